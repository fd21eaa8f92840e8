"""What a run leaves on disk: stages that are done once, an event log, progress on the terminal.

Every file is whole or not there: a run that is stopped anywhere goes on from the last whole one."""
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import os
import pickle
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from engine import spread
from engine.config import Config, ConfigError
from engine.spread import Team
from engine.training import wide

try:
    import fcntl
except ImportError:     # Windows: two processes on one run are not told apart
    fcntl = None

PLACES = "data.root", "loop.device", "guidance.external", "classifier.weights"
FORMAT = 3          # of the checkpoints; another number is not used
UNUSABLE = (        # what is wrong where the first n words of a checkpoint's note differ
    (2, f"no whole checkpoint of format {FORMAT}"),
    (4, "it belongs to another stage, another config or other data"),
    (None, "it is damaged, its checksum does not fit"))


class RunError(RuntimeError):
    """One line: what of the run folder cannot be used, and what to do."""


class Run:
    """runs/NAME: its config, device and seeds, and what it has finished so far.
    A checkpoint of another fingerprint is not used. seconds: from one save of a training to the
    next, so what kill -9 loses of it at most. reading: nothing of the folder is changed. team: of
    several processes at work, who this is; only the first writes, but for its share of `shared`."""

    def __init__(self, folder: Path, config: Config, fingerprint: str = "none",
                 seconds: float = 30, reading: bool = False, team: Team = Team()):
        self.team, self.sharing, self.turn = team, False, 0
        self.folder, self.config, self.fingerprint = folder, config, fingerprint
        self.seconds, self.saved = seconds, 0.0     # when a training was last saved
        self.reading, self.plan, self.pace = reading, {}, 1.0   # seconds by stage; how true so far
        self.device = pick_device(config.loop.device)
        self.bf16 = pick_bf16(config.loop.bf16, self.device)
        draw = (folder.parent / "draws").is_file()          # one of several
        runs = folder.parent.parent if draw else folder.parent
        self.cache = runs / "cache" / f"{config.data.kind}_{config.data.size}"
        self.checkpoints = folder / "checkpoints"
        if not reading:
            self.checkpoints.mkdir(exist_ok=True)

    def begin(self, splits: dict) -> None:
        """Know the fingerprint, and write to seen.json which images this run sees. What the folder
        holds of another config or of other data is set aside. A finished run ends the process."""
        self.fingerprint, folder = fingerprint(self.config, splits), self.folder
        before = mapping(folder / "seen.json").get("fingerprint", self.fingerprint)
        if before != self.fingerprint and not self.team.rank:
            aside = new_folder(folder, "before")
            for path in sorted(folder.iterdir(), key=lambda p: p.name == "seen.json"):
                if path.name not in ("config.yaml", "lock") and not path.name.startswith("before"):
                    os.replace(path, aside / path.name)
            self.checkpoints.mkdir(exist_ok=True)
            print(f"config or data were changed since it began; what it made is now in {aside}")
        seen = {name: {"pixels": digests(s.images), "lesions": sorted({*s.lesions.tolist()})}
                for name, s in splits.items()}
        self.write("seen.json", json.dumps({"fingerprint": self.fingerprint, **seen}))
        self.team.wait()
        done, scored = mapping(folder / "results.json"), vars(self.config.evaluate)
        if done.get("fingerprint") == self.fingerprint and (folder / "report.html").exists() and (
                done.get("config", {}).get("evaluate") == scored):
            print(f"{folder} is finished, nothing is left to do; its report: {folder}/report.html "
                  f"(to make it anew, remove {folder}/results.json)")
            sys.exit()

    def progress(self, name: str, done: int = 0) -> "Progress":
        """That of a stage: its place in the plan, and how long those after it will take."""
        if name not in self.plan:
            return Progress(name, done)
        place, seconds = list(self.plan).index(name) + 1, [*self.plan.values()]
        stage = f"stage {place} of {len(seconds)}, {name}"
        return Progress(stage, done, self.pace * sum(seconds[place:]) / self.team.size)

    def seed(self, *words) -> int:
        """A seed for every purpose: unrelated streams of (the run's seed, name, number, ...)."""
        return derive(self.config.loop.seed, *words)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        dtype = wide(self.device) if array.dtype == np.float64 else None
        return torch.tensor(np.ascontiguousarray(array), dtype=dtype, device=self.device)

    def log(self, event: str, **details) -> None:
        """Append one line to log.jsonl."""
        if self.team.rank and not self.sharing:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, "event": event, "step": None, **details}) + "\n")

    def write(self, name: str, content: bytes | str) -> None:
        """A file of the run folder, whole or absent."""
        content = content if isinstance(content, bytes) else content.encode()
        if not self.team.rank:
            write_bytes(self.folder / name, content)

    def shared(self, work: Callable, items: Iterable) -> list:
        """[work(item), ...], whose stages and trainings several processes share out: each does its
        own, then all read what was done."""
        if self.team.size > 1:
            self.sharing = True
            [*map(work, items)]
            self.sharing = False
            self.team.wait()
        return [*map(work, items)]

    def alone(self) -> None:
        """From here on the first process goes on by itself."""
        if self.team.rank:
            sys.exit()
        self.team = Team()

    def asked(self, name: str, device="cpu", together=False) -> tuple[bool, dict | None]:
        """Is it this process that does it and stores it; and what is stored already."""
        self.turn += self.sharing
        first = self.turn * self.sharing % self.team.size == self.team.rank
        return first, self.load(name, device) if first or together else None

    def settled(self, name: str, stored: dict | None, device="cpu") -> dict | None:
        """What one process has stored, for all; None while another may be at it."""
        if self.sharing:
            return None
        self.team.wait()
        return stored or self.load(name, device)

    def stage(self, name: str, compute: Callable, *args, **settings):
        """compute(*args, **settings), done once; in a resumed run the stored result: a dict, list
        or tuple of numbers, text and arrays of numbers."""
        begun, (first, stored) = time.monotonic(), self.asked(name)
        if first and stored is None:
            result = compute(*args, **settings)
            stored = {"result": each(np.ndarray, result, lambda a: torch.from_numpy(a.copy()))}
            self.finish(name, stored, begun)
        stored = self.settled(name, stored)
        return stored and each(torch.Tensor, stored["result"], torch.Tensor.numpy)

    def train(self, name: str, network: torch.nn.Module, fit: Callable, *args,
              together: bool = False, **settings) -> torch.nn.Module:
        """fit(network, *args, **settings) once, with bf16, state, save and on_step of training.fit
        besides; a resumed run goes on from the middle of it. Returns the network in eval mode.
        together: by all processes. Raises RunError naming the last good checkpoint if the loss is
        not finite."""
        partial, begun = f"{name}.partial", time.monotonic()
        first, stored = self.asked(name, self.device, together)
        if stored is None and (first or together):
            state = self.load(partial, self.device)
            progress, self.saved = self.progress(name, state["step"] if state else 0), begun
            save = functools.partial(self.save_sometimes, partial) if first else None
            hooks = spread.together(network, self.team) if together and self.team.size > 1 else []
            if hooks:           # what a graph or a compiler holds, hooks may not reach
                settings |= {"record": False, "compiled": False}
            try:
                fit(network, *args, **settings, bf16=self.bf16, state=state, save=save,
                    on_step=functools.partial(self.tell, name, progress))
            except FloatingPointError as error:
                good = self.path(partial) if self.path(partial).exists() else "none yet"
                raise RunError(f"{name}: {error}; last good checkpoint: {good}") from None
            for hook in hooks:
                hook.remove()
            stored = {"network": network.state_dict()}
            if first:
                self.finish(name, stored, begun)
            progress.end()
            if self.plan.get(name) and state is None:
                self.pace = (time.monotonic() - begun) / self.plan[name]
        stored = self.settled(name, stored, self.device)
        if stored:
            network.load_state_dict(stored["network"])
            for old in (partial, f"{partial}.previous"):
                self.path(old).unlink(missing_ok=True)
        return network.eval()

    def save_sometimes(self, name: str, state: dict) -> None:
        if time.monotonic() - self.saved >= self.seconds:
            self.save(name, state)
            self.saved = time.monotonic()

    def tell(self, name: str, progress: "Progress", step: int, steps: int, loss: float) -> None:
        self.log("loss", stage=name, step=step, loss=loss)
        progress(step, steps, f"loss {loss:.4f}")

    def finish(self, name: str, content: dict, begun: float) -> None:
        self.save(name, content)
        self.log("stage", stage=name, seconds=round(time.monotonic() - begun, 2))

    def path(self, name: str) -> Path:
        return self.checkpoints / f"{name}.pt"

    def note(self, name: str, payload: bytes) -> bytes:
        """The last line of a checkpoint: what it is, whose, and its checksum. torch.load reads the
        file all the same: a zip archive may be followed by anything."""
        checksum = hashlib.sha256(payload).hexdigest()
        return f"checkpoint {FORMAT} {name} {self.fingerprint} {checksum}".encode()

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
        """What `save` was last given, or None. A checkpoint that is truncated, damaged or foreign
        is named on stderr and set aside as *.bad; the one before it is used. reading: RunError."""
        for path in (self.path(name), self.path(f"{name}.previous")):
            if not path.exists():
                continue
            payload, _, note = path.read_bytes().rpartition(b"\n")
            found, wanted = note.split(b" "), self.note(name, payload).split(b" ")
            problem = next((said for n, said in UNUSABLE if found[:n] != wanted[:n]), None)
            try:
                if problem is None:
                    return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
            except pickle.UnpicklingError:
                problem = "it holds more than tensors, numbers and text"
            if self.reading:
                raise RunError(f"{path}: {problem}; remove it and results.json, then --resume")
            os.replace(path, path.with_suffix(".bad"))
            print(f"{path}: {problem}; set aside as {path.stem}.bad, going on from what was before",
                  file=sys.stderr)
        return None


