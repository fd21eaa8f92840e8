"""kill -9 at random moments, resume, and compare: is any byte of the outcome another?

    python benchmarks/interrupt.py [--config configs/tiny.yaml] [--kills 30] [--seed 0]

An unbroken run is made first. Then one run is killed again and again, each time after a random
share of what an attempt to finish it takes, until it has been killed `kills` times; it is finished
and compared. Half of the kills fall on the moment at which some file is being written, between its
temporary name and its own. About 10 minutes on two cores.
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
from engine.command import Parser, one_line


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(HERE / "loop.py"), *arguments],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(arguments: list[str]) -> float:
    """Run to the end; the seconds it took."""
    begun = time.monotonic()
    if start(arguments).wait():
        sys.exit(f"loop.py {' '.join(arguments)} failed")
    return time.monotonic() - begun


def outcome(folder: Path) -> dict[str, bytes]:
    """The files that may not depend on how often a run was stopped."""
    names = [folder / name for name in ("config.yaml", "predictions.npz", "results.json")]
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in (*names, *folder.glob("synthetic/**/*.*"), *folder.glob("pictures/*.png"))}


def newest(folder: Path) -> str:
    """The file written last: where the run was."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("log.jsonl", "lock")]
    return str(max(files, key=lambda p: p.stat().st_mtime).relative_to(folder)) if files else "-"


@one_line("interrupt.py")
def main() -> int:
    parser = Parser("interrupt.py", __doc__)
    parser.add_argument("--config", default=str(HERE / "configs/tiny.yaml"))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not Path(arguments.config).is_file():
        parser.error(f"--config: no file {arguments.config}")
    config, rng = str(Path(arguments.config).resolve()), random.Random(arguments.seed)
    name = Path(config).stem
    os.chdir(tempfile.mkdtemp())
    whole = Path("whole/runs", name)
    os.makedirs("whole")
    os.chdir("whole")
    seconds = finish(["--config", config])
    os.chdir("..")
    print(f"unbroken: {seconds:.0f} s", flush=True)

    folder, kills, rounds = Path("runs", name), 0, 0
    while kills < arguments.kills:
        begun = folder / "config.yaml"      # beside a lock: that is made first
        if not begun.exists():
            shutil.rmtree(folder, ignore_errors=True)   # killed before there was anything to resume
            rounds += 1
        process = start(["--resume", str(folder)] if begun.exists() else ["--config", config])
        # Far enough to finish a stage now and then: a training is saved every 30 seconds only.
        limit = time.monotonic() + rng.uniform(0, 0.8 * seconds)
        writing, left = rng.random() < 0.5, set(folder.rglob("*.tmp"))
        while process.poll() is None and (time.monotonic() < limit or writing):
            if time.monotonic() >= limit and set(folder.rglob("*.tmp")) - left:
                break
            time.sleep(0.0005 if time.monotonic() >= limit else 0.05)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills += 1
            half = ", ".join(p.name for p in folder.rglob("*.tmp"))
            print(f"kill {kills}: after {newest(folder)}{', amid ' + half if half else ''}",
                  flush=True)
        elif process.returncode == 0:                # done before the kill: compare, begin anew
            compare(whole, folder)
            os.rename(folder, f"finished-{rounds}")
        else:
            sys.exit(f"an attempt ended with status {process.returncode}")
    finish(["--resume", str(folder)] if begun.exists() else ["--config", config])
    compare(whole, folder)
    print(f"{kills} kills in {rounds} runs, every outcome byte for byte the unbroken one's")
    return 0


def compare(whole: Path, folder: Path) -> None:
    a, b = outcome(whole), outcome(folder)
    other = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    if other:
        sys.exit(f"not the same after the kills: {', '.join(sorted(other))}")
    print(f"finished: {len(a)} files, all the same", flush=True)


if __name__ == "__main__":
    sys.exit(main())
