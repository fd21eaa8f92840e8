"""Do the intervals hold what they promise? Simulated studies of a known truth, scored by evaluate.

    python benchmarks/coverage.py [--studies 2000]

A study: arms whose students differ from each other, R seeds, test lesions. An image's score is the
sum of the arm's error on this lesion, the student's on this lesion, and how well the training as a
whole came out. Errors are `shared` where an arm's students err on the same lesions, `separate`
where each errs on its own. Prints, for every kind of study: how often the interval of a difference
holds the truth, the same among the narrower half of the intervals, how often it is clear of 0
though nothing differs, and how often an arm and six controls that equal it come out as "better"
than all or "worse" than any. Three minutes on one core.
"""
import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate

LESIONS, DRAWS = 60, 200
KINDS = list(itertools.product((3, 5), ("shared", "half", "separate"), (0, 1, 2, 4)))


def study(rng: np.random.Generator, weights: np.ndarray, arms: int, seeds: int, errors: str,
          trainings: float) -> list[np.ndarray]:
    """A table (R, 1 + D) of every arm; the true value of all is 0. trainings: the variance of a
    whole training in units of the variance of one arm's mean over the lesions."""
    own = {"shared": 0.0, "half": 0.5, "separate": 1.0}[errors]
    lesions = len(weights)
    tables = []
    for _ in range(arms):
        by_lesion = rng.normal(size=lesions) * (1 - own) ** 0.5
        by_student = rng.normal(size=(seeds, lesions)) * own ** 0.5
        whole = rng.normal(size=(seeds, 1)) * (trainings / lesions) ** 0.5
        tables.append((by_lesion + by_student + whole) @ weights / lesions)
    return tables


def simulated(studies: int, arms: int, seeds: int, errors: str, trainings: float, seed: int = 0):
    """Intervals [low, high] (studies, arms - 1, 2) of the first arm less each other one, for one
    comparison alone and for all at once."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(studies):
        if i % 50 == 0:     # the bootstrap's own draws matter little: not anew for every study
            weights = evaluate.lesion_weights(np.arange(LESIONS), DRAWS, rng)
        first, *others = study(rng, weights, arms, seeds, errors, trainings)
        noise = evaluate.seed_noise(np.stack([t[:, 0] for t in (first, *others)]))
        found.append([[[row["low"], row["high"]] for row in (
            evaluate.interval(first - other, noise, at_once, (-9, 9)) for at_once in (1, arms - 1))]
            for other in others])
    found = np.array(found)
    return found[:, :, 0], found[:, :, 1]


def measured(studies: int, seeds: int, errors: str, trainings: float, seed: int = 0) -> dict:
    """The five shares that the table shows."""
    alone, _ = simulated(studies, 5, seeds, errors, trainings, seed)
    low, high = alone[:, 0].T
    holds, narrow = (low <= 0) & (high >= 0), high - low <= np.median(high - low)
    _, at_once = simulated(studies, 7, seeds, errors, trainings, seed + 1)
    low, high = at_once[..., 0], at_once[..., 1]
    return {"holds the truth": holds.mean(), "the narrower half": holds[narrow].mean(),
            "clear of 0": 1 - holds.mean(), "better than all 6": (low > 0).all(1).mean(),
            "worse than any of 6": (high < 0).any(1).mean()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000)
    studies = parser.parse_args().studies
    for i, (seeds, errors, trainings) in enumerate(KINDS):
        found = measured(studies, seeds, errors, trainings)
        if i == 0:
            print("| seeds | errors | trainings | " + " | ".join(found) + " |")
            print("|---" * (3 + len(found)) + "|")
        print(f"| {seeds} | {errors} | {trainings} | "
              + " | ".join(f"{100 * v:.1f} %" for v in found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
