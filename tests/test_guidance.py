"""guidance.py: gradients by finite differences, off that is exactly off, and known directions."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ddpm
import loop
from classifier import ResNet
from data import ImageSet
from engine.training import Noise
from ddpm import SAMPLERS, Schedule, even_times, sample_ddim
from engine import config as configuration
from extras import children
from engine.augment import to_float
from engine.run import Run, derive
from engine.training import seeded
from guidance import (OBJECTIVES, Generator, Tally, class_evidence, counterfactual, gradient,
                      guided_eps, hardness, normalise, synthesise, variation)
from oracle import Gaussian, normal, paper_abar
from unet import UNet

T = 50
TINY = Path(__file__).parents[1] / "configs/tiny.yaml"


def settled(network, seed=0):
    """Random weights and BatchNorm statistics, in float64 and eval mode."""
    with torch.no_grad():
        for i, (name, value) in enumerate(network.state_dict().items()):
            if value.is_floating_point():
                draw = normal(*value.shape, seed=seed + i, dtype=value.dtype)
                value.copy_(draw.abs() + 0.5 if name.endswith("running_var") else
                            value + 0.2 * draw)
    if isinstance(network, ResNet) and network.noise_levels:
        # The level's waves are float32; they do not depend on x_t.
        network.time.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    return network.double().eval()


@pytest.fixture(scope="module")
def guide():
    torch.manual_seed(0)
    return settled(ResNet(3, (1, 1), 8, "small", T))


@pytest.fixture(scope="module")
def students():
    torch.manual_seed(1)
    return [settled(ResNet(2, (1, 1), 8, "small"), seed=100 * k) for k in range(2)]


def noisy(t):
    """x_t and eps of images at the levels t, some of whose x0_hat the clip will touch."""
    t = torch.tensor(t)
    x0, eps = normal(len(t), 3, 8, 8).mul(0.5), normal(len(t), 3, 8, 8, seed=1)
    a = torch.tensor(paper_abar(T, "cosine"))[t + 1].view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps, t, eps


def estimate(x_t, t, eps):
    """The clipped x0_hat, from the paper's formula."""
    a = torch.tensor(paper_abar(T, "cosine"))[t + 1].view(-1, 1, 1, 1)
    return ((x_t - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)


def finite_differences(make, x_t, t, eps, h=1e-6):
    """d make(i, rows)(x_t, t, x0_hat) / d x_t pixel by pixel, image i alone at a time."""
    found = torch.zeros_like(x_t)
    n = x_t[0].numel()
    for i in range(len(x_t)):
        steps = h * torch.cat([torch.eye(n), -torch.eye(n)]).double().view(-1, *x_t.shape[1:])
        rows, level = x_t[i] + steps, t[i].expand(2 * n)
        value = make(i, 2 * n)(rows, level, estimate(rows, level, eps[i])).detach()
        found[i] = ((value[:n] - value[n:]) / (2 * h)).view(x_t.shape[1:])
    return found


def check_gradient(make_all, make_one, t=(2, 20, 40)):
    x_t, t, eps = noisy(list(t))
    found = gradient(make_all, Schedule(T), x_t, t, eps)
    wanted = finite_differences(make_one, x_t, t, eps)
    assert (wanted.flatten(1).abs().amax(1) > 1e-6).all()
    for a, b in zip(found, wanted):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    return found


# ---- the gradients ------------------------------------------------------------------------------

def test_class_evidence_gradient(guide):
    y = torch.tensor([0, 1, 2])
    check_gradient(class_evidence(guide, y), lambda i, n: class_evidence(guide, y[i].expand(n)))


def test_class_evidence_is_the_log_probability_of_the_noisy_image(guide):
    x_t, t, _ = noisy([2, 20, 40])
    y = torch.tensor([2, 0, 1])
    logits = guide(x_t, t).detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose(class_evidence(guide, y)(x_t, t, None).detach(), np.log(p[range(3), y]))


def votes(students, x_t, t, eps):
    return torch.stack([s(estimate(x_t, t, eps)).softmax(1) for s in students]).mean(0).detach()


def test_hardness_gradient_below_the_cap(students):
    y = votes(students, *noisy([2, 20, 40])).argmax(1)           # where p > 1/2, -log p < log 2
    check_gradient(hardness(students, y), lambda i, n: hardness(students, y[i].expand(n)))


def test_hardness_by_hand_and_flat_above_the_cap(students):
    x_t, t, eps = noisy([2, 20, 40])
    p = votes(students, x_t, t, eps).numpy()
    for y in (p.argmax(1), p.argmin(1)):
        value = hardness(students, torch.tensor(y))(x_t, t, estimate(x_t, t, eps))
        assert np.allclose(value.detach(), np.minimum(-np.log(p[range(3), y]), 0.69))
    y = torch.tensor(p.argmin(1))
    assert (gradient(hardness(students, y), Schedule(T), x_t, t, eps) == 0).all()
    uncapped = gradient(hardness(students, y, cap=9), Schedule(T), x_t, t, eps)
    assert (uncapped.flatten(1).abs().amax(1) > 1e-6).all()


def test_the_objective_sees_a_clipped_estimate_and_no_gradient_passes_the_clip():
    x_t, t, eps = noisy([45])
    seen = []

    def objective(x_t, t, x0_hat):
        seen.append(x0_hat.detach())
        return x0_hat.sum((1, 2, 3))
    found = gradient(objective, Schedule(T), x_t, t, eps)
    assert torch.allclose(seen[0], estimate(x_t, t, eps), atol=1e-9)
    clipped = estimate(x_t, t, eps).abs() == 1
    assert clipped.any() and (~clipped).any()
    a = paper_abar(T, "cosine")[46]
    assert (found[clipped] == 0).all()
    assert torch.allclose(found[~clipped], torch.tensor(1 / math.sqrt(a), dtype=torch.float64))


def test_a_gradient_is_taken_inside_no_grad_too(guide):
    x_t, t, eps = noisy([2, 20])
    objective = class_evidence(guide, torch.tensor([0, 1]))
    with torch.no_grad():
        found = gradient(objective, Schedule(T), x_t, t, eps)
    assert not found.requires_grad and (found != 0).any() and not x_t.requires_grad


@pytest.mark.parametrize("build", [lambda n: class_evidence(n, torch.zeros(1, dtype=torch.int64)),
                                   lambda n: hardness([n], torch.zeros(1, dtype=torch.int64))])
def test_networks_in_train_mode_are_refused(build):
    network = ResNet(3, (1, 1), 8, "small")
    build(network.eval())
    with pytest.raises(ValueError, match="eval mode"):
        build(network.train())


def test_one_student_in_train_mode_among_others_is_refused():
    mixed = [ResNet(2, (1,), 8, "small").eval(), ResNet(2, (1,), 8, "small")]
    with pytest.raises(ValueError, match="eval mode"):
        hardness(mixed, torch.zeros(1, dtype=torch.int64))


# ---- normalise ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalise_by_hand_image_by_image(dtype):
    sizes = torch.tensor([1e-3, 1, 50, 7], dtype=dtype).view(4, 1, 1, 1)
    grad = normal(4, 3, 8, 8, dtype=dtype) * sizes
    wanted = [g / np.sqrt((g ** 2).mean()) for g in grad.double().numpy()]
    assert np.allclose(normalise(grad), wanted, atol=1e-5)
    assert normalise(grad).dtype == dtype


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-10, 1e10, 1e30])
def test_normalise_does_not_depend_on_the_size(size):
    grad = normal(2, 3, 8, 8, dtype=torch.float32)
    close = 1e-4 if size > 1e-38 else 1e-2                       # few digits are left at 1e-40
    assert torch.allclose(normalise((grad.double() * size).float()), normalise(grad), atol=close)


