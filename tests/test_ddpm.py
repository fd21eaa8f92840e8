"""ddpm.py against the papers' formulas in numpy, brute-force Bayes and an exact Gaussian oracle."""
import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

import ddpm
from engine.training import Noise
from ddpm import (SAMPLERS, Schedule, ddim_step, even_times, invert_ddim, sample_ddim,
                  sample_ddpm, sample_dpm)
from engine.training import seeded
from oracle import Gaussian, normal, paper_abar
from unet import UNet

EXACT = dict(rtol=1e-9, atol=1e-11)
UNCLIPPED = math.inf


# ---- the schedule -------------------------------------------------------------------------------

def test_linear_1000_is_ho_et_al():
    schedule = Schedule(1000, "linear")
    b = schedule.betas.numpy()
    assert b.dtype == np.float64 and len(b) == 1000
    assert math.isclose(b[0], 1e-4) and math.isclose(b[-1], 0.02)
    assert np.allclose(np.diff(b), (0.02 - 1e-4) / 999, rtol=1e-9)
    assert math.isclose(schedule.alphas_cumprod[-1], 4.0358e-5, rel_tol=1e-4)


@pytest.mark.parametrize("T", [12, 50, 1000])
def test_cosine_is_its_formula(T):
    schedule = Schedule(T, "cosine")
    t = np.arange(1, T)                                          # the last beta is clipped
    abar = (np.cos((t / T + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
    assert np.allclose(schedule.alphas_cumprod[:-1], abar, rtol=1e-10)
    assert math.isclose(schedule.betas[-1], 0.999)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("T", [20, 50, 200, 1000])
def test_every_schedule_ends_in_noise(kind, T):
    schedule = Schedule(T, kind)
    assert np.allclose(schedule.alphas_cumprod, paper_abar(T, kind)[1:], rtol=1e-10)
    assert schedule.alphas_cumprod[-1] < 1e-3                    # 0.6 for 1000-step betas at T = 50
    assert (schedule.alphas_cumprod.diff() < 0).all()
    assert (schedule.alphas + schedule.betas == 1).all()


def test_a_schedule_that_does_not_end_in_noise_is_refused():
    with pytest.raises(ValueError, match="T = 1 leaves 0.900"):
        Schedule(1, "linear")


def test_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="'sigmoid'"):
        Schedule(100, "sigmoid")


def test_abar_is_1_at_the_clean_image_and_takes_the_dtype_asked():
    schedule = Schedule(50)
    x = torch.zeros(4, 3, 2, 2)
    found = schedule.abar(torch.tensor([-1, 0, 7, 49]), x)
    assert found.shape == (4, 1, 1, 1) and found.dtype == torch.float32
    assert np.allclose(found.flatten(), paper_abar(50, "cosine")[[0, 1, 8, 50]], rtol=1e-6)
    assert found[0] == 1


@pytest.mark.parametrize("t", [torch.tensor(3), torch.tensor([3]), torch.tensor([[3], [3]]),
                               torch.tensor([3, 3, 3])])
def test_t_of_a_wrong_shape_is_refused(t):
    schedule, x = Schedule(50), torch.zeros(2, 3, 2, 2)
    for call in (schedule.q_sample, schedule.predict_x0, schedule.velocity,
                 lambda a, t, b: schedule.posterior(a, b, t, t - 1)):
        with pytest.raises(ValueError, match="^t: "):
            call(x, t, x)


# ---- the forward process and its inverses -------------------------------------------------------

def test_q_sample_moments():
    schedule, t, n = Schedule(50), 20, 200_000
    a = paper_abar(50, "cosine")[t + 1]
    x = schedule.q_sample(torch.full((1, n, 1, 1), 0.7), torch.tensor([t]),
                          normal(1, n, 1, 1, dtype=torch.float32)).double().flatten()
    assert abs(x.mean() - math.sqrt(a) * 0.7) < 5 * math.sqrt((1 - a) / n)
    assert abs(x.var() / (1 - a) - 1) < 5 * math.sqrt(2 / n)


def test_q_sample_is_the_linear_combination_one_level_per_image():
    schedule, t = Schedule(50), torch.tensor([0, 20, 49, -1])
    x0, eps = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    a = paper_abar(50, "cosine")[[1, 21, 50, 0]][:, None, None, None]
    assert np.allclose(schedule.q_sample(x0, t, eps),
                       np.sqrt(a) * x0.numpy() + np.sqrt(1 - a) * eps.numpy(), **EXACT)


def test_round_trips_in_float64():
    schedule, t = Schedule(50), torch.arange(50)
    x0, eps = normal(50, 3, 2, 2), normal(50, 3, 2, 2, seed=1)
    x_t = schedule.q_sample(x0, t, eps)
    v = schedule.velocity(x0, t, eps)
    for found, wanted in [(schedule.predict_x0(x_t, t, eps), x0),
                          (schedule.predict_eps(x_t, t, x0), eps),
                          (schedule.eps_from_velocity(x_t, t, v), eps)]:
        assert (found - wanted).abs().max() < 1e-10
    # v is how x_t turns with the angle whose cosine is sqrt(abar): Salimans & Ho, appendix D.
    angle = np.arccos(np.sqrt(paper_abar(50, "cosine")[1:]))[:, None, None, None]

    def turned(d):
        return np.cos(angle + d) * x0.numpy() + np.sin(angle + d) * eps.numpy()
    assert np.allclose(v, (turned(1e-5) - turned(-1e-5)) / 2e-5, atol=1e-8)


@pytest.mark.parametrize("t, t_prev", [(1, 0), (5, 4), (12, 11), (18, 17), (18, 3), (9, 0)])
def test_posterior_is_what_bayes_says_on_a_grid(t, t_prev):
    """q(x_s | x_t, x_0) is q(x_t | x_s) q(x_s | x_0), normalised by summing it; s = t - 1 or less.
    """
    schedule, abar, x0, x_t = Schedule(20), paper_abar(20, "cosine"), 0.6, -0.4
    before, now = abar[t_prev + 1], abar[t + 1]
    x = np.linspace(-9, 9, 400_001)
    log = (-(x_t - np.sqrt(now / before) * x) ** 2 / (2 * (1 - now / before))
           - (x - np.sqrt(before) * x0) ** 2 / (2 * (1 - before)))
    p = np.exp(log - log.max())
    p /= p.sum()
    mean = (p * x).sum()
    found = schedule.posterior(*(torch.full((1, 1, 1, 1), v, dtype=torch.float64)
                                 for v in (x0, x_t)), torch.tensor([t]), torch.tensor([t_prev]))
    assert math.isclose(found[0].item(), mean, rel_tol=1e-8)
    assert math.isclose(found[1].item(), (p * (x - mean) ** 2).sum(), rel_tol=1e-8)


def test_posterior_is_per_image_and_eq_7_of_ho_et_al():
    """Mixed levels and strides in one batch; for neighbours, mu-tilde and beta-tilde of the paper.
    """
    schedule, abar = Schedule(20), paper_abar(20, "cosine")
    x0, x_t, t, before = normal(3, 3, 2, 2), normal(3, 3, 2, 2, seed=1), [1, 9, 19], [0, 8, 18]
    mean, variance = schedule.posterior(x0, x_t, torch.tensor(t), torch.tensor(before))
    a, b = (abar[np.array(k) + 1][:, None, None, None] for k in (t, before))
    beta = 1 - a / b
    assert np.allclose(mean, np.sqrt(b) * beta / (1 - a) * x0.numpy()
                       + np.sqrt(1 - beta) * (1 - b) / (1 - a) * x_t.numpy(), **EXACT)
    assert np.allclose(variance, (1 - b) / (1 - a) * beta, **EXACT)


@pytest.mark.parametrize("t", [0, 7, 19])
def test_posterior_of_the_clean_image_is_the_clean_image(t):
    x0, t = normal(2, 3, 2, 2), torch.full((2,), t)
    mean, variance = Schedule(20).posterior(x0, normal(2, 3, 2, 2, seed=1), t,
                                            torch.full_like(t, -1))
    assert torch.allclose(mean, x0, **EXACT) and (variance == 0).all()


# ---- samplers on the Gaussian oracle ------------------------------------------------------------
# There every sampler is affine in its noise, so its law is known exactly once its coefficients are.

class Basis:
    """In place of noise: its k-th draw is 1 for image k + 2 and 0 for the others. With 1 as the
    start of image 1 and 0 of the others, the outputs are the coefficients themselves."""

    def __init__(self, draws):
        self.calls, self.images = 0, draws + 2

    def __call__(self, *shape):
        drawn = torch.zeros(self.images, *shape, dtype=torch.float64)
        drawn[self.calls + 2] = 1                           # IndexError if drawn from too often
        self.calls += 1
        return drawn


def coefficients(sample, draws):
    """(offset, gains of the start and of every draw) of sample(x, noise)."""
    noise, x = Basis(draws), torch.zeros(draws + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    out = sample(x, noise).flatten().numpy()
    assert noise.calls == draws                             # so none at the last step
    return out[0], out[1:] - out[0]


def recursion(moves):
    """The same from the closed recursion x <- slope x + shift + spread z, given those three."""
    offset, gains = 0.0, [1.0]
    for slope, shift, spread in moves:
        offset = slope * offset + shift
        gains = [slope * g for g in gains] + ([spread] if spread else [])
    return offset, np.array(gains)


def ddpm_moves(oracle, T):
    """Posterior of x_{t-1} as a product of two Gaussians: precisions add, means weigh by them."""
    for t in reversed(range(T)):
        before, now = oracle.abar[t], oracle.abar[t + 1]
        k, c = oracle.line(t)
        if t == 0:
            yield k, c, 0.0
            continue
        alpha = now / before
        precision = alpha / (1 - alpha) + 1 / (1 - before)
        on_x0 = math.sqrt(before) / (1 - before) / precision
        on_x = math.sqrt(alpha) / (1 - alpha) / precision
        yield on_x + on_x0 * k, on_x0 * c, precision ** -0.5


def ddim_moves(oracle, times, eta):
    """Song et al. 2021, Eq. 12 with sigma of Eq. 16: DDIM at eta = 0, ancestral at eta = 1."""
    for t, u in zip(times, times[1:]):
        a, b = oracle.abar[t + 1], oracle.abar[u + 1]
        k, c = oracle.line(t)
        sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        along = math.sqrt(1 - b - sigma ** 2) / math.sqrt(1 - a)
        x0 = math.sqrt(b) - along * math.sqrt(a)
        yield x0 * k + along, x0 * c, sigma


def strides(steps, last):
    return [int(t) for t in np.round(np.linspace(last, -1, steps + 1))]


STRIDES = [(1, 49), (2, 49), (7, 49), (50, 49), (5, 20), (21, 20), (1, 0)]


@pytest.mark.parametrize("T, kind", [(50, "cosine"), (30, "linear")])
def test_ddpm_follows_its_recursion(T, kind):
    oracle, schedule = Gaussian(T, kind), Schedule(T, kind)
    offset, gains = coefficients(lambda x, noise: sample_ddpm(
        oracle, schedule, x, list(range(T - 1, -2, -1)), noise, UNCLIPPED), T - 1)
    wanted_offset, wanted_gains = recursion(ddpm_moves(oracle, T))
    assert math.isclose(offset, wanted_offset, rel_tol=1e-9)
    assert np.allclose(gains, wanted_gains, **EXACT)


@pytest.mark.parametrize("steps, last", STRIDES)
@pytest.mark.parametrize("sample, eta", [(sample_ddim, 0), (sample_ddpm, 1)])
def test_ddim_and_ddpm_on_strides_follow_eq_12(sample, eta, steps, last):
    oracle, schedule = Gaussian(50), Schedule(50)
    offset, gains = coefficients(lambda x, noise: sample(
        oracle, schedule, x, even_times(steps, last), noise, UNCLIPPED), eta * (steps - 1))
    wanted_offset, wanted_gains = recursion(ddim_moves(oracle, strides(steps, last), eta))
    assert math.isclose(offset, wanted_offset, rel_tol=1e-9)
    assert np.allclose(gains, wanted_gains, **EXACT)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_reaches_the_data_s_law_as_steps_grow(name):
    """A perfect model at few steps still has the wrong spread; at 400 it has the data's."""
    errors, mean_errors = [], []
    for T in (25, 100, 400):
        oracle, schedule = Gaussian(T), Schedule(T)
        offset, gains = coefficients(lambda x, noise: SAMPLERS[name](
            oracle, schedule, x, even_times(T, T - 1), noise, UNCLIPPED),
            T - 1 if name == "ddpm" else 0)
        errors.append(abs(math.sqrt((gains ** 2).sum()) / oracle.s - 1))
        mean_errors.append(abs(offset - oracle.m))
    assert errors[2] == min(errors) and errors[2] < 0.02, errors
    assert mean_errors[2] < 0.01, mean_errors


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_the_same_interface(name):
    """guidance calls any of them by position: (eps_model, schedule, x, times, noise, clip)."""
    parameters = list(inspect.signature(SAMPLERS[name]).parameters.values())
    assert [p.name for p in parameters] == ["eps_model", "schedule", "x", "times", "noise", "clip"]
    assert parameters[-1].default == 1.0


def exact_flow(oracle, x, t, u):
    """The ODE solved: every pixel keeps its place in units of the law's spread at each level."""
    (a, sd), (b, sd_u) = ((math.sqrt(oracle.abar[i + 1]),
                           math.sqrt(oracle.abar[i + 1] * oracle.s ** 2 + 1 - oracle.abar[i + 1]))
                          for i in (t, u))
    return (x - a * oracle.m) / sd * sd_u + b * oracle.m


def test_samplers_converge_on_the_exact_flow_each_at_its_order():
    T, start = 20_000, 16_000           # so many levels that the strides are even
    oracle, schedule, x = Gaussian(T), Schedule(T), normal(4, 1, 2, 2)

    def errors(sample, end):
        found = [sample(oracle, schedule, x, [round(t) for t in np.linspace(start, end, n + 1)],
                        clip=UNCLIPPED) for n in (20, 40, 80, 160)]
        wanted = exact_flow(oracle, x, start, end)
        return np.array([(f - wanted).abs().max().item() for f in found])
    # To the clean image: the last stride ends where lambda is infinite, and is of first order.
    ddim, dpm = errors(sample_ddim, -1), errors(sample_dpm, -1)
    assert (dpm < ddim / 5).all() and ddim[-1] < 0.02
    ddim, dpm = errors(sample_ddim, 2_000), errors(sample_dpm, 2_000)
    assert np.allclose(ddim[:-1] / ddim[1:], 2, atol=0.2)
    assert np.allclose(dpm[:-1] / dpm[1:], 4, atol=0.4)


def curved(x_t, t):
    """An eps_model that is no straight line, and whose x0_hat a clip often touches."""
    return 1.3 * torch.tanh(x_t) + 0.01 * t.to(x_t).view(-1, 1, 1, 1) - 0.2


@pytest.mark.parametrize("clip", [0.5, UNCLIPPED])
@pytest.mark.parametrize("steps", [1, 9, 40])
def test_ddpm_on_strides_is_eq_12_with_eps_made_to_agree_with_what_is_clipped(steps, clip):
    """Song et al. 2021, Eq. 12 and 16 at eta = 1, in numpy, on a model that is no line."""
    abar = paper_abar(40, "cosine")
    found = sample_ddpm(curved, Schedule(40), normal(2, 1, 3, 3), even_times(steps, 39),
                        self_numbering(), clip)
    x, z, times = normal(2, 1, 3, 3).numpy(), self_numbering(), strides(steps, 39)
    for t, u in zip(times, times[1:]):
        a, b = abar[t + 1], abar[u + 1]
        eps = 1.3 * np.tanh(x) + 0.01 * t - 0.2
        x0 = np.clip((x - np.sqrt(1 - a) * eps) / np.sqrt(a), -clip, clip)
        eps = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
        sigma = np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
        x = np.sqrt(b) * x0 + np.sqrt(1 - b - sigma ** 2) * eps
        if u >= 0:
            x = x + sigma * z(1, 3, 3).numpy()
    assert np.allclose(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [0.5, UNCLIPPED])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_dpm_is_algorithm_2_of_lu_et_al(steps, clip):
    """Their box in numpy: lambda, h_i, r_i and D_i by name, alpha and sigma as they write them."""
    abar, x = paper_abar(40, "cosine"), normal(2, 1, 3, 3)
    found = sample_dpm(curved, Schedule(40), x, even_times(steps, 39), None, clip)
    x, estimates, h, times = x.numpy(), [], [], strides(steps, 39)
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    lam = np.log(alpha[1:] / sigma[1:])                          # by code level
    for t, u in zip(times, times[1:]):
        eps = 1.3 * np.tanh(x) + 0.01 * t - 0.2
        estimates.append(np.clip((x - sigma[t + 1] * eps) / alpha[t + 1], -clip, clip))
        if u < 0:
            break
        h.append(lam[u] - lam[t])
        D = estimates[-1]
        if len(h) > 1:
            r = h[-2] / h[-1]
            D = (1 + 1 / (2 * r)) * estimates[-1] - 1 / (2 * r) * estimates[-2]
        x = sigma[u + 1] / sigma[t + 1] * x - alpha[u + 1] * (np.exp(-h[-1]) - 1) * D
    assert np.allclose(found, estimates[-1], rtol=1e-8, atol=1e-8)


def test_ddpm_is_algorithm_2_and_uses_what_it_clips():
    """The paper's box in numpy, its mean by Eq. 7 from x0_hat held to [-0.5, 0.5]."""
    T, abar, clipped = 15, paper_abar(15, "cosine"), 0
    found = sample_ddpm(curved, Schedule(T), normal(2, 1, 3, 3), even_times(T, T - 1),
                        self_numbering(), clip=0.5)
    x, z = normal(2, 1, 3, 3).numpy(), self_numbering()
    for t in range(T, 0, -1):
        a, before = abar[t], abar[t - 1]
        alpha, beta = a / before, 1 - a / before
        eps = 1.3 * np.tanh(x) + 0.01 * (t - 1) - 0.2
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        clipped += (np.abs(x0) > 0.5).mean() / T
        x = (np.sqrt(before) * beta / (1 - a) * np.clip(x0, -0.5, 0.5)
             + np.sqrt(alpha) * (1 - before) / (1 - a) * x)
        if t > 1:
            x = x + np.sqrt((1 - before) / (1 - a) * beta) * z(1, 3, 3).numpy()
    assert np.allclose(found, x, atol=1e-9)
    assert 0.2 < clipped < 0.99 and np.abs(x).max() <= 0.5


def self_numbering():
    """Noise whose k-th draw is the same wherever it is asked for."""
    count = iter(range(100, 200))
    return lambda *shape: normal(2, *shape, seed=next(count))


def test_ddim_step_recomputes_eps_from_the_clipped_image():
    schedule, abar = Schedule(50), paper_abar(50, "cosine")
    x_t = torch.tensor([0.9, -0.2], dtype=torch.float64).view(2, 1, 1, 1)
    eps = torch.tensor([-1.0, 0.1], dtype=torch.float64).view(2, 1, 1, 1)
    t, u = torch.tensor([30, 30]), torch.tensor([20, 20])
    found = ddim_step(schedule, x_t, t, u, eps, clip=1.0).flatten().numpy()
    a, b = abar[31], abar[21]
    x0 = (x_t.flatten().numpy() - math.sqrt(1 - a) * eps.flatten().numpy()) / math.sqrt(a)
    assert x0[0] > 1 > abs(x0[1])
    agreed = (0.9 - math.sqrt(a)) / math.sqrt(1 - a)
    assert np.allclose(found, [math.sqrt(b) + math.sqrt(1 - b) * agreed,
                               math.sqrt(b) * x0[1] + math.sqrt(1 - b) * 0.1], **EXACT)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_in_the_clipped_image(name):
    def drawn(clip):
        return SAMPLERS[name](curved, Schedule(50), normal(2, 1, 3, 3), even_times(10, 49),
                              self_numbering(), clip)
    assert drawn(0.5).abs().max() <= 0.5 + 1e-9
    assert drawn(UNCLIPPED).abs().max() > 0.6


def test_even_times_by_brute_force():
    for last in range(60):
        for steps in range(1, last + 2):
            times = even_times(steps, last)
            assert len(times) == steps + 1 and times[0] == last and times[-1] == -1
            assert all(type(t) is int for t in times)
            assert all(a > b for a, b in zip(times, times[1:]))
            gaps = -np.diff(times)
            assert gaps.max() - gaps.min() <= 1
        for steps in (-1, 0, last + 2):
            with pytest.raises(ValueError, match="do not fit"):
                even_times(steps, last)


# ---- inversion ----------------------------------------------------------------------------------

def test_inversion_is_the_same_ode_upwards():
    """Its coefficients: each move leaves level t with eps taken there, at level 0 for the image."""
    oracle, steps, end = Gaussian(50), 6, 30
    times = strides(steps, end)[::-1]
    offset, gain = 0.0, 1.0
    for t, u in zip(times, times[1:]):
        a, b = oracle.abar[t + 1], oracle.abar[u + 1]
        first = oracle.abar[max(t, 0) + 1]
        k, c = oracle.line(max(t, 0))
        e_slope, e_shift = (1 - math.sqrt(first) * k) / math.sqrt(1 - first), \
            -math.sqrt(first) * c / math.sqrt(1 - first)
        slope = math.sqrt(b / a) + (math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)) * e_slope
        shift = (math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)) * e_shift
        offset, gain = slope * offset + shift, slope * gain
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    found = invert_ddim(oracle, Schedule(50), x, even_times(steps, end)).flatten()
    assert math.isclose(found[0], offset, rel_tol=1e-9)
    assert math.isclose(found[1] - found[0], gain, rel_tol=1e-9)


def test_decoding_an_inversion_returns_the_image_at_first_order():
    oracle, schedule = Gaussian(1000), Schedule(1000)
    x0, errors = normal(2, 3, 4, 4).mul(0.4).clamp(-1, 1), []
    for steps in (31, 61, 121, 241):                       # gaps of 32, 16, 8, 4 levels
        latent = invert_ddim(oracle, schedule, x0, even_times(steps, 960))
        assert (latent - x0).abs().max() > 0.5
        back = sample_ddim(oracle, schedule, latent, even_times(steps, 960), clip=UNCLIPPED)
        errors.append((back - x0).abs().max().item())
    ratios = [a / b for a, b in zip(errors, errors[1:])]
    assert all(1.7 < r < 2.3 for r in ratios), (errors, ratios)
    assert errors[-1] < 0.02


# ---- the loss -----------------------------------------------------------------------------------

class Recorder(nn.Module):
    """A network that keeps what it is given and answers by `rule(x_t, t)`."""

    def __init__(self, rule=lambda x_t, t: torch.zeros_like(x_t)):
        super().__init__()
        self.rule, self.calls = rule, []

    def forward(self, x_t, t, y, g):
        self.calls.append((x_t, t, y, g))
        return self.rule(x_t, t)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_exact_target_has_loss_0_and_half_off_a_quarter(prediction):
    schedule, x0, y = Schedule(50), normal(64, 3, 2, 2), torch.zeros(64, dtype=torch.int64)
    abar = torch.tensor(paper_abar(50, "cosine"))

    def exact(x_t, t, off=0.0):
        a = abar[t + 1].view(-1, 1, 1, 1)
        eps = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
        return (eps if prediction == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0) + off
    for off in (0.0, 0.5):
        network = Recorder(lambda x_t, t: exact(x_t, t, off))
        found = ddpm.loss(network, schedule, x0, y, y, torch.Generator().manual_seed(0),
                          prediction=prediction)
        assert abs(found - off ** 2) < 1e-12 and found.shape == ()


def test_what_the_network_is_shown_while_training():
    schedule, B, drop = Schedule(20), 20_000, 0.1
    network, y = Recorder(), torch.arange(B) % 7
    ddpm.loss(network, schedule, torch.full((B, 3, 1, 1), 0.5), y, y + 1,
              torch.Generator().manual_seed(0), drop=drop)
    (x_t, t, told_y, told_g), = network.calls
    # every level 0..T-1, equally often
    counts = np.bincount(t, minlength=20)
    assert len(counts) == 20 and abs(counts - B / 20).max() < 5 * math.sqrt(B / 20)
    # three coins: the class alone, the group alone, both together
    no_y, no_g = told_y == -1, told_g == -1
    either, both = 1 - (1 - drop) ** 2, drop + (1 - drop) * drop ** 2
    for found, p in [(no_y, either), (no_g, either), (no_y & no_g, both)]:
        assert abs(found.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / B)
    assert (told_y[~no_y] == y[~no_y]).all() and (told_g[~no_g] == y[~no_g] + 1).all()
    # x_t is the image noised to that very level
    for level in (0, 10, 19):
        a, x = paper_abar(20, "cosine")[level + 1], x_t[t == level].double()
        assert abs(x.mean() - 0.5 * math.sqrt(a)) < 5 * math.sqrt((1 - a) / x.numel())
        assert abs(x.var() / (1 - a) - 1) < 5 * math.sqrt(2 / x.numel())


def test_nothing_is_withheld_at_drop_0_and_everything_at_1():
    y = torch.arange(50)
    for drop, wanted in [(0.0, y), (1.0, torch.full_like(y, -1))]:
        network = Recorder()
        ddpm.loss(network, Schedule(20), torch.zeros(50, 3, 1, 1), y, y,
                  torch.Generator().manual_seed(0), drop=drop)
        assert torch.equal(network.calls[0][2], wanted) and torch.equal(network.calls[0][3], wanted)


# ---- training ---------------------------------------------------------------------------------

class Tiny(nn.Module):
    """One convolution in place of the UNet; keeps its weights as they were before every step."""

    def __init__(self):
        super().__init__()
        self.conv, self.path = nn.Conv2d(3, 3, 3, padding=1), []

    def forward(self, x_t, t, y, g):
        self.path.append(self.conv.weight.detach().clone())
        return self.conv(x_t) + y.view(-1, 1, 1, 1) * 0.01


def train(network, images=None, labels=None, **more):
    if images is None:
        images = torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8,
                               generator=torch.Generator().manual_seed(0))
        labels = torch.arange(20) % 3
    given = dict(steps=60, batch=8, lr=1e-2, ema_decay=0.9, prediction="v", drop=0.1, seed=5)
    return ddpm.train(network, Schedule(20), images, labels, labels + 100, **given | more)


