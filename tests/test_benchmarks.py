"""The benchmarks that need no long training still run: at their smallest size."""
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_load(monkeypatch):
    import load
    load.write_images(60)
    for _ in range(2):                              # decoded, then from the cache
        assert sum(map(len, load.load(60).values())) == 60
    load.nearest(60)
    monkeypatch.setattr(load.loop, "save_picture", None)        # put back afterwards
    monkeypatch.setattr(load.loop.pictures, "one", None)
    load.ledger(60)


def test_many_draws():
    import many_draws
    # by hand: mean 2.5, standard deviation sqrt(5/3), t of 3 degrees of freedom 3.182
    assert many_draws.over_draws([1.0, 2.0, 3.0, 4.0], 0.0) == pytest.approx((2.5, 0.446, 4.554),
                                                                            abs=1e-3)
    mean, low, high = many_draws.over_draws([1.0, 2.0, 3.0, 4.0], 0.75)     # four times 1 / n
    assert (mean, high - low) == pytest.approx((2.5, 2 * 4.108), abs=1e-3)
    # 95 % of the intervals of six normal draws hold the truth
    draws = np.random.default_rng(0).normal(size=(4000, 6))
    held = [low <= 0 <= high for _, low, high in (many_draws.over_draws(d, 0.0) for d in draws)]
    assert 0.94 < np.mean(held) < 0.96


def test_fuzz(monkeypatch):
    import fuzz
    monkeypatch.setattr(fuzz.loop.Experiment, "go", None)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--cases", "30"])
    assert fuzz.main() == 0
