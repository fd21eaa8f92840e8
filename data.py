"""The images: one container, three loaders, splits that keep a lesion on one side, and pictures.

Kinds: the procedural phantom (phantom.py), HAM10000 as users have it on disk, and any folder of
classes. Everything is a numpy array; nothing here knows of torch, the config or the run.

    python data.py --config config.yaml        # writes runs/data.png, prints the counts

HAM10000: Tschandl, Rosendahl, Kittler, Sci. Data 5:180161 (2018), doi:10.7910/DVN/DBW86T.
"""
import argparse
import csv
import hashlib
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import phantom

LOADER_VERSION = 1   # part of the cache key: raise it whenever `decode` gives other pixels
PER_IMAGE = {"images": "uint8", "labels": "int64", "groups": "int64", "lesions": "str",
             "folds": "int64", "sources": "str", "subtypes": "int64"}
HAM_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
# akiec (actinic keratosis, Bowen's disease) counts as malignant: carcinoma in situ, it is treated
HAM_MALIGNANT = ("akiec", "bcc", "mel")


class DataError(ValueError):
    """One line: the file or key, what was found there, and what to write instead."""


# ---------------------------------------------------------------------------- the container

@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images and all that the loop knows of each. Checked when made, then read-only.

    images: uint8 (N, 3, H, W); labels: int64 (N,) index into class_names; groups: int64 (N,) index
    into group_names (skin type or another attribute), -1 unknown; lesions: (N,) str, the unit that
    never straddles a split; folds: int64 (N,) cross-fitting fold, -1 none; sources: (N,) str, the
    image id, for a synthetic image its parent's; malignant: one bool a class; subtypes: int64 (N,)
    hidden subtype, -1 unknown: for evaluation alone, no model is told.
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

    def __post_init__(self):
        count = len(self.images)
        for name in ("class_names", "group_names", "malignant", "subtype_names"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.subtypes is None:
            object.__setattr__(self, "subtypes", np.full(count, -1, np.int64))
        if len(self.malignant) != len(self.class_names):
            raise DataError(f"ImageSet: malignant has {len(self.malignant)} entries for "
                            f"{len(self.class_names)} classes; give one bool a class")
        ends = {"labels": len(self.class_names), "groups": len(self.group_names),
                "folds": np.inf, "subtypes": len(self.subtype_names)}
        for name, wanted in PER_IMAGE.items():
            array = np.asarray(getattr(self, name))
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
            view = array.view()   # the lock is on our view: the caller's own array stays writable
            view.setflags(write=False)
            object.__setattr__(self, name, view)

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index) -> "ImageSet":
        """The images that `index` picks: (M,) int, in that order, or (N,) bool. A copy."""
        index = np.asarray(index)
        if index.size == 0 and index.dtype != bool:
            index = index.astype(np.int64)   # numpy makes an empty list float
        return replace(self, **{name: getattr(self, name)[index] for name in PER_IMAGE})

    def extend(self, other: "ImageSet") -> "ImageSet":
        """These images, then `other`'s. Raises DataError unless names and image size agree."""
        for name in ("class_names", "group_names", "malignant", "subtype_names"):
            if getattr(self, name) != getattr(other, name):
                raise DataError(f"ImageSet.extend: {name} differ, {getattr(self, name)} and "
                                f"{getattr(other, name)}; map them to the same tuple first")
        if self.images.shape[1:] != other.images.shape[1:]:
            raise DataError(f"ImageSet.extend: images of {self.images.shape[2:]} and of "
                            f"{other.images.shape[2:]} pixels; load both with the same size")
        return replace(self, **{name: np.concatenate([getattr(self, name), getattr(other, name)])
                                for name in PER_IMAGE})


# ---------------------------------------------------------------------------- loaders

def load(kind: str, *, root, size: int, seed: int, train: int, val: int, test: int,
         val_fraction: float, test_fraction: float, split_by: str, malignant, folds: int,
         cache=None, progress=None) -> dict[str, ImageSet]:
    """The splits train (with `folds` folds), val and test of one data set.

    The arguments are the config's section `data`: load(**vars(config.data)). kind: "phantom" (uses
    size, seed, folds and the counts train, val, test), "ham10000" (root, size, seed, folds and the
    fractions) or "folder" (the same, and malignant: class names). split_by: "lesion", or "image",
    the common mistake, to show what it leaks. cache, progress: see `decode_all`. Raises DataError.
    """
    if kind == "phantom":
        splits = load_phantom(size, seed, train, val, test)
    elif kind in ("ham10000", "folder"):
        loaded = (load_ham10000(root, size, cache, progress) if kind == "ham10000"
                  else load_folder(root, size, malignant, cache, progress))
        # split by image: every image for its own lesion, and afterwards the lesions put back
        units = loaded if split_by == "lesion" else replace(loaded, lesions=loaded.sources)
        splits = split_lesions(units, val_fraction, test_fraction, seed)
        lesion_of = dict(zip(loaded.sources.tolist(), loaded.lesions.tolist()))
        for name, part in splits.items():
            lesions = np.array([lesion_of[source] for source in part.sources.tolist()])
            splits[name] = replace(part, lesions=lesions)
    else:
        raise DataError(f"data.kind: {kind!r} is unknown; write phantom, ham10000 or folder")
    return splits | {"train": add_folds(splits["train"], folds, seed)}


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


