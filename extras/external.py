"""Images made elsewhere, as an arm of a run."""
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import ImageSet
from datasets import images as files
from datasets import layouts
from datasets.layouts import DataError, Listing, Row
from engine.config import Config
from extras import measures


def photos(root: Path, key: str) -> list[Path]:
    """Every image file at any depth below `root`. Raises DataError that names the key."""
    found = [path for path in layouts.files_below(root, key)[0]
             if path.suffix.lower() in layouts.SUFFIXES]
    if not found:
        raise DataError(f"{key}: {root} holds no {', '.join(layouts.SUFFIXES)}")
    return found


def load_made(c: Config, like: ImageSet) -> dict[str, ImageSet]:
    """{"external": the images of guidance.external}, if there are, of the classes and groups of
    `like`: root/<class>/*, root/<class>/<group>/*, or a csv of image (a path below the csv's
    folder), class and group (may be empty). Raises one DataError that lists every problem."""
    path = c.guidance.external
    if not path:
        return {}
    root, key = Path(os.path.expanduser(path)), "guidance.external"
    if root.is_file():
        rows, root = layouts.table(root, "image", "class", "", "group"), root.parent
        found = layouts.files_below(root, key)[0]
    else:
        found = photos(root, key)
        parts = [file.relative_to(root).parts for file in found]
        rows = [Row("/".join(part), *(*part[:-1], "")[:1], "", *part[1:-1][:1]) for part in parts]
    listing = Listing(rows, like.class_names, ())
    layouts.check(listing, found, root)
    listing.problems += [
        (f"image {row.image} has the group {row.group!r}: write one of "
         f"{', '.join(like.group_names) or 'none, the data set has none'}", [row.image])
        for row in rows if row.group and row.group not in like.group_names]
    images, unreadable = files.decode_all(listing, c.data.size)
    problems = [text for text, _ in listing.problems]
    problems += [f"{image} cannot be decoded ({reason})" for image, reason in unreadable]
    if problems:
        raise DataError(f"{key}: {path}: {len(problems)} problem(s): "
                        + layouts.first_ten(problems))
    rows = listing.rows
    labels = np.array([like.class_names.index(row.label) for row in rows])
    groups = np.array([like.group_names.index(row.group) if row.group else -1 for row in rows])
    names = np.array([f"external/{row.image}" for row in rows])
    return {"external": ImageSet(images, labels, groups, names, None, names, like.class_names,
                                 like.group_names, like.malignant,
                                 subtype_names=like.subtype_names)}


def rings(images: np.ndarray, zoom: float = 1.0) -> torch.Tensor:
    """Six rings of 32 points of each image without brightness and contrast, of length 1, (N, 18,
    32): a turned image has them rolled, a mirrored one flipped."""
    angle, radius = torch.arange(32) * math.pi / 16, (torch.arange(6) + 0.5) * 0.14     # at most 1
    at = torch.stack([angle.cos(), angle.sin()], -1) * zoom * radius[:, None, None]
    small, at = torch.tensor(measures.thumbnails(images)), at.expand(len(images), -1, -1, -1)
    x = F.grid_sample(small, at, align_corners=False)           # (N, 3, 6, 32)
    area = radius[:, None] / radius.sum() / 96
    x = (x - (x * area).sum((1, 2, 3), keepdim=True)) * area.sqrt()
    return F.normalize(x.flatten(1)).view(-1, 18, 32)


def likeness(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The correlation (N,) of each image with the known one that is most like it, however it was
    turned, mirrored, brightened or, by a few percent, cropped."""
    ours, theirs = torch.cat([rings(images), rings(images, zoom=1.07)]), rings(known).flatten(1)
    best = torch.zeros(len(ours))
    for turn in range(32):
        for way in (ours, ours.flip(-1)):
            best = best.maximum((way.roll(turn, -1).flatten(1) @ theirs.T).amax(1))
    return best.view(2, -1).amax(0).numpy()


def held_out(keep, splits: dict, images: np.ndarray) -> np.ndarray:
    """Which images, (N,) bool, are some of val or test, as they are or changed: as near as a copy,
    or more like one of them than 99 % of val are like anything seen. keep: the loop.Filter."""
    val, test = splits["val"].images, splits["test"].images
    usual = likeness(val[::1 + len(val) // 500], keep.seen.images)      # 500 will do
    alike = likeness(images, np.concatenate([val, test])) >= np.quantile(usual, 0.99)
    return alike | (measures.nearest(images, np.concatenate([val, test]))[0] <= keep.too_near)
