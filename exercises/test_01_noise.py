"""Marks exercise 1."""
import ex_01_noise
import numpy as np
import pytest
import torch

from ddpm import Schedule

T = 50
ABAR = np.cos((np.arange(1, T) / T + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(
    0.008 / 1.008 * np.pi / 2) ** 2                             # of t = 0..T-2, by the paper
X0, EPS = torch.randn(2, T - 1, 3, 2, 2, generator=torch.Generator().manual_seed(0),
                      dtype=torch.float64)
LEVELS, A = torch.arange(T - 1), torch.tensor(ABAR).view(-1, 1, 1, 1)
X_T = A.sqrt() * X0 + (1 - A).sqrt() * EPS


def check_forward(mine):
    assert torch.allclose(mine.q_sample(Schedule(T), X0, LEVELS, EPS), X_T, atol=1e-10)


def check_x0(mine):
    assert torch.allclose(mine.predict_x0(Schedule(T), X_T, LEVELS, EPS), X0, atol=1e-9)


def check_eps(mine):
    assert torch.allclose(mine.predict_eps(Schedule(T), X_T, LEVELS, X0), EPS, atol=1e-9)


@pytest.mark.parametrize("check", [check_forward, check_x0, check_eps])
def test_yours(check):
    check(ex_01_noise)
