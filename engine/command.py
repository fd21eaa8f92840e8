"""The command line of a run, and one clear line with exit status 2 for whatever goes wrong."""
import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml

from datasets.layouts import DataError
from engine import config as configuration
from engine.config import ConfigError
from engine.run import Run, RunError, device_name, locked, new_folder, pick_device, write_bytes


@contextlib.contextmanager
def one_line(program: str) -> Iterator[None]:
    """What is wrong with config, data, disk or numbers ends the program in one line, status 2."""
    try:
        yield
    except (ValueError, OSError, RunError, FloatingPointError) as error:
        print(f"{program}:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def launch(experiment: Callable[[Run], None], known: dict, argv: list[str] | None = None) -> int:
    """python loop.py --config or --resume: experiment(run), and the exit status. known: see
    config.load."""
    parser = argparse.ArgumentParser(description="Guide a diffusion model to a classifier's "
                                                 "failures, retrain, compare.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="a yaml file; the run goes to runs/<its name>")
    which.add_argument("--resume", metavar="runs/NAME", help="go on with a run that was stopped")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    arguments = parser.parse_args(argv)
    new, device, goes_on = arguments.resume is None, None, True
    folder = None if new else Path(arguments.resume)
    path = arguments.config if new else folder / "config.yaml"
    try:
        if not new and arguments.set:
            raise ConfigError("--set: a resumed run keeps its own config; start a new run")
        if not new and not path.is_file():
            raise ConfigError(f"--resume {folder}: no run there, it has no config.yaml")
        config = configuration.load(path, arguments.set, known)
        device = device_name(pick_device(config.loop.device))
        if new:
            folder = new_folder(Path("runs"), Path(path).stem)
            text = yaml.safe_dump(config.as_dict(), sort_keys=False)
            write_bytes(folder / "config.yaml", text.encode())
        with locked(folder), stoppable(folder):
            torch.backends.cudnn.benchmark = not config.loop.deterministic
            if config.loop.deterministic:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # wanted by the next line
                torch.use_deterministic_algorithms(True)
            experiment(Run(folder, config))
        return 0
    except (ConfigError, DataError, RunError, FloatingPointError) as error:
        problem, goes_on = str(error), False
    except OSError as error:        # the disk is full, the folder is gone or may not be written to
        problem = f"{error.filename or folder}: {error.strerror or error}"
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
        problem = out_of_memory(device, error)
    if new and folder and not any((folder / "checkpoints").glob("*")):
        shutil.rmtree(folder, ignore_errors=True)       # made a moment ago, and nothing in it yet
    elif goes_on and folder and folder.exists():
        problem += f"; what was finished is kept, go on with: python loop.py --resume {folder}"
    print("loop.py:", " ".join(problem.split()), file=sys.stderr)
    return 2


def out_of_memory(device: str, error: BaseException) -> str:
    """One line, and which keys make a batch smaller where that is what helps."""
    said = (str(error).strip() or "out of memory").split("\n")[0]
    if not isinstance(error, torch.AcceleratorError):
        said += "; halve ddpm.batch or classifier.batch, whichever stage it was, in a new run"
    return f"{device}: {said}"


@contextlib.contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process with one line, once torch has finished what it computes.
    Nothing is tidied up: every file is whole or absent."""
    def stop(number, _):
        print(f"\nstopped; go on with: python loop.py --resume {folder}", file=sys.stderr)
        os._exit(128 + number)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
