"""What a run leaves on disk: stages that are done once, an event log, progress on the terminal.

Every write goes to a temporary name, is flushed and then renamed, so that a file either is whole or
is not there; a run that is stopped anywhere continues from the last whole file.
"""
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

FORMAT = 1          # of the checkpoints; another number is refused


class RunError(RuntimeError):
    """One line: what of the run folder cannot be used, and what to do."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either whole or absent, even if the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """runs/NAME: checkpoints/, pictures/, log.jsonl and the stages that are finished."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)

    def log(self, event: str, **details) -> None:
        """Append one line to log.jsonl."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"time": now, "event": event, "step": None, **details}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, name: str, content: dict) -> None:
        """A checkpoint: a dictionary of tensors, numbers, text and lists of them."""
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "content": content}, buffer)
        write_bytes(self.checkpoints / f"{name}.pt", buffer.getvalue())

    def load(self, name: str, device="cpu") -> dict | None:
        """What `save` was given, or None if there is no such checkpoint."""
        path = self.checkpoints / f"{name}.pt"
        if not path.exists():
            return None
        stored = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise RunError(f"{path}: no checkpoint of format {FORMAT}; delete it to make it anew")
        return stored["content"]

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
        """Train `network` by fit(state=, save=, save_every=, on_step=) once, resuming midway."""
        device = next(network.parameters()).device

        def compute(progress):
            state = self.load(f"{name}.partial", device)
            progress.first = 0 if state is None else state["step"]

            def on_step(step, total, loss):
                self.log("loss", stage=name, step=step, loss=loss)
                progress(step, total, f"loss {loss:.4f}")
            fit(state=state, save=lambda s: self.save(f"{name}.partial", s),
                save_every=max(100, steps // 10 // 20 * 20), on_step=on_step)
            return {"network": network.state_dict()}
        stored = self.stage(name, compute)
        network.load_state_dict(stored["network"])
        network.eval()
        (self.checkpoints / f"{name}.partial.pt").unlink(missing_ok=True)
