"""Pixels: to the networks' range and back, and random changes that leave a diagnosis what it is."""
import torch
import torch.nn.functional as F
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) in 0..255 to float32 in [-1, 1], the range every network here expects."""
    return images.float().div(127.5).sub(1)


def to_uint8(x: Tensor) -> Tensor:
    """float (B, 3, H, W) in [-1, 1] to uint8 in 0..255, rounded; what lies outside is clipped."""
    return x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def random_turn(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, S, S) under one of 8 turns and mirrors: dermoscopy has no up or left."""
    coin = torch.rand(3, len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    x = torch.where(coin[0], x.flip(-1), x)
    x = torch.where(coin[1], x.flip(-2), x)
    return torch.where(coin[2], x.transpose(-1, -2), x)


def jitter_colour(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Light, pigment and camera change: a random gain for each image, and a small one per channel.
    By Beer-Lambert more melanin takes a factor off the light, so the log-gain is drawn: one for all
    channels in [-strength, min(strength, 0.15)], as light skin is nearly white, and up to a tenth
    of strength per channel. x: (B, 3, H, W) in [-1, 1]. Returns the same, clipped."""
    if strength == 0:
        return x
    u = torch.rand(len(x), 4, 1, 1, generator=generator, device=x.device)
    up = min(strength, 0.15)
    common = u[:, :1] * (strength + up) - strength              # (B, 1, 1, 1)
    log_gain = common + 0.1 * strength * (2 * u[:, 1:] - 1)     # (B, 3, 1, 1)
    return ((x + 1) * log_gain.exp() - 1).clamp(-1, 1)


def random_shift(x: Tensor, generator: torch.Generator, pixels: int) -> Tensor:
    """Each image moved by up to `pixels` either way, its edge mirrored into the gap."""
    B, C, H, W = x.shape
    on = {"device": x.device}
    padded = F.pad(x, [pixels] * 4, mode="reflect").permute(0, 2, 3, 1)
    dy, dx = torch.randint(2 * pixels + 1, (2, B, 1, 1), generator=generator, **on)
    rows, columns = dy + torch.arange(H, **on)[:, None], dx + torch.arange(W, **on)
    moved = padded[torch.arange(B, **on)[:, None, None], rows, columns]     # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)
