"""classifier.py: the published ResNet-18's shape, plain functions on its weights, numpy, toys."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import classifier
from classifier import ResNet, balanced_weights, build, predict
from engine.augment import random_shift, random_turn, to_float
from engine.training import seeded
from extras.outcome import extract_features
from oracle import normal as drawn_normal


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return drawn_normal(*shape, seed=seed, dtype=torch.float32)


def settled(network, seed=0):
    """Weights and BatchNorm statistics away from where they start, in eval mode."""
    with torch.no_grad():
        for i, (name, value) in enumerate(network.state_dict().items()):
            if value.is_floating_point():
                draw = normal(*value.shape, seed=seed + i)
                value.copy_(draw.abs() + 0.5 if name.endswith("running_var") else
                            value + 0.1 * draw)
    return network.eval()


# ---- the network --------------------------------------------------------------------------------

COUNTS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}


def published(network):
    """Names and shapes of the published weights, from the paper's Table 1."""
    shapes = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name, channels):
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{key}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()
    norm("bn1", 64)
    before, times = 64, 4 if network == "resnet50" else 1
    depths = (2, 2, 2, 2) if network == "resnet18" else (3, 4, 6, 3)
    for layer, (blocks, channels) in enumerate(zip(depths, (64, 128, 256, 512)), start=1):
        for block in range(blocks):
            name, out = f"layer{layer}.{block}", times * channels
            kernels = ([(channels, before, 1, 1), (channels, channels, 3, 3), (out, channels, 1, 1)]
                       if times == 4 else [(channels, before, 3, 3), (channels, channels, 3, 3)])
            for i, shape in enumerate(kernels, start=1):
                shapes[f"{name}.conv{i}.weight"] = shape
                norm(f"{name}.bn{i}", shape[0])
            if before != out:
                shapes[f"{name}.downsample.0.weight"] = (out, before, 1, 1)
                norm(f"{name}.downsample.1", out)
            before = out
    return shapes | {"fc.weight": (1000, before), "fc.bias": (1000,)}


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_names_shapes_and_counts(name):
    with torch.device("meta"):                               # shapes without memory
        network = build(name, 224, 1000, published=True)
    found = {name: tuple(v.shape) for name, v in network.state_dict().items()}
    assert found == published(name)
    assert sum(p.numel() for p in network.parameters()) == COUNTS[name]


def test_build_chooses_by_size():
    def count(*arguments):
        return sum(p.numel() for p in build(*arguments).parameters())
    assert count("auto", 64, 4) == count("resnet18", 64, 4) == 11_689_512 - 996 * 513
    assert count("auto", 32, 4) == count("small", 32, 4) == count("small", 64, 4) < 400_000
    assert build("small", 32, 4, 50).noise_levels == 50 and build("auto", 32, 4).noise_levels == 0


