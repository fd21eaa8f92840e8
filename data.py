"""The images: one container, decoding, splits that keep a lesion on one side, and pictures.

The procedural phantom (phantom.py) draws its images; datasets.py says what the others' files look
like. Everything is a numpy array; nothing here knows of torch, the config or the run.

    python data.py --config config.yaml        # writes runs/data.png, prints the counts
"""
import argparse
import hashlib
import io
import itertools
import json
import mmap
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from datasets import layouts as datasets
from datasets import phantom
from datasets.layouts import SPLITS, DataError, Listing, Row

LOADER_VERSION = 1   # part of the cache key: raise it whenever `decode` gives other pixels
PER_IMAGE = {"images": "uint8", "labels": "int64", "groups": "int64", "lesions": "str",
             "folds": "int64", "sources": "str", "subtypes": "int64"}
# Individual typology angle in degrees, from light to dark: Chardon et al., Int. J. Cosmet. Sci. 13
# (1991); the six names after Del Bino & Bernerd, Br. J. Dermatol. 169 (2013)
TONES = ("very light", "light", "intermediate", "tan", "brown", "dark")
TONE_ENDS = (55, 41, 28, 10, -30)


# ---------------------------------------------------------------------------- the container

class FileImages:
    """Images in a file, behaving like a uint8 array (N, 3, H, W) of which only what is asked for is
    read: a set larger than memory can be split, joined with others and drawn from.

    arrays: memory maps or arrays (n, 3, H, W); index: (N,) int64, rows of them laid end to end.
    Indexing along the first axis gives a plain array.
    """
    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, arrays, index: np.ndarray):
        self.arrays, self.index = tuple(arrays), index
        self.shape = (len(index), *arrays[0].shape[1:])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key) -> np.ndarray:
        index = np.asarray(self.index[key])
        images, start = np.empty((*index.shape, *self.shape[1:]), np.uint8), 0
        for array in self.arrays:
            here = (index >= start) & (index < start + len(array))
            images[here] = array[index[here] - start]
            start += len(array)
            if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                array.base.madvise(mmap.MADV_DONTNEED)   # what was read stays in the disk's cache
        return images

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:]

    def join(self, images) -> "FileImages":
        """These, then `images`."""
        start = sum(map(len, self.arrays))
        return FileImages((*self.arrays, np.asarray(images)),
                          np.concatenate([self.index, start + np.arange(len(images))]))