def load_ham10000(root, size: int, cache=None, progress=None) -> ImageSet:
    """All of HAM10000 below `root`: HAM10000_metadata[.csv] and the .jpg in any folders.

    Images come sorted by id and are decoded to (3, size, size); other files are ignored.
    cache, progress: see `decode_all`. Raises one DataError that lists every problem found.
    """
    files = files_below(root, "the folder that holds HAM10000_metadata.csv and the images")
    tables = [path for path in files if path.name in ("HAM10000_metadata.csv", "HAM10000_metadata")]
    if not tables:
        raise DataError(f"data.root: no HAM10000_metadata.csv (or without .csv) below {root}; "
                        "put the released metadata file there")
    rows = read_csv(tables[0], ("image_id", "lesion_id", "dx"))
    photos = {}
    for path in files:
        if path.suffix.lower() in (".jpg", ".jpeg"):
            photos.setdefault(path.stem, []).append(path)

    problems, chosen, first_of_lesion = [], {}, {}
    for image, lesion, dx in rows:
        twins = photos.get(image, [])
        first_image, first_dx = first_of_lesion.setdefault(lesion, (image, dx))
        if not image or not lesion:
            problems.append(f"empty image_id or lesion_id (image {image!r}, lesion {lesion!r})")
        elif image in chosen:
            problems.append(f"image {image} stands twice in {tables[0].name}: keep one row")
        elif dx not in HAM_CLASSES:
            problems.append(f"image {image} has dx {dx!r}: write one of {', '.join(HAM_CLASSES)}")
        elif dx != first_dx:
            problems.append(f"lesion {lesion} is {first_dx} in {first_image} but {dx} in {image}")
        elif not twins:
            problems.append(f"no {image}.jpg below the root: add it or drop its row")
        # a common re-pack holds every image in two folders; harmless while they are the same
        elif len({path.stat().st_size for path in twins}) > 1:
            problems.append(f"{image}.jpg stands in {len(twins)} folders, not the same: keep one")
        chosen.setdefault(image, (twins[0] if twins else None, lesion, dx))

    ids = sorted(image for image, (path, _, _) in chosen.items() if path)
    images = decode_all(ids, [chosen[i][0] for i in ids], size, root, problems, cache, progress)
    return _image_set(images, [HAM_CLASSES.index(chosen[i][2]) for i in ids],
                      [chosen[i][1] for i in ids], ids, HAM_CLASSES, HAM_MALIGNANT)


def load_folder(root, size: int, malignant, cache=None, progress=None) -> ImageSet:
    """root/<class>/*.jpg, .jpeg or .png (any case): classes in alphabetical order.

    malignant: names of the malignant classes, some but not all. Nothing says which images share a
    lesion, so each is its own: the splits are honest only if no lesion was photographed twice.
    cache, progress: see `decode_all`. Raises DataError.
    """
    photos, folders = {}, set()
    for path in files_below(root, "the folder that holds one folder per class"):
        parts = path.relative_to(root).parts
        folders |= {parts[0]} if len(parts) > 1 else set()
        if len(parts) == 2 and path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            photos["/".join(parts)] = path
    ids = sorted(photos)
    names = tuple(sorted({image.split("/")[0] for image in ids}))
    if len(names) < 2:
        raise DataError(f"data.root: {root} holds {len(names)} class folders with images; "
                        "write root/<class>/*.jpg, .jpeg or .png for at least two classes")
    empty = sorted(folders - set(names))
    if empty:
        raise DataError(f"data.root: {root}/{empty[0]} holds no .jpg, .jpeg or .png of its own; "
                        "put its images directly there or remove it")
    unknown = sorted(set(malignant) - set(names))
    if unknown or not 0 < len(set(malignant)) < len(names):
        what = f"{unknown[0]!r} is no class" if unknown else f"found {malignant!r}"
        raise DataError(f"data.malignant: {what}; write a list of some, not all, of the classes "
                        f"found: {', '.join(names)}")
    images = decode_all(ids, [photos[i] for i in ids], size, root, [], cache, progress)
    labels = [names.index(i.split("/")[0]) for i in ids]
    return _image_set(images, labels, ids, ids, names, malignant)


def _image_set(images, labels, lesions, ids, class_names, malignant) -> ImageSet:
    """An ImageSet without groups, folds or subtypes; `malignant` by name."""
    unknown = np.full(len(ids), -1, np.int64)
    return ImageSet(images, np.array(labels, np.int64), unknown, np.array(lesions, dtype=str),
                    unknown, np.array(ids, dtype=str), class_names, (),
                    tuple(name in malignant for name in class_names))


