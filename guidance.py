"""Steering the diffusion model: objectives, their gradients, the wrapper that adds them to eps, and
three ways to an image: counterfactual, variation, pure noise.

The wrapper makes a guided eps_model of any: samplers never hear of it, and off is exactly off.
Sources: Dhariwal & Nichol 2021 (arXiv 2105.05233), Algorithm 2, guidance of eps; Bansal et al. 2023
(arXiv 2302.07121), objectives on x0_hat; Song et al. 2021 (arXiv 2010.02502), 5.4, inversion;
Meng et al. 2022, SDEdit (arXiv 2108.01073), the start from a noised image.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data import ImageSet
from ddpm import (SAMPLERS, EpsModel, Schedule, eps_model,
                  even_times, invert_ddim, sample_ddim)
from engine.augment import to_float, to_uint8
from engine.training import Noise

Objective = Callable    # (x_t, t, x0_hat) -> (B,), larger is better; no image sees another


class Tally:
    """Counts what guidance had to drop."""
    nonfinite = 0


def frozen(*networks: nn.Module) -> None:
    """In train mode BatchNorm would let one image change another's gradient."""
    if any(network.training for network in networks):
        raise ValueError("guidance needs eval mode: call network.eval()")


def class_evidence(guide: nn.Module, y: Tensor) -> Objective:
    """log p(y | x_t) by the noise-aware guide; y: (B,) int64. Dhariwal & Nichol 2021, 4.1."""
    frozen(guide)

    def objective(x_t, t, x0_hat):
        log_p = guide(x_t, t).log_softmax(1)                    # (B, classes)
        return log_p.gather(1, y[:, None])[:, 0]
    return objective


def hardness(students: Sequence[nn.Module], y: Tensor,
             cap: float = 0.69) -> Objective:
    """How wrong the students' mean vote is about the clean estimate: min(-log p(y | x0_hat), cap).
    An ensemble, because one student's gradient makes noise that fools that student alone; capped
    at log 2, where the vote is even, because beyond it the image stops being of its class."""
    frozen(*students)

    def objective(x_t, t, x0_hat):
        votes = [student(x0_hat).softmax(1) for student in students]    # (B, classes) each
        p = torch.stack(votes).mean(0).gather(1, y[:, None])[:, 0]
        return (-p.clamp(min=1e-6).log()).clamp(max=cap)
    return objective


# name in the config -> (guide, students, y) -> Objective
OBJECTIVES = {
    "class_evidence": lambda guide, students, y: class_evidence(guide, y),
    "hardness": lambda guide, students, y: hardness(students, y),
}


def gradient(objective: Objective, schedule: Schedule, x_t: Tensor,
             t: Tensor, eps: Tensor) -> Tensor:
    """d objective / d x_t, one image at a time, like x_t. x0_hat follows x_t with eps held fixed:
    going through the network too would double the cost, and only the direction is used."""
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        x0_hat = schedule.predict_x0(x, t, eps.detach())
        x0_hat = x0_hat.clamp(-1, 1)                # the range that objectives know
        value = objective(x, t, x0_hat).sum()
        return torch.autograd.grad(value, x)[0]


def normalise(grad: Tensor, tally: Tally | None = None) -> Tensor:
    """Each image's gradient at root mean square 1, so that one scale means the same for every term,
    image and noise level. Non-finite ones become 0 and are counted; 0 stays 0."""
    finite = grad.flatten(1).isfinite().all(1)                  # (B,)
    if tally is not None:
        tally.nonfinite += int((~finite).sum())
    grad = torch.where(finite.view(-1, 1, 1, 1), grad, 0.0)

    # Squares of tiny numbers vanish: divide by the largest first.
    size = grad.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    grad = grad / size.clamp(min=torch.finfo(grad.dtype).tiny)
    rms = grad.square().mean((1, 2, 3), keepdim=True).sqrt()    # (B, 1, 1, 1)
    return torch.where(rms > 0, grad / rms, 0.0)


def guided_eps(model: EpsModel, schedule: Schedule,
               terms: Sequence[tuple[float, Objective]],
               tally: Tally | None = None) -> EpsModel:
    """An eps_model that climbs the terms (scale, objective). Dhariwal & Nichol 2021, Algorithm 2:

        eps <- eps - scale * sqrt(1 - abar_t) * gradient

    Each image's gradient is set to root mean square sqrt(abar_t), our choice: x0_hat then moves by
    scale * (1 - abar_t): less as the noise goes, and never more than the scale.
    A term of scale 0 is not evaluated; without any other the very same eps_model is returned."""
    terms = [(scale, term) for scale, term in terms if scale != 0]
    if not terms:
        return model

    def guided(x_t, t):
        eps, push = model(x_t, t), 0
        for scale, objective in terms:
            grad = gradient(objective, schedule, x_t, t, eps)
            push = push + scale * normalise(grad, tally)
        abar_t = schedule.abar(t, x_t)                          # (B, 1, 1, 1)
        # sqrt(1 - abar_t) of Algorithm 2, times the gradient's sqrt(abar_t)
        return eps - (abar_t * (1 - abar_t)).sqrt() * push
    return guided


