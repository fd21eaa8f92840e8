"""guidance.py: gradients by finite differences, off that is exactly off, and known directions."""
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import ddpm
from classifier import ResNet
from ddpm import Noise, Schedule, sample_ddim, sample_ddpm
from guidance import (Tally, class_evidence, counterfactual, gradient, guided_eps, hardness,
                      normalise, variation)
from oracle import Gaussian, paper_abar
from unet import UNet

T = 50


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


def run(sampler, wanted, x0=None):
    """Every way there is to draw with `wanted`, on the same images and noise."""
    schedule, noise, own = Schedule(T), Noise([1, 2, 3]), Gaussian(T)
    x0 = normal(3, 3, 4, 4).mul(0.3).float() if x0 is None else x0
    z = noise(3, 4, 4)
    if sampler == "ddpm":
        return sample_ddpm(wanted, schedule, z, noise)
    if sampler == "ddim":
        return sample_ddim(wanted, schedule, z, 10)
    if sampler == "ddim eta":
        return sample_ddim(wanted, schedule, z, 10, eta=1.0, noise=noise)
    if sampler == "counterfactual":
        return counterfactual(own, wanted, schedule, x0, 0.8, 10)
    return variation(wanted, schedule, x0, z, 0.6, 10)


SAMPLERS = ["ddpm", "ddim", "ddim eta", "counterfactual", "variation"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scale_0_is_unguided_to_the_bit(sampler):
    off = guided_eps(Gaussian(T), Schedule(T), [(0.0, towards(0.8)), (0.0, never)])
    assert torch.equal(run(sampler, off), run(sampler, Gaussian(T)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_reaches_every_way_of_drawing_and_in_its_direction(sampler):
    plain, means = run(sampler, Gaussian(T)), {}
    for target in (-0.9, 0.9):
        for scale in (0.1, 0.5):
            guided = run(sampler, guided_eps(Gaussian(T), Schedule(T), [(scale, towards(target))]))
            gained = towards(target)(None, None, guided) - towards(target)(None, None, plain)
            assert (gained > 0).all()                            # every image, not only their mean
            means[target, scale] = guided.mean().item()
    assert (means[-0.9, 0.5] < means[-0.9, 0.1] < plain.mean() < means[0.9, 0.1] < means[0.9, 0.5])


def test_the_size_of_the_push_is_as_the_formula_says():
    """One DDIM step from level t to the image: x0_hat moves by scale (1 - abar)."""
    schedule, t = Schedule(T), 10
    a = paper_abar(T, "cosine")[t + 1]
    x = normal(2, 3, 4, 4).mul(0.3)
    plain = sample_ddim(Gaussian(T), schedule, x, 1, start=t)
    guided = sample_ddim(guided_eps(Gaussian(T), schedule, [(0.2, lambda x_t, t, x0_hat:
                                                            x0_hat.sum((1, 2, 3)))]),
                         schedule, x, 1, start=t)
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
    out = sample_ddim(found, Schedule(T), normal(2, 3, 4, 4), 5)
    assert torch.equal(out, sample_ddim(Gaussian(T), Schedule(T), normal(2, 3, 4, 4), 5))
    assert tally.nonfinite == 2 * 5


def test_guidance_by_real_networks_raises_the_class_evidence():
    """Untrained but real: UNet, guide, sampler, all at once, against the same noise unguided."""
    torch.manual_seed(0)
    unet, guide = UNet(8, 3, 2, 16, (1, 2)).eval(), ResNet(3, (1, 1), 8, "small", T).eval()
    y, schedule = torch.arange(12) % 3, Schedule(T)
    model, objective = ddpm.eps_model(unet, schedule, y, y * 0 - 1), class_evidence(guide, y)
    z, zero = Noise(range(12))(3, 8, 8), torch.zeros(12, dtype=torch.int64)

    def evidence(scale):
        x = sample_ddim(guided_eps(model, schedule, [(scale, objective)]), schedule, z, 10)
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
    found = variation(oracle, Schedule(T), *(torch.tensor(v).view(3, 1, 1, 1) for v in (x0, z)),
                      strength, steps)
    wanted = offset + slope * (math.sqrt(a) * x0 + math.sqrt(1 - a) * z)
    assert np.allclose(found.flatten(), wanted, atol=1e-9)
