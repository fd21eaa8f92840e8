"""What only a GPU can show: recorded steps are the steps, and the program runs there. Skipped
without one."""
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import classifier
import ddpm
import guidance
import loop
from engine.augment import to_float
from engine.training import fit, seeded, step_generator
from unet import UNet

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def exact():
    """fp32 without the shortcuts that would hide a difference."""
    old = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = old


def images(n=40, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return x.to(device), (torch.arange(n) % 3).to(device), (torch.arange(n) % 2).to(device)


def unet():
    return seeded(0, UNet, 16, 3, 2, 32, (1, 2)).cuda()


def train_unet(network, **more):
    given = dict(steps=30, batch=8, lr=1e-3, ema_decay=0.9, prediction="v", drop=0.1, seed=3)
    return ddpm.train(network, ddpm.Schedule(100, device="cuda"), *images(), **(given | more))


def train_student(network, **more):
    x, y, _ = images()
    given = dict(steps=30, batch=8, lr=1e-3, jitter=0.3, seed=3)
    return classifier.train(network, x, y, torch.ones(40, device="cuda"), **(given | more))


def student():
    return seeded(0, classifier.build, "small", 16, 3).cuda()


def apart(one, other):
    """The largest difference of two networks' weights, against what training moved them."""
    a, b = one.state_dict(), other.state_dict()
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


@pytest.mark.parametrize("build, train", [(unet, train_unet), (student, train_student)])
def test_recorded_steps_are_the_steps(build, train):
    plain, recorded = build(), build()
    losses = train(plain, record=False), train(recorded)
    assert np.allclose(*losses, rtol=1e-4)
    assert apart(build(), plain) > 0.01             # it moved
    assert apart(plain, recorded) < 1e-4            # atomic additions differ in their order


def test_recorded_steps_draw_anew():
    drawn = []
    network = torch.nn.Linear(1, 1).cuda()

    def pick(generator):
        return torch.rand(4, generator=generator, device="cuda")

    def loss(u, generator):
        kept.copy_(u)
        return network(u[:, None]).square().mean()

    class Watch:
        def update(self, network):
            drawn.append(kept.tolist())

    kept = torch.zeros(4, device="cuda")
    fit(network, pick, loss, steps=8, lr=0.1, seed=5, device="cuda", ema=Watch())
    wanted = [torch.rand(4, generator=step_generator(5, step, "cuda"), device="cuda")
              for step in range(8)]
    assert drawn == [u.tolist() for u in wanted]


def test_stopped_and_resumed_is_unbroken():
    whole, stopped, resumed, kept = unet(), unet(), unet(), []
    train_unet(whole, steps=60)

    class Stop(Exception):
        pass

    def save(state):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        kept.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        raise Stop
    with pytest.raises(Stop):
        train_unet(stopped, steps=60, save=save)
    train_unet(resumed, steps=60, state=kept[0])
    assert apart(whole, resumed) < 1e-4


def test_compiled_training_learns_the_same():
    plain, compiled = unet(), unet()
    losses = train_unet(plain), train_unet(compiled, compiled=True)
    assert np.allclose(*losses, rtol=1e-3)
    assert apart(plain, compiled) < 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_guided_images_are_those_of_the_cpu(sampler):
    network = unet()
    train_unet(network)
    made = []
    for device in ("cuda", "cpu"):
        x, y, g = images(6, device)
        net = network.to(device).eval()
        judge = student().to(device).eval()
        schedule = ddpm.Schedule(100, device=device)
        own = ddpm.eps_model(net, schedule, y, g)
        wanted = guidance.guided_eps(ddpm.eps_model(net, schedule, y, 1 - g, scale=2.0), schedule,
                                     [(0.1, guidance.hardness([judge], y))])
        made.append(guidance.counterfactual(own, wanted, schedule, to_float(x), 0.9, 6,
                                            ddpm.SAMPLERS[sampler]).cpu())
    assert torch.allclose(*made, atol=2e-3)


def test_a_run_ends_in_its_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loop.main(["--config", str(ROOT / "configs/tiny.yaml")]) == 0
    found = json.loads((tmp_path / "runs" / "tiny" / "results.json").read_text())
    assert found["environment"]["device"].startswith("cuda")
    assert (tmp_path / "runs" / "tiny" / "report.html").exists()