def each(kind: type, value, change: Callable):
    """Every `kind` among dicts, lists and tuples changed; tuples come back as lists. A checkpoint
    may hold tensors, but no arrays."""
    if isinstance(value, dict):
        return {key: each(kind, v, change) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [each(kind, v, change) for v in value]
    return change(value) if isinstance(value, kind) else value


def derive(*words) -> int:
    """One seed from numbers and text; a 0 at the end is as good as none."""
    numbers = [zlib.crc32(w.encode()) if isinstance(w, str) else int(w) for w in words]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def fingerprint(config: Config, splits: dict) -> str:
    """Stands for all that a checkpoint depends on: the config but for how it is scored and where
    files lie, and what these hold."""
    matters = config.as_dict() | {"evaluate": config.evaluate.oracle}
    for key in PLACES:
        section, name = key.split(".")
        del matters[section][name]
    if weights := config.classifier.weights:
        matters["weights"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode())
    for s in splits.values():
        for array in (s.images, s.labels, s.groups, s.folds, s.sources):
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def digests(images: np.ndarray) -> list[str]:
    """A short name of each image's pixels."""
    return [hashlib.sha256(image.tobytes()).hexdigest()[:20] for image in images]


def mapping(path: Path) -> dict:
    """What a json file holds; {} if it is absent, damaged or something else."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def csv_bytes(rows: Iterable) -> bytes:
    """A csv; text that a spreadsheet would run gets a ' in front (OWASP, CSV injection)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        ["'" * str(cell).startswith(tuple("=+-@\t\r")) + cell if isinstance(cell, str) else cell
         for cell in row] for row in rows)
    return text.getvalue().encode()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either whole or absent, even if the power fails."""
    path.parent.mkdir(exist_ok=True)        # no parents: a run folder that is gone stays gone
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def save_picture(path: Path, picture) -> None:
    """A PIL image as PNG, atomically."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def new_folder(root: Path, name: str) -> Path:
    """root/name, or root/name-2, -3, ...: the first that does not exist yet, made."""
    if os.path.lexists(root) and not root.is_dir():
        raise RunError(f"{root}: no folder, but a file or a link to nowhere; move it away")
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = root / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


