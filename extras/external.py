"""Images made elsewhere, as an arm of a run."""
from pathlib import Path

import numpy as np

from data import ImageSet
from datasets import images as files
from datasets import layouts
from datasets.layouts import DataError, Listing, Row
from engine.config import Config


def photos(root: Path, key: str) -> list[Path]:
    """Every image file at any depth below `root`. Raises DataError that names the key."""
    if not root.is_dir():
        raise DataError(f"{key}: {root} is no folder; write one that holds images")
    found = [path for path in layouts.files_below(root)
             if path.suffix.lower() in layouts.SUFFIXES]
    if not found:
        raise DataError(f"{key}: {root} holds no {', '.join(layouts.SUFFIXES)}")
    return found


def load_made(c: Config, like: ImageSet) -> dict[str, ImageSet]:
    """{"external": the images of guidance.external}, or nothing where the config names none."""
    path = c.guidance.external
    return {"external": read_made(path, like, c.data.size)} if path else {}


def read_made(path: str, like: ImageSet, size: int) -> ImageSet:
    """Labelled images made elsewhere, with the classes and groups of `like`, (N, 3, size, size).
    path: a folder root/<class>/*, root/<class>/<group>/*, or a csv of image (a path below the
    csv's folder), class and group (may be empty). Raises one DataError that lists every problem."""
    root, key = Path(path), "guidance.external"
    if root.is_file():
        columns = ("image", "class", "group")
        rows = [tuple(row[k][row[k].startswith(("'=", "'+", "'-", "'@")):] for k in columns)
                for row in layouts.read_csv(root, columns)]     # without what csv_bytes put there
        root = root.parent
    else:
        parts = [file.relative_to(root).parts for file in photos(root, key)]
        rows = [("/".join(part), *(*part[:-1], "", "")[:2]) for part in parts]
    problems, chosen, seen = [], [], set()
    for image, name, group in sorted(rows):
        file = root / image
        if image in seen:
            problems.append(f"{image} stands twice: keep one row")
        elif not file.is_file() or not file.resolve().is_relative_to(root.resolve()):
            problems.append(f"{image} is no file below {root.name}")
        elif name not in like.class_names:
            problems.append(f"{image} has class {name!r}: write one of "
                            f"{', '.join(like.class_names)}")
        elif group and group not in like.group_names:
            problems.append(f"{image} has group {group!r}: write one of "
                            f"{', '.join(like.group_names) or 'none, the data set has none'}")
        else:
            chosen.append(Row(image, name, group=group, path=file))
        seen.add(image)
    images, unreadable = files.decode_all(Listing(chosen, like.class_names, ()), size)
    problems += [f"{image} cannot be decoded ({reason})" for image, reason in unreadable]
    if problems:
        raise DataError(f"{key}: {path}: {len(problems)} problem(s): "
                        + layouts.first_ten(problems))
    labels = np.array([like.class_names.index(row.label) for row in chosen])
    groups = np.array([like.group_names.index(row.group) if row.group else -1 for row in chosen])
    names = np.array([f"external/{row.image}" for row in chosen])
    return ImageSet(images, labels, groups, names, None, names, like.class_names,
                    like.group_names, like.malignant, subtype_names=like.subtype_names)