def pick(images, index):
    """The images that `index` (numbers or truth values) picks: a copy, or without reading any."""
    if isinstance(images, FileImages):
        return FileImages(images.arrays, images.index[index])
    return images[index]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images and all that the loop knows of each. Checked when made, then read-only.

    images: uint8 (N, 3, H, W), an array or FileImages; labels: int64 (N,) index into class_names;
    groups: int64 (N,) index into group_names (skin type or another attribute), -1 unknown; lesions:
    (N,) str, the unit that never straddles a split; folds: int64 (N,) cross-fitting fold, -1 none;
    sources: (N,) str, the image id, for a synthetic image its parent's; malignant: one bool a
    class; subtypes: int64 (N,) hidden subtype, -1 unknown: for evaluation alone, no model is told;
    notes: what was left out or found while loading, one sentence each.
    Raises DataError if shapes, dtypes or ranges are wrong. torch.tensor(set.images) copies without
    complaint; torch.from_numpy warns, because the arrays are read-only.
    """
    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    lesions: np.ndarray
    folds: np.ndarray
    sources: np.ndarray
    class_names: tuple[str, ...]
    group_names: tuple[str, ...]
    malignant: tuple[bool, ...]
    subtypes: np.ndarray | None = None     # None: unknown for all
    subtype_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        count = len(self.images)
        for name in ("class_names", "group_names", "malignant", "subtype_names", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.subtypes is None:
            object.__setattr__(self, "subtypes", np.full(count, -1, np.int64))
        if len(self.malignant) != len(self.class_names):
            raise DataError(f"ImageSet: malignant has {len(self.malignant)} entries for "
                            f"{len(self.class_names)} classes; give one bool a class")
        ends = {"labels": len(self.class_names), "groups": len(self.group_names),
                "folds": np.inf, "subtypes": len(self.subtype_names)}
        for name, wanted in PER_IMAGE.items():
            array = getattr(self, name)
            array = array if isinstance(array, FileImages) else np.asarray(array)
            found = "str" if array.dtype.kind == "U" else str(array.dtype)
            shape, fits = f"({count},)", array.shape == (count,)
            if name == "images":
                shape, fits = "(N, 3, H, W)", array.ndim == 4 and array.shape[1] == 3
            if not fits or found != wanted:
                raise DataError(f"ImageSet: {name} must be {wanted} {shape}; "
                                f"found {found} {array.shape}")
            lowest = 0 if name == "labels" else -1
            if name in ends and count and not lowest <= array.min() <= array.max() < ends[name]:
                raise DataError(f"ImageSet: {name} must lie in {lowest}..{ends[name] - 1}; "
                                f"found {array.min()}..{array.max()}")
            if isinstance(array, np.ndarray):
                array = array.view()   # the lock is on our view: the caller's own stays writable
                array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index) -> "ImageSet":
        """The images that `index` picks: (M,) int, in that order, or (N,) bool."""
        index = np.asarray(index)
        if index.size == 0 and index.dtype != bool:
            index = index.astype(np.int64)   # numpy makes an empty list float
        return replace(self, **{name: pick(getattr(self, name), index) for name in PER_IMAGE})

    def extend(self, other: "ImageSet") -> "ImageSet":
        """These images, then `other`'s. Raises DataError unless names and image size agree."""
        for name in ("class_names", "group_names", "malignant", "subtype_names"):
            if getattr(self, name) != getattr(other, name):
                raise DataError(f"ImageSet.extend: {name} differ, {getattr(self, name)} and "
                                f"{getattr(other, name)}; map them to the same tuple first")
        if self.images.shape[1:] != other.images.shape[1:]:
            raise DataError(f"ImageSet.extend: images of {self.images.shape[2:]} and of "
                            f"{other.images.shape[2:]} pixels; load both with the same size")
        both = {name: [getattr(self, name), getattr(other, name)] for name in PER_IMAGE}
        first, second = both.pop("images")
        images = (first.join(second) if isinstance(first, FileImages)
                  else np.concatenate([first, second]))
        return replace(self, images=images, **{k: np.concatenate(v) for k, v in both.items()})


# ---------------------------------------------------------------------------- loaders

def load(kind: str, *, root, size: int, seed: int, train: int, val: int, test: int,
         val_fraction: float, test_fraction: float, split_by: str, labelled: float, malignant,
         folds: int, image_column: str, label_column: str, lesion_column: str, group: str,
         skip_bad: bool, cache=None, progress=None) -> dict[str, ImageSet]:
    """The splits train (with `folds` folds), val and test of one data set; with labelled < 1 also
    "unlabelled", the train images whose class nobody is to be told (`few_labels`).

    The arguments are the config's section `data`, explained in config.yaml:
    load(**vars(config.data)). cache, progress: see `decode_all`. split_by: "lesion", or "image",
    the common mistake, to show what it leaks. A data set's own splits are kept; by lesion, an image
    whose lesion stands in several of them goes to the first of train, val, test. Raises DataError.
    """
    if kind == "phantom":
        splits = load_phantom(size, seed, train, val, test)
    else:
        loaded, sides = load_images(kind, root, size, malignant, image_column, label_column,
                                    lesion_column, group, skip_bad, cache, progress)
        # split by image: every image for its own lesion, and afterwards the lesions put back
        units = loaded if split_by == "lesion" else replace(loaded, lesions=loaded.sources)
        splits = (split_lesions(units, val_fraction, test_fraction, seed) if sides is None
                  else own_splits(units, sides))
        lesion_of = dict(zip(loaded.sources.tolist(), loaded.lesions.tolist()))
        for name, part in splits.items():
            lesions = np.array([lesion_of[source] for source in part.sources.tolist()])
            splits[name] = replace(part, lesions=lesions)
    if labelled < 1:
        splits |= few_labels(splits["train"], labelled, folds, seed)
    return splits | {"train": add_folds(splits["train"], folds, seed)}


