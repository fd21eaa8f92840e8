"""A data set on disk becomes plain arrays: pictures decoded to small squares, checked and cached.
layouts.py says which files, classes and lesions there are; here their pixels are read."""
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from datasets import layouts, skin
from datasets.layouts import DataError, Listing, Row

VERSION = 2     # part of the cache's key: raise it whenever `decode` gives other pixels
# No others, whatever a file is called: PostScript would start Ghostscript. JPEG reads MPO too.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
PIXELS = 2 ** 26        # of the largest image that is decoded, 8,192 a side: 0.8 GB of memory
Image.MAX_IMAGE_PIXELS = None       # Pillow's limit is higher, and it warns below that
# What Pillow raises for foreign, truncated, damaged and unsupported files
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, RuntimeError, ArithmeticError,
              LookupError, TypeError, MemoryError, struct.error)


def read(c, cache=None, progress=None) -> tuple[dict, dict, np.ndarray | None]:
    """All images of the data set that `c`, the config's section data, describes: the fields of
    data.ImageSet, and (N,) str, the data set's own splits, or None. Images with the very same
    pixels count as one lesion. Everything wrong with the data is raised in one DataError; with
    c.skip_bad the images that it concerns are left out, counted in notes."""
    listing = layouts.read(c)
    images, unreadable = decode_all(listing, c.size, cache, progress)
    problems = listing.problems + [(f"{image} cannot be decoded ({reason}): replace the file",
                                    [image]) for image, reason in unreadable]
    bad = {image for _, concerned in problems for image in concerned}
    twins = same_pixels(listing.rows, images, bad)
    torn = [same for same in twins if len({row.label for row in same}) > 1]
    problems += [(" and ".join(f"{row.image} ({row.label})" for row in same)
                  + " are the same picture: keep one", []) for same in torn]
    bad |= {row.image for same in torn for row in same}
    if problems and not c.skip_bad:
        shown = layouts.first_ten([text for text, _ in problems])
        raise DataError(f"{c.root}: {len(problems)} problem(s) in the data: {shown} (data.skip_bad:"
                        " true leaves out what they concern)")

    rows, notes = [row for row in listing.rows if row.image not in bad], list(listing.notes)
    if problems:
        images = images[[row.image not in bad for row in listing.rows]]
        notes.append(f"data.skip_bad left out {listing.total - len(rows)} of {listing.total} "
                     f"images for {len(problems)} problem(s) in the data")
    if not rows:
        raise DataError(f"{c.root}: not one image is left; {notes[-1]}")
    twins = [same for same in twins if same[0].image not in bad]
    if twins:
        notes.append("images that repeat another, pixel for pixel, and count as the same lesion: "
                     f"{sum(map(len, twins)) - len(twins)}")
    lesions = join_lesions(rows, twins)
    sides = np.array([row.split for row in rows]) if rows[0].split else None
    if sides is not None and c.split_by == "lesion":
        own, sides = sides, sides.copy()
        for name in reversed(layouts.SPLITS):       # a lesion in several goes to the first of them
            sides[np.isin(lesions, lesions[own == name])] = name
        if moved := (own != sides).sum():
            notes.append(f"images moved to the split where their lesion already stands: {moved}")
    group_names, groups = (skin.skin_tones(images) if c.group == "ita" else
                           layouts.coded([row.group for row in rows]))
    arrays = dict(images=images, groups=groups, lesions=lesions,
                  labels=np.array([listing.class_names.index(row.label) for row in rows]),
                  sources=np.array([row.image for row in rows]))
    names = dict(class_names=listing.class_names, group_names=group_names, notes=tuple(notes),
                 malignant=tuple(name in listing.malignant for name in listing.class_names))
    return arrays, names, sides


