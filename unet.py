"""The denoising network: a residual UNet told the noise level, the class and the group (skin type).

Sources: Ho et al. 2020 (arXiv 2006.11239), appendix B; Dhariwal & Nichol 2021 (arXiv 2105.05233),
the scale-and-shift GroupNorm; Hoogeboom et al. 2023 (arXiv 2301.11093), the patched input.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 1e4) -> Tensor:
    """Sinusoids of t at `dim`/2 frequencies from 1 down to 1/max_period. Vaswani et al. 2017, 3.5.
    t: (B,) int64. Returns (B, dim) float32: cosines, then sines."""
    half = dim // 2
    steps = torch.arange(half, device=t.device)                             # (dim/2,)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = t.float()[:, None] * frequencies[None]                         # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm, 16 channels a group: with 4, on a CPU, the norm costs more than the conv."""
    return nn.GroupNorm(channels // 16, channels)


def zero(module: nn.Module) -> nn.Module:
    """Start at nothing: a residual block as the identity, the whole network at 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """Two 3x3 convolutions; the condition scales and shifts the features between them."""

    def __init__(self, channels: int, out: int, condition: int):
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.condition = nn.Linear(condition, 2 * out)
        self.norm2 = norm(out)
        self.conv2 = zero(nn.Conv2d(out, out, 3, padding=1))
        self.skip = (nn.Identity() if channels == out
                     else nn.Conv2d(channels, out, 1))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                               # (B, out, H, W)
        c = self.condition(c)[:, :, None, None]                             # (B, 2 out, 1, 1)
        scale, shift = c.chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))                         # (B, out, H, W)


class Attention(nn.Module):
    """Self-attention over the positions of a small feature map, 32 channels a head if that fits."""
    def __init__(self, channels: int):
        super().__init__()
        self.heads = channels // 32 if channels % 32 == 0 else 1
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        d = C // self.heads
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, d, H * W)
        q, k, v = qkv.unbind(1)                                             # (B, heads, d, HW)
        if x.is_cuda:
            q, k, v = (a.transpose(-1, -2) for a in (q, k, v))
            h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        else:       # On a CPU, for so few positions, faster written out.
            scores = q.transpose(-1, -2) @ k * d ** -0.5
            weights = scores.softmax(-1)                                    # (B, heads, HW, HW)
            h = v @ weights.transpose(-1, -2)
        return x + self.out(h.reshape(B, C, H, W))


class UNet(nn.Module):
    """eps (or v) from (x_t, t, y, g): noise level t, class y, group g; -1 stands for "not told".
    The image is folded `patch` x `patch` pixels into channels first: a quarter of the work at
    patch 2, and no convolution runs at 3 channels, where it would be slow. attention: at feature
    maps of at most this many pixels a side. Raises ValueError if size or width does not fit."""

    def __init__(self, size: int, classes: int, groups: int,
                 width: int = 64, multipliers: tuple[int, ...] = (1, 2, 2),
                 blocks: int = 1, attention: int = 8, patch: int = 2):
        super().__init__()
        unit = patch * 2 ** (len(multipliers) - 1)
        if size % unit:
            raise ValueError(f"size {size} is no multiple of {unit}, "
                             "patch x 2^(levels - 1)")
        if width % 16:
            raise ValueError(f"width {width} is no multiple of 16")
        self.width, self.patch = width, patch
        c, pixels = 4 * width, 3 * patch ** 2

        # The condition; the last row of each table is "not told".
        self.time = nn.Sequential(nn.Linear(width, c), nn.SiLU(),
                                  nn.Linear(c, c))
        self.class_embedding = nn.Embedding(classes + 1, c)
        self.group_embedding = nn.Embedding(groups + 1, c)
        self.stem = nn.Conv2d(pixels, width, 3, padding=1)

        def stage(channels, out, side):
            block = ResBlock(channels, out, c)
            mix = Attention(out) if side <= attention else nn.Identity()
            return nn.ModuleList([block, mix])

        # Down: the side halves from level to level.
        channels, side, skips = width, size // patch, [width]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            out = width * multiplier
            for _ in range(blocks):
                self.down.append(stage(channels, out, side))
                channels = out
                skips.append(channels)
            if level + 1 < len(multipliers):
                self.down.append(nn.Conv2d(channels, channels, 3,
                                           stride=2, padding=1))
                skips.append(channels)
                side //= 2

        # The bottleneck.
        self.middle = nn.ModuleList([ResBlock(channels, channels, c),
                                     Attention(channels),
                                     ResBlock(channels, channels, c)])

        # Up: the features of the way down are joined on.
        for level, multiplier in reversed(list(enumerate(multipliers))):
            out = width * multiplier
            for _ in range(blocks + 1):
                self.up.append(stage(channels + skips.pop(), out, side))
                channels = out
            if level:
                self.up.append(nn.Conv2d(channels, channels, 3, padding=1))
                side *= 2
        last = nn.Conv2d(channels, pixels, 3, padding=1)
        self.head = nn.Sequential(norm(channels), nn.SiLU(), zero(last))

    def embed(self, t: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """Time, class and group, each embedded and summed: (B, 4 width)."""
        c = self.time(timestep_embedding(t, self.width))
        for table, index in ((self.class_embedding, y),
                             (self.group_embedding, g)):
            untold = table.num_embeddings - 1
            c = c + table(torch.where(index < 0, untold, index))
        return F.silu(c)

    def encode(self, x_t: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The half down to the bottleneck: its features, and those on the way."""
        h = self.stem(F.pixel_unshuffle(x_t, self.patch))                   # (B, width, S/p, S/p)
        skips = [h]
        for module in self.down:
            if isinstance(module, nn.Conv2d):
                h = module(h)                                               # half the side
            else:
                block, attention = module
                h = attention(block(h, c))
            skips.append(h)
        first, attention, last = self.middle
        return last(attention(first(h, c)), c), skips                       # smallest side

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """x_t (B, 3, S, S) float32; t, y, g (B,) int64. Returns (B, 3, S, S) float32."""
        c = self.embed(t, y, g)                                             # (B, 4 width)
        h, skips = self.encode(x_t, c)
        for module in self.up:
            if isinstance(module, nn.Conv2d):                               # twice the side
                h = module(F.interpolate(h, scale_factor=2.0))
            else:
                block, attention = module
                h = torch.cat([h, skips.pop()], dim=1)
                h = attention(block(h, c))
        return F.pixel_shuffle(self.head(h).float(), self.patch)            # (B, 3, S, S)
