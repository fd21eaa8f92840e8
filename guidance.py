"""Steering the diffusion model: objectives, their gradients, and the wrapper that adds them to eps.

The wrapper makes a guided eps_model out of any other, so samplers never hear of it: off is exactly
off, and every sampler obeys it.
Sources: Dhariwal & Nichol 2021 (arXiv 2105.05233), Algorithm 2, guidance of eps; Bansal et al. 2023
(arXiv 2302.07121), objectives on x0_hat; Song et al. 2021 (arXiv 2010.02502), 5.4, inversion;
Meng et al. 2022, SDEdit (arXiv 2108.01073), the start from a noised image.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ddpm import EpsModel, Schedule, invert_ddim, sample_ddim

# (x_t, t, x0_hat) -> (B,): one number per image, larger is better, no image seeing another.
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


class Tally:
    """Counts what guidance had to drop."""

    def __init__(self):
        self.nonfinite = 0


def frozen(*networks: nn.Module) -> None:
    """In train mode BatchNorm would let one image change another's gradient."""
    if any(network.training for network in networks):
        raise ValueError("guidance needs networks in eval mode: call network.eval()")


def class_evidence(guide: nn.Module, y: Tensor) -> Objective:
    """log p(y | x_t) by the noise-aware guide; y: (B,) int64. Dhariwal & Nichol 2021, 4.1."""
    frozen(guide)

    def objective(x_t, t, x0_hat):
        return guide(x_t, t).log_softmax(1).gather(1, y[:, None])[:, 0]
    return objective


def hardness(students: Sequence[nn.Module], y: Tensor, cap: float = 0.69) -> Objective:
    """How wrong the students' mean vote is about the clean estimate: min(-log p(y | x0_hat), cap).

    An ensemble, because one student's gradient makes noise that fools that student alone; capped
    at log 2, where the vote is even, because beyond it the image stops being of its class.
    """
    frozen(*students)

    def objective(x_t, t, x0_hat):
        votes = torch.stack([student(x0_hat).softmax(1) for student in students]).mean(0)
        return (-votes.gather(1, y[:, None])[:, 0].clamp(min=1e-6).log()).clamp(max=cap)
    return objective


def gradient(objective: Objective, schedule: Schedule, x_t: Tensor, t: Tensor,
             eps: Tensor) -> Tensor:
    """d objective / d x_t, one image at a time, like x_t.

    x0_hat follows x_t with eps held fixed: going through the network as well would double the cost
    of a step, and only the direction is used. It is clipped before an objective sees it.
    """
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        x0_hat = schedule.predict_x0(x, t, eps.detach()).clamp(-1, 1)
        return torch.autograd.grad(objective(x, t, x0_hat).sum(), x)[0]


def normalise(grad: Tensor, tally: Tally | None = None) -> Tensor:
    """Each image's gradient at root mean square 1, so that one scale means the same for every term,
    image and noise level. Non-finite ones become 0 and are counted; 0 stays 0."""
    finite = grad.flatten(1).isfinite().all(1)
    if tally is not None:
        tally.nonfinite += int((~finite).sum())
    grad = torch.where(finite.view(-1, 1, 1, 1), grad, 0.0)
    size = grad.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    grad = grad / size.clamp(min=torch.finfo(grad.dtype).tiny)      # squares of tiny numbers vanish
    rms = grad.square().mean((1, 2, 3), keepdim=True).sqrt()
    return torch.where(rms > 0, grad / rms, 0.0)


def guided_eps(eps_model: EpsModel, schedule: Schedule, terms: Sequence[tuple[float, Objective]],
               tally: Tally | None = None) -> EpsModel:
    """An eps_model that climbs the terms (scale, objective). Dhariwal & Nichol 2021, Algorithm 2:

        eps <- eps - scale * sqrt(1 - abar_t) * gradient

    The gradient is normalised per image to root mean square sqrt(abar_t): a true gradient of
    log p(y | x_t) fades with the signal too. x0_hat then moves by scale * (1 - abar_t), so scale
    is the most that an image is changed in one step, in units of its range [-1, 1].

    A term of scale 0 is not evaluated; without any other the very same eps_model is returned.
    """
    terms = [(scale, objective) for scale, objective in terms if scale != 0]
    if not terms:
        return eps_model

    def guided(x_t, t):
        eps = eps_model(x_t, t)
        push = sum(scale * normalise(gradient(objective, schedule, x_t, t, eps), tally)
                   for scale, objective in terms)
        abar_t = schedule.abar(t, x_t)
        return eps - (abar_t * (1 - abar_t)).sqrt() * push
    return guided


def counterfactual(own: EpsModel, wanted: EpsModel, schedule: Schedule, x0: Tensor, depth: float,
                   steps: int) -> Tensor:
    """The same lesion, were it otherwise: invert x0 under `own`, decode the latent under `wanted`.

    own: eps_model told the image's own class and group; wanted: told the same class and another
    group, guided or not. What the condition does not explain (the lesion's shape, its place) sits
    in the latent and stays; what it does explain (the skin) changes.
    x0: (B, C, H, W) in [-1, 1]. depth: share of the noise levels to climb, in (0, 1].
    """
    end = max(steps, round(depth * schedule.T)) - 1
    latent = invert_ddim(own, schedule, x0, steps, end)
    return sample_ddim(wanted, schedule, latent, steps, start=end)


def variation(wanted: EpsModel, schedule: Schedule, x0: Tensor, noise: Tensor, strength: float,
              steps: int) -> Tensor:
    """A relative of x0: noise it up to `strength` of the levels and denoise. Meng et al. 2022.

    noise: standard normal, like x0. strength 1 forgets x0; 0.3 keeps all but the texture.
    """
    start = max(steps, round(strength * schedule.T)) - 1
    t = torch.full((len(x0),), start, device=x0.device)
    return sample_ddim(wanted, schedule, schedule.q_sample(x0, t, noise), steps, start=start)
