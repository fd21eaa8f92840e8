"""Does a data set larger than memory train? The loop on many images, and its peak of memory.

    python benchmarks/memory.py [--count 100000] [--size 64]

Writes that many small files of four classes to a temporary folder, runs every stage of the loop on
them with few steps, and prints the peak of resident memory beyond that of the imports (torch among
them). Under 10 minutes on one core.
"""
import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import config as configuration
import loop
from runfolder import RunFolder

FEW = ["ddpm.steps=60", "classifier.steps=60", "classifier.guide_steps=20", "ddpm.batch=16",
       "classifier.network=small", "classifier.jitter=[0]", "guidance.steps=2", "loop.seeds=1",
       "guidance.strength=0.3", "loop.margin=1",
       "loop.added=0.01", "loop.surplus=1.0", "loop.arms=[real, recolour, guided]", "data.folds=2",
       "data.val_fraction=0.01", "data.test_fraction=0.01", "evaluate.draws=100"]


def peak() -> float:
    """GiB; the unit of ru_maxrss is 1 KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        rng, root = np.random.default_rng(0), Path(folder, "images")
        for i in range(arguments.count):
            path = root / "abcd"[i % 4] / f"{i:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = rng.integers(60 * (i % 4), 60 * (i % 4) + 70, (8, 8, 3), np.uint8)
            Image.fromarray(small).resize([arguments.size] * 2, Image.NEAREST).save(path)
        c = configuration.load(Path(__file__).parents[1] / "configs/ham10000_cpu.yaml", [
            "data.kind=folder", f"data.root={root}", "data.malignant=[a]",
            f"data.size={arguments.size}", *FEW])
        run = Path(folder, "runs", "memory")
        run.mkdir(parents=True)
        os.chdir(folder)
        begun = time.monotonic()
        experiment = loop.Experiment(c, RunFolder(run))
        for stage in ("prepare", "estimate", "train_generator", "choose_jitter", "train_judge"):
            getattr(experiment, stage)()
            print(f"{stage}: peak {peak() - before:.2f} GiB beyond the imports' {before:.2f}, "
                  f"{time.monotonic() - begun:.0f} s", flush=True)
        experiment.go()
        print(f"{arguments.count} images of {arguments.size} pixels "
              f"({arguments.count * 3 * arguments.size ** 2 / 2 ** 30:.2f} GiB): peak "
              f"{peak() - before:.2f} GiB beyond the imports' {before:.2f}, "
              f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
