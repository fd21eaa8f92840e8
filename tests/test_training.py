"""engine/training.py: one step by hand, the optimiser's path, resuming to the bit, random streams;
and how short the way from a student to its network is.
"""
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import loop
from classifier import ResNet
from data import load_phantom
from engine import config as configuration
from engine.run import Run, pick_device
from engine.training import (EMA, clip_gradients, fit, learning_rate, seeded, step, step_generator,
                             wide)
from oracle import normal


def pick(generator):
    """A batch of the one image there is."""
    return torch.zeros(1, dtype=torch.int64)


# ---- one step -----------------------------------------------------------------------------------

def test_one_step_by_hand():
    """Three steps of a straight line through four points: zero_grad, loss, backward, clip, AdamW
    (Loshchilov & Hutter 2019, Algorithm 2) and the running mean again, in numpy."""
    network = seeded(1, nn.Linear, 3, 1).double()
    x, y = normal(20, 3), 9 * normal(20, 1, seed=1)
    w = np.append(network.weight.detach().numpy(), network.bias.detach().numpy())
    mean, first, second = w.copy(), np.zeros(4), np.zeros(4)
    lr, decay, beta1, beta2 = 0.05, 0.3, 0.9, 0.99
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=decay,
                                  betas=(beta1, beta2))
    ema, lengths = EMA(network, 0.95), []
    for p in network.parameters():
        p.grad = torch.full_like(p, 1e3)                 # of somebody else: has no say
    for n in range(1, 4):
        found = step(network, optimizer, lambda g: torch.randint(20, (4,), generator=g),
                     lambda batch, g: (network(x[batch]) - y[batch]).square().mean(),
                     step_generator(7, n), ema=ema)

        batch = torch.randint(20, (4,), generator=step_generator(7, n)).numpy()
        inputs = np.hstack([x[batch].numpy(), np.ones((4, 1))])
        off = inputs @ w - y[batch, 0].numpy()
        grad = 2 * inputs.T @ off / 4
        lengths.append(np.linalg.norm(grad))
        grad = grad * min(1, 1 / (lengths[-1] + 1e-6))
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * grad ** 2
        w = w - lr * decay * w - lr * (first / (1 - beta1 ** n)) / (
            np.sqrt(second / (1 - beta2 ** n)) + 1e-8)
        d = min(0.95, (1 + n) / (10 + n))
        mean = d * mean + (1 - d) * w
        assert found.item() == pytest.approx((off ** 2).mean()) and not found.requires_grad
        for state, wanted in ((network.state_dict(), w), (ema.shadow, mean)):
            assert np.allclose([*state["weight"][0], *state["bias"]], wanted, rtol=1e-9)
    assert min(lengths) > 1


def test_a_short_gradient_is_left_as_it_is_and_a_long_one_cut():
    for length in (0.5, 40.0):
        network = nn.Linear(4, 1, bias=False)
        network.weight.grad = torch.tensor([[0.6, 0.0, -0.8, 0.0]]) * length
        assert clip_gradients(network).item() == pytest.approx(length)
        assert network.weight.grad.norm().item() == pytest.approx(min(length, 1), rel=1e-4)


def test_each_network_of_a_module_dict_is_clipped_by_itself():
    """By plain gradient descent at rate 1 a network moves by its own cut gradient."""
    networks = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("a", "b", "c")})
    slopes = {"a": [300.0, 400.0], "b": [0.3, 0.4]}             # c has no part in the loss
    before = {name: one.weight.detach().clone() for name, one in networks.items()}

    def loss(batch, generator):
        return sum((networks[name].weight * torch.tensor(slope)).sum()
                   for name, slope in slopes.items())
    value = step(networks, torch.optim.SGD(networks.parameters(), lr=1.0), pick, loss,
                 torch.Generator())
    assert value.item() == pytest.approx(sum(
        (before[name] * torch.tensor(slope)).sum().item() for name, slope in slopes.items()),
        rel=1e-5)
    for name, moved in (("a", [0.6, 0.8]), ("b", [0.3, 0.4]), ("c", [0.0, 0.0])):
        found = before[name] - networks[name].weight.detach()
        assert torch.allclose(found, torch.tensor([moved]), atol=1e-5), name


