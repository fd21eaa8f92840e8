"""Marks exercise 3."""
import math

import ex_03_ddim
import pytest
import torch

from ddpm import Schedule, even_times

SCHEDULE = Schedule(1000)
X = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian(x_t, t):
    """The best eps where every pixel is drawn from N(0, 0.5^2)."""
    a = SCHEDULE.abar(t, x_t)
    return (1 - a).sqrt() * x_t / (a / 4 + 1 - a)


def check_a_step_is_eq_12(mine):
    eps, levels = X.flip(0) / 3, [(900, 400), (20, -1), (100, 700), (3, 2)]
    t, t_next = torch.tensor(levels).T
    a, b = (torch.tensor([*SCHEDULE.alphas_cumprod, 1.0]).double()[i].view(-1, 1, 1, 1)
            for i in (t, t_next))               # the last, at -1, is the clean image
    wanted = b.sqrt() * (X - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    assert torch.allclose(mine.ddim_step(SCHEDULE, X, t, t_next, eps), wanted, atol=1e-9)


def check_the_latent_is_the_exact_one(mine):
    """On Gaussian data the ODE only stretches: x keeps its place in spreads of each level."""
    found = mine.invert_ddim(gaussian, SCHEDULE, X / 2, even_times(500, 899))
    a = SCHEDULE.alphas_cumprod[899]
    assert torch.allclose(found, X * math.sqrt(a / 4 + 1 - a), rtol=0.02, atol=0.01)


def check_up_and_down(mine):
    def apart(steps):
        times = even_times(steps, 899)
        x = mine.invert_ddim(gaussian, SCHEDULE, X / 2, times)
        for t, t_next in zip(times, times[1:]):
            t, t_next = torch.full((4,), t), torch.full((4,), t_next)
            x = mine.ddim_step(SCHEDULE, x, t, t_next, gaussian(x, t))
        return (x - X / 2).abs().mean().item()
    assert apart(160) < apart(20) / 5 and apart(160) < 0.01


@pytest.mark.parametrize("check", [check_a_step_is_eq_12, check_the_latent_is_the_exact_one,
                                   check_up_and_down])
def test_yours(check):
    check(ex_03_ddim)
