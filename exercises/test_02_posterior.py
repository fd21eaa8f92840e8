"""Marks exercise 2."""
import ex_02_posterior
import numpy as np
import pytest
import torch

from ddpm import Schedule

ABAR = np.append(Schedule(20).alphas_cumprod, 1.0)      # the last for t = -1


def on_a_grid(x0, x_t, t, s):
    """Mean and variance of q(x_t | x_s) q(x_s | x_0) over x_s, summed."""
    x, alpha = np.linspace(-8, 8, 200_001), ABAR[t] / ABAR[s]
    log_p = (-(x_t - np.sqrt(alpha) * x) ** 2 / (2 * (1 - alpha))
             - (x - np.sqrt(ABAR[s]) * x0) ** 2 / (2 * (1 - ABAR[s])))
    p = np.exp(log_p - log_p.max())
    mean = (p * x).sum() / p.sum()
    return mean, (p * (x - mean) ** 2).sum() / p.sum()


def found(mine, x0, x_t, t, s):
    x0, x_t = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1, 1) for v in (x0, x_t))
    return [part.flatten() for part in mine.posterior(
        Schedule(20), x0, x_t, torch.tensor(t), torch.tensor(s))]


def check_neighbours_and_strides(mine):
    cases = [(0.6, -0.4, 1, 0), (-1.0, 0.3, 9, 8), (0.2, 1.5, 18, 17), (0.6, 0.1, 18, 3)]
    mean, variance = found(mine, *zip(*cases))
    wanted = np.array([on_a_grid(*case) for case in cases])
    assert np.allclose(mean, wanted[:, 0], rtol=1e-7)
    assert np.allclose(variance, wanted[:, 1], rtol=1e-7)


def check_the_clean_image(mine):
    mean, variance = found(mine, [0.6, -0.2], [2.0, 1.0], [0, 7], [-1, -1])
    assert np.allclose(mean, [0.6, -0.2]) and np.allclose(variance, 0)


def check_shapes(mine):
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([5, 9])
    mean, variance = mine.posterior(Schedule(20), x, x, t, t - 1)
    assert mean.shape == (2, 3, 4, 4) and variance.shape == (2, 1, 1, 1)


@pytest.mark.parametrize("check", [check_neighbours_and_strides, check_the_clean_image,
                                   check_shapes])
def test_yours(check):
    check(ex_02_posterior)
