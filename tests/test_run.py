"""engine/run.py and engine/command.py: checkpoints that are whole, stages done once, training that
goes on to the bit, one process at a time, an end at once, one line for whatever goes wrong."""
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import loop
from datasets.layouts import DataError
from engine import config as configuration
from engine.command import launch
from engine.run import FORMAT, Run, RunError, clock, derive, locked, new_folder, write_bytes
from engine.training import EMA, fit, seeded

HERE = Path(__file__).parents[1]
TINY = HERE / "configs/tiny.yaml"
CONFIG = configuration.load(TINY)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, CONFIG, "ours")


def files(run):
    return sorted(p.name for p in run.checkpoints.iterdir())


def test_folders_are_never_overwritten_and_times_are_said_as_people_do(tmp_path):
    assert [new_folder(tmp_path, "x").name for _ in range(3)] == ["x", "x-2", "x-3"]
    assert [clock(s) for s in (5, 200, 7200)] == ["5 s", "3 min", "2 h 00 min"]


def test_every_purpose_has_a_seed_of_its_own(run):
    words = [("ddpm",), ("guide",), ("student", 0), ("student", 1), ("crossfit", 1, 2),
             ("crossfit", 2, 1), ("crossfit", 1), (1, "crossfit")]
    found = [run.seed(*w) for w in words]
    assert len(set(found)) == len(words) and found == [run.seed(*w) for w in words]
    assert run.seed("ddpm") == derive(CONFIG.loop.seed, "ddpm") != derive(7, "ddpm")


# ---- stages -------------------------------------------------------------------------------------

class Pair(tuple):
    """What a NamedTuple is to `stage`."""


VALUES = [
    np.arange(6, dtype=np.int64).reshape(2, 3), np.zeros((0, 4), np.float32),
    np.array([True, False]), np.array([[1.5, math.pi]]), np.arange(256, dtype=np.uint8)[::-2],
    np.array(7), 3, -2.5, True, None, "text", [1, "a", [2.5]], (1, 2), (),
    (np.arange(3), np.array([0.1])), Pair((np.arange(2), 5)), {"0.3": 0.5, "n": [1, 2]},
    {"a": np.eye(2), "b": (np.ones(1), "x")}, [np.arange(2)] * 2]


def alike(found, wanted):
    if isinstance(wanted, np.ndarray):
        return (isinstance(found, np.ndarray) and found.dtype == wanted.dtype
                and np.array_equal(found, wanted))
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(alike(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(alike, found, wanted))
    return type(found) is type(wanted) and found == wanted


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_stage_gives_back_what_was_computed_and_computes_it_once(value, run, capsys):
    calls = []

    def compute(*words, times):
        calls.append((words, times))
        return value
    first = run.stage("s", compute, "of", 2, times=3)
    again = Run(run.folder, CONFIG, "ours").stage("s", compute, "of", 2, times=3)    # a resumed run
    assert calls == [(("of", 2), 3)] and files(run) == ["s.pt"]
    assert alike(first, value) and alike(again, value) and not capsys.readouterr().err
    [line] = (run.folder / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["event"] == "stage" and json.loads(line)["stage"] == "s"


def test_a_stage_that_fails_is_computed_again_and_one_of_other_data_too(run, capsys):
    def fail():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        run.stage("s", fail)
    assert not files(run) and run.stage("s", lambda: 4) == 4
    other = Run(run.folder, CONFIG, "theirs")
    assert other.stage("s", lambda: 5) == 5
    assert "other data" in capsys.readouterr().err


# ---- training -----------------------------------------------------------------------------------

class Stop(Exception):
    """Somebody pulls the plug."""


def start(seed=1, with_ema=False):
    """BatchNorm has buffers, too: they have to come back. (Its counts have no mean.)"""
    norm = nn.GroupNorm(2, 4) if with_ema else nn.BatchNorm1d(4)
    return seeded(seed, lambda: nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 1)))


def some_fit(network, slope, *, steps, with_ema=False, **progress):
    """A training with the signature that Run.train calls."""
    def loss(batch, generator):
        x = torch.randn(8, 3, generator=generator)
        return (network(x) - slope * x.sum(1, keepdim=True)).square().mean()
    ema = EMA(network, 0.9) if with_ema else None
    history = fit(network, lambda generator: torch.zeros(1, dtype=torch.int64), loss, steps=steps,
                  lr=0.01, seed=6, ema=ema, **progress)
    if with_ema:
        network.load_state_dict(ema.shadow)
    return history