def same_pixels(rows: list[Row], images: np.ndarray, bad: set[str]) -> list[list[Row]]:
    """The rows, bad ones aside, that share their very pixels with others, together."""
    same = {}
    for row, image in zip(rows, images):
        if row.image not in bad:
            same.setdefault(hashlib.sha256(image.tobytes()).digest(), []).append(row)
    return [twins for twins in same.values() if len(twins) > 1]


def join_lesions(rows: list[Row], twins: list[list[Row]]) -> np.ndarray:
    """Each row's lesion, (N,); those that share a picture (see same_pixels) under one name."""
    joined = {row.lesion: {row.lesion} for row in rows}
    for same in twins:
        every = set().union(*(joined[row.lesion] for row in same))
        joined |= dict.fromkeys(every, every)
    return np.array([min(joined[row.lesion]) for row in rows])


def decode(source: Path | np.ndarray, size: int) -> np.ndarray:
    """One image, a file or (H, W, 3) uint8, as (3, size, size) uint8 RGB. Raises UNREADABLE.
    The central square is kept: squeezing the 4:3 frame would bend every outline. Lanczos keeps the
    fine lines of the pigment network better than a box; JPEGs are first reduced, while decoding, to
    no less than twice the size, which is several times faster. Turned as EXIF says."""
    with (Image.open(source, formats=FORMATS) if isinstance(source, Path)
          else Image.fromarray(source)) as image:
        if image.width * image.height > PIXELS:
            raise OSError(f"{image.width} x {image.height} pixels, over {PIXELS:,}; reduce it")
        image.draft("RGB", (2 * size, 2 * size))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            raise OSError(f"mode {image.mode} has more than 8 bits a channel")   # would clip white
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.convert("RGB").crop((left, top, left + side, top + side))
        return np.asarray(image.resize((size, size), Image.LANCZOS)).transpose(2, 0, 1)


def decode_all(listing: Listing, size: int, cache=None, progress=None) -> tuple[np.ndarray, list]:
    """The listing's images, uint8 (N, 3, size, size), 0 if unreadable, and why: [id, reason] each.
    cache: None, or <cache>.npz keeps both; rebuilt if damaged or of another key: size, and each
    file's id, bytes and time of modification. progress: called as progress(done, total) after each
    image decoded. Raises DataError if the cache cannot be written."""
    path, images = Path(f"{cache}.npz"), np.zeros((len(listing.rows), 3, size, size), np.uint8)
    files = [(row.image, row.path.stat()) for row in listing.rows]
    content = [VERSION, size, [(image, file.st_size, file.st_mtime_ns) for image, file in files]]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if cache and (kept := _read_cache(path, key)):
        return kept
    unreadable, sources = [], listing.pixels() if listing.pixels else [r.path for r in listing.rows]
    for i, (row, source) in enumerate(zip(listing.rows, sources)):
        try:
            images[i] = decode(source, size)
        except UNREADABLE as error:
            reason = str(error).replace(str(row.path), row.path.name) or type(error).__name__
            unreadable.append([row.image, reason])
        if progress:
            progress(i + 1, len(images))
    if cache:
        _write_cache(path, key=key, images=images, unreadable=json.dumps(unreadable))
    return images, unreadable


def _read_cache(path: Path, key: str):
    """What decode_all returns if the file is there, whole (zip's CRC-32) and of this key."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not arrays.zip.testzip() and arrays["key"] == key:
                return arrays["images"], json.loads(str(arrays["unreadable"]))
    except layouts.BROKEN:
        return None


def _write_cache(path: Path, **arrays) -> None:
    """Write the whole file or none of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.{os.getpid()}.tmp", "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        raise DataError(f"cache {path}: {error.strerror or error}; free the disk or choose "
                        "another folder") from None
    finally:        # our own after an error, and what killed processes left
        for left in path.parent.glob(f"{path.name}.*.tmp"):
            pid, told = left.suffixes[-2][1:], Path("/proc/self").exists()
            if pid == str(os.getpid()) or told and not Path("/proc", pid).exists():
                left.unlink(missing_ok=True)
