"""Skin colour, and skin tone by the individual typology angle (ITA): Chardon et al., Int. J.
Cosmet. Sci. 13 (1991); the names of its ranges: Del Bino & Bernerd, Br. J. Dermatol. 169 (2013)."""
import numpy as np

TONES = ("very light", "light", "intermediate", "tan", "brown", "dark")
TONE_ENDS = (55, 41, 28, 10, -30)     # degrees between one tone and the next


def border_colour(images: np.ndarray) -> np.ndarray:
    """The skin's colour, (N, 3) float64 in 0..255, of (N, 3, H, W) uint8 images, 8 pixels or more.
    The median over the ring between 0.85 and 1 of the inscribed circle's radius: lesions lie
    within it, a vignette darkens what is outside, and the median passes over hairs."""
    y, x = (np.arange(side) - (side - 1) / 2 for side in images.shape[2:])
    radius = np.hypot(y[:, None], x) / (min(images.shape[2:]) / 2)
    ring = (radius >= 0.85) & (radius < 1)
    return np.array([np.median(image[:, ring], 1) for image in images]).reshape(-1, 3)


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 to CIELAB under D65, both (..., 3). IEC 61966-2-1; CIE 15."""
    c = np.asarray(rgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ [[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]
    ratio = xyz / [0.9505, 1.0, 1.089]                                # to the white point
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / 3 * (29 / 6) ** 2 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def skin_tones(images: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """The skin-tone estimates that occur, from light to dark, and each image's, (N,) int64:
    ITA = arctan((L* - 50) / b*) of the border. Photographs are not calibrated: no skin type."""
    lightness, _, b = to_lab(border_colour(images)).T
    angle = np.degrees(np.arctan2(lightness - 50, b))       # also keeps light above dark if b* <= 0
    kept, index = np.unique((angle[:, None] <= TONE_ENDS).sum(1), return_inverse=True)
    return tuple(TONES[k] for k in kept), index


def recolour(train, parents, targets: np.ndarray, seed: int) -> np.ndarray:
    """The sceptic's way: parents carried to their target group by one gain per channel, the ratio
    of the groups' mean border colours; without groups, that of another image of the same class to
    the parent's own, within a factor of 2. Returns uint8 (N, 3, H, W)."""
    border = border_colour(train.images)
    if train.group_names:
        members = [border[train.groups == g] for g in range(len(train.group_names))]
        mean = np.stack([(of if len(of) else border).mean(0) for of in (*members, border)])
        gain = mean[targets] / mean[parents.groups]     # the last, -1: a parent of no known group
    else:
        rng = np.random.default_rng(seed)
        other = [rng.choice(np.flatnonzero(train.labels == y)) for y in parents.labels]
        gain = (border[other] / np.maximum(border_colour(parents.images), 1)).clip(0.5, 2)
    return (parents.images * gain[:, :, None, None]).round().clip(0, 255).astype(np.uint8)
