"""Marks exercise 5."""
import ex_05_x0_prediction
import pytest
import torch
from mixture import Mixture, draw

from ddpm import SAMPLERS, Schedule, eps_model, even_times
from engine.training import Noise

SCHEDULE = Schedule(200)


def exact_x0(x_t, t, y, g):
    """E[x0 | x_t] of the eight spots: a network that predicts x_0 perfectly."""
    return SCHEDULE.predict_x0(x_t, t, Mixture(SCHEDULE)(x_t, t, y, g))


def check_one_call(mine):
    x_t, y, g = draw(30, torch.Generator().manual_seed(0))
    t = torch.arange(30) * 6
    found = mine.x0_as_eps_model(exact_x0, SCHEDULE, y, g)(x_t, t)
    assert torch.allclose(found, Mixture(SCHEDULE)(x_t, t, y, g), atol=1e-3)


def check_every_sampler(mine):
    _, y, g = draw(20, torch.Generator().manual_seed(0))
    for name, sample in SAMPLERS.items():
        made = []
        for model in (mine.x0_as_eps_model(exact_x0, SCHEDULE, y, g),
                      eps_model(Mixture(SCHEDULE), SCHEDULE, y, g, prediction="eps")):
            noise = Noise(range(20))
            made.append(sample(model, SCHEDULE, noise(2, 1, 1), even_times(20, 199), noise, 1.5))
        assert torch.allclose(*made, atol=1e-3), name


def check_the_loss(mine):
    x0, x0_hat, eps = torch.randn(3, 50, 3, 4, 4, dtype=torch.float64)
    t = torch.arange(50) * 3
    x_t = SCHEDULE.q_sample(x0, t, eps)
    wanted = (SCHEDULE.predict_eps(x_t, t, x0_hat) - eps).square().mean()
    assert torch.allclose(mine.loss_in_eps(SCHEDULE, t, x0, x0_hat), wanted)


@pytest.mark.parametrize("check", [check_one_call, check_every_sampler, check_the_loss])
def test_yours(check):
    check(ex_05_x0_prediction)
