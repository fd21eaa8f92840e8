"""What a run leaves on disk: stages that are done once, an event log, progress on the terminal.

Every write goes to a temporary name, is flushed and then renamed, so that a file either is whole or
is not there; a run that is stopped anywhere continues from the last whole file. That is why a
signal can end the process at once, without waiting for a training step to return.
"""
import contextlib
import hashlib
import io
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:     # Windows: two processes on one run are not told apart
    fcntl = None

FORMAT = 2          # of the checkpoints; another number is not used


class RunError(RuntimeError):
    """One line: what of the run folder cannot be used, and what to do."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either whole or absent, even if the power fails."""
    path.parent.mkdir(exist_ok=True)        # no parents: a run folder that is gone stays gone
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_picture(path: Path, picture) -> None:
    """A PIL image as PNG, atomically."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def new_folder(root: Path, name: str) -> Path:
    """root/name, or root/name-2, -3, ...: the first that does not exist yet, made."""
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


@contextlib.contextmanager
def one_line(program: str) -> Iterator[None]:
    """What is wrong with config, data, disk or numbers ends the program in one line, status 2."""
    try:
        yield
    except (ValueError, OSError, RunError, FloatingPointError) as error:
        print(f"{program}:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run for this process alone; the kernel drops the lock when it ends, however it ends.

    Raises RunError if another process holds the run, OSError if there is no such folder.
    """
    with open(folder / "lock", "ab") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another process is at work on this run; wait for its end or "
                           "stop it") from None
        yield


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """`locked`, and Ctrl-C and SIGTERM end the process with one line. Only in the main thread.

    A thread of its own hears the signals, because Python's handlers wait for the main thread to
    return from torch.
    """
    def listen():
        for number in os.read(hears, 1):
            print(f"\nstopped; go on with: python loop.py --resume {folder}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(128 + number)          # nothing to tidy up: every file is whole or absent
        os.close(hears)

    with locked(folder):
        hears, tells = os.pipe()
        os.set_blocking(tells, False)
        signal.set_wakeup_fd(tells)
        before = {number: signal.signal(number, lambda *_: None)
                  for number in (signal.SIGINT, signal.SIGTERM)}
        threading.Thread(target=listen, daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(tells)                 # the listener reads the end and returns


def clock(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """One updating line on a terminal, a plain line every 20 seconds in a pipe."""

    def __init__(self, stage: str, done: int = 0):
        self.stage, self.begun, self.first = stage, time.monotonic(), done
        self.shown, self.terminal = self.begun, sys.stderr.isatty()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.shown < (0.2 if self.terminal else 20):
            return
        self.shown = now
        rate = max(done - self.first, 1e-9) / max(now - self.begun, 1e-9)
        line = (f"{self.stage}: {done}/{total}, {rate:.3g} a second, "
                f"{clock((total - done) / rate)} left{', ' + note if note else ''}")
        if self.terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the updating line and say how long the stage took."""
        start = "\r\x1b[K" if self.terminal else ""
        took = clock(time.monotonic() - self.begun)
        print(f"{start}{self.stage}: {took}", file=sys.stderr, flush=True)


class RunFolder:
    """runs/NAME: checkpoints/, pictures/, log.jsonl and the stages that are finished.

    owner: a word for the config and the data; a checkpoint of another owner is not used.
    """

    def __init__(self, folder: Path):
        self.folder, self.owner = folder, "anybody"
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)

    def log(self, event: str, **details) -> None:
        """Append one line to log.jsonl."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"time": now, "event": event, "step": None, **details}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def path(self, name: str) -> Path:
        return self.checkpoints / f"{name}.pt"

    def note(self, name: str, payload: bytes) -> bytes:
        """The last line of a checkpoint: what it is, whose, and its checksum. torch.load reads the
        file all the same: a zip archive may be followed by anything."""
        checksum = hashlib.sha256(payload).hexdigest()
        return f"checkpoint {FORMAT} {name} {self.owner} {checksum}".encode()

    def save(self, name: str, content: dict) -> None:
        """A checkpoint: a dictionary of tensors, numbers, text and lists of them. The one before it
        is kept as name.previous."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        payload, path = buffer.getvalue(), self.path(name)
        if path.exists():
            os.replace(path, self.path(f"{name}.previous"))
        write_bytes(path, payload + b"\n" + self.note(name, payload))

    def load(self, name: str, device="cpu") -> dict | None:
        """What `save` was last given, or None if there is no good checkpoint of that name.

        One that is truncated, damaged or foreign is named on stderr and set aside as *.bad; the one
        before it is used.
        """
        for path in (self.path(name), self.path(f"{name}.previous")):
            if not path.exists():
                continue
            payload, _, found = path.read_bytes().rpartition(b"\n")
            words, wanted = found.split(b" "), self.note(name, payload).split(b" ")
            if len(words) != len(wanted) or words[:2] != wanted[:2]:
                problem = f"no whole checkpoint of format {FORMAT}"
            elif words[2:4] != wanted[2:4]:
                problem = "it belongs to another stage, another config or other data"
            elif words != wanted:
                problem = "it is damaged, its checksum does not fit"
            else:
                try:
                    return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
                except pickle.UnpicklingError:
                    problem = "it holds more than tensors, numbers and text"
            os.replace(path, path.with_suffix(".bad"))
            print(f"{path}: {problem}; set aside as {path.stem}.bad, going on from what was before",
                  file=sys.stderr)
        return None

    def stage(self, name: str, compute: Callable[[Progress], dict]) -> dict:
        """compute(progress)'s result, stored; on a resumed run what was stored, not computed."""
        stored = self.load(name)
        if stored is not None:
            return stored
        progress = Progress(name)
        content = compute(progress)
        self.save(name, content)
        progress.end()
        self.log("stage", stage=name, seconds=round(time.monotonic() - progress.begun, 2))
        return content

    def train(self, name: str, network: torch.nn.Module, steps: int, fit: Callable) -> None:
        """Train `network` by fit(state=, save=, save_every=, on_step=) once, resuming midway.

        Raises RunError if the loss is not finite, naming the last good checkpoint.
        """
        device, partial = next(network.parameters()).device, f"{name}.partial"

        def compute(progress):
            state = self.load(partial, device)
            progress.first = 0 if state is None else state["step"]

            def on_step(step, total, loss):
                self.log("loss", stage=name, step=step, loss=loss)
                progress(step, total, f"loss {loss:.4f}")
            try:
                fit(state=state, save=lambda s: self.save(partial, s),
                    save_every=max(100, steps // 10 // 20 * 20), on_step=on_step)
            except FloatingPointError as error:
                good = self.path(partial) if self.path(partial).exists() else "none yet"
                raise RunError(f"{name}: {error}; last good checkpoint: {good}") from None
            return {"network": network.state_dict()}
        stored = self.stage(name, compute)
        network.load_state_dict(stored["network"])
        network.eval()
        for old in (partial, f"{partial}.previous"):
            self.path(old).unlink(missing_ok=True)
