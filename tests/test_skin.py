"""Skin colour and skin tone: published CIELAB pairs, and every threshold of the angle."""
import numpy as np

from datasets.skin import TONES, border_colour, skin_tones, to_lab


def test_border_colour_ignores_lesion_and_vignette():
    y, x = np.mgrid[:32, :32] - 15.5
    images = np.empty((2, 3, 32, 32), np.uint8)
    for image, skin in zip(images, ((210, 160, 140), (90, 60, 50))):
        image[:] = np.array(skin)[:, None, None]
        image[:, np.hypot(x, y) < 13] = 20         # a large lesion
        image[:, np.hypot(x, y) > 16] = 0          # a black vignette in the corners
        image[:, 14:17, :] = 5                     # a hair from side to side
    assert np.array_equal(border_colour(images), [[210, 160, 140], [90, 60, 50]])
    assert border_colour(images).dtype == np.float64
    assert border_colour(images[:0]).shape == (0, 3)


# sRGB and its CIELAB under D65: the primaries, white and black as tables of CIELAB give them
PUBLISHED = {(255, 0, 0): (53.24, 80.09, 67.20), (0, 255, 0): (87.74, -86.18, 83.18),
             (0, 0, 255): (32.30, 79.19, -107.86), (255, 255, 0): (97.14, -21.55, 94.48),
             (0, 255, 255): (91.11, -48.09, -14.13), (255, 0, 255): (60.32, 98.23, -60.82),
             (255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0), (119, 119, 119): (50.03, 0, 0)}
# L* and b* of the ColorChecker's two skin patches as its maker publishes them, under D50
SKIN = {(194, 150, 130): (65.71, 17.81), (115, 82, 68): (37.99, 14.06)}


def test_srgb_to_cielab_against_published_pairs():
    found = to_lab(np.array(list(PUBLISHED)))
    assert np.abs(found - list(PUBLISHED.values())).max() < 0.03
    skin = to_lab(np.array(list(SKIN)))[:, [0, 2]]
    assert np.abs(skin - list(SKIN.values())).max() < 1


def test_skin_tone_estimates():
    # L* and b* chosen for angles on both sides of every published threshold, 55 41 28 10 -30
    angles = np.array([56, 54, 42, 40, 29, 27, 11, 9, -29, -31])
    lab = np.stack([50 + 15 * np.tan(np.radians(angles)), np.full(10, 10.0), np.full(10, 15.0)], 1)
    y = (lab[:, 0] + 16) / 116
    xyz = np.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], 1) ** 3 * [0.9505, 1, 1.089]
    linear = xyz @ np.linalg.inv([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192],
                                  [0.1805, 0.0722, 0.9505]])
    rgb = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    images = np.broadcast_to(rgb.round().astype(np.uint8)[:, :, None, None], (10, 3, 16, 16)).copy()
    images[:, :, 4:12, 4:12] = 0                     # a black lesion in the middle changes nothing
    names, index = skin_tones(images)
    assert names == TONES and list(index) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    names, index = skin_tones(images[[9, 0]])
    assert names == ("very light", "dark") and list(index) == [1, 0]
    assert TONES[0] in skin_tones(np.full((1, 3, 16, 16), 255, np.uint8))[0]