def plain(s, x, t=None, levels=0, pool=False):
    """The same logits from the state dict `s` by F.conv2d and F.batch_norm alone."""
    def norm(h, name):
        return F.batch_norm(h, *(s[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight",
                                                            "bias")), training=False)
    c = None
    if t is not None:
        width = s["conv1.weight"].shape[0]
        waves = torch.tensor([[math.cos(k * math.pi / 2 * v / levels) for k in range(1, width + 1)]
                              for v in t.tolist()])
        c = F.silu(F.linear(waves, s["time.0.weight"], s["time.0.bias"]))
    h = F.relu(norm(F.conv2d(x, s["conv1.weight"], stride=2,
                             padding=s["conv1.weight"].shape[-1] // 2), "bn1"))
    if pool or x.shape[-1] >= 128:
        h = F.max_pool2d(h, 3, 2, 1)
    blocks = sorted({tuple(k.split(".")[:2]) for k in s if k.startswith("layer")})
    for layer, block in blocks:
        name = f"{layer}.{block}"
        step = 2 if layer != "layer1" and block == "0" else 1
        deep = f"{name}.conv3.weight" in s                   # then the 3x3 one takes the stride
        r = norm(F.conv2d(h, s[f"{name}.conv1.weight"], stride=1 if deep else step,
                          padding=0 if deep else 1), f"{name}.bn1")
        if c is not None:
            shift = F.linear(c, s[f"{name}.time.weight"], s[f"{name}.time.bias"])
            r = r + shift.view(*shift.shape, 1, 1)
        r = norm(F.conv2d(F.relu(r), s[f"{name}.conv2.weight"], stride=step if deep else 1,
                          padding=1), f"{name}.bn2")
        if deep:
            r = norm(F.conv2d(F.relu(r), s[f"{name}.conv3.weight"]), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in s:
            h = norm(F.conv2d(h, s[f"{name}.downsample.0.weight"], stride=step),
                     f"{name}.downsample.1")
        h = F.relu(h + r)
    return F.linear(h.mean((2, 3)), s["fc.weight"], s["fc.bias"])


@pytest.mark.parametrize("blocks, stem, size, bottleneck", [
    ((1, 1, 1), "small", 16, False), ((2, 1), "large", 32, False), ((2, 1), "large", 32, True),
    ((2, 2, 2, 2), "large", 128, False)])
@pytest.mark.parametrize("levels", [0, 50])
def test_forward_against_plain_functions(blocks, stem, size, bottleneck, levels):
    torch.manual_seed(0)
    network = settled(ResNet(5, blocks, 8, stem, levels, bottleneck))
    x, t = normal(3, 3, size, size), torch.tensor([0, 20, 49]) if levels else None
    found, wanted = network(x, t), plain(network.state_dict(), x, t, levels)
    assert found.shape == (3, 5) and torch.allclose(found, wanted, atol=1e-4)
    assert torch.allclose(network.fc(network.features(x, t)), found)
    if levels:                                                   # and the level matters
        assert (network(x, t.flip(0)) - found)[[0, 2]].abs().mean() > 0.01


def test_a_guide_needs_t_and_a_student_refuses_it():
    x, t = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="guide needs t"):
        build("small", 16, 3, noise_levels=10)(x)
    with pytest.raises(ValueError, match="student takes none"):
        build("small", 16, 3)(x, t)


# ---- how often each image is drawn --------------------------------------------------------------

def test_balanced_weights_by_hand():
    assert np.allclose(balanced_weights(np.array([0, 0, 0, 2])), [1 / 6, 1 / 6, 1 / 6, 1 / 2])
    labels, cells = np.array([0, 0, 0, 0, 1, 1]), np.array([5, 5, 5, -1, 7, 7])
    assert np.allclose(balanced_weights(labels, cells),
                       [1 / 12, 1 / 12, 1 / 12, 1 / 4, 1 / 4, 1 / 4])


def test_balanced_weights_even_out_any_counts():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 500, p=[0.7, 0.2, 0.07, 0.03])
    cells = rng.choice(3, 500, p=[0.8, 0.15, 0.05])
    for given in (None, cells):
        w = balanced_weights(labels, given)
        assert math.isclose(w.sum(), 1)
        assert np.allclose([w[labels == c].sum() for c in range(4)], 1 / 4)
    for c in range(4):
        sums = [w[(labels == c) & (cells == k)].sum() for k in np.unique(cells[labels == c])]
        assert np.allclose(sums, sums[0])


class Reader(nn.Module):
    """Knows every image: image i is flat grey of value 10 i, and its label is i % 3."""

    def __init__(self):
        super().__init__()
        self.scale, self.drawn, self.levels = nn.Parameter(torch.ones(())), [], []

    def forward(self, x, t=None):
        index = ((x.mean((1, 2, 3)) + 1) * 12.75).round().long()
        self.drawn.append(index)
        self.levels.append(t)
        return self.scale * 50 * F.one_hot(index % 3, 3)


def greys(n=8):
    return (10 * torch.arange(n)).to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, 16, 16).contiguous()


def test_images_are_drawn_as_often_as_their_weights_say_with_their_own_labels():
    weights = torch.tensor([0.0, 1, 2, 3, 0, 4, 5, 0])
    network = Reader()
    history = classifier.train(network, greys(), torch.arange(8) % 3, weights, steps=40, batch=250,
                               lr=0.0, jitter=0.0, seed=0)
    counts, n = np.bincount(torch.cat(network.drawn), minlength=8), 10_000
    p = weights.numpy() / 15
    assert counts.sum() == n and (counts[p == 0] == 0).all()
    assert (abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()
    assert max(history) < 1e-6                               # any wrong label would cost 50


def test_an_index_is_drawn_where_its_share_of_the_sum_lies():
    """By brute force: the first index whose cumulative share is not below the number drawn."""
    weights = torch.tensor([0.0, 3, 0, 1, 5, 0, 0.5])
    found = classifier.pick(classifier.cumulative(weights), 300, generator(3)).tolist()
    shares = np.cumsum(weights.numpy()) / weights.sum().item()
    u = torch.rand(300, generator=generator(3), dtype=torch.float64).tolist()
    assert found == [next(i for i in range(7) if shares[i] >= v) for v in u]
    assert set(found) == {1, 3, 4, 6}


@pytest.mark.parametrize("guide", [False, True])
def test_the_loss_is_the_cross_entropy_of_what_the_network_is_shown(guide):
    """Turned and shifted by the stream of the step (nothing else draws before), or noised."""
    images = torch.randint(256, (9, 3, 16, 16), generator=generator(), dtype=torch.uint8)
    labels, index = torch.arange(9) % 5, torch.tensor([3, 3, 8, 0])
    network, levels = seeded(1, ResNet, 5, (1,), 8, "small", 10 * guide).eval(), [4, 0, 9, 1]

    def noise(x0, generator):
        return x0 / 2 - 0.1, torch.tensor(levels)
    found = classifier.loss(network, images, labels, 0.0, noise if guide else None, index,
                            generator(5))
    stream = generator(5)
    x = random_turn(to_float(images[[3, 3, 8, 0]]), stream)
    logits = (network(x / 2 - 0.1, torch.tensor(levels)) if guide else
              network(random_shift(x, stream, 1)))
    p = torch.softmax(logits, 1).detach().numpy()
    assert found.item() == pytest.approx(-np.log(p[range(4), [3, 3, 3, 0]]).mean(), rel=1e-4)


def test_a_guide_is_trained_on_noised_images_and_their_levels():
    network = Reader()

    def noise(x0, generator):
        return x0 + 20 / 127.5, torch.randint(7, (len(x0),), generator=generator)
    classifier.train(network, greys(), torch.arange(8) % 3, torch.ones(8), steps=5, batch=50,
                     lr=0.0, jitter=0.0, seed=0, noise=noise)
    assert min(map(min, network.drawn)) == 2 and max(map(max, network.drawn)) == 9
    assert torch.cat(network.levels).unique().tolist() == list(range(7))


# ---- training and prediction --------------------------------------------------------------------

def toy(n, seed):
    """Class 1 has a dark spot somewhere, class 0 a bright one, on skin of any brightness."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.integers(90, 170, (n, 1, 1, 1)) + rng.integers(-5, 6, (n, 3, 16, 16))
    for image, label in zip(images, labels):
        i, j = rng.integers(2, 10, 2)
        image[:, i:i + 4, j:j + 4] += -60 if label else 60
    return torch.tensor(images.clip(0, 255).astype(np.uint8)), torch.tensor(labels)


def learnt(**more):
    images, labels = toy(100, 0)
    network = seeded(3, ResNet, 2, (1, 1), 8, "small")
    classifier.train(network, images, labels, torch.ones(100), steps=80, batch=32, lr=0.01,
                     jitter=0.2, seed=1, **more)
    return network


@pytest.fixture(scope="module")
def states():
    """What training saves on its way; `student` fills it."""
    return []


@pytest.fixture(scope="module")
def student(states):
    return learnt(save=lambda state: states.append(copy.deepcopy(state)))


def test_a_toy_is_learnt_and_unseen_images_are_recognised(student):
    images, labels = toy(200, 1)
    assert not student.training
    assert (predict(student, images).argmax(1) == labels.numpy()).mean() == 1


def test_a_resumed_student_is_the_unbroken_one_to_the_bit(student, states):
    assert [state["step"] for state in states] == [20, 40, 60]
    again = learnt(state=states[1])
    assert all(torch.equal(again.state_dict()[k], v) for k, v in student.state_dict().items())


def test_predictions_are_rows_of_probabilities_whatever_the_batch(student):
    images, _ = toy(520, 2)                                  # more than it takes at once
    whole = predict(student.train(), images)                 # it asks for eval mode itself
    assert whole.shape == (520, 2) and whole.dtype == np.float32
    assert np.allclose(whole.sum(1), 1, atol=1e-6)
    for part in (slice(0, 1), slice(3, 40), slice(490, 520)):
        assert np.allclose(predict(student, images[part]), whole[part], atol=1e-5)
    assert np.allclose(predict(student, images.flip(0))[::-1], whole, atol=1e-5)
    logits = plain(student.state_dict(), images.float() / 127.5 - 1).double()
    assert np.allclose(whole, torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True), atol=1e-4)


def test_extracted_features_are_what_the_last_layer_sees(student):
    images, _ = toy(505, 3)
    features = extract_features(student.eval(), images)
    logits = torch.tensor(features) @ student.fc.weight.T + student.fc.bias
    assert features.shape == (505, 16)
    assert np.allclose(logits.softmax(1).detach(), predict(student, images), atol=1e-5)