def test_a_tiny_gradient_beside_a_huge_one_keeps_its_own_size():
    grad = normal(2, 3, 8, 8, dtype=torch.float32)
    sizes = torch.tensor([1e-30, 1e30]).view(2, 1, 1, 1)
    assert torch.allclose(normalise(grad * sizes), normalise(grad), atol=1e-4)


def test_zero_stays_zero_and_what_is_not_finite_is_dropped_and_counted():
    tally, grad = Tally(), normal(5, 3, 8, 8, dtype=torch.float32)
    grad[0], grad[1, 2, 3, 4], grad[3, 0, 0, 0] = 0, math.nan, -math.inf
    found = normalise(grad, tally)
    assert tally.nonfinite == 2
    assert (found[[0, 1, 3]] == 0).all()
    assert torch.equal(found[[2, 4]], normalise(grad[[2, 4]], tally))
    assert tally.nonfinite == 2
    normalise(grad)                                              # and without anyone counting
    normalise(grad, tally)
    assert tally.nonfinite == 4


# ---- the wrapper --------------------------------------------------------------------------------

def never(x_t, t, x0_hat):
    raise AssertionError("a term of scale 0 was evaluated")


def towards(target):
    """The known case: its gradient points from x0_hat to the target."""
    return lambda x_t, t, x0_hat: -(x0_hat - target).square().sum((1, 2, 3))