def load_whole(kind: str, *, cache=None, progress=None, **section) -> ImageSet:
    """All images of one data set, not split: the arguments of `load`."""
    def some(*names):
        return {name: section[name] for name in names}
    if kind == "phantom":
        train, val, test = load_phantom(**some("size", "seed", "train", "val", "test")).values()
        return train.extend(val).extend(test)
    return load_images(kind, cache=cache, progress=progress, **some(
        "root", "size", "malignant", "image_column", "label_column", "lesion_column", "group",
        "skip_bad"))[0]


def load_phantom(size: int, seed: int, train: int, val: int, test: int) -> dict[str, ImageSet]:
    """Three independent draws from the phantom: `train`, `val`, `test` images of size x size.

    train is the collection, mostly light skin. val and test are even over the six skin types: on a
    phantom a validation set like the deployment costs nothing, and thresholds need one.
    """
    counts = {"train": train, "val": val, "test": test}
    return {name: _phantom_set(name, counts[name], size, seed, stream,
                               phantom.COLLECTION if name == "train" else phantom.EVEN)
            for stream, name in enumerate(counts)}


def load_oracle(size: int, seed: int, count: int) -> ImageSet:
    """A fourth draw, large and even over the types: what an oracle of the labels learns from."""
    return _phantom_set("oracle", count, size, seed, 3, phantom.EVEN)


def load_counterfactuals(size: int, seed: int, train: int, index, groups, **kind) -> np.ndarray:
    """Images `index` of load_phantom's train set as a perfect generator would carry them to
    `groups`, both (N,) int: uint8 (N, 3, size, size). kind: shot, new_view of phantom.carry."""
    return phantom.carry(train, size, _stream_seed(seed, 0), index, groups, **kind)


def _stream_seed(seed: int, stream: int) -> int:
    """The seed of the phantom's draw number `stream`."""
    return int(np.random.SeedSequence(seed).spawn(stream + 1)[stream].generate_state(1)[0])


def _phantom_set(name: str, count: int, size: int, seed: int, stream: int, weights) -> ImageSet:
    """`count` phantom images from random stream number `stream` of the seed."""
    try:
        drawn = phantom.draw(count, size, _stream_seed(seed, stream), weights)
    except ValueError as error:
        raise DataError(f"data.{name} {count}, data.size {size}: {error}") from None
    return ImageSet(
        images=drawn["images"], labels=drawn["labels"], groups=drawn["groups"],
        # with the draw's name no two draws can share a lesion id
        lesions=np.array([f"{name}-{lesion}" for lesion in drawn["lesions"]], dtype=str),
        folds=np.full(count, -1, np.int64),
        sources=np.array([f"{name}-{i:06d}" for i in range(count)], dtype=str),
        class_names=phantom.CLASS_NAMES, group_names=phantom.GROUP_NAMES,
        malignant=phantom.MALIGNANT,
        subtypes=drawn["subtypes"], subtype_names=phantom.SUBTYPE_NAMES)


