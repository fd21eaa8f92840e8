"""What do several processes at one run gain? Seconds from start to report, and by kind of stage.

    python benchmarks/scaling.py                                # 1 and 2 processes, 4 minutes
    python benchmarks/scaling.py --config config.yaml           # the default run, 30 minutes
    python benchmarks/scaling.py --config config.yaml --processes 1 2 4 8       # where there are 8
    python benchmarks/scaling.py --plan runs/config --processes 1 2 8 80    # reckoned, from a run

Each number of processes is a run of its own by torchrun, in runs/scaling_N; on a CPU with as many
threads each as there are cores for one. What is spread is the same to the byte if the diffusion
model is: the last column says in how many of the test predictions of arm `real`, which needs none,
the run differs from the first; 0 wherever the threads are as many.

--plan measures nothing: from the seconds of every stage of a run that one process finished, how
long it would be one by many, and 100 draws of it, if processes cost each other nothing: students
and batches of images are shared out, the diffusion model is divided, all else waits.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
from engine import config as configuration
from engine.command import Parser, one_line
from engine.run import RunError

# stages that are shared out among each other: one that begins so waits for all that stood before
SHARED = "jitter", "teacher", "crossfit", "student", "round", "random", "guided", "noise"
KINDS = {"ddpm": "diffusion model", "guide": "guide", "random": "synthesis", "guided": "synthesis",
         "noise": "synthesis"}


def stages(run: Path) -> Iterator[tuple[list[str], float]]:
    """The words of each finished stage's name and its seconds, from a run's log."""
    for line in (run / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "stage":
            yield event["stage"].split("_"), event["seconds"]


def timed(arguments, processes: int, threads: int) -> tuple[float, Counter, np.ndarray]:
    """Seconds of a whole run, its seconds by kind of stage (of all processes), and what the
    students of `real` say of test."""
    name = f"scaling_{processes}"
    shutil.rmtree(Path("runs") / name, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
               str(HERE / "loop.py"), "--config", arguments.config, "--name", name,
               *(word for one in arguments.set for word in ("--set", one))]
    begun = time.monotonic()
    status = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode
    if status:
        raise RunError(f"{processes} processes: the run ended with status {status}")
    seconds, spent = time.monotonic() - begun, Counter()
    for (kind, *_), took in stages(Path("runs") / name):
        spent[KINDS.get(kind, "students")] += took
    return seconds, spent, np.load(Path("runs") / name / "predictions.npz")["test_probs_real"]


def planned(run: Path, processes: list[int], draws: int = 100) -> list[str]:
    """A table of a finished run: hours of one and of many draws, by so many processes."""
    seconds = {}
    for (kind, *rest), took in stages(run):     # jitter_0.3, crossfit_1_0, guided_1_128
        group = (kind, *rest[:-1]) if kind not in ("jitter", "student") else (kind,)
        seconds.setdefault(group, []).append(took)

    def hours(n):
        return sum(sum(of) / n if kind == "ddpm" else sum(of) / len(of) * -(-len(of) // n)
                   if kind in SHARED else sum(of) for (kind, *_), of in seconds.items()) / 3600
    lines = [f"| processes | minutes of one draw | efficiency | hours of {draws} draws, one each | "
             "efficiency |", "| --- " * 5 + "|"]
    batch = configuration.load(run / "config.yaml").ddpm.batch
    for n in processes:
        rounds = -(-draws // n)             # of draws that begin together
        one = (f"{60 * hours(n):.1f} | {hours(1) / n / hours(n):.0%}" if n <= batch else
               f"no more than {batch} processes share a batch | ")
        lines.append(f"| {n} | {one} | {rounds * hours(1):.1f} | {draws / n / rounds:.0%} |")
    return lines


def main() -> None:
    parser = Parser("scaling.py", __doc__)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--plan", type=Path, metavar="runs/NAME")
    parser.add_argument("--threads", type=int, default=0, help="of each process; 0: cores for one")
    arguments = parser.parse_args()
    with one_line("scaling.py"):
        if arguments.plan:
            print("\n".join(planned(arguments.plan, arguments.processes)))
            return
        cores, first, rows = len(os.sched_getaffinity(0)), None, []
        for n in arguments.processes:
            threads = arguments.threads or max(1, cores // n)
            seconds, spent, real = timed(arguments, n, threads)
            first = first or (seconds, real)
            kinds = ", ".join(f"{kind} {found:.0f}" for kind, found in spent.most_common())
            rows.append(f"| {n} | {threads} | {seconds:.0f} | {first[0] / seconds:.2f} | {kinds} | "
                        f"{(real != first[1]).mean():.0%} |")
        print("\n".join(["| processes | threads each | seconds | gain | seconds by stage, of all "
                         "processes | differs in |", "| --- " * 6 + "|", *rows]))


if __name__ == "__main__":
    main()
