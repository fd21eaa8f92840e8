"""A finished run's networks: its students on new images, its diffusion model and guide."""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import classifier
import data
import ddpm
from engine import config as configuration
from engine.run import PLACES, Run, RunError
from engine.training import seeded
from extras import measures, networks, report
from guidance import Generator


class Finished:
    """A finished run: what it predicted, and its students on new images. Nothing of its folder is
    changed. Raises RunError, or ValueError, where it is no run, not finished or damaged."""

    def __init__(self, folder: Path):
        for name in ("config.yaml", "results.json", "predictions.npz"):
            if not (folder / name).is_file():
                raise RunError(f"{folder}: no finished run, it has no {name}")
        self.results, self.predictions = report.stored(folder)
        config = configuration.load(folder / "config.yaml")
        try:
            measures.check_predictions(self.predictions)
            for section, keys in measures.rounded(config.as_dict()).items():
                for name, value in keys.items():
                    learnt = self.results["config"][section][name]
                    if learnt != value and f"{section}.{name}" not in PLACES:
                        raise RunError(f"{folder}/config.yaml was changed after the run: {section}."
                                       f"{name} was {learnt}, is {value}; change it back")
            self.run = Run(folder, config, self.results["fingerprint"], reading=True)
            self.bf16 = self.results["environment"]["precision"] == "bf16"
        except (LookupError, TypeError, AttributeError) as error:
            raise RunError(f"{folder}: results.json or predictions.npz is damaged "
                           f"({type(error).__name__}: {error}); run it again") from None
        self.class_names = self.predictions["class_names"].tolist()
        self.arms = self.predictions["arms"].tolist()

    def load(self, name: str, network):
        """The network with the weights of the run's checkpoint `name`, in eval mode."""
        stored = self.run.load(name, self.run.device)
        if stored is None:
            raise RunError(f"{self.run.path(name)} is missing; to make it again remove "
                           f"{self.run.folder}/results.json, then python loop.py --resume "
                           f"{self.run.folder}")
        network.load_state_dict(stored["network"])
        return network.eval()

    def resnet(self, name: str, noise_levels: int = 0) -> classifier.ResNet:
        """A student or, with noise_levels, the guide."""
        k = self.run.config.classifier
        # seeded: the memory layout of the training, so the same digits
        return self.load(name, seeded(0, classifier.build, k.network, self.run.config.data.size,
                                      len(self.class_names), noise_levels,
                                      bool(k.weights)).to(self.run.device))

    def predict(self, names: list[str], images: np.ndarray) -> np.ndarray:
        """Class probabilities by the students of these checkpoints: (students, N, C) float32."""
        x = self.run.tensor(images)
        return np.stack([classifier.predict(self.resnet(name), x, self.bf16) for name in names])

    def splits(self) -> dict:
        """The images that the run learnt from and was scored on."""
        return data.load(self.run.config.data, self.run.cache)

    def generator(self, train) -> Generator:
        """The diffusion model and the guide; train: of `splits`."""
        c = self.run.config.ddpm
        if c.classifier_weight or c.joint_head:
            raise RunError(f"{self.run.folder}: its guide learnt with the diffusion model; wanted "
                           "a run with ddpm.classifier_weight 0 and ddpm.joint_head false")
        schedule = ddpm.Schedule(c.T, c.schedule, self.run.device)
        unet = self.load("ddpm", networks.new_unet(self.run, train, 0))
        return Generator(unet, self.resnet("guide", c.T), schedule, c.prediction, self.bf16)

    def students(self, arm: str) -> list[str]:
        """The names of an arm's checkpoints, one a seed."""
        return [f"student_{arm}_{seed}" for seed in self.predictions["seeds"]]


def parser(about: str, out: str) -> argparse.ArgumentParser:
    """What every example on a finished run is told; `about`: its docstring."""
    found = argparse.ArgumentParser(description=about.splitlines()[0])
    found.add_argument("run", type=Path, help="a finished run, runs/NAME")
    found.add_argument("--out", type=Path, default=Path(out), help="the picture to write")
    return found


def index(names, name: str, what: str) -> int:
    """Where `name` stands in `names`; ValueError says which there are."""
    if name not in names:
        raise ValueError(f"--{what} {name}: write one of {', '.join(names)}")
    return list(names).index(name)
