"""Marks exercise 4."""
import ex_04_schedule
import numpy as np
import pytest
import torch


def check_literal_values(mine):
    found = mine.cosine(1000)
    assert found.shape == (1000,) and found.dtype == torch.float64
    assert np.allclose(found[[0, 250, 500, 750]], [0.99995872, 0.84588799, 0.49228517, 0.14317865],
                       atol=1e-7)


def check_it_ends_in_noise_and_no_beta_is_above(mine):
    for T in (12, 1000):
        abar = mine.cosine(T)
        assert 0 < abar[-1] < 1e-3 and (abar.diff() < 0).all()
        assert np.isclose(1 - abar[-1] / abar[-2], 0.999)


def check_the_levels_of_the_strip(mine):
    abar = mine.cosine(1000)
    still = torch.zeros(3, 2, 2, dtype=torch.float64)
    found = mine.strip(abar, still + 1, still, 4)
    assert found.shape == (4, 3, 2, 2)
    assert torch.allclose(found[:, 0, 0, 0], abar[[0, 333, 666, 999]].sqrt())


def check_the_noise_of_the_strip(mine):
    x0, eps = torch.zeros(3, 40, 40), torch.randn(3, 40, 40)
    found = mine.strip(torch.tensor([0.9, 0.5, 0.1]), x0, eps, 3)
    assert torch.allclose(found, torch.tensor([0.1, 0.5, 0.9]).sqrt().view(3, 1, 1, 1) * eps)


@pytest.mark.parametrize("check", [
    check_literal_values, check_it_ends_in_noise_and_no_beta_is_above,
    check_the_levels_of_the_strip, check_the_noise_of_the_strip])
def test_yours(check):
    check(ex_04_schedule)
