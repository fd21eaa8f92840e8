"""The benchmarks that need no long training still run: at their smallest size."""
import sys
from pathlib import Path

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


def test_fuzz(monkeypatch):
    import fuzz
    monkeypatch.setattr(fuzz.loop.Experiment, "go", None)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--cases", "30"])
    assert fuzz.main() == 0
