"""training.py: the optimiser's path by hand, resuming to the bit, random streams, pixel values."""
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddpm
from ddpm import EMA
from engine.training import (fit, learning_rate, random_turn, seeded, step_generator, to_float, to_uint8)
from unet import UNet


# ---- pixels -------------------------------------------------------------------------------------

def test_all_256_values_come_back():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    f = to_float(x)
    assert f.dtype == torch.float32 and f.min() == -1 and f.max() == 1
    assert np.allclose(f.flatten(), np.arange(256) * 2 / 255 - 1, atol=1e-6)
    assert torch.equal(to_uint8(f), x)


def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-3.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.999, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_random_turn_yields_the_8_symmetries_and_nothing_else():
    one = torch.arange(2 * 9.0).view(1, 2, 3, 3)
    turned = [np.rot90(m, k, (2, 3)) for m in (one.numpy(), one.numpy()[..., ::-1])
              for k in range(4)]
    assert len({t.tobytes() for t in map(np.ascontiguousarray, turned)}) == 8
    n = 4000
    found = random_turn(one.expand(n, 2, 3, 3), torch.Generator().manual_seed(0)).numpy()
    which = np.array([[np.array_equal(f, t[0]) for t in turned] for f in found])
    assert (which.sum(1) == 1).all()
    assert abs(which.sum(0) - n / 8).max() < 5 * math.sqrt(n / 8)


def test_random_turn_turns_each_image_by_itself():
    x = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found = random_turn(x, torch.Generator().manual_seed(0))
    assert torch.equal(found.flatten(2).sort(-1)[0], x.flatten(2).sort(-1)[0])
    assert torch.equal(found, random_turn(x, torch.Generator().manual_seed(0)))


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
    def build():
        return nn.Conv2d(3, 4, 3)
    torch.manual_seed(9)
    wanted = torch.randn(2)
    torch.manual_seed(9)
    a, b, c = seeded(1, build), seeded(1, build), seeded(2, build)
    assert torch.equal(torch.randn(2), wanted)
    assert torch.equal(a.weight, b.weight) and not torch.equal(a.weight, c.weight)


def pick(generator):
    """A batch of the one image there is."""
    return torch.zeros(1, dtype=torch.int64)


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
        network, step = nn.Linear(1, 1, bias=False), iter(range(40))
        nn.init.constant_(network.weight, 0.0)
        fit(network, pick, lambda *_: network.weight.sum() * (huge if next(step) == 5 else 1.0),
            steps=40, lr=0.01, seed=0)
        return network.weight.item()
    assert path(1e6) == pytest.approx(path(1.0), abs=1e-5)


# ---- fit ----------------------------------------------------------------------------------------

def run(network, ema=None, **arguments):
    def loss_fn(batch, generator, part):
        x = torch.randn(6, 3, 4, 4, generator=generator)
        return (network(x)[:, 0] - x.mean((1, 2, 3))).square().mean()
    return fit(network, pick, loss_fn, steps=70, lr=0.01, seed=4, ema=ema, **arguments)


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
    history = run(network, ema, save=save, save_every=20)
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

    def loss_fn(batch, generator, part):
        seen.append(names[batch].ravel().tolist())
        return network.weight.sum() * (math.nan if len(seen) == 8 else 1.0)
    with pytest.raises(FloatingPointError) as error:
        fit(network, draw, loss_fn, steps=20, lr=0.0, seed=3, names=names)
    assert str(error.value).endswith(f"at step 7 of 20, on the images {', '.join(seen[7])}")


def test_a_gradient_that_is_not_finite_is_never_saved():
    """sqrt has value 0 and an infinite slope at 0: the loss looks well, the weights are lost."""
    network, saved = nn.Linear(1, 1, bias=False), []
    nn.init.zeros_(network.weight)
    with pytest.raises(FloatingPointError, match="at step 0 of 40"):
        fit(network, pick, lambda *_: network.weight.abs().sqrt().sum(), steps=40, lr=0.01, seed=0,
            save=saved.append, save_every=20)
    assert not saved


