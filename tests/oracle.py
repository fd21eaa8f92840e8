"""What several tests compare with: the papers' formulas again, in numpy, a data distribution so
simple that the best possible eps is known, and seeded normal numbers."""
import numpy as np
import torch


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def paper_abar(T, kind):
    """alpha-bar of the papers' t = 0, 1, ..., T: code t is entry t + 1. float64 (T + 1,)."""
    if kind == "linear":
        betas = np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)
    else:
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


class Gaussian:
    """Every pixel is drawn from N(m, s^2) on its own, so E[x0 | x_t] is a straight line in x_t."""

    def __init__(self, T=50, kind="cosine", m=0.3, s=0.5):
        self.abar, self.m, self.s = paper_abar(T, kind), m, s

    def line(self, t):
        """(k, c) of E[x0 | x_t] = k x_t + c at code level t: Gaussian regression."""
        a = self.abar[t + 1]
        k = self.s ** 2 * np.sqrt(a) / (self.s ** 2 * a + 1 - a)
        return k, self.m - k * np.sqrt(a) * self.m

    def __call__(self, x_t, t):
        """The best eps_model there is, with the network's own interface."""
        a = torch.tensor(self.abar)[t + 1].view(-1, 1, 1, 1)
        k, c = (torch.tensor(v).view(-1, 1, 1, 1) for v in self.line(t.numpy()))
        return ((x_t - a.sqrt() * (k * x_t + c)) / (1 - a).sqrt()).to(x_t.dtype)
