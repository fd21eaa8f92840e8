"""spread.py: two processes at one run do what one does."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, go

HERE = Path(__file__).parents[1]
SCRIPT = """
import sys
import torch
sys.path.insert(0, {here!r})
import ddpm
from engine import spread
from engine.training import seeded
from unet import UNet


def gradient(team):
    network = seeded(0, UNet, 8, 3, 2, 16, (1, 2), 1, 4, 1)
    with torch.no_grad():           # a last layer of zeros would pass no gradient on
        for p in network.head.parameters():
            p.add_(0.1)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(5, 3, 8, 8, generator=generator) * 2 - 1
    y = torch.tensor([0, 1, 2, 0, 1])
    hooks = spread.together(network, team) if team.size > 1 else []
    loss = ddpm.loss(network, ddpm.Schedule(20), x0, y, y % 2, generator)
    loss.backward()
    for hook in hooks:
        hook.remove()
    again = ddpm.loss(network, ddpm.Schedule(20), x0, y, y % 2, generator)
    return loss.item(), again.item(), [p.grad for p in network.parameters()]


if __name__ == "__main__":
    team = spread.join()
    assert spread.told("" if team.rank else "a folder, \\u00e9") == "a folder, \\u00e9"
    torch.save(gradient(team), f"{{sys.argv[1]}}/{{team.rank}}.pt")
    team.wait()
"""


def begin(folder, *command):
    """torchrun with two processes of one thread each."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *map(str, command)]
    return subprocess.Popen(run, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def workers(process):
    """The pids of torchrun's processes, by rank."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {next(word for word in Path(f"/proc/{pid}/environ").read_text().split("\0")
                  if word.startswith("RANK=")): int(pid) for pid in pids}
    return [ranks[f"RANK={rank}"] for rank in range(2)]


def test_two_processes_have_the_gradient_of_one_though_their_parts_are_uneven(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(here=str(HERE)))
    process = begin(tmp_path, "script.py", tmp_path)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 0, said
    namespace = {"__name__": "script"}
    exec(SCRIPT.format(here=str(HERE)), namespace)
    loss, again, wanted = namespace["gradient"](namespace["spread"].Team())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found[:2] == pytest.approx((loss, again), rel=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found[2], wanted))
    assert sum(bool(grad.abs().max() > 1e-6) for grad in wanted) > 20


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process that it finds in /proc")
def test_a_killed_process_ends_the_run_in_one_line_and_resumed_it_is_the_run_of_one(
        tiny, tmp_path):
    """All but the diffusion model, which two learn with another rounding, to the byte; one thread
    each, as the tests have (conftest.py), since another number of threads rounds otherwise."""
    folder, stored = tmp_path / "runs/tiny", tmp_path / "runs/tiny/checkpoints"
    stored.mkdir(parents=True)
    shutil.copy(tiny / "checkpoints/ddpm.pt", stored)
    (folder / "config.yaml").write_text((tiny / "config.yaml").read_text())
    (folder / "lock").touch()
    process = begin(tmp_path, HERE / "loop.py", "--resume", "runs/tiny")
    while not (stored / "student_random_0.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(workers(process)[1], signal.SIGKILL)
    said = process.communicate(timeout=100)[1]
    ours = [line for line in said.splitlines() if "--resume runs/tiny" in line]
    assert process.returncode and len(ours) == 1, said
    assert not (stored / "critic.pt").exists()

    go(tmp_path, ["--resume", "runs/tiny"])
    for name in ("predictions.npz", "synthetic/synthetic.csv"):
        assert (folder / name).read_bytes() == (tiny / name).read_bytes(), name
    ours, theirs = ({p.name for p in run.rglob("*") if "external" not in p.name}
                    for run in (folder, tiny))
    assert theirs - ours == {"loss_ddpm.svg"} and not ours - theirs


def test_what_is_wrong_is_said_once(tmp_path):
    (tmp_path / "tiny.yaml").write_text(SMALL)
    process = begin(tmp_path, HERE / "loop.py", "--config", "tiny.yaml", "--set", "loop.seed=x")
    said = process.communicate(timeout=100)[1]
    assert process.returncode and said.count("loop.seed: wanted a whole number, found 'x'") == 1
    assert not (tmp_path / "runs/tiny").exists()