@pytest.mark.parametrize("limit", [3, 1])
def test_out_of_memory_gives_the_same_optimisation_in_parts(limit, capsys):
    """A batch of 10 where 3 images, or 1, are all that fit, against one in which 10 do."""
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3

    def trained(most):
        network, whole = seeded(1, lambda: UNet(8, 3, 2, 16, (1, 2), 1, 4, 1)), UNet.forward
        sizes = []

        def forward(x, *rest):
            sizes.append(len(x))
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(network, x, *rest)
        network.forward = forward
        history = ddpm.train(network, ddpm.Schedule(20), images, labels, labels % 2, steps=5,
                             batch=10, lr=1e-3, ema_decay=0.5, prediction="v", drop=0.3, seed=5)
        return network, history, sizes
    (a, history_a, _), (b, history_b, sizes) = trained(10), trained(limit)
    # tries of 10, then 5, then what fits; of 10 rows the parts differ in length by one at most
    steps = 5 * ([3, 3, 2, 2] if limit == 3 else [1] * 10)
    assert sizes == ([10, 5] if limit == 3 else [10, 5, 3, 2]) + steps
    assert history_a == pytest.approx(history_b, rel=1e-5)
    for one, other in zip(a.state_dict().values(), b.state_dict().values()):
        assert torch.allclose(one, other, atol=1e-5)
    error = capsys.readouterr().err.splitlines()
    assert len(error) == (2 if limit == 3 else 4) and all("out of memory in step 0" in line
                                                          for line in error)


def test_one_image_that_does_not_fit_is_an_error():
    def loss_fn(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        fit(nn.Linear(1, 1), pick, loss_fn, steps=5, lr=0.0, seed=0)


@pytest.mark.parametrize("bad", [0, 7, 19, 27, 44])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(bad, value):
    network, calls = nn.Linear(1, 1), []

    def loss_fn(batch, generator, part):
        calls.append(1)
        return network.weight.sum() * (float(value) if len(calls) == bad + 1 else 1.0)
    with pytest.raises(FloatingPointError, match=f"not finite at step {bad} of 45"):
        fit(network, pick, loss_fn, steps=45, lr=0.01, seed=0)
    assert len(calls) <= bad + 20


def test_no_state_is_saved_once_the_loss_is_not_finite():
    network, calls, saved = nn.Linear(1, 1), [], []

    def loss_fn(batch, generator, part):
        calls.append(1)
        return network.weight.sum() * (math.nan if len(calls) == 30 else 1.0)
    with pytest.raises(FloatingPointError):
        fit(network, pick, loss_fn, steps=60, lr=0.01, seed=0, save_every=20,
            save=lambda s: saved.append(s["step"]))
    assert saved == [20]


def test_progress_is_the_mean_loss_of_20_steps_and_the_modes_are_right():
    network, modes, told, k = nn.Linear(1, 1), [], [], iter(range(50))

    def loss_fn(batch, generator, part):
        modes.append(network.training)
        return 0 * network.weight.sum() + next(k)
    history = fit(network.eval(), pick, loss_fn, steps=50, lr=0.01, seed=0,
                  on_step=lambda *seen: told.append(seen))
    assert history == [9.5, 29.5, 44.5]
    assert told == [(20, 50, 9.5), (40, 50, 29.5), (50, 50, 44.5)]
    assert all(modes) and not network.training


def test_fit_draws_from_its_seed_alone():
    def first(seed):
        network = nn.Linear(1, 1, bias=False)
        seen = []

        def loss_fn(batch, generator, part):
            seen.append(torch.rand(1, generator=generator).item())
            return network.weight.sum()
        fit(network, pick, loss_fn, steps=5, lr=0.0, seed=seed)
        return seen
    assert first(1) == first(1) and not set(first(1)) & set(first(2))
    assert first(1) == [torch.rand(1, generator=step_generator(1, k)).item() for k in range(5)]
