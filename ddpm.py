"""Denoising diffusion: the noise schedule, the training loss, three samplers and DDIM inversion.

Nothing here knows the UNet: samplers take any callable eps_model(x_t, t) -> eps_hat, so that
guidance (guidance.py) and exact oracles (tests) pass through the very same lines.
Sources: Ho et al. 2020, DDPM (arXiv 2006.11239); Song et al. 2021, DDIM (arXiv 2010.02502);
Nichol & Dhariwal 2021, cosine schedule (arXiv 2102.09672); Salimans & Ho 2022, v (2202.00512);
Lu et al. 2022, DPM-Solver++ (2211.01095).
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.augment import random_turn, to_float
from engine.training import EMA, fit, wide

EpsModel = Callable         # (x_t, t) -> eps_hat, (B, C, H, W)


class Schedule:
    """How much of the image is left at each noise level:

        q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I).

    The papers count t = 1..T; the code counts t = 0..T-1, so code t = paper t - 1, and the clean
    image, the papers' t = 0, is code t = -1 with abar = 1. Tables are float64 and cast when read.
    kind: "linear" or "cosine". Raises ValueError for another, and if abar_T > 0.01: sampling would
    start from more noise than training saw."""

    def __init__(self, T: int = 1000, kind: str = "cosine", device="cpu"):
        if kind == "linear":        # Ho et al. 2020, section 4, for T = 1000
            betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
            betas = betas * (1000 / T)      # a short one ends in noise too
        elif kind == "cosine":      # Nichol & Dhariwal 2021, Eq. 17
            u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
            abar = (u + 0.008) / 1.008 * math.pi / 2
            abar = torch.cos(abar) ** 2
            betas = 1 - abar[1:] / abar[:-1]
        else:
            raise ValueError(f"schedule {kind!r}: linear or cosine")

        self.T = T
        betas = betas.clamp(max=0.999).to(device, wide(device))
        self.betas, self.alphas = betas, 1 - betas              # (T,)
        self.alphas_cumprod = self.alphas.cumprod(0)
        last = self.alphas_cumprod[-1]
        if last > 0.01:
            raise ValueError(f"a {kind} schedule of T = {T} leaves {last:.3f}"
                             " of the image's variance: take a larger T")

    def abar(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha-bar at t, shaped (B, 1, 1, 1) and typed to broadcast over `like`; 1 at t = -1.
        t: (B,) int64 in -1..T-1. Raises ValueError if t is not (B,)."""
        if t.shape != (len(like),):
            raise ValueError(f"t: {tuple(t.shape)}, not ({len(like)},)")
        value = self.alphas_cumprod[t.clamp(min=0)]
        value = torch.where(t < 0, 1.0, value).to(like.dtype)
        return value.view(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x0 noised to level t: sqrt(abar_t) x0 + sqrt(1 - abar_t) eps."""
        abar_t = self.abar(t, x0)                       # Ho et al., Eq. 4
        return abar_t.sqrt() * x0 + (1 - abar_t).sqrt() * eps

    def noised(self, x0: Tensor, generator: torch.Generator):
        """x0, each image at a level of its own, and the levels: what a guide learns from."""
        on = {"generator": generator, "device": x0.device}
        t = torch.randint(self.T, (len(x0),), **on)
        eps = torch.randn(x0.shape, **on)
        return self.q_sample(x0, t, eps), t

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean image that (x_t, eps) imply, not clipped."""
        abar_t = self.abar(t, x_t)                      # Ho et al., Eq. 15
        return (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()

    def predict_eps(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise that (x_t, x0) imply: q_sample solved for eps."""
        abar_t = self.abar(t, x_t)
        return (x_t - abar_t.sqrt() * x0) / (1 - abar_t).sqrt()

    def velocity(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0."""
        abar_t = self.abar(t, x0)                       # Salimans & Ho, section 4
        return abar_t.sqrt() * eps - (1 - abar_t).sqrt() * x0

    def eps_from_velocity(self, x_t: Tensor, t: Tensor,
                          v: Tensor) -> Tensor:
        """eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t: that rotation backwards."""
        abar_t = self.abar(t, x_t)
        return abar_t.sqrt() * v + (1 - abar_t).sqrt() * x_t

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor):
        """mu-tilde, beta-tilde: mean and variance of q(x_{t_prev} | x_t, x_0), Ho et al., Eq. 7 for
        t_prev = t - 1; for a longer stride the same lines (Nichol & Dhariwal 2021, section 4)."""
        abar_t = self.abar(t, x_t)                              # (B, 1, 1, 1)
        abar_prev = self.abar(t_prev, x_t)
        alpha_t = abar_t / abar_prev
        of_x0 = abar_prev.sqrt() * (1 - alpha_t)
        of_x_t = alpha_t.sqrt() * (1 - abar_prev)
        mean = (of_x0 * x0 + of_x_t * x_t) / (1 - abar_t)
        variance = (1 - alpha_t) * (1 - abar_prev) / (1 - abar_t)
        return mean, variance


# ---- training --------------------------------------------------------------------------------

def loss(network: nn.Module, schedule: Schedule, x0: Tensor,
         y: Tensor, g: Tensor, generator: torch.Generator, *,
         prediction: str = "v", drop: float = 0.1, also=None) -> Tensor:
    """The training loss: mean squared error of the predicted eps or v at a random noise level.
    Ho et al. 2020, Algorithm 1 and Eq. 14 (eps); Salimans & Ho 2022, Eq. 12 (v: its error weighs
    that of x0 by SNR + 1, so that the noisiest levels, where eps says nothing, are learnt too).
    With probability `drop` each, the class, the group, and both together are withheld (-1), so that
    one network is also the unconditional model: Ho & Salimans 2022 (arXiv 2207.12598).
    x0: (B, 3, H, W) in [-1, 1]; y, g: (B,) int64, -1 unknown. also(t, x0_hat, y) is added, of the
    network's clean estimate (not clipped) and the class it was told. Returns a scalar."""
    on = {"generator": generator, "device": x0.device}
    t = torch.randint(schedule.T, (len(x0),), **on)             # (B,)
    eps = torch.randn(x0.shape, **on)                           # (B, 3, H, W)

    # What the network is told this time.
    told = torch.rand(3, len(x0), **on) >= drop
    y = torch.where(told[0] & told[2], y, -1)
    g = torch.where(told[1] & told[2], g, -1)

    # Algorithm 1, line 5.
    x_t = schedule.q_sample(x0, t, eps)
    output = network(x_t, t, y, g)                              # (B, 3, H, W)
    target, eps_hat = eps, output
    if prediction == "v":
        target = schedule.velocity(x0, t, eps)
        eps_hat = schedule.eps_from_velocity(x_t, t, output)
    error = (output - target).square().mean()
    if also is None:
        return error
    x0_hat = schedule.predict_x0(x_t, t, eps_hat)               # Class-N-Diff
    return error + also(t, x0_hat, y)


def train(network: nn.Module, schedule: Schedule, images: Tensor,
          labels: Tensor, groups: Tensor, *, steps: int, batch: int,
          lr: float, ema_decay: float, prediction: str, drop: float,
          seed: int, bf16=False, compiled=False, **progress) -> list[float]:
    """Train on uint8 images (N, 3, H, W) and leave the EMA weights in `network`.
    labels, groups: (N,) int64. Images are turned and mirrored at random. compiled: torch.compile
    merges what lies between the convolutions: a minute first, then a GPU takes half as long.
    `progress` goes to training.fit. Returns the loss history."""
    model = torch.compile(network, dynamic=False) if compiled else network

    def pick(generator):
        on = {"generator": generator, "device": images.device}
        return torch.randint(len(images), (batch,), **on)

    def batch_loss(index, generator):
        x0 = random_turn(to_float(images[index]), generator)
        y, g = labels[index], groups[index]
        return loss(model, schedule, x0, y, g, generator,
                    prediction=prediction, drop=drop)

    ema = EMA(network, ema_decay)
    history = fit(network, pick, batch_loss, steps=steps, lr=lr,
                  seed=seed, device=images.device, bf16=bf16,
                  ema=ema, **progress)
    network.load_state_dict(ema.shadow)
    return history


def eps_model(network: nn.Module, schedule: Schedule, y: Tensor, g: Tensor,
              *, prediction: str = "v", scale: float = 1.0,
              bf16: bool = False) -> EpsModel:
    """The network as eps_model(x_t, t) for images of class y and group g, (B,) int64, -1 untold.
    scale: classifier-free guidance, Ho & Salimans 2022, Eq. 6 in the form
        eps = eps(x_t) + scale * (eps(x_t, y, g) - eps(x_t));
    1 is the conditional model itself and costs one evaluation, anything else two."""
    nobody = torch.full_like(y, -1)
    half = {"dtype": torch.bfloat16, "enabled": bf16}

    def evaluate(x_t, t, y, g):
        device = x_t.device.type
        with torch.no_grad(), torch.autocast(device, **half):
            output = network(x_t, t, y, g)
        if prediction == "eps":
            return output
        return schedule.eps_from_velocity(x_t, t, output)

    def conditional(x_t, t):
        eps_hat = evaluate(x_t, t, y, g)
        if scale == 1:
            return eps_hat
        free = evaluate(x_t, t, nobody, nobody)                 # unconditional
        return free + scale * (eps_hat - free)
    return conditional


# ---- sampling --------------------------------------------------------------------------------

def even_times(steps: int, last: int) -> list[int]:
    """Noise levels from `last` to -1, the clean image, in `steps` even strides; ValueError if there
    are fewer levels. With more, no step is spent on level 0, all but clean: that would cost DDIM a
    tenth, on the exact oracle, and DPM-Solver++ most of its advantage."""
    if not 1 <= steps <= last + 1:
        raise ValueError(f"{steps} steps do not fit between the noise "
                         f"levels 0 and {last}")
    times = torch.linspace(last, -1, steps + 1, dtype=torch.float64)
    return [round(time) for time in times.tolist()]             # steps + 1 of them


def pairs(times: list[int], x: Tensor):
    """Every step's noise levels (t, t_next), each (B,) int64, for the images x."""
    levels = [torch.full((len(x),), t, device=x.device) for t in times]
    return zip(levels, levels[1:])


# A sampler takes (eps_model, schedule, x, times, noise, clip) and returns x_0, (B, C, H, W).
# x: (B, C, H, W) at level times[0]; times: as of `even_times`; noise(C, H, W): fresh noise for
# the B images (ddpm alone draws any); clip: x0_hat is held to [-clip, clip], where images live.

def sample_ddpm(eps_model: EpsModel, schedule: Schedule, x: Tensor,
                times: list[int], noise, clip: float = 1.0) -> Tensor:
    """Ancestral sampling: Ho et al. 2020, Algorithm 2, with x0_hat clipped before it is used."""
    for t, t_next in pairs(times, x):
        x0_hat = schedule.predict_x0(x, t, eps_model(x, t))
        x0_hat = x0_hat.clamp(-clip, clip)

        # To the posterior's mean; and add its spread but for the last
        # step, where beta-tilde is 0, because x_0 is what we want.
        x, variance = schedule.posterior(x0_hat, x, t, t_next)
        if t_next[0] >= 0:
            x = x + variance.sqrt() * noise(*x.shape[1:])
    return x


def sample_ddim(eps_model: EpsModel, schedule: Schedule, x: Tensor,
                times: list[int], noise=None, clip: float = 1.0) -> Tensor:
    """DDIM: Song et al. 2021, Eq. 12 with sigma = 0. The image follows from x alone."""
    for t, t_next in pairs(times, x):
        eps = eps_model(x, t)
        x = ddim_step(schedule, x, t, t_next, eps, clip)
    return x


def sample_dpm(eps_model: EpsModel, schedule: Schedule, x: Tensor,
               times: list[int], noise=None, clip: float = 1.0) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2: the ODE of DDIM at second order, by a straight
    line through the last two x0_hat in lambda = log(alpha / sigma)."""
    before = None                               # x0_hat and h of the last step
    for t, t_next in pairs(times, x):
        x0_hat = schedule.predict_x0(x, t, eps_model(x, t))
        x0_hat = x0_hat.clamp(-clip, clip)
        if t_next[0] < 0:
            return x0_hat                       # lambda = infinity

        # D: x0_hat carried on along the line by half a step.
        abar_t = schedule.abar(t, x)
        abar_next = schedule.abar(t_next, x)
        h = (abar_next.logit() - abar_t.logit()) / 2            # of lambda
        D = x0_hat
        if before is not None:
            last, h_last = before
            D = x0_hat + h / (2 * h_last) * (x0_hat - last)
        before = x0_hat, h

        # sigma_next / sigma x - alpha_next (exp(-h) - 1) D
        shrink = ((1 - abar_next) / (1 - abar_t)).sqrt()
        x = shrink * x - abar_next.sqrt() * torch.expm1(-h) * D
    return x


SAMPLERS = {"ddim": sample_ddim, "ddpm": sample_ddpm, "dpm": sample_dpm}


def ddim_step(schedule: Schedule, x_t: Tensor, t: Tensor, t_next: Tensor,
              eps: Tensor, clip: float = math.inf) -> Tensor:
    """From level t to t_next, up or down, along the estimated noise. Their alpha is our alpha-bar.
    If x0_hat is clipped, eps is recomputed to agree."""
    x0_hat = schedule.predict_x0(x_t, t, eps)
    if clip < math.inf:
        x0_hat = x0_hat.clamp(-clip, clip)
        eps = schedule.predict_eps(x_t, t, x0_hat)
    abar_next = schedule.abar(t_next, x_t)                      # (B, 1, 1, 1)
    return abar_next.sqrt() * x0_hat + (1 - abar_next).sqrt() * eps


def invert_ddim(eps_model: EpsModel, schedule: Schedule, x0: Tensor,
                times: list[int]) -> Tensor:
    """The same ODE run from the image up to level times[0]: the latent that decodes to x0 again.
    Every step takes eps at the level it leaves (for the clean image, at level 0), which is exact as
    steps grow: Song et al. 2021, section 4.3 and 5.4. Not clipped. Returns x_t, (B, C, H, W)."""
    x = x0
    for t, t_next in pairs(times[::-1], x):
        eps = eps_model(x, t.clamp(min=0))                      # at the level it leaves
        x = ddim_step(schedule, x, t, t_next, eps)
    return x