def test_guided_eps_by_hand():
    """Algorithm 2 of Dhariwal & Nichol with the exact gradient of two known objectives."""
    x_t, t, _ = noisy([5, 30])
    x_t = 0.4 * x_t                                              # so that no x0_hat is clipped
    base, a = Gaussian(T), paper_abar(T, "cosine")[[6, 31]][:, None, None, None]
    eps = base(x_t, t).numpy()
    x0 = (x_t.numpy() - np.sqrt(1 - a) * eps) / np.sqrt(a)
    assert np.abs(x0).max() < 1
    push = 0
    for scale, gap in ((0.3, 0.8 - x0), (-0.1, -0.5 - x0)):
        push = push + scale * gap / np.sqrt((gap ** 2).mean((1, 2, 3), keepdims=True))
    found = guided_eps(base, Schedule(T), [(0.3, towards(0.8)), (0, never), (-0.1, towards(-0.5))])
    assert np.allclose(found(x_t, t), eps - np.sqrt(a * (1 - a)) * push, atol=1e-9)


def test_without_a_scale_it_is_the_very_same_callable():
    base, schedule = Gaussian(T), Schedule(T)
    assert guided_eps(base, schedule, []) is base
    assert guided_eps(base, schedule, [(0.0, never), (0, never), (-0.0, never)]) is base


def run(way, wanted):
    """Every way there is to draw with `wanted`, on the same images and noise."""
    schedule, noise, own = Schedule(T), Noise([1, 2, 3]), Gaussian(T)
    x0 = normal(3, 3, 4, 4).mul(0.3).float()
    start, sampler = way.split()
    if start == "counterfactual":
        return counterfactual(own, wanted, schedule, x0, 0.8, 10, SAMPLERS[sampler])
    if start == "variation":
        return variation(wanted, schedule, x0, noise, 0.6, 10, SAMPLERS[sampler])
    return SAMPLERS[sampler](wanted, schedule, noise(3, 4, 4), even_times(10, T - 1), noise)


# A counterfactual decodes its parent's latent, which ddpm's fresh noise would drown: refused.
WAYS = [f"{start} {sampler}" for start in ("noise", "variation", "counterfactual")
        for sampler in SAMPLERS if (start, sampler) != ("counterfactual", "ddpm")]


@pytest.mark.parametrize("way", WAYS)
def test_scale_0_is_unguided_to_the_bit(way):
    off = guided_eps(Gaussian(T), Schedule(T), [(0.0, towards(0.8)), (0.0, never)])
    assert torch.equal(run(way, off), run(way, Gaussian(T)))


@pytest.mark.parametrize("way", WAYS)
def test_guidance_reaches_every_way_of_drawing_and_in_its_direction(way):
    plain, means = run(way, Gaussian(T)), {}
    for target in (-0.9, 0.9):
        for scale in (0.1, 0.5):
            guided = run(way, guided_eps(Gaussian(T), Schedule(T), [(scale, towards(target))]))
            gained = towards(target)(None, None, guided) - towards(target)(None, None, plain)
            assert (gained > 0).all()                            # every image, not only their mean
            means[target, scale] = guided.mean().item()
    assert (means[-0.9, 0.5] < means[-0.9, 0.1] < plain.mean() < means[0.9, 0.1] < means[0.9, 0.5])


