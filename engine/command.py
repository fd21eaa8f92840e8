"""The command line, and one clear line with exit status 2 for whatever goes wrong."""
import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml

from datasets.layouts import DataError
from engine import config as configuration
from engine import spread
from engine.config import Config, ConfigError, require
from engine.run import Run, RunError, commit, locked, new_folder, write_bytes

MEMORY = MemoryError, torch.OutOfMemoryError, torch.AcceleratorError
OUTSIDE = (KeyboardInterrupt, OSError, *MEMORY)      # a resumed run may go better
TROUBLE = (ConfigError, DataError, RunError, FloatingPointError, *OUTSIDE)


class Parser(argparse.ArgumentParser):
    """A command's arguments. --help is its docstring, examples and all; wrong ones are one line."""

    def __init__(self, program: str, about: str):
        super().__init__(prog=program, description=about, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--version", action="version", version=f"commit {commit()}")

    def error(self, message: str):
        sys.exit(last_words(self.prog, ValueError(f"{message}; see {self.prog} --help")))


@contextlib.contextmanager
def one_line(program: str) -> Iterator[None]:
    """What is wrong with config, data, disk or numbers ends the program in one line, status 2;
    Ctrl-C with status 130."""
    try:
        open_streams()
        yield
    except (ValueError, *TROUBLE) as error:
        sys.exit(last_words(program, error))


def open_streams() -> None:
    """Have stdout and stderr write any text, a line at once. RunError where stdout is closed."""
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if sys.stdout is None:
        raise RunError("standard output is closed: send it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # not where a notebook listens
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def last_words(program: str, error: BaseException, more: str = "") -> int:
    """Say in one line why it ends, and return the exit status. What can no longer be written is let
    go, or Python would complain of it."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        text = "stopped"
    elif isinstance(error, OSError):    # the disk is full, a folder is gone or may not be written
        text = f"{error.filename or 'output'}: {error.strerror or error}"
    elif isinstance(error, MEMORY):
        text = (text.strip() or "out of memory").split("\n")[0]
        if not isinstance(error, torch.AcceleratorError):
            text += "; halve ddpm.batch or classifier.batch, whichever stage it was, in a new run"
    line = f"{program}: {' '.join((text + more).split())}\n"
    for stream, words in ((sys.stderr, line), (sys.stdout, "")):
        try:
            print(words, end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 130 if isinstance(error, KeyboardInterrupt) else 2


def launch(experiment: Callable[[Run], None], known: dict, argv: list[str] | None = None,
           pool: Callable[[Path, list[Path]], None] | None = None) -> int:
    """python loop.py --config or --resume: experiment(run), and the exit status. known: see
    config.load. With --draws an experiment for each, and pool(folder, folders of the draws)."""
    with one_line("loop.py"):
        team, parser = spread.join(), run_parser(sys.modules[experiment.__module__].__doc__)
        arguments = parser.parse_args(["--resume", spread.told()] if team.rank else argv)
    new = arguments.resume is None
    folder = None if new else Path(arguments.resume)
    path = arguments.config if new else folder / "config.yaml"
    try:
        require(new or not (arguments.set or arguments.name or arguments.draws), "--resume: a run "
                "keeps its config, name and draws; for others start a new run with --config")
        require(arguments.draws in (0, *range(2, 100)), "--draws: write 2 to 99, found "
                f"{arguments.draws}; one draw is a run without --draws")
        require(new or path.is_file() and (folder / "lock").is_file(), f"--resume {folder}: no run "
                "there, it has no config.yaml with a file 'lock' beside it")
        config = configuration.load(path, arguments.set, known)
        name = Path(path).stem if arguments.name is None else arguments.name
        require(name.isprintable() and name == Path(name).name not in ("", "..", "cache"),
                f"--name: found {name!r}; write a new folder's name, no path, and not 'cache'")
        require(not arguments.draws or config.data.kind != "dermamnist",
                "--draws: kind dermamnist brings its own splits, so there is one draw")
        if new:
            folder = new_folder(Path("runs"), name)
            if arguments.draws:
                write_bytes(folder / "draws", str(arguments.draws).encode())
            keep(config, folder)
        require(not (folder.parent / "draws").is_file(), f"--resume {folder}: it is one of several "
                f"draws; go on with all: python loop.py --resume {folder.parent}")
        count = (folder / "draws").read_text() if (folder / "draws").is_file() else "0"
        require(count.isdecimal(), f"{folder}/draws: found {count!r}, write the number of draws")
        draws = [folder / f"draw-{k}" for k in range(int(count))]
        batch = config.ddpm.batch
        require(len(draws) >= team.size or batch >= team.size,
                f"torchrun: {team.size} processes cannot share ddpm.batch, {batch}: take fewer")
        if not team.rank:
            spread.told(str(folder))
        with locked(folder, team), stoppable(folder):
            torch.backends.cudnn.benchmark = not config.loop.deterministic
            if config.loop.deterministic:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # wanted by the next line
                torch.use_deterministic_algorithms(True)
            for own in draws_of(config, draws, team):
                with locked(own.folder, own.team), contextlib.suppress(SystemExit):
                    experiment(own)             # it ends the process if it is finished
            team.wait()
            if not draws:
                experiment(Run(folder, config, team=team))
            elif not team.rank:
                pool(folder, draws)
        return 0
    except TROUBLE as error:
        time.sleep(5 if team.rank else 0)       # what all find wrong the first says, and ends it
        if new and folder and not any(folder.glob("**/checkpoints/*")):
            shutil.rmtree(folder, ignore_errors=True)   # made a moment ago, and nothing in it yet
        lasting = folder and folder.exists() and isinstance(error, OUTSIDE)
        return last_words("loop.py", error, lasting and "; what was finished is kept, go on with: "
                          f"python loop.py --resume {folder}" or "")


def run_parser(about: str) -> Parser:
    """The arguments of loop.py."""
    parser = Parser("loop.py", about)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="a yaml file; the run goes to runs/<its name>")
    which.add_argument("--resume", metavar="runs/NAME", help="go on with a run that was stopped")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--name", help="the run goes to runs/NAME")
    parser.add_argument("--draws", type=int, default=0, metavar="K", help="K draws of the data (of "
                        "real data: splits), each a run, runs/NAME/draw-0 and so on, then pooled")
    return parser


def draws_of(config: Config, folders: list[Path], team: spread.Team) -> Iterator[Run]:
    """The runs of these draws: with as many draws as processes each by one, else all by all."""
    numbers = range(len(folders))
    if len(folders) >= team.size:
        numbers, team = numbers[team.rank::team.size], spread.Team()
    for k in numbers:
        print(folders[k])
        own = config.replace("data", seed=config.data.seed + k)
        own = own.replace("loop", seed=config.loop.seed + k)
        if not team.rank:
            keep(own, folders[k])
        team.wait()
        yield Run(folders[k], own, team=team)


def keep(config: Config, folder: Path) -> None:
    """A run's folder with its config, from which it can be resumed."""
    folder.mkdir(exist_ok=True)
    write_bytes(folder / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False).encode())
    (folder / "lock").touch()


@contextlib.contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process with one line, once torch has finished what it computes.
    Nothing is tidied up: every file is whole or absent."""
    def stop(number, _):
        line = f"\nstopped; go on with: python loop.py --resume {folder}\n"
        with contextlib.suppress(OSError):
            os.write(2, b"" if spread.RANK else line.encode(errors="replace"))
        os._exit(128 + number)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