def stopped(at, where):
    """some_fit, but that it ends in step `at`, before (on_step) or after what it saves there."""
    def broken(network, *args, save, on_step, **more):
        def save_and_stop(state):
            save(state)
            if where == "save" and state["step"] == at:
                raise Stop

        def tell_and_stop(step, steps, loss):
            on_step(step, steps, loss)
            if where == "on_step" and step == at:
                raise Stop
        return some_fit(network, *args, save=save_and_stop, on_step=tell_and_stop, **more)
    return broken


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(),
                                                 other.state_dict().values(), strict=True))


@pytest.mark.parametrize("where, kept", [("save", 40), ("on_step", 20)])
@pytest.mark.parametrize("with_ema", [False, True])
def test_a_training_stopped_and_resumed_is_the_unbroken_one_to_the_bit(where, kept, with_ema,
                                                                       tmp_path):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    settings = dict(steps=90, with_ema=with_ema)
    run = Run(tmp_path / "whole", CONFIG)
    whole = run.train("s", start(1, with_ema), some_fit, 2.0, **settings)
    run = Run(tmp_path / "stopped", CONFIG, seconds=0)
    with pytest.raises(Stop):
        run.train("s", start(1, with_ema), stopped(40, where), 2.0, **settings)
    assert run.load("s") is None and run.load("s.partial")["step"] == kept

    seen, run = [], Run(tmp_path / "stopped", CONFIG, seconds=0)

    def watched(network, *args, state, **more):
        seen.append(state["step"])
        return some_fit(network, *args, state=state, **more)
    other = start(2, with_ema)                                       # has no say
    resumed = run.train("s", other, watched, 2.0, **settings)
    assert seen == [kept] and same(whole, resumed) and not same(whole, start(1, with_ema))
    assert files(run) == ["s.pt"] and not resumed.training
    lines = map(json.loads, (run.folder / "log.jsonl").read_text().splitlines())
    steps = [line["step"] for line in lines if line["event"] == "loss"]
    assert steps == [20, 40] + list(range(kept + 20, 90, 20)) + [90]

    def never(*_, **__):
        raise AssertionError("trained again")
    again = run.train("s", start(3, with_ema), never, 2.0, **settings)
    assert same(whole, again) and not again.training


@pytest.mark.parametrize("seconds, wanted", [(0, [20, 40, 60, 80]), (1e9, [None] * 4)])
def test_how_often_a_training_is_saved(seconds, wanted, run, tmp_path):
    """Seen from on_step, which stands before the save of its own step; nothing is left at the end.
    """
    found = {}

    def watched(network, *args, on_step, **more):
        def tell(step, steps, loss):
            on_step(step, steps, loss)
            stored = run.load("s.partial")
            found[step] = None if stored is None else stored["step"]
        return some_fit(network, *args, on_step=tell, **more)
    run.seconds = seconds
    run.train("s", start(), watched, 2.0, steps=100)
    assert found == dict(zip([20, 40, 60, 80, 100], [None, *wanted]))
    assert files(run) == ["s.pt"]


def test_what_a_damaged_half_leaves_is_the_half_before_it(run, tmp_path, capsys):
    whole = Run(tmp_path, CONFIG, "whole").train("whole", start(), some_fit, 2.0, steps=70)
    run.seconds = 0
    with pytest.raises(Stop):
        run.train("s", start(), stopped(60, "save"), 2.0, steps=70)
    path = run.path("s.partial")
    path.write_bytes(path.read_bytes()[:-100])
    assert same(whole, run.train("s", start(2), some_fit, 2.0, steps=70))
    assert "s.partial.pt: no whole checkpoint" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_names_the_stage_and_the_last_good_checkpoint(run):
    run.seconds = 0
    with pytest.raises(RunError, match="s: the loss .*at step 0 of 90.*checkpoint: none yet"):
        run.train("s", start(), some_fit, math.nan, steps=90)
    with pytest.raises(Stop):
        run.train("s", start(), stopped(20, "save"), 2.0, steps=90)
    with pytest.raises(RunError, match="s: the loss .*at step 20 of 90.*: .*s.partial.pt"):
        run.train("s", start(), some_fit, math.nan, steps=90)
    assert run.load("s.partial")["step"] == 20 and run.load("s") is None


# ---- checkpoints --------------------------------------------------------------------------------

