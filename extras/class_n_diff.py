"""Class-N-Diff, Munia & Imran 2025 (arXiv 2510.16887): the guide learns beside the diffusion model,
and in some steps both learn from what that makes of a noised image; or the model itself classifies,
by a head on its bottleneck."""
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import classifier
import ddpm
from engine.augment import random_turn, to_float
from engine.training import EMA, fit
from unet import UNet, norm, zero


class JointUNet(UNet):
    """A UNet with a second head: logits from the bottleneck, which both tasks share."""

    def __init__(self, size: int, classes: int, *more):
        super().__init__(size, classes, *more)
        bottom = self.middle[-1].conv2.out_channels
        # last, so that the other weights are those of a network without it
        self.diagnosis = nn.Sequential(norm(bottom), nn.SiLU(), nn.AdaptiveAvgPool2d(1),
                                       nn.Flatten(), zero(nn.Linear(bottom, classes)))

    def classify(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits (B, classes) of noisy images; class and group would tell the answer."""
        untold = torch.full_like(t, -1)
        return self.diagnosis(self.encode(x_t, self.embed(t, untold, untold))[0])


class Head(nn.Module):
    """The joint head of a UNet, called as a guide is: logits (B, classes) of (x_t, t)."""

    def __init__(self, unet: JointUNet):
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.unet.classify(x_t, t)


class UnetEMA(EMA):
    """Of the diffusion model alone: the guide's BatchNorm counts batches, which have no mean."""

    def update(self, networks: nn.ModuleDict) -> None:
        super().update(networks["unet"])


def taught(guide: nn.Module, schedule: ddpm.Schedule, weight: float, t: Tensor, x0_hat: Tensor,
           y: Tensor) -> Tensor:
    """Does the clean estimate show the class that the model was told? A scalar:

        mean of abar_t * CE(guide(x0_hat), y)

    abar_t, because x0_hat of a very noisy image is a blur of all. It is clipped as samplers do; a
    withheld class counts 0. The guide learns all of it, the diffusion model `weight` times it."""
    x0_hat = x0_hat.detach().lerp(x0_hat, weight)       # its value, but weight times its gradient
    logits = guide(x0_hat.clamp(-1, 1), torch.zeros_like(t))
    error = F.cross_entropy(logits, y, ignore_index=-1, reduction="none")               # (B,)
    return (schedule.abar(t, x0_hat).flatten() * error).mean()


def half_noised(schedule: ddpm.Schedule, x0: Tensor,
                generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Schedule.noised, but half of the images are left clean and told to be at level 0, which is
    all but clean."""
    x_t, t = schedule.noised(x0, generator)
    coin = torch.rand(len(x0), generator=generator, device=x0.device)
    clean = coin < 0.5
    return torch.where(clean.view(-1, 1, 1, 1), x0, x_t), torch.where(clean, 0, t)


def train(networks: nn.ModuleDict, schedule: ddpm.Schedule, images: Tensor, labels: Tensor,
          groups: Tensor, weights: Tensor, *, steps: int, batch: int, lr: float, ema_decay: float,
          prediction: str, drop: float, jitter: float, classifier_weight: float,
          classifier_probability: float, seed: int, bf16: bool = False,
          **progress) -> list[float]:
    """Train "unet" (EMA weights are left in it) together with "guide", or with its own head where
    `networks` holds none. To the diffusion loss is added the classifier's, on other real images,
    evenly over the classes, half of them clean. Once a tenth of the steps is done a gate opens:
    with classifier_probability the guide sees the model's clean estimates in their place, and both
    learn by `taught`. A head's loss, times classifier_weight, teaches the model in every step."""
    unet, joint = networks["unet"], "guide" not in networks
    guide = Head(unet) if joint else networks["guide"]
    ema, table = UnetEMA(unet, ema_decay), classifier.cumulative(weights)
    noise = functools.partial(half_noised, schedule)

    def pick(generator):
        index = torch.randint(len(images), (batch,), generator=generator, device=images.device)
        return torch.stack([index, classifier.pick(table, batch, generator)], dim=1)     # (B, 2)

    also = functools.partial(taught, guide, schedule, classifier_weight)

    def loss(index, generator):
        for_unet, for_guide = index.unbind(1)
        coin = torch.rand((), generator=generator, device=images.device)
        # ema.updates is the number of this step, in a resumed run too
        gate = not joint and ema.updates >= steps / 10 and bool(coin < classifier_probability)
        x0 = random_turn(to_float(images[for_unet]), generator)
        error = ddpm.loss(unet, schedule, x0, labels[for_unet], groups[for_unet], generator,
                          prediction=prediction, drop=drop, also=also if gate else None)
        if gate:
            return error
        return error + (classifier_weight if joint else 1) * classifier.loss(
            guide, images, labels, jitter, noise, for_guide, generator)

    history = fit(networks, pick, loss, steps=steps, lr=lr, seed=seed, device=images.device,
                  bf16=bf16, ema=ema, record=False, **progress)       # the coin is the CPU's
    unet.load_state_dict(ema.shadow)
    return history