def load_images(kind: str, root, size: int, malignant, image_column: str, label_column: str,
                lesion_column: str, group: str, skip_bad: bool, cache=None, progress=None
                ) -> tuple[ImageSet, np.ndarray | None]:
    """All images of a real data set below `root`, and (N,) the data set's own splits, or None.

    Images with the very same pixels count as one lesion. Everything wrong with the data is raised
    in one DataError; with skip_bad the images that it concerns are left out and counted in notes.
    """
    listing = datasets.read(kind, root, malignant, image_column, label_column, lesion_column,
                            "" if group == "ita" else group)
    if size < 1:
        raise DataError(f"data.size: {size} is not a size; write the side in pixels, such as 64")
    rows, problems, notes = listing.rows, listing.problems, list(listing.notes)
    images, unreadable = decode_all(listing, size, cache, progress)
    problems += [(f"{image} cannot be decoded ({reason}): replace the file", [image])
                 for image, reason in unreadable]
    bad = {image for _, concerned in problems for image in concerned}
    twins = same_pixels(rows, images, bad)
    problems += [(f"{a.image} and {b.image} are the same picture, but {a.label} and {b.label}", [])
                 for a, b in twins if a.label != b.label]
    if problems and not skip_bad:
        shown = datasets.first_ten([text for text, _ in problems])
        raise DataError(f"{root}: {len(problems)} problem(s) in the data: {shown} (data.skip_bad: "
                        "true leaves out what they concern)")
    bad |= {image for a, b in twins if a.label != b.label for image in (a.image, b.image)}
    images = pick(images, np.array([row.image not in bad for row in rows], bool))
    rows = [row for row in rows if row.image not in bad]
    if problems:
        notes.append(f"data.skip_bad left out {listing.total - len(rows)} of {listing.total} "
                     f"images for {len(problems)} problem(s) in the data")
    if not rows:
        raise DataError(f"{root}: not one image is left; {notes[-1]}")
    twins = [(a, b) for a, b in twins if b.image not in bad]
    if twins:
        notes.append("images that repeat another, pixel for pixel, and count as the same lesion: "
                     f"{len(twins)}")
    names, groups = ((), np.full(len(rows), -1)) if not group else (
        skin_tones(images) if group == "ita" else datasets.coded([row.group for row in rows]))
    sides = np.array([row.split for row in rows])
    return ImageSet(
        images, np.array([listing.class_names.index(row.label) for row in rows]), groups,
        join_lesions(rows, twins), np.full(len(rows), -1),
        np.array([row.image for row in rows]), listing.class_names, names,
        [name in listing.malignant for name in listing.class_names],
        notes=notes), sides if sides[0] else None


def same_pixels(rows: list[Row], images, bad: set[str]) -> list[tuple[Row, Row]]:
    """(first, copy) for every image with the very same pixels as an earlier one, bad ones aside."""
    first = {}
    pairs = [(first.setdefault(hashlib.sha256(image.tobytes()).digest(), row), row)
             for row, image in zip(rows, images) if row.image not in bad]
    return [(a, b) for a, b in pairs if a is not b]


def join_lesions(rows: list[Row], twins: list[tuple[Row, Row]]) -> np.ndarray:
    """Each row's lesion, (N,); those that share a picture (see same_pixels) under one name. The
    first of a pair may have been left out of rows: its copies still belong together."""
    above = {row.lesion: row.lesion for row in [*rows, *(a for a, _ in twins)]}

    def top(lesion):
        while above[lesion] != lesion:
            lesion = above[lesion]
        return lesion
    for a, b in twins:
        low, high = sorted((top(a.lesion), top(b.lesion)))
        above[high] = low
    return np.array([top(row.lesion) for row in rows])


# ---------------------------------------------------------------------------- pixels and cache

