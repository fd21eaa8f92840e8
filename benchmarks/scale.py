"""How do the seconds and the memory of every phase grow with images, pixels, arms and seeds?

    python benchmarks/scale.py
    python benchmarks/scale.py --images 1000 10000 100000 --sizes 32 64    # several GB of memory

Every cell is the whole loop in a process of its own, with few training steps: the config sets their
number, so that what grows is all the rest. The images are files of four classes, coarse patches,
since the phantom takes 1 to 10 ms to draw one; without groups, so that children are variations of
their parent. A hundredth is generated, val and test each. Memory is the peak of a phase beyond the
imports (torch among them), what an earlier phase freed but the process kept included; on Linux
alone. Under 10 minutes on two cores.
"""
import contextlib
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine import config as configuration
import loop
from engine.command import Parser, one_line
from engine.run import Run

CONFIG = Path(__file__).resolve().parents[1] / "configs/ham10000_cpu.yaml"
FEW = ["ddpm.steps=60", "classifier.steps=60", "classifier.guide_steps=20", "ddpm.batch=16",
       "classifier.network=small", "classifier.jitter=[0]", "guidance.steps=2", "loop.seeds=1",
       "guidance.strength=0.3", "loop.margin=1",
       "loop.added=0.01", "loop.surplus=1.0", "loop.arms=[real, recolour, guided]", "data.folds=2",
       "data.val_fraction=0.01", "data.test_fraction=0.01", "evaluate.draws=100"]
# a phase lasts from the first stage whose name begins so until the next phase
PHASES = {"": "data, estimate", "ddpm": "diffusion model, guide", "judge": "judge",
          "crossfit": "cross-fitting", "mined": "candidates, filter", "student": "arms",
          "critic": "generator's quality, scores, report"}


class Watched(Run):
    """A run that tells `lap` which phase has ended, when the first stage of the next begins."""

    def __init__(self, folder: Path, config, lap):
        super().__init__(folder, config)
        self.lap, self.phase = lap, ""

    def begin(self, name: str) -> None:
        phase = max((start for start in PHASES if name.startswith(start)), key=len)
        if phase not in ("", self.phase):
            self.lap(PHASES[self.phase])
            self.phase = phase

    def stage(self, name, *args, **settings):
        self.begin(name)
        return super().stage(name, *args, **settings)

    def train(self, name, *args, **settings):
        self.begin(name)
        return super().train(name, *args, **settings)


def peaks() -> tuple[float, float]:
    """MiB resident and of the GPU, the highest since this was last asked."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")           # "start the peak anew"
    resident, gpu = int(status.split("VmHWM:")[1].split()[0]) / 1024, 0.0
    if torch.cuda.is_initialized():
        gpu = torch.cuda.max_memory_allocated() / 2 ** 20
        torch.cuda.reset_peak_memory_stats()
    return resident, gpu


def cell(folder: str, size: int, changes: list[str]) -> dict:
    """The loop on folder/images, in the process it is called in: {phase: (seconds, MiB, MiB)}."""
    rows, (imports, _), begun = {}, peaks(), time.monotonic()

    def lap(name):
        nonlocal begun
        now, (resident, gpu) = time.monotonic(), peaks()
        before = rows.get(name, (0.0, 0.0, 0.0))        # of an earlier round
        rows[name] = (before[0] + now - begun, max(before[1], resident - imports),
                      max(before[2], gpu))
        begun = now
    os.makedirs(f"{folder}/runs/scale")
    os.chdir(folder)
    c = configuration.load(CONFIG, ["data.kind=folder", "data.root=images", "data.malignant=[a]",
                                    f"data.size={size}", *FEW, *changes])
    with contextlib.redirect_stdout(sys.stderr):
        run = Watched(Path("runs", "scale"), c, lap)
        loop.experiment(run)
    lap(PHASES[run.phase])
    seconds, *highest = zip(*rows.values())
    return {**rows, "the whole loop": (sum(seconds), *map(max, highest))}


def measure(count: int, size: int, changes: list[str]) -> dict:
    """Write `count` images of `size` x `size` pixels; the loop on them in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(count):
            path = Path(folder, "images", "abcd"[i % 4], f"{i:06d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            small = rng.integers(60 * (i % 4), 60 * (i % 4) + 8, (8, 8, 3), np.uint8)
            Image.fromarray(small).resize([size] * 2, Image.NEAREST).save(path)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(cell, folder, size, changes).result()


def show(title: str, columns: dict, tenfold: float = 0.0) -> None:
    """A row a phase. tenfold: how many times ten lie between the first column and the last."""
    print(f"\n{title}\n\n| phase | {' | '.join(columns)} |{' ten times as many |' * bool(tenfold)}")
    print("| --- " * (len(columns) + 1 + bool(tenfold)) + "|")
    for name in next(iter(columns.values())):
        rows = [column[name] for column in columns.values()]
        told = [f"{s:.1f} s, {memory:,.0f} MiB" + f", GPU {gpu:,.0f} MiB" * bool(gpu)
                for s, memory, gpu in rows]
        if tenfold:
            ratio = rows[-1][0] / rows[0][0]
            told.append(f"x {ratio ** (1 / tenfold):.1f}")
        print(f"| {name} | {' | '.join(told)} |", flush=True)


def main() -> None:
    parser = Parser("scale.py", __doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    arguments = parser.parse_args()
    images, changes = arguments.images, arguments.set
    for size in arguments.sizes:
        show(f"{size} pixels", {f"{n:,} images": measure(n, size, changes) for n in images},
             math.log10(images[-1] / images[0]))
    n, size = images[0], arguments.sizes[0]
    show(f"{n:,} images of {size} pixels", {f"{words}, seeds: {seeds}": measure(n, size, [
        f"loop.arms=[{arms}]", f"loop.seeds={seeds}", *changes])
        for words, arms in (("3 arms", "real, recolour, guided"),
                            ("5 arms", "real, replay, recolour, random, guided"))
        for seeds in (1, 3)})


if __name__ == "__main__":
    with one_line("scale.py"):
        main()
