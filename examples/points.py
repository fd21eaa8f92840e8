"""Diffusion on 2-D points: a small network beside the exact score, by the program's own lines.

    python examples/points.py [--steps 2000] [--sampler ddim] [--out points.png]

The points and the exact score stand in mixture.py.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mixture import MEANS, SPREAD, Mixture, draw
from shown import scatter, sheet

import ddpm
from engine.training import Noise, fit, seeded

class Small(nn.Module):
    """v from (x_t, t, y, g): three layers."""

    def __init__(self, T: int, width: int = 128):
        super().__init__()
        self.T, self.y, self.g = T, nn.Embedding(5, 16), nn.Embedding(3, 16)    # last: not told
        self.layers = nn.Sequential(nn.Linear(2 + 16 + 32, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x_t, t, y, g):
        angle = t[:, None] / self.T * torch.pi / 2 * torch.arange(1, 17)
        told = self.y(torch.where(y < 0, 4, y)), self.g(torch.where(g < 0, 2, g))
        return self.layers(torch.cat([x_t.flatten(1), angle.cos(), *told], 1)).view(x_t.shape)


def near(x, y, g):
    """The share of points within three spreads of the spot that was asked for."""
    return ((x.flatten(1) - MEANS[y, g]).norm(dim=1) < 3 * SPREAD).float().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--sampler", choices=ddpm.SAMPLERS, default="ddim")
    parser.add_argument("--out", type=Path, default=Path("points.png"))
    arguments = parser.parse_args(argv)
    schedule, network = ddpm.Schedule(1000), seeded(0, Small, 1000)
    x0, y, g = draw(4000, torch.Generator().manual_seed(0))
    fit(network, lambda generator: torch.randint(4000, (256,), generator=generator),
        lambda i, generator: ddpm.loss(network, schedule, x0[i], y[i], g[i], generator),
        steps=arguments.steps, lr=3e-3, seed=0)

    # Both from the same noise, seen where they stand after each fifth of the way.
    y, g, noise, rows = y[:1500], g[:1500], Noise(range(1500)), []
    times, x_T = ddpm.even_times(50, 999), noise(2, 1, 1)
    for name, model, prediction in (("exact", Mixture(schedule), "eps"), ("trained", network, "v")):
        model = ddpm.eps_model(model, schedule, y, g, prediction=prediction)
        x, seen = x_T, [x_T]
        for first in range(0, 50, 10):
            x = ddpm.SAMPLERS[arguments.sampler](model, schedule, x, times[first:first + 11],
                                                 noise, 1.5)
            seen.append(x)
        rows.append(np.stack([scatter(part.flatten(1).numpy(), y.numpy()) for part in seen]))
        print(f"{name}: {near(x, y, g):.1%} of the points lie in the spot asked for")
    sheet(arguments.out, rows, ("exact", "trained"), side=120)
    print(f"wrote {arguments.out}: {arguments.sampler}, from noise to points, a colour a class")


if __name__ == "__main__":
    main()