# ---- three ways to an image ------------------------------------------------------------------

def counterfactual(own: EpsModel, wanted: EpsModel,
                   schedule: Schedule, x0: Tensor, depth: float,
                   steps: int, sample=sample_ddim, noise=None) -> Tensor:
    """The same lesion, were it otherwise: invert x0 under `own`, decode the latent under `wanted`.
    own: eps_model told the image's class and group; wanted: told the class and another group,
    guided or not. What the condition does not explain (the lesion's shape, its place) sits in the
    latent and stays; what it does explain (the skin) changes. x0: (B, C, H, W) in [-1, 1]. depth:
    share of the noise levels to climb, in (0, 1]."""
    end = max(steps, round(depth * schedule.T)) - 1
    times = even_times(steps, end)
    latent = invert_ddim(own, schedule, x0, times)              # up
    return sample(wanted, schedule, latent, times, noise)       # and down


def variation(wanted: EpsModel, schedule: Schedule, x0: Tensor,
              noise: Callable, strength: float, steps: int,
              sample=sample_ddim) -> Tensor:
    """A relative of x0: noise it up to `strength` of the levels and denoise. Meng et al. 2022.
    noise(C, H, W): standard normal, like x0. strength 1 forgets x0; 0.3 keeps all but texture."""
    start = max(steps, round(strength * schedule.T)) - 1
    times = even_times(steps, start)
    t = torch.full((len(x0),), start, device=x0.device)
    x_t = schedule.q_sample(x0, t, noise(*x0.shape[1:]))
    return sample(wanted, schedule, x_t, times, noise)


class Generator(NamedTuple):
    """The trained diffusion model and the guide that steers it."""
    unet: nn.Module
    guide: nn.Module
    schedule: Schedule
    prediction: str                         # eps or v
    bf16: bool


class Drawn(NamedTuple):
    """What became of N parents."""
    images: np.ndarray                      # uint8 (N, 3, H, W)
    finite: np.ndarray | bool = True        # (N,) bool: whether each came out so
    nonfinite_gradients: int = 0            # dropped on the way


def synthesise(generator: Generator,
               students: Sequence[nn.Module], parents: ImageSet,
               targets: np.ndarray, seeds: np.ndarray, c, *, start: str,
               objectives: dict[str, float]) -> Drawn:
    """One image of every parent's class and of group targets (N,), -1 for none, in one batch.
    start: "counterfactual", "parent" (a variation of it) or "noise". objectives: name -> scale.
    c: the config's section `guidance` (sampler, steps, depth, strength, classifier_free)."""
    unet, guide, schedule, prediction, bf16 = generator
    device = schedule.betas.device
    x0 = to_float(torch.tensor(parents.images, device=device))
    y, own, target = (torch.tensor(a, device=device)
                      for a in (parents.labels, parents.groups, targets))
    noise, tally = Noise(seeds, device), Tally()

    # The model told the wanted group, climbing the objectives.
    def told(group, scale=1.0):
        return eps_model(unet, schedule, y, group, scale=scale,
                         prediction=prediction, bf16=bf16)
    terms = [(scale, OBJECTIVES[name](guide, students, y))
             for name, scale in objectives.items() if scale]
    wanted = told(target, c.classifier_free)                    # an eps_model
    wanted = guided_eps(wanted, schedule, terms, tally)

    sample = SAMPLERS[c.sampler]
    if start == "counterfactual":
        x = counterfactual(told(own), wanted, schedule, x0,
                           c.depth, c.steps, sample, noise)
    elif start == "parent":
        x = variation(wanted, schedule, x0, noise,
                      c.strength, c.steps, sample)
    else:
        times = even_times(c.steps, schedule.T - 1)
        x_T = noise(*x0.shape[1:])                              # (B, 3, H, W)
        x = sample(wanted, schedule, x_T, times, noise)
    x = x.float().cpu()
    finite = x.flatten(1).isfinite().all(1).numpy()             # (N,) bool
    x = to_uint8(x.nan_to_num()).numpy()
    return Drawn(x, finite, tally.nonfinite)

