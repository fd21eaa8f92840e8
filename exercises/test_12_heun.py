"""Marks exercise 12."""
import math

import ex_12_heun
import numpy as np
import pytest
from test_08_dpm_solver import SCHEDULE, X, errors, gaussian

from ddpm import sample_ddim


def check_fourfold_per_halving(mine):
    found = errors(mine.sample_heun)
    assert np.allclose(found[:-1] / found[1:], 4, atol=0.5), found
    assert found[0] < errors(sample_ddim)[0] / 4


def check_two_evaluations_a_step_and_one_in_the_last(mine):
    asked = []

    def model(x, t):
        asked.append(int(t[0]))
        return gaussian(x, t)
    mine.sample_heun(model, SCHEDULE, X, [16_000, 9_000, -1], None, math.inf)
    assert asked == [16_000, 9_000, 9_000]


def check_the_clip(mine):
    found = mine.sample_heun(gaussian, SCHEDULE, 9 * X, [9_000, 5_000, -1], None, 0.25)
    assert found.abs().max() <= 0.25 + 1e-9


@pytest.mark.parametrize("check", [
    check_fourfold_per_halving, check_two_evaluations_a_step_and_one_in_the_last, check_the_clip])
def test_yours(check):
    check(ex_12_heun)
