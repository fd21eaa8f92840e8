"""Denoising diffusion: the noise schedule, the training loss, three samplers and DDIM inversion.

Nothing here knows the UNet: samplers take any callable eps_model(x_t, t) -> eps_hat, so that
guidance (guidance.py) and exact oracles (tests) pass through the very same lines.
Sources: Ho et al. 2020, DDPM (arXiv 2006.11239); Song et al. 2021, DDIM (arXiv 2010.02502);
Nichol & Dhariwal 2021, cosine schedule (arXiv 2102.09672); Salimans & Ho 2022, v (2202.00512);
Lu et al. 2022, DPM-Solver++ (2211.01095).

    python ddpm.py --config config.yaml      train on the config's data, write samples to ddpm.png
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.training import fit, random_turn, to_float

EpsModel = Callable[[Tensor, Tensor], Tensor]


class Schedule:
    """How much of the image is left at each noise level:

        q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I).

    The papers count t = 1..T; the code counts t = 0..T-1, so code t = paper t - 1, and the clean
    image, the papers' t = 0, is code t = -1 with abar = 1. Tables are float64 and cast when read.
    """

    def __init__(self, T: int = 1000, kind: str = "cosine", device: torch.device | str = "cpu"):
        """kind: "linear" (Ho et al. 2020, section 4, its betas scaled by 1000/T so that a short
        schedule still ends in noise) or "cosine" (Nichol & Dhariwal 2021, Eq. 17, beta <= 0.999).
        Raises ValueError if abar_T > 0.01: sampling would start from more noise than training saw.
        """
        if kind == "linear":
            betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
            betas = betas.clamp(max=0.999)
        elif kind == "cosine":
            u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
            abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"schedule {kind!r} is neither 'linear' nor 'cosine'")
        self.T = T
        self.betas = betas.to(device)
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64, device=device),
                              self.alphas_cumprod[:-1]])
        # beta-tilde, Ho et al. 2020, Eq. 7
        self.posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        if self.alphas_cumprod[-1] > 0.01:
            raise ValueError(f"a {kind} schedule of T = {T} leaves {self.alphas_cumprod[-1]:.3f} "
                             "of the image's variance at its end: take a larger T")

    def abar(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha-bar at t, shaped (B, 1, 1, 1) and typed to broadcast over `like`; 1 at t = -1.

        t: (B,) int64 in -1..T-1. Raises ValueError if t is not (B,).
        """
        if t.shape != (len(like),):
            raise ValueError(f"t has shape {tuple(t.shape)}, wanted ({len(like)},)")
        value = torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp(min=0)])
        return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def log_snr(self, t: Tensor, like: Tensor) -> Tensor:
        """log(abar_t / (1 - abar_t)), as `abar`; for t >= 0 (Kingma et al. 2021)."""
        value = self.alphas_cumprod.logit()[t]
        return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps: x0 noised to level t. Ho et al., Eq. 4."""
        abar_t = self.abar(t, x0)
        return abar_t.sqrt() * x0 + (1 - abar_t).sqrt() * eps

    def noised(self, x0: Tensor, generator: torch.Generator,
               clean: float = 0.0) -> tuple[Tensor, Tensor]:
        """x0, each image at a level of its own, and the levels: what a guide learns from. A share
        `clean` of them is left clean and told to be at level 0, which is all but clean."""
        t = torch.randint(self.T, (len(x0),), generator=generator, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        coin = torch.rand(len(x0), generator=generator, device=x0.device)
        t = torch.where(coin < clean, -1, t)
        return self.q_sample(x0, t, eps), t.clamp(min=0)

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean image that (x_t, eps) imply, not clipped. Ho et al. 2020, Eq. 15."""
        abar_t = self.abar(t, x_t)
        return (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()

    def predict_eps(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise that (x_t, x0) imply: q_sample solved for eps."""
        abar_t = self.abar(t, x_t)
        return (x_t - abar_t.sqrt() * x0) / (1 - abar_t).sqrt()

    def velocity(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0. Salimans & Ho 2022, section 4."""
        abar_t = self.abar(t, x0)
        return abar_t.sqrt() * eps - (1 - abar_t).sqrt() * x0

    def eps_from_velocity(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t: the same rotation, the other way round."""
        abar_t = self.abar(t, x_t)
        return abar_t.sqrt() * v + (1 - abar_t).sqrt() * x_t

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """mu-tilde, the mean of q(x_{t-1} | x_t, x_0). Ho et al. 2020, Eq. 7."""
        abar_t, abar_prev = self.abar(t, x_t), self.abar(t - 1, x_t)
        alpha_t = abar_t / abar_prev
        return (abar_prev.sqrt() * (1 - alpha_t) * x0
                + alpha_t.sqrt() * (1 - abar_prev) * x_t) / (1 - abar_t)


def loss(network: nn.Module, schedule: Schedule, x0: Tensor, y: Tensor, g: Tensor,
         generator: torch.Generator, part: slice = slice(None), *, prediction: str = "v",
         drop: float = 0.1,
         also: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """The training loss: mean squared error of the predicted eps or v at a random noise level.

    Ho et al. 2020, Algorithm 1 and Eq. 14 (eps); Salimans & Ho 2022, Eq. 12 (v: its error weighs
    that of x0 by SNR + 1, so that the noisiest levels, where eps says nothing, are learnt too).
    With probability `drop` each, the class, the group, and both together are withheld (-1), so that
    one network is also the unconditional model: Ho & Salimans 2022 (arXiv 2207.12598).
    x0: (B, 3, H, W) in [-1, 1]; y, g: (B,) int64, -1 unknown. part: the rows that count; what is
    drawn is drawn for all. also(t, x0_hat, y) is added, of the network's clean estimate (not
    clipped) and the class it was told. Returns a scalar.
    """
    B, device = len(x0), x0.device
    t = torch.randint(schedule.T, (B,), generator=generator, device=device)
    eps = torch.randn(x0.shape, generator=generator, device=device)
    told = torch.rand(3, B, generator=generator, device=device) >= drop
    y, g = torch.where(told[0] & told[2], y, -1), torch.where(told[1] & told[2], g, -1)
    x0, y, g, t, eps = (a[part] for a in (x0, y, g, t, eps))
    x_t = schedule.q_sample(x0, t, eps)
    output = network(x_t, t, y, g)
    target = eps if prediction == "eps" else schedule.velocity(x0, t, eps)
    error = (output - target).square().mean()
    if also is None:
        return error
    eps_hat = output if prediction == "eps" else schedule.eps_from_velocity(x_t, t, output)
    return error + also(t, schedule.predict_x0(x_t, t, eps_hat), y)


class EMA:
    """A running mean of the weights: samples drawn with it are better by several points of FID.

    The decay rises as (1 + n) / (10 + n) up to `decay`, so that the random start is soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999):
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in network.state_dict().items()}

    def update(self, network: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()),
                             [v.detach() for v in network.state_dict().values()], 1 - decay)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.shadow = {k: v.clone() for k, v in state["shadow"].items()}
        self.updates = state["updates"]


