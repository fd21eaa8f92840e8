"""Eight spots in the plane, so simple that the best possible eps is known. A point is an image of
two channels and one pixel: Schedule, loss, samplers and guidance are those of the real model."""
import torch

from ddpm import Schedule

SPREAD = 0.06
ANGLES = torch.arange(4)[:, None] * torch.pi / 2 + torch.pi / 4     # a class each
RADII = torch.tensor([0.45, 0.95])                                  # a group each
MEANS = torch.stack([RADII * ANGLES.cos(), RADII * ANGLES.sin()], -1)       # (classes, groups, 2)


def draw(count: int, generator: torch.Generator):
    """x0 (count, 2, 1, 1), y, g (count,): even over the eight spots."""
    y, g = (torch.randint(n, (count,), generator=generator) for n in MEANS.shape[:2])
    x0 = MEANS[y, g] + SPREAD * torch.randn(count, 2, generator=generator)
    return x0[..., None, None], y, g


class Mixture:
    """The best eps there is, with the UNet's own interface: (x_t, t, y, g), -1 for "not told"."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def log_parts(self, x_t, t):
        """log p(x_t, y, g) of every spot but for a constant, (B, 4, 2), and what it follows from.
        x_t given a spot is N(sqrt(abar) mean, abar SPREAD^2 + 1 - abar)."""
        abar = self.schedule.abar(t, x_t)                               # (B, 1, 1, 1)
        x, means = x_t.view(-1, 1, 1, 2), MEANS.to(x_t)
        off = x - abar.sqrt() * means                                   # (B, 4, 2, 2)
        variance = abar * SPREAD ** 2 + 1 - abar
        return -off.square().sum(-1) / (2 * variance[..., 0]), off, variance, abar, means

    def __call__(self, x_t, t, y, g):
        log_p, off, variance, abar, means = self.log_parts(x_t, t)
        other = (torch.arange(4) != y[:, None])[:, :, None] & (y >= 0)[:, None, None]
        other = other | (torch.arange(2) != g[:, None])[:, None] & (g >= 0)[:, None, None]
        share = log_p.masked_fill(other, -torch.inf).flatten(1).softmax(1).view(log_p.shape)
        x0 = means + SPREAD ** 2 * abar.sqrt() / variance * off         # E[x0 | x_t, spot]
        x0 = (share[..., None] * x0).sum((1, 2))[..., None, None]       # E[x0 | x_t]
        return self.schedule.predict_eps(x_t, t, x0)

    def log_class(self, x_t, t):
        """log p(y | x_t), (B, 4): what a perfect guide would say."""
        return self.log_parts(x_t, t)[0].logsumexp(2).log_softmax(1)
