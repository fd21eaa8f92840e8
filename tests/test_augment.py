"""engine/augment.py: pixel values there and back, the square's symmetries, jitter and shifts by
brute force and by their laws."""
import math

import numpy as np
import pytest
import torch

from engine.augment import jitter_colour, random_shift, random_turn, to_float, to_uint8
from oracle import normal


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- pixels -------------------------------------------------------------------------------------

def test_all_256_values_come_back():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    f = to_float(x)
    assert f.dtype == torch.float32 and f.min() == -1 and f.max() == 1
    assert np.allclose(f.flatten(), np.arange(256) * 2 / 255 - 1, atol=1e-6)
    assert torch.equal(to_uint8(f), x)


def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-3.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.999, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]


# ---- turns --------------------------------------------------------------------------------------

def test_random_turn_yields_the_8_symmetries_and_nothing_else():
    one = torch.arange(2 * 9.0).view(1, 2, 3, 3)
    turned = [np.rot90(m, k, (2, 3)) for m in (one.numpy(), one.numpy()[..., ::-1])
              for k in range(4)]
    assert len({t.tobytes() for t in map(np.ascontiguousarray, turned)}) == 8
    n = 4000
    found = random_turn(one.expand(n, 2, 3, 3), generator()).numpy()
    which = np.array([[np.array_equal(f, t[0]) for t in turned] for f in found])
    assert (which.sum(1) == 1).all()
    assert abs(which.sum(0) - n / 8).max() < 5 * math.sqrt(n / 8)


def test_random_turn_turns_each_image_by_itself():
    x = normal(50, 3, 4, 4, dtype=torch.float32)
    found = random_turn(x, generator())
    assert torch.equal(found.flatten(2).sort(-1)[0], x.flatten(2).sort(-1)[0])
    assert torch.equal(found, random_turn(x, generator()))


# ---- light and place ----------------------------------------------------------------------------

def test_jitter_of_strength_0_is_the_image_itself():
    x = normal(4, 3, 2, 2)
    assert jitter_colour(x, 0, generator()) is x


@pytest.mark.parametrize("strength, up", [(0.1, 0.1), (0.3, 0.15), (1.0, 0.15)])
def test_jitter_gains_are_as_documented(strength, up):
    n, grey = 20_000, -0.6                                   # light 0.4: no gain reaches the clip
    light = jitter_colour(torch.full((n, 3, 2, 2), grey), strength, generator()).double() + 1
    gain = (light / (1 + grey)).log()
    assert (gain == gain[:, :, :1, :1]).all()                # one gain for all pixels
    gain = gain[:, :, 0, 0]
    # common in [-strength, up], each channel up to a tenth of strength beside it
    own = 0.1 * strength
    assert gain.min() >= -strength - own - 1e-5 and gain.max() <= up + own + 1e-5
    assert gain.min() < -strength and gain.max() > up
    spread = gain.max(1)[0] - gain.min(1)[0]
    assert 1.8 * own < spread.max() <= 2 * own + 1e-5
    assert abs(gain.mean() - (up - strength) / 2) < 0.01 * (up + strength)
    wanted = (up + strength) ** 2 / 12 + own ** 2 / 3        # two uniforms
    assert abs(gain.var(0) / wanted - 1).max() < 0.05


def test_jitter_scales_light_and_clips():
    x = torch.tensor([-1.0, 0.0, 0.9]).view(1, 1, 1, 3).expand(500, 3, 1, 3)
    found = jitter_colour(x, 1.0, generator())
    gain = found[:, :, 0, 1] + 1
    assert (found[:, :, 0, 0] == -1).all()                   # black stays black
    assert torch.allclose(found[:, :, 0, 2], (1.9 * gain - 1).clamp(max=1), atol=1e-5)
    assert (found == 1).any() and found.max() == 1


@pytest.mark.parametrize("pixels", [1, 2])
def test_random_shift_is_a_crop_of_the_mirrored_image(pixels):
    x, n = normal(400, 2, 5, 6), 2 * pixels + 1
    found, chosen = random_shift(x, generator(), pixels).numpy(), []
    assert found.shape == x.shape
    for image, moved in zip(x.numpy(), found):
        padded = np.pad(image, [(0, 0), (pixels, pixels), (pixels, pixels)], mode="reflect")
        fits = [(i, j) for i in range(n) for j in range(n)
                if np.array_equal(padded[:, i:i + 5, j:j + 6], moved)]
        assert len(fits) == 1
        chosen += fits
    counts = np.zeros((n, n))
    np.add.at(counts, tuple(np.transpose(chosen)), 1)
    mean = 400 / n ** 2                                      # rows and columns move independently
    assert abs(counts - mean).max() < 5 * math.sqrt(mean)
