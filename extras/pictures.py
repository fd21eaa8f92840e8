"""The contact sheets of a run: which images to show beside which. Arrays in, PIL pictures out."""
import numpy as np
from PIL import Image

from data import ImageSet, class_by_group_sheet, contact_sheet


def one(image: np.ndarray) -> Image.Image:
    """A uint8 (3, H, W) image as a PIL picture."""
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))


def zoom(images: np.ndarray) -> int:
    """A whole magnification that makes an image about 96 pixels wide on the sheet."""
    return max(1, round(96 / images.shape[-1]))


def by_class_and_group(image_set: ImageSet) -> Image.Image:
    return class_by_group_sheet(image_set, each=2, scale=max(1, zoom(image_set.images) - 1))


def hard_cases(train: ImageSet, probs: np.ndarray, margin: np.ndarray,
               count: int = 24) -> Image.Image:
    """The training images that the out-of-fold students are most wrong about: class > their answer.

    probs: (N, C) out-of-fold; margin: (N,) as in mining.margins.
    """
    chosen = np.argsort(margin, kind="stable")[:count]
    names = train.class_names
    captions = [f"{names[train.labels[i]]} > {names[probs[i].argmax()]}"
                + (f"\n{train.group_names[train.groups[i]]}" if train.groups[i] >= 0 else "")
                for i in chosen]
    return contact_sheet(train.images[chosen], captions, 8, zoom(train.images))


def rows(columns: list[np.ndarray], labels: list[str]) -> Image.Image:
    """Several versions of the same images: one row a version, one column an image."""
    images = np.concatenate(columns)
    return contact_sheet(images, None, len(columns[0]), zoom(images), None, labels)


def children(train: ImageSet, parents: np.ndarray, images: np.ndarray, targets: np.ndarray,
             judge: np.ndarray, fate: list[str], count: int = 16) -> Image.Image:
    """Each parent with its child on its right: group, the judge's probability, kept or why not."""
    pairs = np.stack([train.images[parents[:count]], images[:count]], 1)
    captions = []
    for i, parent in enumerate(parents[:count]):
        own, target = train.groups[parent], targets[i]
        captions += [train.class_names[train.labels[parent]]
                     + (f" {train.group_names[own]}" if own >= 0 else ""),
                     (f"> {train.group_names[target]} " if target >= 0 else "child ")
                     + f"{judge[i]:.2f}\n{fate[i]}"]
    return contact_sheet(pairs.reshape(-1, *images.shape[1:]), captions, 8, zoom(images))


def every_group(train: ImageSet, chosen: np.ndarray, images: np.ndarray) -> Image.Image:
    """A row a lesion: the photograph, then `images` (rows x groups, ...), it on every group."""
    blocks = images.reshape(len(chosen), -1, *images.shape[1:])
    tiles = np.concatenate([train.images[chosen][:, None], blocks], 1)
    captions = [text for i in chosen for text in
                [f"real, {train.group_names[train.groups[i]]}" if train.groups[i] >= 0 else "real"]
                + list(train.group_names)]
    return contact_sheet(tiles.reshape(-1, *images.shape[1:]), captions, tiles.shape[1],
                         zoom(images), None, [train.class_names[train.labels[i]] for i in chosen])


def composition(real: ImageSet, made: ImageSet) -> Image.Image:
    """A row a class, a pair a group: a real image beside a synthetic one, and how many of each."""
    tiles, captions = [], []
    blank = np.full(real.images.shape[1:], 235, np.uint8)              # light grey: no such image
    groups = list(enumerate(real.group_names))
    if (real.groups == -1).any():
        groups.append((-1, "unknown" if groups else "all"))
    for label in range(len(real.class_names)):
        for group, name in groups:
            for kind, images in (("real", real), ("made", made)):
                cell = np.flatnonzero((images.labels == label) & (images.groups == group))
                tiles.append(images.images[cell[0]] if len(cell) else blank)
                captions.append(f"{name}: {len(cell)} {kind}")
    return contact_sheet(np.stack(tiles), captions, 2 * len(groups), zoom(real.images), None,
                         list(real.class_names))


def neighbours(train: ImageSet, images: np.ndarray, distance: np.ndarray,
               nearest: np.ndarray) -> Image.Image:
    """Synthetic images, each with the training image nearest to it on its right."""
    pairs = np.stack([images, train.images[nearest]], 1)
    captions = [text for d in distance for text in (f"distance {d:.1f}", "nearest real")]
    return contact_sheet(pairs.reshape(-1, *images.shape[1:]), captions, 8, zoom(images))


def mended(test: ImageSet, before: np.ndarray, after: np.ndarray, margin: np.ndarray,
           each: int = 8) -> Image.Image:
    """Test images put right and put wrong by the retraining: class, answer before > after."""
    names, tiles, captions = test.class_names, [], []
    blank = np.full((1, *test.images.shape[1:]), 235, np.uint8)
    order = np.argsort(margin, kind="stable")              # the hardest first
    for cases in ((before != test.labels) & (after == test.labels),
                  (before == test.labels) & (after != test.labels)):
        chosen = order[cases[order]][:each]
        tiles += [test.images[chosen], *[blank] * (each - len(chosen))]
        captions += [f"{names[test.labels[i]]}\n{names[before[i]]} > {names[after[i]]}"
                     for i in chosen]
        captions += [""] * (each - len(chosen))
    return contact_sheet(np.concatenate(tiles), captions, each, zoom(test.images), None,
                         ["mended", "broken"])