def test_the_size_of_the_push_is_as_the_formula_says():
    """One DDIM step from level t to the image: x0_hat moves by scale (1 - abar)."""
    schedule, t = Schedule(T), 10
    a = paper_abar(T, "cosine")[t + 1]
    x = normal(2, 3, 4, 4).mul(0.3)
    plain = sample_ddim(Gaussian(T), schedule, x, [t, -1])
    guided = sample_ddim(guided_eps(Gaussian(T), schedule, [(0.2, lambda x_t, t, x0_hat:
                                                            x0_hat.sum((1, 2, 3)))]),
                         schedule, x, [t, -1])
    moved = torch.tensor(0.2 * (1 - a), dtype=torch.float64)
    assert torch.allclose(guided - plain, moved, atol=1e-9)


def test_no_sample_influences_another_s_guidance(guide, students):
    x_t, t, _ = noisy([2, 20, 40])

    def eps_at(x_t, t, y, tally=None):
        terms = [(0.5, class_evidence(guide, y)), (0.3, hardness(students, y.clamp(max=1), 9))]
        return guided_eps(Gaussian(T), Schedule(T), terms, tally)(x_t, t)
    y = torch.tensor([0, 1, 2])
    base = eps_at(x_t, t, y)
    other_x, other_t, other_y = x_t.clone(), t.clone(), y.clone()
    other_x[1], other_t[1], other_y[1] = 30 * x_t[0], 3, 0
    found = eps_at(other_x, other_t, other_y)
    assert torch.allclose(found[[0, 2]], base[[0, 2]], atol=1e-12)
    assert not torch.allclose(found[1], base[1])
    other_x[1, 0, 0, 0], tally = math.nan, Tally()
    found = eps_at(other_x, t, y, tally)
    assert torch.allclose(found[[0, 2]], base[[0, 2]], atol=1e-12)
    assert tally.nonfinite == 2                                      # the one image, in both terms
    alone = [guided_eps(Gaussian(T), Schedule(T), [(0.5, class_evidence(guide, y[i:i + 1]))])(
        x_t[i:i + 1], t[i:i + 1]) for i in range(3)]
    together = guided_eps(Gaussian(T), Schedule(T), [(0.5, class_evidence(guide, y))])(x_t, t)
    assert torch.allclose(torch.cat(alone), together, atol=1e-12)


def test_a_gradient_that_is_not_finite_leaves_the_image_unguided():
    tally = Tally()

    def broken(x_t, t, x0_hat):
        return (x0_hat - x0_hat.detach()).abs().sum((1, 2, 3)).sqrt()     # inf * 0 at 0
    found = guided_eps(Gaussian(T), Schedule(T), [(1.0, broken)], tally)
    times = even_times(5, T - 1)
    out = sample_ddim(found, Schedule(T), normal(2, 3, 4, 4), times)
    assert torch.equal(out, sample_ddim(Gaussian(T), Schedule(T), normal(2, 3, 4, 4), times))
    assert tally.nonfinite == 2 * 5


def test_guidance_by_real_networks_raises_the_class_evidence():
    """Untrained but real: UNet, guide, sampler, all at once, against the same noise unguided."""
    torch.manual_seed(0)
    unet, guide = UNet(8, 3, 2, 16, (1, 2)).eval(), ResNet(3, (1, 1), 8, "small", T).eval()
    y, schedule = torch.arange(12) % 3, Schedule(T)
    model, objective = ddpm.eps_model(unet, schedule, y, y * 0 - 1), class_evidence(guide, y)
    z, zero = Noise(range(12))(3, 8, 8), torch.zeros(12, dtype=torch.int64)

    def evidence(scale):
        x = sample_ddim(guided_eps(model, schedule, [(scale, objective)]), schedule, z,
                        even_times(10, T - 1))
        return objective(x, zero, None).mean().item()
    assert evidence(1.0) > evidence(0.3) > evidence(0.0) > evidence(-0.3)


# ---- counterfactual and variation ---------------------------------------------------------------

