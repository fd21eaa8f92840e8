"""Class-N-Diff: the classifier inside the diffusion model's training, in two forms.

The guide learns beside the model and, in some steps, teaches it: Munia & Imran 2025 (arXiv
2510.16887). Or the model itself classifies, by a head on its bottleneck (`UNet.classify`).
"""
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import classifier
import ddpm
from engine.training import fit, random_turn, to_float


class Head(nn.Module):
    """The joint head of a UNet, called as a guide is: logits (B, classes) of (x_t, t)."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.unet.classify(x_t, t)


class UnetEMA(ddpm.EMA):
    """Of the diffusion model alone: the guide's BatchNorm counts batches, and counts have no mean.
    Its last weights serve, as those of a guide trained apart do."""

    def update(self, networks: nn.ModuleDict) -> None:
        super().update(networks["unet"])


def taught(guide: nn.Module, schedule: ddpm.Schedule, t: Tensor, x0_hat: Tensor,
           y: Tensor) -> Tensor:
    """Does the clean estimate show the class that the model was told? A scalar:

        mean of abar_t * CE(guide(x0_hat), y)

    abar_t, because x0_hat of a very noisy image is a blur of all images, and a class forced upon it
    noise that fools the guide. x0_hat is clipped, as samplers clip it and the guide knows images.
    A row whose class is withheld counts 0: that would teach the model to mean a class unasked.
    """
    logits = guide(x0_hat.clamp(-1, 1), torch.zeros_like(t))
    error = F.cross_entropy(logits, y, ignore_index=-1, reduction="none")               # (B,)
    return (schedule.abar(t, x0_hat).flatten() * error).mean()


def train(networks: nn.ModuleDict, schedule: ddpm.Schedule, images: Tensor, labels: Tensor,
          groups: Tensor, weights: Tensor, *, steps: int, batch: int, lr: float, ema_decay: float,
          prediction: str, drop: float, jitter: float, classifier_weight: float,
          classifier_probability: float, seed: int, bf16: bool = False,
          **progress) -> list[float]:
    """Train "unet" (EMA weights are left in it) together with "guide", or with its own head where
    `networks` holds no guide. Arguments otherwise as in ddpm.train and classifier.train.

    Every step has the diffusion loss. Then the classifier learns from other real images, evenly
    over the classes, half of them clean, half noised. But with classifier_probability, once the
    learning rate has warmed up (a tenth of the steps), the guide teaches instead: classifier_weight
    times `taught` is added, and its gradient reaches the diffusion model alone. A head teaches in
    every step, by what its loss, times classifier_weight, does to the half that it shares.
    """
    unet, joint = networks["unet"], "guide" not in networks
    guide = Head(unet) if joint else networks["guide"]
    ema, balanced = UnetEMA(unet, ema_decay), classifier.drawer(weights, batch)
    noise = functools.partial(schedule.noised, clean=0.5)

    def pick(generator):
        index = torch.randint(len(images), (batch,), generator=generator, device=images.device)
        return torch.stack([index, balanced(generator)], dim=1)                  # (B, 2)

    def also(t, x0_hat, y):
        return classifier_weight * taught(guide, schedule, t, x0_hat, y)

    def loss_fn(index, generator, part):
        for_unet, for_guide = index.unbind(1)
        coin = torch.rand((), generator=generator, device=images.device)
        # ema.updates is the number of this step, in a resumed run too
        teaches = not joint and ema.updates >= steps / 10 and bool(coin < classifier_probability)
        guide.train(not teaches).requires_grad_(not teaches)
        x0 = random_turn(to_float(images[for_unet]), generator)
        loss = ddpm.loss(unet, schedule, x0, labels[for_unet], groups[for_unet], generator, part,
                         prediction=prediction, drop=drop, also=also if teaches else None)
        if teaches:
            return loss
        return loss + (classifier_weight if joint else 1) * classifier.loss(
            guide, images, labels, for_guide, generator, part, jitter=jitter, noise=noise)

    history = fit(networks, pick, loss_fn, steps=steps, lr=lr, seed=seed, device=images.device,
                  bf16=bf16, ema=ema, record=False, **progress)       # the coin is the CPU's
    unet.load_state_dict(ema.shadow)
    guide.requires_grad_()
    return history