def decode(source: Path | np.ndarray, size: int) -> np.ndarray:
    """One image, a file or (H, W, 3) uint8, as (3, size, size) uint8 RGB. Raises OSError and the
    like if it is unreadable.

    The central square is kept, not the whole 4:3 frame: lesions are photographed in the middle,
    and squeezing would bend every outline. Lanczos with antialiasing keeps the fine lines of the
    pigment network better than a box; JPEGs are reduced first, while decoding, to no less than
    twice the size, which is several times faster.

    Turned as EXIF says; grey, palette and CMYK become RGB, transparency is dropped; grey of 16 or
    more bits is refused, and so is whatever Pillow takes for a decompression bomb.
    """
    with Image.open(source) if isinstance(source, Path) else Image.fromarray(source) as image:
        image.draft("RGB", (2 * size, 2 * size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            raise OSError(f"mode {image.mode} has more than 8 bits a channel")   # would clip white
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.convert("RGB").crop((left, top, left + side, top + side))
        return np.asarray(image.resize((size, size), Image.LANCZOS)).transpose(2, 0, 1)


def decode_all(listing: Listing, size: int, cache=None, progress=None):
    """The listing's images, uint8 (N, 3, size, size), and (id, reason) of each unreadable one,
    whose pixels are 0.

    cache: path prefix, or None for an array in memory. <cache>.npy holds the images, written one by
    one and read as FileImages; <cache>.json its key (ids, file sizes, size, loader version) and
    checksum. A cache with another key or damaged content is rebuilt. progress: called as
    progress(done, total) after each image decoded. Raises DataError if the cache cannot be written.
    """
    rows, unreadable = listing.rows, []
    content = [LOADER_VERSION, size, [[row.image, row.path.stat().st_size] for row in rows]]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    cache = cache if rows else None      # an empty file cannot be mapped
    cached = cache and _read_cache(cache, key)
    if cached:
        return cached

    def decoded():
        sources = listing.pixels() if listing.pixels else (row.path for row in rows)
        for i, (row, source) in enumerate(zip(rows, sources)):
            try:
                yield decode(source, size)
            # what PIL raises for foreign, truncated, damaged and absurdly large files
            except (OSError, SyntaxError, ValueError, EOFError,
                    Image.DecompressionBombError) as error:
                reason = str(error).replace(str(row.path), row.path.name)
                unreadable.append([row.image, reason])
                yield np.zeros((3, size, size), np.uint8)
            if progress:
                progress(i + 1, len(rows))
    if cache:
        _write_cache(cache, key, decoded(), (len(rows), 3, size, size), unreadable)
        cached = _read_cache(cache, key)
        if not cached:
            raise DataError(f"cache {cache}: another run has written it meanwhile; start again")
        return cached
    images = np.empty((len(rows), 3, size, size), np.uint8)
    for i, image in enumerate(decoded()):
        images[i] = image
    return images, unreadable


def _read_cache(prefix, key: str):
    """What decode_all returns, if the note carries this key and the file's checksum, else None."""
    try:
        note = json.loads(Path(f"{prefix}.json").read_text())
        with open(f"{prefix}.npy", "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        if note["key"] != key or note["sha256"] != checksum:
            return None
        images = np.load(f"{prefix}.npy", mmap_mode="r")
        return FileImages([images], np.arange(len(images))), note["unreadable"]
    except (OSError, ValueError, TypeError, KeyError):   # none there yet, or not ours
        return None


def _write_cache(prefix, key: str, images, shape: tuple[int, ...], unreadable: list) -> None:
    """Write the images as they come, then the note (`unreadable` is filled by then): a stop in
    between leaves a checksum that cannot match."""
    def write(path, parts):
        # of killed processes; where there is no /proc, nobody knows which are alive
        for left in Path(path).parent.glob(f"{Path(path).name}.*.tmp"):
            if Path("/proc/self").exists() and not Path("/proc", left.suffixes[-2][1:]).exists():
                left.unlink(missing_ok=True)
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        write(f"{prefix}.npy", itertools.chain([head.getvalue()],
                                               (image.tobytes() for image in images)))
        with open(f"{prefix}.npy", "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        note = {"key": key, "sha256": checksum, "unreadable": unreadable}
        write(f"{prefix}.json", [json.dumps(note).encode()])
    except OSError as error:
        raise DataError(f"cache {prefix}: {error.strerror}; free the disk or choose another "
                        "folder") from None


# ---------------------------------------------------------------------------- splits

def _lesions_by_class(image_set: ImageSet, seed: int, purpose: int):
    """Each image's lesion number (N,), and per class its lesion numbers, shuffled.

    Lesions are sorted by id before the shuffle, and every (seed, purpose, class) has its own
    stream, so neither the order of files nor another class changes the result.
    """
    names, first, lesion = np.unique(image_set.lesions, return_index=True, return_inverse=True)
    label = image_set.labels[first]
    odd = np.flatnonzero(label[lesion] != image_set.labels)
    if odd.size:
        raise DataError(f"lesion {image_set.lesions[odd[0]]} carries two labels: give it one")
    streams = [np.random.default_rng([seed, purpose, c]) for c in range(len(image_set.class_names))]
    return lesion, [rng.permutation(np.flatnonzero(label == c)) for c, rng in enumerate(streams)]


def split_lesions(image_set: ImageSet, val_fraction: float, test_fraction: float,
                  seed: int) -> dict[str, ImageSet]:
    """Split by lesion, stratified by class: no lesion stands on two sides.

    Of every class's lesions val_fraction go to val and test_fraction to test (rounded, at least
    one each), the rest to train. HAM10000 has up to 6 photographs of a lesion; splitting images at
    random instead would leave 35 % of the test images with a sister in train.
    Raises DataError if the fractions are impossible or a class has too few lesions.
    """
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise DataError(f"data.val_fraction {val_fraction}, data.test_fraction {test_fraction}: "
                        "write two shares above 0 with a sum below 1, such as 0.1 and 0.2")
    lesion, by_class = _lesions_by_class(image_set, seed, purpose=0)
    side = np.empty(lesion.max(initial=-1) + 1, np.int64)
    for name, members in zip(image_set.class_names, by_class):
        val = max(1, int(val_fraction * len(members) + 0.5))
        test = max(1, int(test_fraction * len(members) + 0.5))
        if val + test >= len(members):
            raise DataError(f"class {name!r} has {len(members)} lesion(s): too few for train, val "
                            "and test; add lesions, drop the class or lower the fractions")
        side[members] = np.repeat([1, 2, 0], [val, test, len(members) - val - test])
    return {name: image_set.subset(side[lesion] == i)
            for i, name in enumerate(SPLITS)}


def few_labels(train: ImageSet, share: float, folds: int, seed: int) -> dict[str, ImageSet]:
    """Train in two parts, by lesion and alike for every class: `share` of the lesions, at least
    `folds` of a class, stay "train", the others are "unlabelled"; they keep their labels for those
    who wish to count how many were guessed right."""
    lesion, by_class = _lesions_by_class(train, seed, purpose=2)
    kept = np.concatenate([members[:max(folds, round(share * len(members)))]
                           for members in by_class])
    known = np.isin(lesion, kept)
    return {"train": train.subset(known), "unlabelled": train.subset(~known)}


def own_splits(image_set: ImageSet, sides: np.ndarray) -> dict[str, ImageSet]:
    """Split as the data set says, sides (N,); but a lesion that stands in several splits goes to
    the first of train, val, test, and a note counts the images moved."""
    side = np.array([SPLITS.index(name) for name in sides])
    _, lesion = np.unique(image_set.lesions, return_inverse=True)
    first = np.full(lesion.max() + 1, len(SPLITS))
    np.minimum.at(first, lesion, side)
    moved = int((first[lesion] != side).sum())
    if moved:
        image_set = replace(image_set, notes=(*image_set.notes, (
            f"images moved to the split where their lesion already stands: {moved}")))
    return {name: image_set.subset(first[lesion] == i) for i, name in enumerate(SPLITS)}


def leaked_share(splits: dict[str, ImageSet]) -> dict[str, float]:
    """The share of test images whose lesion also stands in train: over "all", and by class."""
    test = splits["test"]
    seen, classes = np.isin(test.lesions, splits["train"].lesions), np.unique(test.labels)
    return {"all": float(seen.mean())} | {test.class_names[c]: float(seen[test.labels == c].mean())
                                          for c in classes}


def add_folds(train: ImageSet, folds: int, seed: int) -> ImageSet:
    """The same images with `folds` cross-fitting folds over lesions, stratified by class.

    Raises DataError if a class has fewer lesions than folds: some student would never see it.
    """
    if folds < 2:
        raise DataError(f"data.folds: {folds} cannot judge out of fold; write 2 or more")
    lesion, by_class = _lesions_by_class(train, seed, purpose=1)
    fold = np.empty(lesion.max(initial=-1) + 1, np.int64)
    start = 0   # the next class goes on where this one stopped, so that folds stay equally large
    for name, members in zip(train.class_names, by_class):
        if len(members) < folds:
            raise DataError(f"class {name!r} has {len(members)} lesion(s) in train for {folds} "
                            "folds; add lesions, drop the class or use fewer folds")
        fold[members] = (start + np.arange(len(members))) % folds
        start += len(members)
    return replace(train, folds=fold[lesion])


# ---------------------------------------------------------------------------- counts and pictures

def counts(image_set: ImageSet) -> dict:
    """{"images": n, "lesions": n, "classes": {name: images}, "groups": {name: images}}.

    "groups" has an entry "unknown" where some image has no group.
    """
    def tally(names, index):
        return {name: int((index == i).sum()) for i, name in enumerate(names)}
    groups = tally(image_set.group_names, image_set.groups)
    if (image_set.groups == -1).any():
        groups["unknown"] = int((image_set.groups == -1).sum())
    return {"images": len(image_set), "lesions": len(np.unique(image_set.lesions)),
            "classes": tally(image_set.class_names, image_set.labels), "groups": groups}


def counts_table(splits: dict[str, ImageSet]) -> str:
    """The counts of several sets side by side, as text for the terminal."""
    columns = [counts(image_set) for image_set in splits.values()]
    one = next(iter(splits.values()))
    malignant = dict(zip(one.class_names, one.malignant))
    rows = [("", list(splits))]
    rows += [(key, [c[key] for c in columns]) for key in ("images", "lesions")]
    for kind, of in (("class", "classes"), ("group", "groups")):
        for name in dict.fromkeys(name for c in columns for name in c[of]):
            mark = " (malignant)" if kind == "class" and malignant[name] else ""
            rows.append((f"{kind} {name}{mark}", [c[of].get(name, 0) for c in columns]))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{width}}" + "".join(f"{value:>9}" for value in values)
                     for label, values in rows)


def contact_sheet(images: np.ndarray, captions=None, columns: int = 8, scale: int = 2, title=None,
                  row_labels=None) -> Image.Image:
    """A grid of images, row by row, as one RGB picture.

    images: uint8 (N, 3, H, W), N = 0 allowed; captions: N strings below the images, which may hold
    newlines; columns: images a row; scale: whole number of screen pixels a pixel (nearest
    neighbour, so that pixels stay visible); row_labels: one string a row, on its left.
    Cells widen to the longest caption: no text is cut. Raises DataError if lengths disagree.
    """
    images = np.asarray(images)
    count, rows = len(images), -(-len(images) // columns)
    for name, given, wanted in (("captions", captions, count), ("row_labels", row_labels, rows)):
        if given is not None and len(given) != wanted:
            raise DataError(f"contact_sheet: {len(given)} {name} for {wanted}; give as many")
    font, line = ImageFont.load_default(), 13   # 13: the font's line height in pixels

    def lines(text):   # what the font can draw: PIL's fallback without FreeType knows Latin-1 alone
        text = "" if text is None else str(text)
        return text.encode("latin-1", "replace").decode("latin-1").split("\n")

    def extent(texts):   # width and height of the largest text
        sizes = [(font.getlength(part) + 4, line * len(text)) for text in texts for part in text]
        return [int(max(size)) for size in zip((0, 0), *(size for size in sizes if size[0] > 4))]

    title = lines(title if count else f"{title or ''} (no images)".strip())
    captions, row_labels = ([lines(text) for text in given or []]
                            for given in (captions, row_labels))
    height, width = images.shape[2] * scale, images.shape[3] * scale
    (left, _), (wide, high), (title_width, top) = map(extent, (row_labels, captions, [title]))
    cell_width, cell_height = max(width, wide) + 2, height + high + 2
    sheet = Image.new("RGB", (2 + max(left + cell_width * min(columns, count), title_width),
                              2 + top + cell_height * rows), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x, y, text):
        for i, part in enumerate(text):
            draw.text((x, y + line * i), part, fill="black", font=font)

    write(2, 0, title)
    for i, image in enumerate(images):
        x, y = 2 + left + cell_width * (i % columns), 2 + top + cell_height * (i // columns)
        tile = image.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
        sheet.paste(Image.fromarray(np.ascontiguousarray(tile)), (x, y))
        if captions:
            write(x, y + height, captions[i])
        if row_labels and i % columns == 0:
            write(2, y, row_labels[i // columns])
    return sheet


def class_by_group_sheet(image_set: ImageSet, each: int = 2, seed: int = 0, scale: int = 2,
                         title=None) -> Image.Image:
    """A contact sheet with one row a class and `each` random images a group (4 x each if none).

    The first image of a cell is captioned with the group and how many images the cell has.
    """
    rng = np.random.default_rng(seed)
    groups = list(enumerate(image_set.group_names)) or [(-1, "all")]
    each = each if image_set.group_names else 4 * each
    blank = np.full((1, *image_set.images.shape[1:]), 235, np.uint8)   # light grey: no such image
    tiles, captions = [], []
    for label in range(len(image_set.class_names)):
        for group, name in groups:
            cell = np.flatnonzero((image_set.labels == label) & (image_set.groups == group))
            picked = image_set.images[rng.permutation(cell)[:each]]
            tiles += [picked] + [blank] * (each - len(picked))
            captions += [f"{name}: {len(cell)}"] + [""] * (each - 1)
    return contact_sheet(np.concatenate(tiles), captions, each * len(groups), scale, title,
                         list(image_set.class_names))


def border_colour(images: np.ndarray) -> np.ndarray:
    """The skin's colour, (N, 3) float64 in 0..255, from the border of (N, 3, H, W) uint8 images.

    The median over the ring between 0.85 and 1 of the inscribed circle's radius: lesions lie
    within it, a vignette darkens what is outside, and the median passes over hairs and a lesion
    that reaches the border on one side. Raises DataError below 8 pixels: no ring is left.
    """
    height, width = images.shape[2:]
    if min(height, width) < 8:
        raise DataError(f"border_colour: images of {height} x {width} pixels; give at least 8 x 8")
    y, x = np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2
    radius = np.hypot(y[:, None], x) / (min(height, width) / 2)
    ring = (radius >= 0.85) & (radius < 1)
    return np.concatenate([np.median(images[i:i + 1000][:, :, ring], axis=2)
                           for i in range(0, max(1, len(images)), 1000)])


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 to CIELAB under D65, both (..., 3). IEC 61966-2-1; CIE 15."""
    c = np.asarray(rgb, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192],
                             [0.1805, 0.0722, 0.9505]])
    ratio = xyz / [0.9505, 1.0, 1.089]                                # to the white point
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / 3 * (29 / 6) ** 2 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def skin_tones(images) -> tuple[tuple[str, ...], np.ndarray]:
    """The skin-tone estimates that occur, from light to dark, and each image's, (N,) int64.

        ITA = arctan((L* - 50) / b*)

    in degrees, of the border's colour. An estimate: photographs are not calibrated, and it is no
    skin type. Chardon et al. 1991.
    """
    lab = to_lab(border_colour(images))
    # arctan2 is the same for yellowish skin, b* > 0, and keeps light above dark where b* is below
    angle = np.degrees(np.arctan2(lab[:, 0] - 50, lab[:, 2]))
    kept, index = np.unique((angle[:, None] <= TONE_ENDS).sum(1), return_inverse=True)
    return tuple(TONES[k] for k in kept), index


def main() -> None:
    parser = argparse.ArgumentParser(description="Show a data set: counts and a contact sheet.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--out", default="runs/data.png", help="the contact sheet to write")
    arguments = parser.parse_args()
    from engine import config   # only here: the module itself takes plain arguments

    def progress(done, total):
        if done % 500 == 0 or done == total:
            print(f"decoded {done} of {total}", file=sys.stderr)
    try:
        settings = config.load(arguments.config, arguments.set)
        splits = load(**vars(settings.data), progress=progress,
                      cache=os.path.splitext(arguments.out)[0])
        os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
        class_by_group_sheet(splits["train"], title="train: class by group").save(arguments.out)
    except (ValueError, OSError) as error:  # DataError and config's own: one line, no traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(counts_table(splits), *splits["train"].notes, sep="\n")
    print("share of test images whose lesion is also in train:", ", ".join(
        f"{name} {share:.0%}" for name, share in leaked_share(splits).items()))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
