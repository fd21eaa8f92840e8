"""Marks exercise 8."""
import math

import ex_08_dpm_solver
import numpy as np
import pytest
import torch

from ddpm import Schedule, sample_ddim

T = 20_000
SCHEDULE = Schedule(T)
X = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian(x_t, t):
    """The best eps where every pixel is drawn from N(0, 0.5^2)."""
    a = SCHEDULE.abar(t, x_t)
    return (1 - a).sqrt() * x_t / (a / 4 + 1 - a)


def spread(level):
    a = SCHEDULE.alphas_cumprod[level]
    return (a / 4 + 1 - a).sqrt()


def errors(sample):
    """Off the exact path at level 2,000 after 20, 40, 80 steps: the ODE only stretches there."""
    exact = X / spread(16_000) * spread(2_000)
    return np.array([(sample(gaussian, SCHEDULE, X, [round(t) for t in np.linspace(
        16_000, 2_000, n + 1)], None, math.inf) - exact).abs().max().item() for n in (20, 40, 80)])


def check_fourfold_per_halving(mine):
    found = errors(mine.sample_dpm)
    assert np.allclose(found[:-1] / found[1:], 4, atol=0.5), found
    assert found[0] < errors(sample_ddim)[0] / 4


def check_the_first_step_is_ddims(mine):
    for times in ([16_000, 9_000], [16_000, -1]):
        assert torch.allclose(mine.sample_dpm(gaussian, SCHEDULE, X, times, None, math.inf),
                              sample_ddim(gaussian, SCHEDULE, X, times, None, math.inf))


def check_the_clip(mine):
    found = mine.sample_dpm(gaussian, SCHEDULE, 9 * X, [9_000, 5_000, -1], None, 0.25)
    assert found.abs().max() <= 0.25


@pytest.mark.parametrize("check", [check_fourfold_per_halving, check_the_first_step_is_ddims,
                                   check_the_clip])
def test_yours(check):
    check(ex_08_dpm_solver)