def train(network: nn.Module, schedule: Schedule, images: Tensor, labels: Tensor, groups: Tensor, *,
          steps: int, batch: int, lr: float, ema_decay: float, prediction: str, drop: float,
          seed: int, bf16: bool = False, compiled: bool = False, **progress) -> list[float]:
    """Train on uint8 images (N, 3, H, W) and leave the EMA weights in `network`.

    labels, groups: (N,) int64. Images are turned and mirrored at random. compiled: torch.compile
    merges what lies between the convolutions: a minute first, then a GPU takes half as long.
    `progress` goes to training.fit (names, state, save, save_every, on_step). Returns the loss
    history.
    """
    predict = torch.compile(network, dynamic=False) if compiled else network

    def pick(generator):
        return torch.randint(len(images), (batch,), generator=generator, device=images.device)

    def loss_fn(index, generator, part):
        x0 = random_turn(to_float(images[index]), generator)
        return loss(predict, schedule, x0, labels[index], groups[index], generator, part,
                    prediction=prediction, drop=drop)

    ema = EMA(network, ema_decay)
    history = fit(network, pick, loss_fn, steps=steps, lr=lr, seed=seed, device=images.device,
                  bf16=bf16, ema=ema, **progress)
    network.load_state_dict(ema.shadow)
    return history


