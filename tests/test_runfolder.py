"""What a run leaves on disk: checkpoints that are whole, one process at a time, an end at once."""
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ddpm
import loop
from engine import run as runfolder
from engine.run import RunError, RunFolder, clock, held, new_folder, write_bytes

HERE = Path(__file__).parents[1]
TINY = HERE / "configs/tiny.yaml"


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def test_folders_are_never_overwritten_and_stages_are_done_once(tmp_path, run):
    assert [new_folder(tmp_path, "x").name for _ in range(3)] == ["x", "x-2", "x-3"]
    calls = []
    for _ in range(2):
        run.stage("s", lambda progress: calls.append(1) or {"n": len(calls)})
    assert calls == [1]
    assert [clock(s) for s in (5, 200, 7200)] == ["5 s", "3 min", "2 h 00 min"]


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
    run.owner, ours = "somebody", run.owner
    run.save("a", {"n": 9})
    run.owner = ours


def of_another_stage(run):
    run.save("b", {"n": 9})
    os.replace(run.path("b"), run.path("a"))


def of_another_format(run):
    content = run.path("a").read_bytes()
    mark = f"checkpoint {runfolder.FORMAT} ".encode()
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


def test_a_loss_that_is_not_finite_names_the_stage_and_the_last_good_checkpoint(run):
    network = torch.nn.Linear(1, 1)

    def fit(save, **_):
        save({"step": 100})
        raise FloatingPointError("the loss was nan at step 117")
    with pytest.raises(RunError, match="s: the loss was nan at step 117; .*s.partial.pt"):
        run.train("s", network, 200, fit)
    assert run.load("s.partial") == {"step": 100} and run.load("s") is None


# ---- one process, ended at once -----------------------------------------------------------------

def test_a_second_process_says_so_and_stops(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)        # of a job in the background it is SIG_IGN
    folder = new_folder(Path("runs"), "x")
    (folder / "config.yaml").write_text(f"extends: {TINY}\n")
    with held(folder):
        assert loop.main(["--resume", "runs/x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("loop.py: runs/x: another process") and len(error.splitlines()) == 1
    with held(folder):                                                  # and is given back
        pass
    assert signal.getsignal(signal.SIGINT) is before


WORK = """
import sys, time
from pathlib import Path
import torch
from engine.run import held
with held(Path(sys.argv[1])):
    print("at work", flush=True)
    a = torch.ones(9000, 9000)
    a @ a                       # several seconds, in which Python's own handlers hear nothing
    time.sleep(9)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_within_a_second_and_says_how_to_go_on(number, status, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", WORK, tmp_path], stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == "at work\n"
        time.sleep(0.3)
        with pytest.raises(RunError, match="another process"), held(tmp_path):
            pass
        begun = time.monotonic()
        process.send_signal(number)
        error = process.communicate(timeout=9)[1]
        assert time.monotonic() - begun < 1 and process.returncode == status
    assert error == f"\nstopped; go on with: python loop.py --resume {tmp_path}\n"
    with held(tmp_path):                                                # the kernel let it go
        pass


# ---- trouble outside ----------------------------------------------------------------------------

def trouble(monkeypatch, capsys, tmp_path, happen):
    """What the tiny run says when `happen(folder)` takes the place of training: its one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm, "train", lambda *_, **__: happen(Path("runs/tiny")))
    status = loop.main(["--config", str(TINY)])
    lines = [line for line in capsys.readouterr().err.splitlines() if "loop.py" in line]
    assert status == 2 and len(lines) == 1
    return lines[0]


def fill_disk(folder):
    (folder / "checkpoints/ddpm.pt.tmp").symlink_to("/dev/full")        # the kernel's own ENOSPC


def delete(folder):
    loop.shutil.rmtree(folder)


def refuse(folder):
    raise PermissionError(13, "Permission denied", str(folder / "checkpoints/ddpm.pt.tmp"))


def raising(error):
    def happen(folder):
        write_bytes(folder / "checkpoints/x.pt", b"finished")
        raise error
    return happen


@pytest.mark.parametrize("happen, hint, goes_on", [
    (fill_disk, "No space left on device", True), (delete, "No such file", False),
    (refuse, "ddpm.pt.tmp: Permission denied", False),
    (raising(MemoryError()), "out of memory", True),
    (raising(torch.OutOfMemoryError("CUDA out of memory. Tried")), "cpu (", True),
    (raising(torch.AcceleratorError("CUDA error: device lost\nmore")), "CUDA error: device lost",
     True),
], ids=["disk full", "folder deleted", "read-only", "memory", "GPU memory", "GPU gone"])
def test_trouble_is_one_line(happen, hint, goes_on, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(loop.Experiment, "estimate", lambda self: 0)
    line = trouble(monkeypatch, capsys, tmp_path, happen)
    assert hint in line and ("--resume runs/tiny" in line) == goes_on
    assert Path("runs/tiny/config.yaml").exists() == goes_on


def test_where_no_run_can_be_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file where the folder should be")
    assert loop.main(["--config", str(TINY)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("loop.py: runs") and len(error.splitlines()) == 1