def test_a_counterfactual_under_its_own_condition_is_the_parent():
    x0, errors = normal(3, 3, 4, 4).mul(0.3), []
    for steps in (50, 100, 200):
        oracle = Gaussian(1000)
        found = counterfactual(oracle, oracle, Schedule(1000), x0, 0.8, steps)
        errors.append((found - x0).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02, errors


def test_a_counterfactual_between_two_gaussians_is_their_straight_map():
    """The ODE carries N(m, s^2) to N(n, r^2) by x -> n + r / s (x - m): the rank of x stays."""
    x0 = normal(2, 3, 4, 4).mul(0.2)
    own, wanted = Gaussian(1000, m=0.0, s=0.4), Gaussian(1000, m=0.2, s=0.3)
    found = counterfactual(own, wanted, Schedule(1000), x0, 1.0, 500)
    assert torch.allclose(found, 0.2 + 0.75 * x0, atol=0.02)


@pytest.mark.parametrize("depth, steps, end", [(1.0, 10, 49), (0.6, 10, 29), (0.1, 10, 9)])
def test_a_counterfactual_climbs_under_own_and_descends_under_wanted(depth, steps, end):
    seen = {"own": [], "wanted": []}

    def model(name):
        def eps_model(x_t, t):
            assert (t == t[0]).all()
            seen[name].append(int(t[0]))
            return Gaussian(T)(x_t, t)
        return eps_model
    counterfactual(model("own"), model("wanted"), Schedule(T), normal(2, 3, 4, 4), depth, steps)
    down = [round(v) for v in np.linspace(end, -1, steps + 1)][:-1]
    assert seen["wanted"] == down
    assert seen["own"] == [0] + down[:0:-1]                      # the level each step leaves


@pytest.mark.parametrize("strength, start", [(0.1, 9), (0.3, 14), (0.7, 34), (1.0, 49)])
def test_variation_is_q_sample_and_then_the_sampler(strength, start):
    """Its three coefficients (offset, of x0, of the noise) against the closed recursion."""
    oracle, steps = Gaussian(T), 10
    slope, offset = 1.0, 0.0
    times = [round(v) for v in np.linspace(start, -1, steps + 1)]
    for t, u in zip(times, times[1:]):
        a, b = oracle.abar[t + 1], oracle.abar[u + 1]
        k, c = oracle.line(t)
        along = math.sqrt((1 - b) / (1 - a))
        move = (math.sqrt(b) - along * math.sqrt(a))
        slope, offset = (move * k + along) * slope, (move * k + along) * offset + move * c
    a = oracle.abar[start + 1]
    x0, z = np.array([0, 0.3, 0.0]), np.array([0, 0, 0.3])
    given, noise = (torch.tensor(v).view(3, 1, 1, 1) for v in (x0, z))
    found = variation(oracle, Schedule(T), given, lambda *shape: noise, strength, steps)
    wanted = offset + slope * (math.sqrt(a) * x0 + math.sqrt(1 - a) * z)
    assert np.allclose(found.flatten(), wanted, atol=1e-9)


# ---- the tables and the config ------------------------------------------------------------------

@pytest.mark.parametrize("override, known", [
    ("guidance.sampler=euler", SAMPLERS), ("guidance.objectives.beauty=0.1", OBJECTIVES)])
def test_an_unknown_name_is_refused_and_the_known_ones_listed(override, known, tmp_path,
                                                              monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert loop.main(["--config", str(TINY), "--set", override]) == 2
    error = capsys.readouterr().err
    key, value = override.split("=")
    assert key in error and f"known: {', '.join(known)}" in error
    assert value in error or key.endswith("beauty")
    assert len(error.splitlines()) == 1 and not any(tmp_path.iterdir())


def settings(*overrides):
    """The config's section guidance, for 6 steps."""
    return configuration.load(TINY, ["guidance.start=parent", *overrides]).guidance


def parents(n=6):
    """Images of classes and groups by turns: (0, 0), (1, 1), (0, 2), ..."""
    images = torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(4)).numpy()
    ids = np.array([f"id-{i}" for i in range(n)])
    return ImageSet(images, np.arange(n) % 2, np.arange(n) % 3, ids, np.arange(n) % 2, ids,
                    ("mole", "melanoma"), ("light", "tan", "dark"), (False, True))


class Told(nn.Module):
    """In place of the UNet: shifts the image by what it is told, and keeps it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t, y, g):
        self.calls.append((int(t[0]), y.tolist(), g.tolist()))
        return 0.3 * x_t + 0.2 * (y - 0.3 * g).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def kit():
    """A generator and students of random weights. The students are for class 0: beyond an even
    vote hardness is flat, and no image would move."""
    unet = seeded(1, UNet, 16, 2, 3, 16, (1, 2), 1, 4)
    with torch.no_grad():                                        # away from its start at zero
        for i, p in enumerate(unet.parameters()):
            p.add_(0.05 * normal(*p.shape, seed=i, dtype=p.dtype))
    guide = seeded(2, ResNet, 2, (1, 1), 8, "small", T).eval()
    students = [seeded(k, ResNet, 2, (1, 1), 8, "small").eval() for k in (3, 4)]
    for student in students:
        nn.init.constant_(student.fc.bias[:1], 1.0)
    return Generator(unet.eval(), guide, Schedule(T), "v", False), students


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_moves_every_image_under_every_sampler_of_the_config(name, sampler, kit):
    generator, students = kit
    given, y = parents(), torch.zeros(6, dtype=torch.int64)
    given = given.subset(np.repeat([0, 2, 4], 2))                # all of class 0
    objective = OBJECTIVES[name](generator.guide, students, y)

    def drawn(start, scales):
        made = synthesise(generator, students, given, given.groups, np.arange(6),
                          settings(f"guidance.sampler={sampler}"), start=start, objectives=scales)
        assert made.nonfinite_gradients == 0 and made.finite.all()
        x = to_float(torch.tensor(made.images))
        return made.images, objective(x, y, x).detach().mean()
    for start in ("noise", "parent"):
        off, before = drawn(start, {name: 0.0})
        assert np.array_equal(off, drawn(start, {})[0])
        for scale in (0.3, -0.3):
            on, after = drawn(start, {name: scale})
            assert (on != off).reshape(6, -1).any(1).all()
            assert (after > before) == (scale > 0)


@pytest.mark.parametrize("start", ["noise", "parent", "counterfactual"])
def test_the_sampler_of_the_config_is_the_one_that_draws(start, kit):
    generator, students = kit
    made = [synthesise(generator, students, parents(), (np.arange(6) + 1) % 3, np.arange(6),
                       settings(f"guidance.sampler={name}"), start=start, objectives={}).images
            for name in SAMPLERS if (start, name) != ("counterfactual", "ddpm")]
    assert len(made) > 1
    for i, one in enumerate(made):
        assert all((one != other).any() for other in made[:i])


# ---- synthesis ----------------------------------------------------------------------------------

@pytest.mark.parametrize("start", ["noise", "parent", "counterfactual"])
def test_what_the_model_is_told_on_the_way_to_an_image(start):
    """Up under the image's own class and group, down under the same class and the wanted group,
    beside nothing at all (classifier-free guidance); levels of the config's steps and depth."""
    unet, given = Told(), parents(3)
    generator = Generator(unet, None, Schedule(T), "v", False)
    c = settings("guidance.depth=0.6", "guidance.strength=0.4", "guidance.steps=5")
    synthesise(generator, [], given, np.array([2, 0, -1]), np.arange(3), c, start=start,
               objectives={})
    last = {"noise": T - 1, "parent": 19, "counterfactual": 29}[start]
    down = [round(v) for v in np.linspace(last, -1, 6)][:-1]
    up = [0, *down[:0:-1]] if start == "counterfactual" else []
    y, own, wanted, nothing = [0, 1, 0], [0, 1, 2], [2, 0, -1], [-1, -1, -1]
    expected = [(t, y, own) for t in up]
    for t in down:
        expected += [(t, y, wanted), (t, nothing, nothing)]
    assert unet.calls == expected


def test_a_synthesis_from_noise_is_its_formula():
    """Told is a straight line, so DDIM's five steps are written out in numpy."""
    given, c = parents(3), settings("guidance.steps=5", "guidance.classifier_free=1.5")
    found = synthesise(Generator(Told(), None, Schedule(T), "eps", False), [], given,
                       np.array([2, 0, 1]), np.array([7, 8, 9]), c, start="noise", objectives={})
    x = np.stack([normal(3, 16, 16, seed=s, dtype=torch.float32).numpy() for s in (7, 8, 9)])
    abar, times = paper_abar(T, "cosine"), [round(v) for v in np.linspace(T - 1, -1, 6)]
    told = 0.2 * (np.array([0, 1, 0]) - 0.3 * np.array([2, 0, 1])).reshape(3, 1, 1, 1)
    free = 0.2 * (-1 + 0.3)
    for t, u in zip(times, times[1:]):
        a, b = abar[t + 1], abar[u + 1]
        eps = 0.3 * x + free + 1.5 * (told - free)
        x0 = ((x - np.sqrt(1 - a) * eps) / np.sqrt(a)).clip(-1, 1)
        x = np.sqrt(b) * x0 + np.sqrt(1 - b) / np.sqrt(1 - a) * (x - np.sqrt(a) * x0)
    off = abs(found.images - (x + 1) * 127.5)
    assert off.max() < 0.51 and found.finite.all() and found.nonfinite_gradients == 0


def test_an_image_that_is_not_finite_is_told_apart_and_spoils_no_other(kit):
    class Broken(Told):
        def forward(self, x_t, t, y, g):
            out = super().forward(x_t, t, y, g)
            return torch.where((g == 2).view(-1, 1, 1, 1), math.nan, out)
    made = [synthesise(Generator(unet, kit[0].guide, Schedule(T), "v", False), kit[1], parents(),
                       np.array([0, 2, 1, 2, 0, -1]), np.arange(6), settings(), start="parent",
                       objectives={"class_evidence": 0.1}) for unet in (Told(), Broken())]
    assert made[0].finite.all() and made[0].nonfinite_gradients == 0
    assert made[1].finite.tolist() == [True, False, True, False, True, True]
    assert made[1].nonfinite_gradients == 2 * 5   # of six steps; in the first x_t is still whole
    good = made[1].finite
    assert np.array_equal(made[1].images[good], made[0].images[good])


def test_neither_the_batch_nor_its_order_changes_a_child(kit):
    generator, students = kit
    targets, seeds = np.array([1, 2, 0, 1, -1, 0]), np.arange(6) + 50

    def drawn(rows):
        return synthesise(generator, students, parents().subset(rows), targets[rows], seeds[rows],
                          settings(), start="parent",
                          objectives={"class_evidence": 0.1, "hardness": 0.05}).images
    whole = drawn(np.arange(6))
    for rows in (np.array([4]), np.array([5, 0, 3])):
        assert abs(drawn(rows).astype(int) - whole[rows]).max() <= 1     # a rounding


def test_a_run_draws_in_batches_each_of_them_once(tmp_path):
    """130 images are two batches; what is stored is not drawn again."""
    config = configuration.load(TINY, ["guidance.start=parent", "guidance.steps=2"])
    given, unet, targets = parents(130), Told(), np.arange(130) % 3
    run = Run(tmp_path, config)
    one = loop.Kit(run, "arm_1", 77, given, Generator(unet, None, Schedule(T), "v", False), [])
    found = children.from_model(one, given, targets, {}, "parent")
    assert found.images.shape == (130, 3, 16, 16) and len(found.finite) == 130
    assert {p.name for p in run.checkpoints.iterdir()} == {"arm_1_0.pt", "arm_1_128.pt"}
    seeds = [derive(77, i) for i in range(130)]
    whole = synthesise(one.generator, [], given, targets, seeds, config.guidance, start="parent",
                       objectives={})
    assert np.array_equal(found.images, whole.images)
    run.path("arm_1_128").unlink()
    unet.calls.clear()
    again = children.from_model(one, given, targets, {}, "parent")
    assert np.array_equal(again.images, found.images)
    assert {len(y) for _, y, _ in unet.calls} == {2}