def test_a_checkpoint_comes_back_and_torch_alone_reads_it_too(run):
    run.save("a", {"w": torch.arange(3), "names": ["b"]})
    for stored in (run.load("a"), torch.load(run.path("a"), weights_only=True)):
        assert torch.equal(stored["w"], torch.arange(3)) and stored["names"] == ["b"]
    assert run.load("absent") is None


class Payload:
    """What an attacker would put there: code that runs when it is unpickled."""
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def pickled(run):
    torch.save({"content": Payload()}, run.path("a"))


def pickled_under_our_seal(run):
    payload = pickle.dumps({"content": Payload()}, protocol=2)
    run.path("a").write_bytes(payload + b"\n" + run.note("a", payload))


def of_another_run(run):
    run.path("a").unlink()
    run.fingerprint, ours = "somebody", run.fingerprint
    run.save("a", {"n": 9})
    run.fingerprint = ours


def of_another_stage(run):
    run.save("b", {"n": 9})
    os.replace(run.path("b"), run.path("a"))


def of_another_format(run):
    content = run.path("a").read_bytes()
    mark = f"checkpoint {FORMAT} ".encode()
    assert mark in content
    run.path("a").write_bytes(content.replace(mark, b"checkpoint 99 "))


@pytest.mark.parametrize("spoil, hint", [
    (lambda run: run.path("a").write_bytes(b""), "no whole checkpoint"),
    (lambda run: run.path("a").write_bytes(run.path("a").read_bytes()[:-200]), "no whole"),
    (lambda run: run.path("a").write_bytes(b"PK\3\4 something else\n"), "no whole"),
    (pickled, "no whole"), (of_another_format, "no whole"), (of_another_run, "belongs to another"),
    (of_another_stage, "belongs to another"), (pickled_under_our_seal, "more than tensors"),
], ids=["empty", "truncated", "a zip", "pickled", "format", "run", "stage", "pickled and sealed"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_bad_checkpoint_is_named_and_the_one_before_it_used(run, spoil, hint, earlier, capsys,
                                                              monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run.save("a", {"n": 1})
    if earlier:
        run.save("a", {"n": 2})
    spoil(run)
    assert run.load("a") == ({"n": 1} if earlier else None)
    error = capsys.readouterr().err
    assert "a.pt" in error and hint in error and len(error.splitlines()) == 1
    assert (run.checkpoints / "a.bad").exists() and not Path("unpickled").exists()
    assert run.load("a") == ({"n": 1} if earlier else None)
    assert not capsys.readouterr().err                                  # said once


def test_no_flipped_byte_goes_unseen(run, capsys):
    run.save("a", {"w": torch.arange(4.0)})
    content = run.path("a").read_bytes()
    for i in range(0, len(content), 7):
        run.path("a").write_bytes(content[:i] + bytes([content[i] ^ 16]) + content[i + 1:])
        assert run.load("a") is None, i


@pytest.mark.parametrize("at", ["open", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_before_it(run, at, monkeypatch):
    run.save("a", {"n": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(*{"open": ("builtins.open", fail), "fsync": (os, "fsync", fail),
                          "replace": (os, "replace", fail)}[at])
    with pytest.raises(OSError):
        run.save("a", {"n": 2})
    monkeypatch.undo()
    assert run.load("a") == {"n": 1}
    run.save("a", {"n": 3})
    assert run.load("a") == {"n": 3}


# ---- one process, ended at once -----------------------------------------------------------------

def test_a_second_process_says_so_and_stops(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)        # of a job in the background it is SIG_IGN
    folder = new_folder(Path("runs"), "x")
    (folder / "config.yaml").write_text(f"extends: {TINY}\n")
    with locked(folder):
        assert loop.main(["--resume", "runs/x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("loop.py: runs/x: another process") and len(error.splitlines()) == 1
    with locked(folder):                                                # and is given back
        pass
    assert signal.getsignal(signal.SIGINT) is before


WORK = """
import sys
from pathlib import Path
import torch
from engine.command import stoppable
from engine.run import locked, write_bytes
folder = Path(sys.argv[1])
with locked(folder), stoppable(folder):
    print("at work", flush=True)
    a = torch.ones(100, 100)
    while True:
        a = (a @ a).clamp(0, 1)
        write_bytes(folder / "file", bytes(100_000))
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_at_once_and_says_how_to_go_on(number, status, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", WORK, tmp_path], stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == "at work\n"
        with pytest.raises(RunError, match="another process"), locked(tmp_path):
            pass
        process.send_signal(number)
        error = process.communicate(timeout=20)[1]
    assert process.returncode == status
    assert error == f"\nstopped; go on with: python loop.py --resume {tmp_path}\n"
    with locked(tmp_path):                                              # the kernel let it go
        pass
    if (tmp_path / "file").exists():                                    # whole, or not yet there
        assert (tmp_path / "file").read_bytes() == bytes(100_000)


# ---- trouble outside ----------------------------------------------------------------------------

def launched(experiment, monkeypatch, capsys, tmp_path, *arguments):
    """The status of a run of `experiment`, and what it says on stderr."""
    monkeypatch.chdir(tmp_path)
    status = launch(experiment, {}, list(arguments or ["--config", str(TINY)]))
    return status, capsys.readouterr().err


def fill_disk(run):
    write_bytes(run.path("x"), b"finished")
    Path(f"{run.path('y')}.tmp").symlink_to("/dev/full")                # the kernel's own ENOSPC
    run.save("y", {"n": 1})


def fill_disk_in_training(run):
    """The trained half is kept where the end of it could not be written."""
    Path(f"{run.path('s')}.tmp").symlink_to("/dev/full")
    run.seconds = 0
    run.train("s", start(), some_fit, 2.0, steps=30)


def delete(run):
    shutil.rmtree(run.folder)
    run.save("y", {"n": 1})


def refuse(run):
    raise PermissionError(13, "Permission denied", str(run.path("ddpm")))


def raising(error, finished=True):
    def experiment(run):
        if finished:
            run.stage("x", lambda: 1)
        raise error
    return experiment


@pytest.mark.parametrize("experiment, hint, goes_on, kept", [
    (fill_disk, "No space left on device", True, True),
    (fill_disk_in_training, "No space left on device", True, True),
    (delete, "No such file", False, False), (refuse, "ddpm.pt: Permission denied", False, False),
    (raising(OSError(28, "No space left on device", "f")), "f: No space left", True, True),
    (raising(MemoryError()), "out of memory; halve ddpm.batch or classifier.batch", True, True),
    (raising(torch.OutOfMemoryError("CUDA out of memory. Tried")), "Tried; halve ddpm.batch", True,
     True),
    (raising(torch.AcceleratorError("CUDA error: device lost\nmore")), "CUDA error: device lost",
     True, True),
    (raising(MemoryError(), finished=False), "out of memory", False, False),
    (raising(RunError("s: the loss was nan")), "loop.py: s: the loss was nan", False, True),
    (raising(DataError("x.csv: no images"), finished=False), "x.csv: no images", False, False),
], ids=["disk full", "disk full in training", "folder deleted", "read-only", "ENOSPC", "memory",
        "GPU memory", "GPU gone", "memory at the start", "nan", "data"])
def test_trouble_is_one_line(experiment, hint, goes_on, kept, monkeypatch, capsys, tmp_path):
    status, error = launched(experiment, monkeypatch, capsys, tmp_path)
    [line] = [line for line in error.splitlines() if "loop.py" in line]
    assert status == 2 and line.startswith("loop.py: ") and hint in line
    assert ("go on with: python loop.py --resume runs/tiny" in line) == goes_on
    assert Path("runs/tiny/config.yaml").exists() == kept


def test_after_trouble_a_resumed_run_goes_on_with_what_was_finished(monkeypatch, capsys, tmp_path):
    calls = []

    def experiment(run):
        calls.append(run.stage("x", lambda: len(calls)))
        if len(calls) == 1:
            raise MemoryError
    assert launched(experiment, monkeypatch, capsys, tmp_path)[0] == 2
    status, error = launched(experiment, monkeypatch, capsys, tmp_path, "--resume", "runs/tiny")
    assert (status, error, calls) == (0, "", [0, 0])


def test_an_error_of_the_program_is_no_trouble_outside(monkeypatch, capsys, tmp_path):
    numbers = signal.SIGINT, signal.SIGTERM
    before, during = [signal.getsignal(n) for n in numbers], []

    def experiment(run):
        during.extend(signal.getsignal(n) for n in numbers)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        launched(experiment, monkeypatch, capsys, tmp_path)
    with locked(Path("runs/tiny")):                                     # let go all the same
        pass
    assert [signal.getsignal(n) for n in numbers] == before             # and the signals, too
    assert not set(before) & set(during)


def test_where_no_run_can_be_made(tmp_path, monkeypatch, capsys):
    Path(tmp_path / "runs").write_text("a file where the folder should be")
    status, error = launched(refuse, monkeypatch, capsys, tmp_path)
    assert status == 2 and error.startswith("loop.py: runs") and len(error.splitlines()) == 1