def test_training_leaves_the_averaged_weights():
    """Their mean by hand. At decay 0 what is left is the last step's weights themselves."""
    def trained(decay):
        network = seeded(1, Tiny)
        history = train(network, ema_decay=decay)
        return network, history
    (averaged, history), (raw, same) = trained(0.9), trained(0.0)
    path = [*averaged.path, raw.conv.weight.detach()]
    assert len(history) == 3 and history == same and len(path) == 61
    assert all(torch.equal(a, b) for a, b in zip(averaged.path, raw.path))
    mean = path[0].double()
    for n, weight in enumerate(path[1:], start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * weight.double()
    assert torch.allclose(averaged.conv.weight.double(), mean, atol=1e-6)
    assert (path[-1] - mean).abs().max() > 1e-3


def test_training_pairs_every_image_with_its_own_label_and_group():
    """Every image is one flat grey: what stays of it after the noise is known at every level."""
    network, value = Recorder(), torch.arange(0, 200, 10, dtype=torch.uint8)
    network.weight = nn.Parameter(torch.zeros(()))
    network.rule = lambda x_t, t: network.weight * x_t
    images = value.view(-1, 1, 1, 1).expand(20, 3, 16, 16).contiguous()
    train(network, images, torch.arange(20), steps=20, batch=50, lr=0.0, drop=0.0)
    x_t, t, y, g = (torch.cat(part) for part in zip(*network.calls))
    abar = torch.tensor(paper_abar(20, "cosine"))[t + 1]
    wanted, spread = abar.sqrt() * (value[y] / 127.5 - 1), ((1 - abar) / 768).sqrt()
    assert ((x_t.mean((1, 2, 3)) - wanted).abs() < 5.5 * spread).all()
    near = spread / abar.sqrt() < 0.1 * 10 / 127.5               # any other image would be 10 off
    assert len(t) == 1000 and near.sum() > 100
    assert torch.equal(g, y + 100)
    assert abs(np.bincount(y, minlength=20) - 50).max() < 5 * math.sqrt(50)


# ---- the network as an eps_model ----------------------------------------------------------------

@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_classifier_free_guidance_by_hand(prediction, scale):
    class Told(Recorder):
        def forward(self, x_t, t, y, g):
            super().forward(x_t, t, y, g)
            return x_t * (0.5 + y.view(-1, 1, 1, 1)) + g.view(-1, 1, 1, 1) / 8.0
    schedule, network = Schedule(50), Told()
    y, g, t = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([10, 40])
    x = normal(2, 3, 2, 2)
    found = ddpm.eps_model(network, schedule, y, g, prediction=prediction, scale=scale)(x, t)
    a = paper_abar(50, "cosine")[[11, 41]][:, None, None, None]

    def eps(y, g):
        out = x.numpy() * (0.5 + np.reshape(y, (-1, 1, 1, 1))) + np.reshape(g, (-1, 1, 1, 1)) / 8
        return out if prediction == "eps" else np.sqrt(a) * out + np.sqrt(1 - a) * x.numpy()
    told, free = eps([0, 2], [1, 3]), eps([-1, -1], [-1, -1])
    assert np.allclose(found, free + scale * (told - free), **EXACT)
    assert len(network.calls) == (1 if scale == 1 else 2)


def test_eps_model_builds_no_graph():
    y = torch.zeros(2, dtype=torch.int64)
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    found = ddpm.eps_model(Tiny(), Schedule(50), y, y, prediction="eps")(x, y)
    assert not found.requires_grad


# ---- randomness: one stream per image -----------------------------------------------------------

def test_batch_size_and_order_never_change_a_stream():
    together = Noise([5, 6, 7, 8])
    first, second = together(3, 2, 2), together(3, 2, 2)
    assert first.shape == (4, 3, 2, 2) and first.dtype == torch.float32
    for order in ([5], [8, 7], [6, 5, 8, 7]):
        noise = Noise(order)
        rows = [seed - 5 for seed in order]
        assert torch.equal(noise(3, 2, 2), first[rows])
        assert torch.equal(noise(3, 2, 2), second[rows])
    flat = torch.cat([first, second]).flatten(1)
    assert (torch.cdist(flat, flat) + 9 * torch.eye(8) > 0.5).all()          # all eight differ


def randomised(network, seed=0, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return network.eval()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_of_4_is_a_batch_of_1_and_a_batch_of_3(name):
    schedule, network = Schedule(12), randomised(UNet(8, 3, 2, 16, (1, 2)))
    y, g, seeds = torch.tensor([0, 1, 2, -1]), torch.tensor([0, 1, -1, 0]), [3, 1, 4, 15]

    def draw(rows):
        noise = Noise([seeds[r] for r in rows])
        model = ddpm.eps_model(network, schedule, y[rows], g[rows], scale=1.5)
        return SAMPLERS[name](model, schedule, noise(3, 8, 8), even_times(5, 11), noise)
    whole = draw([0, 1, 2, 3])
    parts = torch.cat([draw([0]), draw([1, 2, 3])])
    assert torch.allclose(whole, parts, atol=1e-4)
    assert (whole[0] - whole[1]).abs().mean() > 0.05
