"""A residual network, used twice: the `student` that diagnoses clean images, and the `guide` that
recognises a class in a noisy image x_t, knowing its noise level t, so that its gradient can steer.

Sources: He et al. 2016 (arXiv 1512.03385), blocks and bottlenecks; Dhariwal & Nichol 2021 (arXiv
2105.05233), section 4: a classifier of noisy images.
"""
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.augment import (jitter_colour, random_shift, random_turn,
                            to_float)
from engine.training import fit, wide

# mean and spread of the published networks' inputs in 0..1, by channel
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# He et al. 2016, table 1: blocks in each of the four layers
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3),
          "resnet50": (3, 4, 6, 3)}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a noise level, if given, shifts the features between.
    bottleneck: 1x1, 3x3 and 1x1 instead, the last four times as wide: He et al. 2016, figure 5."""

    def __init__(self, channels: int, width: int, stride: int,
                 condition: int, bottleneck: bool):
        super().__init__()
        plan = [(3, width), (3, width)]                         # (kernel, channels out)
        if bottleneck:
            plan = [(1, width), (3, width), (1, 4 * width)]
        self.count, before = len(plan), channels
        for i, (kernel, out) in enumerate(plan, start=1):
            # The stride is in the last convolution but one, where
            # the published weights have it.
            here = stride if i == self.count - 1 else 1
            conv = nn.Conv2d(before, out, kernel, stride=here,
                             padding=kernel // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(out))
            before = out

        self.downsample = None
        if stride != 1 or channels != out:
            conv = nn.Conv2d(channels, out, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))
        self.time = nn.Linear(condition, width) if condition else None

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        h = self.bn1(self.conv1(x))                             # (B, width, H, W)
        if self.time is not None:
            h = h + self.time(c)[:, :, None, None]
        h = self.bn2(self.conv2(F.relu(h)))                     # H and W by the stride
        if self.count == 3:
            h = self.bn3(self.conv3(F.relu(h)))                 # (B, 4 width, ...)
        if self.downsample is not None:
            x = self.downsample(x)
        return F.relu(h + x)


class ResNet(nn.Module):
    """Logits of `classes` from images (B, 3, S, S) in [-1, 1].
    blocks: blocks in each layer, (2, 2, 2, 2) is ResNet-18; width doubles from layer to layer.
    stem: "large" is the published 7x7 stride-2 convolution, without its max-pooling below 128
    pixels, where too little would be left; "published" has it always, and ImageNet's normalisation,
    as published weights need; "small" is a 3x3 stride-2 convolution for 32 pixels: stride 1 would
    cost four times the work. noise_levels: 0 for a student; T for a guide, which is called with t.
    """

    def __init__(self, classes: int, blocks: tuple[int, ...] = (2, 2, 2, 2),
                 width: int = 64, stem: str = "large", noise_levels: int = 0,
                 bottleneck: bool = False):
        super().__init__()
        self.noise_levels = noise_levels
        self.published = stem == "published"
        condition = 4 * width if noise_levels else 0
        kernel = 3 if stem == "small" else 7
        imagenet = torch.tensor(IMAGENET)[:, :, None, None]
        self.register_buffer("imagenet", imagenet, False)       # not saved
        self.conv1 = nn.Conv2d(3, width, kernel, stride=2,
                               padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.time = (nn.Sequential(nn.Linear(width, condition), nn.SiLU())
                     if noise_levels else None)

        channels, self.layers = width, []
        for i, count in enumerate(blocks):
            out, layer = width * 2 ** i, nn.ModuleList()
            for j in range(count):
                stride = 2 if i and j == 0 else 1
                block = Block(channels, out, stride, condition, bottleneck)
                layer.append(block)
                channels = 4 * out if bottleneck else out
            self.layers.append(f"layer{i + 1}")
            self.add_module(self.layers[-1], layer)
        self.fc = nn.Linear(channels, classes)

    def embed(self, t: Tensor) -> Tensor:
        """The level as an angle from 0 to pi/2, seen at frequencies 1, 2, 3, ...: (B, 4 width)."""
        angle = t.float() / self.noise_levels * math.pi / 2     # (B,)
        count = self.conv1.out_channels
        frequencies = torch.arange(1, count + 1, device=t.device)
        return self.time((angle[:, None] * frequencies).cos())

    def features(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """The pooled features before the last layer: (B, channels of the last layer).
        t: (B,) int64 noise levels, for a guide and for none but a guide (ValueError)."""
        if (t is not None) != bool(self.noise_levels):
            raise ValueError("a guide needs t and a student takes none")
        c = None if t is None else self.embed(t)
        if self.published:
            mean, spread = self.imagenet
            x = ((x + 1) / 2 - mean) / spread
        h = F.relu(self.bn1(self.conv1(x)))                     # (B, width, S/2, S/2)
        if self.published or x.shape[-1] >= 128:
            h = F.max_pool2d(h, 3, stride=2, padding=1)
        for name in self.layers:
            for block in getattr(self, name):
                h = block(h, c)
        return h.mean((2, 3))                                   # (B, channels)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.fc(self.features(x, t))                     # (B, classes)


def build(network: str, size: int, classes: int,
          noise_levels: int = 0, published: bool = False) -> ResNet:
    """network: "resnet18", "resnet34", "resnet50", "small" (three layers of one block, from 32
    channels) or "auto", which is resnet18 at 64 pixels and above, where the small one has too
    little depth to see far. published: with the stem that published weights need."""
    if network == "auto":
        network = "small" if size < 64 else "resnet18"
    if network == "small":
        return ResNet(classes, (1, 1, 1), 32, "small", noise_levels)
    stem = "published" if published else "large"
    return ResNet(classes, BLOCKS[network], 64, stem,
                  noise_levels, network == "resnet50")


# ---- training --------------------------------------------------------------------------------

def cumulative(weights: Tensor) -> Tensor:
    """`pick`'s table, (N,): cumulative shares, on the CPU, as a GPU's sums have no fixed order."""
    of = weights.cpu().double()                                 # (N,)
    table = (of / of.sum()).cumsum(0)
    return table.to(weights.device, wide(weights.device))


def pick(table: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """(batch,) int64, each index drawn as often as its weight says: exact, and fast for any N."""
    on = {"generator": generator, "device": table.device}
    u = torch.rand(batch, **on, dtype=table.dtype)              # (batch,)
    return torch.searchsorted(table, u).clamp(max=len(table) - 1)


def loss(network: ResNet, images: Tensor, labels: Tensor, jitter: float,
         noise, index: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy on the images at `index` (B,), turned, jittered, and noised (a guide) or
    shifted (a student); the other arguments as in `train`. Returns a scalar."""
    x = random_turn(to_float(images[index]), generator)         # (B, 3, S, S)
    x = jitter_colour(x, jitter, generator)
    if noise is not None:
        logits = network(*noise(x, generator))                  # x_t, t
    else:
        pixels = max(1, x.shape[-1] // 16)
        logits = network(random_shift(x, generator, pixels))
    return F.cross_entropy(logits, labels[index])


def train(network: ResNet, images: Tensor, labels: Tensor,
          weights: Tensor, *, steps: int, batch: int, lr: float,
          jitter: float, seed: int, noise: Callable | None = None,
          **progress) -> list[float]:
    """Train on uint8 images (N, 3, H, W), labels (N,) int64; weights (N,) >= 0 say how often each
    image is drawn. noise(x0, generator) -> (x_t, t) makes a guide of it: Dhariwal & Nichol 2021,
    section 4. `progress` goes to training.fit. Returns the loss history."""
    drawn = functools.partial(pick, cumulative(weights), batch)
    lost = functools.partial(loss, network, images, labels, jitter, noise)
    return fit(network, drawn, lost, steps=steps, lr=lr, seed=seed,
               device=images.device, weight_decay=0.05, **progress)


def balanced_weights(labels: np.ndarray,
                     cells: np.ndarray | None = None) -> np.ndarray:
    """Draw every class as often as any other; within a class, every cell (say, skin type) likewise
    if `cells` (N,) is given. Returns (N,) float64 that sum to 1."""
    weights = np.zeros(len(labels))
    cells = np.zeros(len(labels)) if cells is None else cells
    for label in np.unique(labels):
        of_class = labels == label                              # (N,) bool
        kinds = np.unique(cells[of_class])
        for kind in kinds:
            members = of_class & (cells == kind)
            weights[members] = 1 / members.sum() / len(kinds)   # one class: sum 1
    return weights / weights.sum()


@torch.no_grad()
def predict(network: ResNet, images: Tensor,
            bf16: bool = False) -> np.ndarray:
    """Class probabilities of clean uint8 images (N, 3, H, W): (N, classes) float32."""
    network.eval()
    half = {"dtype": torch.bfloat16, "enabled": bf16}
    found = []
    for part in images.split(500):
        with torch.autocast(images.device.type, **half):
            logits = network(to_float(part))                    # (<= 500, classes)
        found.append(logits.float().softmax(1).cpu())
    return torch.cat(found).numpy()