def test_a_step_shows_a_gradient_that_is_not_finite():
    """sqrt has value 0 and an infinite slope at 0: the loss looks well, the weights are lost."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    found = step(network, torch.optim.SGD(network.parameters(), lr=0.1), pick,
                 lambda *_: network.weight.abs().sqrt().sum(), torch.Generator())
    assert not found.isfinite()


# ---- the averaged weights -----------------------------------------------------------------------

def test_ema_against_a_loop_by_hand():
    network = nn.Linear(2, 1)
    ema = EMA(network, 0.6)
    mean, n = network.weight.detach().double().clone(), 0
    for i in range(12):
        with torch.no_grad():
            network.weight.copy_(normal(1, 2, seed=i, dtype=torch.float32))
        ema.update(network)
        n += 1
        decay = min(0.6, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * network.weight.detach().double()
    assert torch.allclose(ema.shadow["weight"].double(), mean, atol=1e-6)
    assert (1 + n) / (10 + n) < 0.6 < (1 + n + 4) / (10 + n + 4)      # the rise is not over yet
    for _ in range(12, 20):
        ema.update(network)
        n += 1
        mean = (d := min(0.6, (1 + n) / (10 + n))) * mean + (1 - d) * network.weight.detach()
    assert torch.allclose(ema.shadow["weight"].double(), mean, atol=1e-6)


def test_ema_keeps_its_own_copy_and_comes_back():
    network = nn.Linear(2, 1)
    ema = EMA(network, 0.9)
    before = ema.shadow["weight"].clone()
    with torch.no_grad():
        network.weight.add_(1)
    assert torch.equal(ema.shadow["weight"], before)
    ema.update(network)
    other = EMA(nn.Linear(2, 1), 0.9)
    other.load_state_dict(ema.state_dict())
    ema.update(network)
    other.update(network)
    assert torch.equal(other.shadow["weight"], ema.shadow["weight"])

# ---- randomness ---------------------------------------------------------------------------------

def test_every_step_of_every_seed_has_its_own_stream():
    def first(seed, step):
        return torch.randn(3, generator=step_generator(seed, step)).tolist()
    found = {(s, k): tuple(first(s, k)) for s in range(30) for k in range(30)}
    assert len(set(found.values())) == 900
    assert list(found[3, 4]) == first(3, 4)
    # neighbours are unrelated: the mean product of 870 pairs of normals
    pairs = [np.dot(found[s, k], found[s, k + 1]) / 3 for s in range(30) for k in range(29)]
    assert abs(np.mean(pairs)) < 5 / math.sqrt(3 * len(pairs))


def test_seeded_networks_and_the_global_state():
    torch.manual_seed(9)
    wanted = torch.randn(2)
    torch.manual_seed(9)
    a, b, c = (seeded(seed, nn.Conv2d, 3, 4, kernel_size=3) for seed in (1, 1, 2))
    assert torch.equal(torch.randn(2), wanted)
    assert torch.equal(a.weight, b.weight) and not torch.equal(a.weight, c.weight)


# ---- the learning rate --------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 5, 100, 1600])
def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine(steps):
    rates = np.array([learning_rate(k, steps, 0.2) for k in range(steps)])
    top = max(1, round(steps / 10))
    assert np.allclose(rates[:top], 0.2 * np.arange(1, top + 1) / top)
    k = np.arange(top, steps)
    assert np.allclose(rates[top:], 0.2 * np.cos((k - top) / max(1, steps - top) * np.pi / 2) ** 2)
    assert rates.max() == pytest.approx(0.2) and (rates > 0).all()
    if steps >= 100:
        assert rates[-1] < 0.001 * 0.2 and (np.diff(rates[top:]) < 0).all()


def test_fit_walks_as_far_as_the_learning_rates_say():
    """On a constant gradient Adam moves by exactly the learning rate; decay shrinks the weight."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    fit(network, pick, lambda *_: 3 * network.weight.sum(), steps=30, lr=0.01, seed=0,
        weight_decay=0.1)
    w = 2.0
    for k in range(30):
        rate = learning_rate(k, 30, 0.01)
        w = w * (1 - 0.1 * rate) - rate
    assert network.weight.item() == pytest.approx(w, abs=1e-5)


def test_fit_cuts_a_long_gradient_to_length_1():
    """One huge gradient among small ones: Adam's memory would show it for 100 steps if uncut."""
    def path(huge):
        network, number = nn.Linear(1, 1, bias=False), iter(range(40))
        nn.init.constant_(network.weight, 0.0)
        fit(network, pick, lambda *_: network.weight.sum() * (huge if next(number) == 5 else 1.0),
            steps=40, lr=0.01, seed=0)
        return network.weight.item()
    assert path(1e6) == pytest.approx(path(1.0), abs=1e-5)


# ---- fit ----------------------------------------------------------------------------------------

def run(network, ema=None, **arguments):
    def loss(batch, generator):
        x = torch.randn(6, 3, 4, 4, generator=generator)
        return (network(x)[:, 0] - x.mean((1, 2, 3))).square().mean()
    return fit(network, pick, loss, steps=70, lr=0.01, seed=4, ema=ema, **arguments)


