"""The whole experiment made as small as it goes, and one run of it that several files read."""
from pathlib import Path

import pytest
import torch

import data
import loop
from engine import config as configuration
from engine.run import Run

torch.set_num_threads(1)    # networks this small lose time to a second thread
TINY = Path(__file__).parents[1] / "configs/tiny.yaml"
SMALL = f"""extends: {TINY}
data: {{train: 160, val: 60, test: 100}}
unet: {{width: 16}}
ddpm: {{steps: 30, batch: 8}}
classifier: {{steps: 20, guide_steps: 10, batch: 16}}
guidance: {{steps: 3, classifier_free: 1}}
evaluate: {{draws: 100, oracle: 100}}
loop: {{surplus: 4, margin: 0.9, rounds: 1}}
"""     # of nearly all images as parents, the judge is right about some


def go(where: Path, arguments, status=0):
    """loop.py with these arguments in the folder `where`; returns the run's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        assert loop.main([str(a) for a in arguments]) == status
    return where / "runs/tiny"


def new(where: Path, *overrides, status=0):
    """A new small run in the folder `where`; overrides: section.key=value."""
    (where / "tiny.yaml").write_text(SMALL)
    return go(where, ["--config", "tiny.yaml", *(x for o in overrides for x in ("--set", o))],
              status)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """An unbroken small run of five arms."""
    return new(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL)
    return configuration.load(path)


@pytest.fixture(scope="module")
def splits(config):
    return data.load(config.data)


@pytest.fixture
def train(splits):
    return splits["train"]


@pytest.fixture
def run(config, tmp_path):
    return Run(tmp_path, config)


def set_to(run, section, **values):
    """The same run with other settings."""
    return Run(run.folder, run.config.replace(section, **values))
