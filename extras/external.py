"""Images made elsewhere, as an arm of a run."""
import os
from pathlib import Path

import numpy as np

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
    print(f"{key}: copies of this run's images are found if stored anew, mirrored or turned by 90 "
          "degrees, not if cropped, brightened or turned otherwise")
    rows = listing.rows
    labels = np.array([like.class_names.index(row.label) for row in rows])
    groups = np.array([like.group_names.index(row.group) if row.group else -1 for row in rows])
    names = np.array([f"external/{row.image}" for row in rows])
    return {"external": ImageSet(images, labels, groups, names, None, names, like.class_names,
                                 like.group_names, like.malignant,
                                 subtype_names=like.subtype_names)}


def in_round(kit, source: ImageSet) -> np.ndarray:
    """Which of the images are candidates in the kit's round, an index: in every round others."""
    order = np.random.default_rng(kit.run.seed("external")).permutation(len(source))
    return np.array_split(order, kit.run.config.loop.rounds)[kit.number - 1]


def held_out(keep, splits: dict, images: np.ndarray) -> np.ndarray:
    """Which images, (N,) bool, are some of val or test, mirrored, turned by 90 degrees or stored
    anew. Not found: what was cropped, brightened or turned otherwise. keep: the loop.Filter."""
    known = np.concatenate([splits["val"].images, splits["test"].images])
    return measures.nearest(images, known)[0] <= keep.too_near
