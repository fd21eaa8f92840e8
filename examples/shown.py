"""Pictures for the examples: images in rows with words, and points, as one small PNG."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.run import save_picture


def sheet(path: Path, rows: list, words=(), captions=(), side: int = 64) -> None:
    """rows of uint8 images (N, 3, H, W), one below the other; words: left of each row; captions:
    below the columns, a list a row or none. side: screen pixels an image, at least."""
    font, size = ImageFont.load_default(), rows[0].shape[-1]
    scale, most = max(1, round(side / size)), max(map(len, rows))
    left = max([0, *(round(font.getlength(word)) + 8 for word in words)])
    below, side = 14 if captions else 2, scale * size
    picture = Image.new("RGB", (left + most * (side + 2), len(rows) * (side + below)), "white")
    pen = ImageDraw.Draw(picture)
    for i, images in enumerate(rows):
        y = i * (side + below)
        pen.text((2, y + side // 2 - 6), words[i] if words else "", "black", font)
        for j, image in enumerate(images):
            tile = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            picture.paste(tile.resize((side, side), 0), (left + j * (side + 2), y))
        for j, caption in enumerate(captions[i] if captions else ()):
            pen.text((left + j * (side + 2), y + side), caption, "black", font)
    save_picture(path, picture.quantize(128))       # 128 colours: a third of the bytes


def scatter(points: np.ndarray, colours: np.ndarray, side: int = 120) -> np.ndarray:
    """Points (N, 2) in [-1.5, 1.5], each of its colour 0..3, as one uint8 image (3, side, side)."""
    image = np.full((3, side, side), 255, np.uint8)
    palette = np.array([[214, 39, 40], [31, 119, 180], [44, 160, 44], [148, 103, 189]], np.uint8)
    at = ((points / 3 + 0.5) * side).astype(int).clip(0, side - 1)
    image[:, side - 1 - at[:, 1], at[:, 0]] = palette[colours].T
    return image
