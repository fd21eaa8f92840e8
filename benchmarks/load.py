"""Large inputs: how long, and how much memory at the peak?

    python benchmarks/load.py [--images 100000] [--rows 10000]

A folder of small images, decoded, cached, split and read again from the cache; the nearest
training image of a thousand among all of them; synthetic images written with their ledger, a file
and a row each. Each part is a process of its own. Needs 600 MB of disk in the temporary folder for
its time.
"""
import os
import resource
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from engine import config as configuration
from engine.command import Parser, one_line
from engine.run import Progress, Run
from extras import measures, outcome
from loop import Candidates

HERE, SIZE = Path(__file__).resolve().parents[1], 32


def write_images(count: int) -> None:
    rng = np.random.default_rng(0)
    for name in ("mel", "nv"):
        os.makedirs(f"root/{name}", exist_ok=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"root/{'mel' if i % 5 == 0 else 'nv'}/{i:06d}.jpg")


def load(count: int) -> dict:
    c = configuration.load(HERE / "config.yaml", [
        "data.kind=folder", "data.root=root", f"data.size={SIZE}", "data.malignant=[mel]"])
    return data.load(c.data, cache="cache", progress=Progress("data"))


def nearest(count: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)
    measures.nearest(images[:1000], images)


def ledger(count: int) -> None:
    """`count` images of 8 pixels by outcome.write_synthetic."""
    few, names = np.arange(count) % 1000, np.array([f"image-{i}" for i in range(1000)])
    images = np.zeros((count, 3, 8, 8), np.uint8)
    train = data.ImageSet(images, few % 2, np.full(count, -1), names[few], few % 3, names[few],
                          ("mel", "nv"), (), (True, False))
    made = Candidates(train, few, train.groups, judge=np.ones(count), distance=np.ones(count),
                      rejected_by=np.zeros(count, int), nonfinite_gradients=0)
    Path("ledger").mkdir()
    run = Run(Path("ledger"), configuration.load(HERE / "config.yaml"))
    outcome.write_synthetic(run, train, [made], [np.arange(count)])
    with open("ledger/synthetic/synthetic.csv") as file:
        assert sum(1 for _ in file) == count + 1


def measured(part, count: int, answer) -> None:
    begun = time.monotonic()
    part(count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024       # KiB on Linux
    answer.put((time.monotonic() - begun, peak))


@one_line("load.py")
def main() -> None:
    parser = Parser("load.py", __doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_images(arguments.images)
        for what, part, count in (
                ("nothing but the imports", len, []), ("decode and split", load, arguments.images),
                ("again, from the cache", load, arguments.images),
                ("nearest of 1,000 images", nearest, arguments.images),
                ("images and ledger", ledger, arguments.rows)):
            answer = get_context("spawn").Queue()
            process = get_context("spawn").Process(target=measured, args=(part, count, answer))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"{what}: failed")
            seconds, peak = answer.get()
            print(f"{what}: {count or 0:,} in {seconds:.1f} s, at the peak {peak:,.0f} MiB",
                  flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
