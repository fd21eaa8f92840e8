"""A finished run's students, for whoever wants to show them new images (predict.py does)."""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import classifier
from engine import config as configuration
from engine.run import PLACES, Run, RunError
from engine.training import seeded
from extras import measures, report


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

    def predict(self, names: list[str], images: np.ndarray) -> np.ndarray:
        """Class probabilities by the students of these checkpoints: (students, N, C) float32."""
        run, found, x = self.run, [], self.run.tensor(images)
        k, size = run.config.classifier, run.config.data.size
        for name in names:
            stored = run.load(name, run.device)
            if stored is None:
                raise RunError(f"{run.path(name)} is missing; to make it again remove "
                               f"{run.folder}/results.json, then python loop.py --resume "
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