@contextlib.contextmanager
def locked(folder: Path, team: Team = Team()) -> Iterator[None]:
    """Lock a run until this process ends, however it does, and the others of its team. RunError if
    somebody else has it."""
    with open(folder / "lock", "ab") as lock:
        if team.rank:
            team.wait()                 # until the first has it
        try:
            if fcntl and not team.rank:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fcntl:                   # with its team
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another process is at work on this run; wait for its end or "
                           "stop it") from None
        if not team.rank:
            team.wait()
        yield


def clock(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """One updating line on a terminal, a plain line every 20 seconds in a pipe."""

    def __init__(self, stage: str, done: int = 0, later: float | None = None):
        self.stage, self.first, self.later = stage, done, later     # seconds of the run after it
        self.begun = self.shown = time.monotonic()
        self.clear, self.newline, self.wait = (
            ("\r\x1b[K", "", 0.2) if sys.stderr.isatty() else ("", "\n", 20))

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.shown >= self.wait:
            self.shown = now
            rate = max(done - self.first, 1e-9) / (now - self.begun)
            left = (total - done) / rate
            whole = "" if self.later is None else f" (of the run {clock(left + self.later)})"
            self.say(f"{done}/{total}, {rate:.3g} a second, {clock(left)} left{whole}"
                     + (note and f", {note}"), self.newline)

    def end(self) -> None:
        """Clear the updating line and say how long the stage took."""
        self.say(clock(time.monotonic() - self.begun))

    def say(self, text: str, newline: str = "\n") -> None:
        if spread.RANK:
            return
        with contextlib.suppress(OSError):      # nobody listens any more: no reason to end
            print(f"{self.clear}{self.stage}: {text}", end=newline, file=sys.stderr, flush=True)


def pick_device(name: str) -> torch.device:
    """auto: CUDA or Apple's mps (untested) if there, else the CPU. Raises ConfigError for a device
    that is not to be had."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found and found.type in ("cuda", "mps") else "cpu"
    if name not in ("cpu", "mps") and not name.startswith("cuda"):
        raise ConfigError(f"loop.device: '{name}' is unknown; write auto, cpu, cuda, cuda:1 or mps")
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return torch.device(name)
    except Exception:       # torch raises its own mixture here: RuntimeError, AssertionError, ...
        raise ConfigError(f"loop.device: '{name}' is not to be had; write auto or cpu") from None


def pick_bf16(choice: str, device: torch.device) -> bool:
    """auto: where the hardware multiplies bfloat16; emulated, it would be slower than float32."""
    if choice != "auto":
        return choice == "true"
    return (torch.cuda.is_bf16_supported() if device.type == "cuda" else
            device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16")))


def device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


@functools.cache
def commit() -> str:
    git = subprocess.run("git describe --always --dirty", shell=True, text=True,
                         cwd=Path(__file__).parent, capture_output=True)
    return git.stdout.strip() or "unknown"


def environment(run: Run) -> dict:
    """What else the numbers depend on. No host or user names."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "device": device_name(run.device),
            "threads": torch.get_num_threads(), "precision": "bf16" if run.bf16 else "fp32",
            "commit": commit()}