@pytest.mark.parametrize("with_ema", [False, True])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(with_ema):
    def start(seed):                                         # BatchNorm has buffers of its own
        norm = nn.GroupNorm(1, 4) if with_ema else nn.BatchNorm2d(4)
        network = seeded(seed, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(),
                                                     nn.Linear(16, 1)))
        return network, EMA(network, 0.95) if with_ema else None

    files = []

    def save(state):
        files.append(io.BytesIO())
        torch.save(state, files[-1])
    network, ema = start(1)
    history = run(network, ema, save=save)
    assert len(files) == 3 and len(history) == 4             # at 20, 40, 60; 70 is the end
    for file in files:
        file.seek(0)
        again, again_ema = start(2)
        torch.manual_seed(123)                               # the global state has no say
        found = run(again, again_ema, state=torch.load(file, weights_only=True))
        assert found == history
        for key, value in network.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        if with_ema:
            assert again_ema.updates == ema.updates == 70
            assert all(torch.equal(again_ema.shadow[k], v) for k, v in ema.shadow.items())


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_a_loss_that_is_not_finite_names_the_images_of_its_batch(shape):
    network, names, seen = nn.Linear(1, 1), np.array([f"image-{i}" for i in range(90)]), []

    def draw(generator):
        return torch.randint(90, shape, generator=generator)

    def loss(batch, generator):
        seen.append(names[batch].ravel().tolist())
        return network.weight.sum() * (math.nan if len(seen) == 8 else 1.0)
    with pytest.raises(FloatingPointError) as error:
        fit(network, draw, loss, steps=20, lr=0.0, seed=3, names=names)
    assert str(error.value).endswith(f"at step 7 of 20, on the images {', '.join(seen[7])}")


def test_a_gradient_that_is_not_finite_is_never_saved():
    """sqrt has value 0 and an infinite slope at 0: the loss looks well, the weights are lost."""
    network, saved = nn.Linear(1, 1, bias=False), []
    nn.init.zeros_(network.weight)
    with pytest.raises(FloatingPointError, match="at step 0 of 40"):
        fit(network, pick, lambda *_: network.weight.abs().sqrt().sum(), steps=40, lr=0.01, seed=0,
            save=saved.append)
    assert not saved


@pytest.mark.parametrize("bad", [0, 7, 19, 27, 44])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(bad, value):
    network, calls = nn.Linear(1, 1), []

    def loss(batch, generator):
        calls.append(1)
        return network.weight.sum() * (float(value) if len(calls) == bad + 1 else 1.0)
    with pytest.raises(FloatingPointError, match=f"not finite at step {bad} of 45"):
        fit(network, pick, loss, steps=45, lr=0.01, seed=0)
    assert len(calls) <= bad + 20


def test_no_state_is_saved_once_the_loss_is_not_finite():
    network, calls, saved = nn.Linear(1, 1), [], []

    def loss(batch, generator):
        calls.append(1)
        return network.weight.sum() * (math.nan if len(calls) == 30 else 1.0)
    with pytest.raises(FloatingPointError):
        fit(network, pick, loss, steps=60, lr=0.01, seed=0,
            save=lambda s: saved.append(s["step"]))
    assert saved == [20]


def test_progress_is_the_mean_loss_of_20_steps_and_the_modes_are_right():
    network, modes, told, k = nn.Linear(1, 1), [], [], iter(range(50))

    def loss(batch, generator):
        modes.append(network.training)
        return 0 * network.weight.sum() + next(k)
    history = fit(network.eval(), pick, loss, steps=50, lr=0.01, seed=0,
                  on_step=lambda *seen: told.append(seen))
    assert history == [9.5, 29.5, 44.5]
    assert told == [(20, 50, 9.5), (40, 50, 29.5), (50, 50, 44.5)]
    assert all(modes) and not network.training


def test_fit_draws_from_its_seed_alone():
    def first(seed):
        network = nn.Linear(1, 1, bias=False)
        seen = []

        def loss(batch, generator):
            seen.append(torch.rand(1, generator=generator).item())
            return network.weight.sum()
        fit(network, pick, loss, steps=5, lr=0.0, seed=seed)
        return seen
    assert first(1) == first(1) and not set(first(1)) & set(first(2))
    assert first(1) == [torch.rand(1, generator=step_generator(1, k)).item() for k in range(5)]


# ---- the way from a student to its network ------------------------------------------------------

def test_from_a_student_to_its_network_there_are_five_frames(tmp_path):
    """Every function of this program between loop.student and ResNet.forward, seen from inside."""
    root, found = Path(loop.__file__).parent, []
    config = configuration.load(root / "configs/tiny.yaml", ["classifier.steps=1"])

    def look(module, given):
        if isinstance(module, ResNet):
            frame, names = sys._getframe(1), []
            while frame.f_code is not loop.student.__code__:
                path = Path(frame.f_code.co_filename)
                if root in path.parents and "site-packages" not in path.parts:
                    names.append((str(path.relative_to(root)), frame.f_code.co_name))
                frame = frame.f_back
            found.append(names[::-1])
    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        images = load_phantom(config.data, "val", 40)
        loop.student(Run(tmp_path, config), "one", images, np.ones(40), 3, 0.3)
    finally:
        hook.remove()
    assert found == [[("engine/run.py", "train"), ("classifier.py", "train"),
                      ("engine/training.py", "fit"), ("engine/training.py", "step"),
                      ("classifier.py", "loss")]]


def test_float64_everywhere_but_on_apples_gpu_which_has_none():
    assert wide("cpu") is wide(torch.device("cuda:1")) is torch.float64
    assert wide("mps") is wide(torch.device("mps")) is torch.float32
    found = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == ("mps" if torch.backends.mps.is_available() else found)
