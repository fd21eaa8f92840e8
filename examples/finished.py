"""A finished run's students, for whoever wants to show them new images (predict.py does)."""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import classifier
from engine import config as configuration
from engine.run import Run, RunError
from engine.training import seeded
from extras import report


class Finished:
    """A finished run: what it predicted, and its students on new images. Raises RunError."""

    def __init__(self, folder: Path):
        for name in ("config.yaml", "results.json", "predictions.npz"):
            if not (folder / name).is_file():
                raise RunError(f"{folder}: no finished run, it has no {name}")
        self.results, self.predictions = report.stored(folder)
        config = configuration.load(folder / "config.yaml")
        self.run = Run(folder, config, self.results["fingerprint"])
        self.class_names = self.predictions["class_names"].tolist()
        self.arms = self.predictions["arms"].tolist()
        self.bf16 = self.results["environment"]["precision"] == "bf16"

    def predict(self, names: list[str], images: np.ndarray) -> np.ndarray:
        """Class probabilities by the students of these checkpoints: (students, N, C) float32."""
        run, found, x = self.run, [], self.run.tensor(images)
        k, size = run.config.classifier, run.config.data.size
        for name in names:
            stored = run.load(name, run.device)
            if stored is None:
                raise RunError(f"{run.path(name)} is missing: go on with python loop.py --resume "
                               f"{run.folder}")
            # seeded: the memory layout of the training, so the same digits
            student = seeded(0, classifier.build, k.network, size, len(self.class_names),
                             published=bool(k.weights)).to(run.device)
            student.load_state_dict(stored["network"])
            found.append(classifier.predict(student, x, self.bf16))
        return np.stack(found)

    def students(self, arm: str) -> list[str]:
        """The names of an arm's checkpoints, one a seed."""
        return [f"student_{arm}_{seed}" for seed in self.predictions["seeds"]]
