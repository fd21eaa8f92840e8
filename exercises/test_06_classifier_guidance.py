"""Marks exercise 6."""
import ex_06_classifier_guidance
import pytest
import torch
from mixture import Mixture, draw

from ddpm import Schedule, eps_model, even_times, sample_ddim
from engine.training import Noise

SCHEDULE = Schedule(200)
UNTOLD = torch.full((200,), -1)
MODEL = eps_model(Mixture(SCHEDULE), SCHEDULE, UNTOLD, UNTOLD, prediction="eps")


def class_2(x_t, t, x0_hat):
    return Mixture(SCHEDULE).log_class(x_t, t)[:, 2]


def check_the_gradient_by_finite_differences(mine):
    def objective(x_t, t, x0_hat):
        return (x_t ** 3).sum((1, 2, 3)) + (x0_hat ** 2).sum((1, 2, 3)) * (1 + t)
    x_t, eps = torch.randn(2, 5, 2, 1, 1, generator=torch.Generator().manual_seed(1),
                           dtype=torch.float64) / 4
    t, wanted = torch.tensor([3, 20, 50, 80, 100]), torch.zeros_like(x_t)
    for i in range(2):
        step = torch.zeros_like(x_t)
        step[:, i] = 1e-6
        up, down = (objective(x, t, SCHEDULE.predict_x0(x, t, eps).clamp(-1, 1))
                    for x in (x_t + step, x_t - step))
        wanted[:, i, 0, 0] = (up - down) / 2e-6
    assert torch.allclose(mine.gradient(objective, SCHEDULE, x_t, t, eps), wanted, rtol=1e-5)


def check_off_is_off(mine):
    assert mine.guided_eps(MODEL, SCHEDULE, []) is MODEL


def check_the_push(mine):
    """eps moves by scale * sqrt(abar (1 - abar)) in root mean square, whatever the level."""
    x_t, t = torch.randn(200, 2, 1, 1), torch.arange(200) // 2 + 20
    push = MODEL(x_t, t) - mine.guided_eps(MODEL, SCHEDULE, [(0.7, class_2)])(x_t, t)
    abar = SCHEDULE.abar(t, x_t).flatten()
    assert torch.allclose(push.square().mean((1, 2, 3)).sqrt(), 0.7 * (abar * (1 - abar)).sqrt(),
                          atol=1e-4)


def check_an_independent_judge(mine):
    """The judge is the ten nearest of 2,000 points with a class: nothing of the guide is in it."""
    known, labels, _ = draw(2000, torch.Generator().manual_seed(5))

    def agree(model):
        x = sample_ddim(model, SCHEDULE, Noise(range(200))(2, 1, 1), even_times(25, 199))
        near = torch.cdist(x.flatten(1), known.flatten(1)).topk(10, largest=False).indices
        return (labels[near].mode(1).values == 2).float().mean().item()
    assert agree(MODEL) < 0.5
    assert agree(mine.guided_eps(MODEL, SCHEDULE, [(1.0, class_2)])) >= 0.8


@pytest.mark.parametrize("check", [
    check_the_gradient_by_finite_differences, check_off_is_off, check_the_push,
    check_an_independent_judge])
def test_yours(check):
    check(ex_06_classifier_guidance)