def eps_model(network: nn.Module, schedule: Schedule, y: Tensor, g: Tensor, *,
              prediction: str = "v", scale: float = 1.0, bf16: bool = False) -> EpsModel:
    """The network as eps_model(x_t, t) for images of class y and group g, (B,) int64, -1 untold.

    scale: classifier-free guidance, Ho & Salimans 2022, Eq. 6 in the form
        eps = eps(x_t) + scale * (eps(x_t, y, g) - eps(x_t));
    1 is the conditional model itself and costs one evaluation, anything else two.
    """
    def evaluate(x_t, t, y, g):
        with torch.no_grad(), torch.autocast(x_t.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = network(x_t, t, y, g)
        return output if prediction == "eps" else schedule.eps_from_velocity(x_t, t, output)

    def conditional(x_t, t):
        eps_hat = evaluate(x_t, t, y, g)
        if scale == 1:
            return eps_hat
        nobody = torch.full_like(y, -1)
        free = evaluate(x_t, t, nobody, nobody)
        return free + scale * (eps_hat - free)

    return conditional


class Noise:
    """One random stream per image, so that neither batch size nor order changes a picture."""

    def __init__(self, seeds: list[int], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = device

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal (len(seeds), *shape), float32, the next draw of every stream."""
        drawn = [torch.randn(shape, generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self.device)


def sample_ddpm(eps_model: EpsModel, schedule: Schedule, x_T: Tensor, noise: Callable[..., Tensor],
                clip: float | None = 1.0) -> Tensor:
    """Ancestral sampling. Ho et al. 2020, Algorithm 2, with x0_hat clipped before it is used.

    x_T: (B, C, H, W) standard normal. noise(C, H, W) gives fresh noise for the B images.
    clip: x0_hat is held to [-clip, clip]; None leaves it. Returns x_0, (B, C, H, W).
    """
    x_t = x_T
    for step in reversed(range(schedule.T)):
        t = torch.full((len(x_t),), step, device=x_t.device)
        x0_hat = schedule.predict_x0(x_t, t, eps_model(x_t, t))
        if clip is not None:
            x0_hat = x0_hat.clamp(-clip, clip)
        # Step to the posterior's mean, and add its spread except at the very last step, where
        # beta-tilde is 0 because x_0 is what we want.
        x_t = schedule.posterior_mean(x0_hat, x_t, t)
        if step > 0:
            spread = schedule.posterior_variance[step].sqrt().to(x_t.dtype)
            x_t = x_t + spread * noise(*x_t.shape[1:])
    return x_t


def ddim_times(steps: int, last: int) -> list[int]:
    """Noise levels from `last` to -1, the clean image, in `steps` even strides.

    No step is spent on level 0, which is all but clean: on the exact oracle that costs DDIM a tenth
    and DPM-Solver++ most of its advantage.
    """
    if not 1 <= steps <= last + 1:
        raise ValueError(f"{steps} steps do not fit between the noise levels 0 and {last}")
    return [round(x) for x in torch.linspace(last, -1, steps + 1, dtype=torch.float64).tolist()]


def ddim_step(schedule: Schedule, x_t: Tensor, t: Tensor, t_next: Tensor, eps: Tensor,
              clip: float | None = None, eta: float = 0.0,
              noise: Callable[..., Tensor] | None = None) -> Tensor:
    """From level t to t_next, either way, along the estimated noise.

    Song et al. 2021, Eq. 12 and 16. Their alpha is our alpha-bar. eta = 0 follows the ODE; eta = 1
    adds the noise of DDPM (needs t_next < t). If x0_hat is clipped, eps is recomputed to agree.
    """
    x0_hat = schedule.predict_x0(x_t, t, eps)
    if clip is not None:
        x0_hat = x0_hat.clamp(-clip, clip)
        eps = schedule.predict_eps(x_t, t, x0_hat)
    abar_t, abar_next = schedule.abar(t, x_t), schedule.abar(t_next, x_t)
    if eta == 0:
        return abar_next.sqrt() * x0_hat + (1 - abar_next).sqrt() * eps
    variance = eta ** 2 * (1 - abar_next) / (1 - abar_t) * (1 - abar_t / abar_next)
    direction = (1 - abar_next - variance).clamp(min=0).sqrt() * eps
    return abar_next.sqrt() * x0_hat + direction + variance.sqrt() * noise(*x_t.shape[1:])


def sample_ddim(eps_model: EpsModel, schedule: Schedule, x: Tensor, steps: int, *,
                start: int | None = None, eta: float = 0.0, clip: float | None = 1.0,
                noise: Callable[..., Tensor] | None = None) -> Tensor:
    """DDIM from noise level `start` (None: T-1, pure noise) to the clean image in `steps` steps.

    x: (B, C, H, W) at level `start`. noise is needed for eta > 0. Returns x_0, (B, C, H, W).
    """
    times = ddim_times(steps, schedule.T - 1 if start is None else start)
    for now, after in zip(times, times[1:]):
        t, t_next = (torch.full((len(x),), u, device=x.device) for u in (now, after))
        x = ddim_step(schedule, x, t, t_next, eps_model(x, t), clip, eta if after >= 0 else 0.0,
                      noise)
    return x


def sample_dpm(eps_model: EpsModel, schedule: Schedule, x: Tensor, steps: int, *,
               start: int | None = None, clip: float | None = 1.0) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), Algorithm 2: the ODE of DDIM at second
    order, by a straight line through the last two x0_hat in lambda = log(alpha / sigma).

    Arguments and result as in `sample_ddim`. The last step, to lambda = infinity, is x0_hat itself.
    """
    times = ddim_times(steps, schedule.T - 1 if start is None else start)
    lam, before = lambda t: schedule.log_snr(t, x) / 2, None
    for now, after in zip(times, times[1:]):
        t, t_next = (torch.full((len(x),), u, device=x.device) for u in (now, after))
        x0_hat = schedule.predict_x0(x, t, eps_model(x, t))
        if clip is not None:
            x0_hat = x0_hat.clamp(-clip, clip)
        if after < 0:
            return x0_hat
        h = lam(t_next) - lam(t)
        D = x0_hat if before is None else x0_hat + h / (2 * before[1]) * (x0_hat - before[0])
        before = x0_hat, h
        abar_t, abar_next = schedule.abar(t, x), schedule.abar(t_next, x)
        x = ((1 - abar_next) / (1 - abar_t)).sqrt() * x - abar_next.sqrt() * torch.expm1(-h) * D
    return x


def invert_ddim(eps_model: EpsModel, schedule: Schedule, x0: Tensor, steps: int,
                end: int) -> Tensor:
    """The same ODE run from the image to noise level `end`: the latent that decodes to x0 again.

    Every step takes eps at the level it leaves (for the clean image, at level 0), which is exact as
    steps grow: Song et al. 2021, section 4.3 and 5.4. Not clipped. Returns x_end, (B, C, H, W).
    """
    times = ddim_times(steps, end)[::-1]
    x = x0
    for now, after in zip(times, times[1:]):
        t, t_next = (torch.full((len(x),), u, device=x.device) for u in (now, after))
        x = ddim_step(schedule, x, t, t_next, eps_model(x, t.clamp(min=0)))
    return x


def main() -> None:
    """Train on a config's data; draw every class on every group from pure noise."""
    import argparse             # this and all below: for this command alone
    from dataclasses import replace

    import numpy as np

    from engine import config
    import data
    from extras import pictures
    from engine.run import Progress, one_line
    from engine.training import seeded, to_uint8
    from unet import UNet
    parser = argparse.ArgumentParser(description="Train a diffusion model and draw samples.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--out", default="ddpm.png", help="the picture to write")
    arguments = parser.parse_args()
    with one_line("ddpm.py"):
        c = config.load(arguments.config, arguments.set)
        if c.ddpm.classifier_weight:
            raise ValueError("ddpm.classifier_weight: this command trains the plain model, write "
                             f"0 or run loop.py; found {c.ddpm.classifier_weight}")
        train_set = data.load(**vars(c.data))["train"]
        classes, groups = len(train_set.class_names), max(1, len(train_set.group_names))
        network = seeded(c.loop.seed, lambda: UNet(
            c.data.size, classes, len(train_set.group_names), c.unet.width,
            tuple(c.unet.multipliers), c.unet.blocks, c.unet.attention, c.unet.patch))
        schedule, progress = Schedule(c.ddpm.T, c.ddpm.schedule), Progress("ddpm")
        train(network, schedule, *(torch.tensor(a) for a in (train_set.images, train_set.labels,
                                                             train_set.groups)),
              steps=c.ddpm.steps, batch=c.ddpm.batch, lr=c.ddpm.lr, ema_decay=c.ddpm.ema,
              prediction=c.ddpm.prediction, drop=c.ddpm.drop, seed=c.loop.seed,
              on_step=lambda step, steps, value: progress(step, steps, f"loss {value:.4f}"))
        y = torch.arange(classes).repeat_interleave(groups)
        g = (torch.arange(groups).repeat(classes) if train_set.group_names else
             torch.full_like(y, -1))
        x_T = Noise(list(range(len(y))))(3, c.data.size, c.data.size)
        model = eps_model(network, schedule, y, g, prediction=c.ddpm.prediction)
        images = to_uint8(sample_ddim(model, schedule, x_T, min(50, c.ddpm.T))).contiguous().numpy()
        made = replace(train_set.subset(np.zeros(len(y), int)), images=images, labels=y.numpy(),
                       groups=g.numpy())
        pictures.composition(train_set, made).save(arguments.out)
        print(f"wrote {arguments.out}: a row a class, a pair a group, real and from pure noise")


if __name__ == "__main__":
    main()