# ---------------------------------------------------------------------------- files and pixels

def files_below(root, wanted: str) -> list[Path]:
    """Every readable file below `root`, sorted by path; hidden files and folders left out."""
    if not root or not os.path.isdir(root):
        raise DataError(f"data.root: {root!r} is not a folder; write {wanted}")
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def read_csv(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named columns of a csv with a header, stripped; commas or tabs. Raises DataError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:   # -sig: spreadsheets add a BOM
            header = file.readline()
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter="\t" if "\t" in header else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path.name}: not a readable csv ({error}); write utf-8 text") from None
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise DataError(f"{path.name}: no {'column ' + missing[0] if rows else 'rows'}; its first "
                        f"line must name {', '.join(columns)}, found {header.strip()[:80]!r}")
    return [tuple((row[name] or "").strip() for name in columns) for row in rows]


def decode(path: Path, size: int) -> np.ndarray:
    """One image file as (3, size, size) uint8 RGB. Raises OSError and the like if unreadable.

    The central square is kept, not the whole 4:3 frame: lesions are photographed in the middle,
    and squeezing would bend every outline. Lanczos with antialiasing keeps the fine lines of the
    pigment network better than a box; JPEGs are reduced first, while decoding, to no less than
    twice the size, which is several times faster.
    """
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            raise OSError(f"mode {image.mode} has more than 8 bits a channel")   # would clip white
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.convert("RGB").crop((left, top, left + side, top + side))
        return np.asarray(image.resize((size, size), Image.LANCZOS)).transpose(2, 0, 1)


def decode_all(ids, paths, size: int, root, problems=(), cache=None, progress=None) -> np.ndarray:
    """Decode files to uint8 (N, 3, size, size), once: later calls read the cache.

    ids: (N,) sorted image ids; problems: lines already found by the caller, reported together with
    the unreadable images. cache: path prefix; <cache>.npy holds the array and <cache>.json its key
    (ids, file sizes, size, loader version), or None. A cache with another key or damaged content is
    rebuilt. progress: called as progress(done, total) after each image decoded.
    Raises DataError with the first 10 problems and their count.
    """
    if size < 1:
        raise DataError(f"data.size: {size} is not a size; write the side in pixels, such as 64")
    problems = list(problems)
    content = [LOADER_VERSION, size, [[i, p.stat().st_size] for i, p in zip(ids, paths)]]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if cache and not problems:
        images = _read_cache(cache, key)
        if images is not None:
            return images
    images = np.empty((len(ids), 3, size, size), np.uint8)
    for i, path in enumerate(paths):
        try:
            images[i] = decode(path, size)
        # what PIL raises for foreign, truncated, damaged and absurdly large files
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            reason = str(error).replace(str(path), path.name)
            problems.append(f"{ids[i]} cannot be decoded ({reason}): replace the file")
        if progress:
            progress(i + 1, len(ids))
    if problems:
        shown = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        raise DataError(f"{root}: {len(problems)} problem(s) in the data: {shown}")
    if cache:
        _write_cache(cache, key, images)
    return images


def _read_cache(prefix, key: str) -> np.ndarray | None:
    """The cached array if its note carries this key and the checksum of the very file, or None."""
    try:
        note = json.loads(Path(f"{prefix}.json").read_text())
        with open(f"{prefix}.npy", "rb") as file:
            if note != {"key": key, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}:
                return None
            file.seek(0)
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError):   # none there yet, or not ours: the caller decodes again
        return None


def _write_cache(prefix, key: str, images: np.ndarray) -> None:
    """Write the array, then its note: a stop in between leaves a checksum that cannot match."""
    def write(path, save):
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        write(f"{prefix}.npy", lambda file: np.save(file, images))
        with open(f"{prefix}.npy", "rb") as file:
            note = {"key": key, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        write(f"{prefix}.json", lambda file: file.write(json.dumps(note).encode()))
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
            for i, name in enumerate(("train", "val", "test"))}


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
    return np.median(images[:, :, (radius >= 0.85) & (radius < 1)], axis=2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show a data set: counts and a contact sheet.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--out", default="runs/data.png", help="the contact sheet to write")
    arguments = parser.parse_args()
    import config   # only here: the module itself takes plain arguments

    def progress(done, total):
        if done % 500 == 0 or done == total:
            print(f"decoded {done} of {total}", file=sys.stderr)
    try:
        settings = config.load(arguments.config, arguments.set)
        splits = load(**vars(settings.data), progress=progress,
                      cache=os.path.splitext(arguments.out)[0])
    except ValueError as error:   # DataError and config's own error: one line, no traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
    class_by_group_sheet(splits["train"], title="train: class by group").save(arguments.out)
    print(counts_table(splits))
    print("share of test images whose lesion is also in train:", ", ".join(
        f"{name} {share:.0%}" for name, share in leaked_share(splits).items()))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
