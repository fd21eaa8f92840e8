"""What each data set's files look like: a folder on disk becomes one row an image, nothing decoded.

HAM10000: Tschandl, Rosendahl, Kittler, Sci. Data 5:180161 (2018), doi:10.7910/DVN/DBW86T.
ISIC 2018, task 3: Codella et al., arXiv 1902.03368. ISIC 2019: HAM10000 with BCN_20000 (Combalia
et al., arXiv 1908.02288) and MSK (Codella et al., arXiv 1710.05006).
Fitzpatrick17k: Groh et al., arXiv 2104.09957. DermaMNIST: Yang et al., Sci. Data 10:41 (2023);
corrected, DermaMNIST-C and -E: Abhishek, Jain, Hamarneh, Sci. Data 12:196 (2025)."""
import csv
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path

import numpy as np

from datasets.checks import ODD, DataError, folder_names

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
HAM_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
ISIC_COLUMNS = ("MEL", "NV", "BCC", "AK", "AKIEC", "BKL", "DF", "VASC", "SCC", "UNK")
# akiec, ak (actinic keratosis, Bowen's disease) count as malignant: carcinoma in situ, treated
MALIGNANT = ("ak", "akiec", "bcc", "mel", "scc")
PARTITIONS = ("three_partition_label", "nine_partition_label", "label")   # of Fitzpatrick17k
SKIN_TYPES = dict(zip("123456", ("I", "II", "III", "IV", "V", "VI")))
UNKNOWN = ("", "-1", "na", "nan", "none", "unknown")     # how files say that a value is not known
SPLITS = ("train", "val", "test")
NO_LESIONS = "which images show one lesion is unknown: every image counts as a lesion of its own"
BROKEN = (OSError, EOFError, ValueError, LookupError, TypeError, MemoryError, RuntimeError,
          zlib.error, zipfile.BadZipFile)                # what a damaged or foreign npz raises


def first_ten(problems: list[str]) -> str:
    """As many problems as one line can hold."""
    return "; ".join(problems[:10]) + "; ..." * (len(problems) > 10)


@dataclass
class Row:
    """One image: its id, and its class, lesion and group as they are written down."""
    image: str
    label: str
    lesion: str = ""        # "": the image is its own
    group: str = ""
    path: Path | None = None
    split: str = ""         # where the data set brings its own


@dataclass
class Listing:
    """What a data set says of its images: what can be decoded, and what is wrong with the rest."""
    rows: list[Row]
    class_names: tuple[str, ...]
    malignant: tuple[str, ...]
    notes: tuple[str, ...] = ()         # what was left out by rule
    pixels: Callable[[], Iterator[np.ndarray]] | None = None   # of rows, uint8 (H, W, 3), not files
    problems: list[tuple[str, list[str]]] = field(default_factory=list)   # text, images it concerns
    total: int = 0                      # rows before any was left out for a problem


def read(c) -> Listing:
    """The listing of the data set that `c`, the config's section data, describes; config.yaml has
    the keys. Raises DataError where no listing can be made at all."""
    group = "" if c.group == "ita" else c.group         # ita: from pixels
    given = Path(os.path.expanduser(c.root))            # of kind csv it may be the table itself
    root = given.parent if c.kind == "csv" and given.is_file() else given
    files, links = files_below(root)
    ham = "HAM10000_metadata.csv", "HAM10000_metadata"
    columns = (c.image_column, c.label_column, c.lesion_column, group)
    kinds = {"ham10000": lambda: Listing(table(the_file(files, *ham), "image_id", "dx", "lesion_id",
                                               group), HAM_CLASSES, MALIGNANT),
             "isic": lambda: isic(files, group),
             "fitzpatrick17k": lambda: fitzpatrick17k(files, c.label_column, group),
             "dermamnist": lambda: dermamnist(files, group),
             "folder": lambda: own_classes(folder(files, links, root), c.malignant),
             "csv": lambda: own_classes(table(
                 given if given.is_file() else the_file(files, "*.csv"), *columns), c.malignant)}
    listing = kinds[c.kind]()
    folder_names(listing.class_names)
    named = check(listing, files, root)
    passed = links + [path for path in files if path not in named and (
        path.suffix.lower() in SUFFIXES or path.relative_to(root).parts[0] in listing.class_names)]
    if passed:
        names = first_ten([repr(path.relative_to(root).as_posix()) for path in passed])
        listing.notes += (f"files and links that are passed over: {len(passed)}: {names}",)
    return listing


# ---------------------------------------------------------------------------- the kinds
def isic(files: list[Path], group: str) -> Listing:
    """ISIC*GroundTruth.csv (a column of 0 and 1 for each class) and the images in any folders;
    lesions and groups from ISIC*Metadata.csv (2019) and ISIC*LesionGroupings.csv (2018), where they
    are. Classes without an image, and UNK, which says what an image is not, are none."""
    truth, beside, rows = the_file(files, "ISIC*GroundTruth.csv"), {}, []
    for path in files:
        if fnmatch(path.name, "ISIC*Metadata.csv") or fnmatch(path.name, "ISIC*Groupings.csv"):
            for row in read_csv(path, ("image",)):
                beside.setdefault(row["image"], {}).update(row)
    columns = set().union(*beside.values())
    if group and group not in columns:
        raise DataError(f"data.group: no column {group!r} in an ISIC*Metadata.csv beside "
                        f"{truth.name}; found {', '.join(sorted(columns)) or 'no such file'}")
    for row in read_csv(truth, ("image",)):
        label = "+".join(c.lower() for c in ISIC_COLUMNS if row.get(c) in ("1", "1.0"))
        known = beside.get(row["image"], {})
        rows.append(Row(row["image"], label, known.get("lesion_id", ""), known.get(group, "")))
    found = {row.label for row in rows}
    names = tuple(c.lower() for c in ISIC_COLUMNS[:-1] if c.lower() in found)
    if len(names) < 2:
        raise DataError(f"{truth.name}: found images of {len(names)} classes; wanted columns of 0 "
                        f"and 1 such as {', '.join(ISIC_COLUMNS[:-1])}")
    return Listing(rows, names, MALIGNANT)


def fitzpatrick17k(files: list[Path], label: str, group: str) -> Listing:
    """fitzpatrick17k.csv and the images, <md5hash>.jpg in any folders; malignant are the classes of
    the three's "malignant". label: one of PARTITIONS: three, nine or 114 classes. Left out are rows
    that the dermatologists' check (`qc`) calls wrongly labelled."""
    if label not in PARTITIONS:
        raise DataError(f"data.label_column: {label!r}; write one of {', '.join(PARTITIONS)}")
    every = read_csv(the_file(files, "fitzpatrick17k.csv"), ("md5hash", *PARTITIONS, "qc", group))
    right = [row for row in every if "wrong" not in row["qc"].lower()]
    types = SKIN_TYPES if group.startswith("fitzpatrick_") else {}
    groups = [types.get(row.get(group), row.get(group, "")) for row in right]
    rows = [Row(row["md5hash"], row[label], group=known) for row, known in zip(right, groups)]
    sick = {row[label] for row in right if row["three_partition_label"] == "malignant"}
    names = tuple(sorted({row.label for row in rows} - {""}))
    note = f"rows left out that qc calls wrongly labelled: {len(every) - len(right)}"
    return Listing(rows, names, tuple(sick), (note,) * (len(every) > len(right)))


def dermamnist(files: list[Path], group: str) -> Listing:
    """dermamnist*.npz (28 to 224 pixels, the corrected C and E alike) with its own splits. Where
    the csv that it was made from lies beside it (DermaMNIST-C: image_id, lesion_id, dx, split and
    more; E: image, diag, split), its rows of a split are that split's images in order, and give
    ids, lesions and groups. Else every image is a lesion."""
    path = the_file(files, "dermamnist*.npz")
    names = dict(zip("0123456", HAM_CLASSES))
    rows = [Row(f"{split}-{i:06d}", names.get(str(label), str(label)), path=path, split=split)
            for split in SPLITS for i, label in enumerate(array(path, f"{split}_labels").ravel())]
    tables = [p for p in files if p.parent == path.parent and p.suffix == ".csv"]
    if tables:
        every = read_csv(the_file(tables, "*.csv"), ("split", group))
        told = [row for split in SPLITS for row in every if row["split"] == split]
        dx = [row.get("dx", row.get("diag")) for row in told]
        ids = [row.get("image_id", row.get("image")) for row in told]
        if dx != [row.label for row in rows] or len({*ids} - {"", None}) < len(rows):
            raise DataError(f"{tables[0].name}: its rows by split (columns image_id or image, dx "
                            f"or diag, split) are not the images of {path.name}, or an id stands "
                            "twice; put the csv of the same release there")
        for row, image, more in zip(rows, ids, told):
            row.image, row.lesion, row.group = image, more.get("lesion_id", ""), more.get(group, "")
    elif group:
        raise DataError(f"data.group: {group!r} needs the csv of the same release beside "
                        f"{path.name}; write ita, or \"\" for no groups")

    def pixels():
        for split in SPLITS:
            images, count = array(path, f"{split}_images"), sum(row.split == split for row in rows)
            if images.dtype != np.uint8 or images.shape != (count, *images.shape[1:3], 3):
                raise DataError(f"{path.name}: {split}_images: found {images.dtype} {images.shape},"
                                f" wanted uint8 ({count}, H, W, 3); replace the file")
            yield from images
    return Listing(rows, HAM_CLASSES, MALIGNANT, pixels=pixels)


def array(path: Path, name: str) -> np.ndarray:
    """One array of DermaMNIST's npz."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except BROKEN as error:
        raise DataError(f"{path.name}: {name} cannot be read ({error}); replace the file") from None


def folder(files: list[Path], links: list[Path], root: Path) -> list[Row]:
    """root/<class>/*, images of any of SUFFIXES. links: those that are not followed."""
    inside = [path.relative_to(root) for path in files if path.parent != root]
    rows = [Row(path.as_posix(), path.parts[0]) for path in inside
            if len(path.parts) == 2 and path.suffix.lower() in SUFFIXES]
    names = {row.label for row in rows}
    linked = {path.name for path in links if path.parent == root and path.is_dir()}
    if empty := {path.parts[0] for path in inside} - names | linked:
        raise DataError(f"data.root: {root}/{min(empty)} holds no {', '.join(SUFFIXES)} of its "
                        "own or is a link; put its images directly there or remove it")
    if len(names) < 2:
        raise DataError(f"data.root: {root} holds {len(names)} class folders with images; "
                        f"write root/<class>/* ({', '.join(SUFFIXES)}) for at least two classes")
    return rows


def own_classes(rows: list[Row], malignant) -> Listing:
    """The listing of rows with whatever classes they name, of which `malignant` are."""
    names = tuple(sorted({row.label for row in rows} - {""}))
    unknown = [f"{name!r} is no class" for name in sorted(set(malignant) - set(names))]
    if unknown or not 0 < len(set(malignant)) < len(names):
        raise DataError(f"data.malignant: {(unknown or [f'found {malignant!r}'])[0]}; write a list "
                        f"of some, not all, of {', '.join(names)}")
    return Listing(rows, names, tuple(malignant))


# ---------------------------------------------------------------------------- what they share
def files_below(root: Path, key: str = "data.root") -> tuple[list[Path], list[Path]]:
    """Every file below `root` but hidden ones, and the links that are not followed, each sorted by
    path: to folders and out of the root. What a data set lists never reads a file elsewhere."""
    if not root.is_dir():
        raise DataError(f"{key}: {str(root.absolute())!r} is not a folder; write the one that "
                        "holds the data")
    found, links, inside = [], [], root.resolve()
    for at, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        links += [Path(at, name) for name in subfolders if os.path.islink(os.path.join(at, name))]
        found += [Path(at, name) for name in names if not name.startswith(".")]
    links += [path for path in found if path.is_symlink() and not (
        path.is_file() and path.resolve().is_relative_to(inside))]
    return sorted(path for path in {*found} - {*links} if path.is_file()), sorted(links)


def the_file(files: list[Path], *patterns: str) -> Path:
    """The one file whose name matches."""
    found = [path for path in files if any(fnmatch(path.name, p) for p in patterns)]
    if len(found) != 1:
        names = ": " * bool(found) + ", ".join(path.name for path in found)
        raise DataError(f"data.root: {len(found) or 'no'} {' or '.join(patterns)} below it{names}; "
                        "there must be one")
    return found[0]


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a csv with a header, stripped; commas, semicolons or tabs. Raises DataError, also
    if one of `columns` is missing; "" is none, nor is the nameless one that some programs write."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:   # -sig: spreadsheets add a BOM
            header = file.readline()
            file.seek(0)
            cells = csv.reader(file, delimiter=max(",;\t", key=header.count), skipinitialspace=True)
            (_, names), *rows = [(cells.line_num, row) for row in cells if row] or [(1, [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path.name}: not a readable csv ({error}); write utf-8 text") from None
    names = [name.strip() for name in names]
    wrong = [f"no column {name}" for name in columns if name and name not in names]
    wrong += [f"two columns {name}" for name in names if name and names.count(name) > 1]
    if wrong or not rows:
        raise DataError(f"{path.name}: {wrong[0] if rows else 'no rows'}; its first line must name "
                        f"{', '.join(filter(None, columns))}, each once, found "
                        f"{header.strip()[:80]!r}")
    for line, row in rows:
        if len(row) > len(names):
            raise DataError(f"{path.name}, line {line}: {len(row)} fields, where the header names "
                            f"{len(names)}: quote a value that holds a separator")
    rows = [[value.strip() for value in row] for _, row in rows]
    return [{name: value[value.startswith(("'=", "'+", "'-", "'@")):]   # as run.csv_bytes writes it
             for name, value in zip_longest(names, row, fillvalue="") if name} for row in rows]


def table(path: Path, *columns: str) -> list[Row]:
    """A csv's rows; columns: what it calls a Row's image, label, lesion and group."""
    return [Row(*(row.get(name, "") for name in columns)) for row in read_csv(path, columns)]


def check(listing: Listing, files: list[Path], root: Path) -> set[Path]:
    """Find each row's file and list what is wrong; rows that cannot be decoded are taken out. An
    image id is the file's name, with or without suffix, in any folder, or its path below root.
    Returns the files named."""
    by_path, by_stem, members, good, named = {}, {}, {}, {}, set()
    for path in files:
        if path.suffix.lower() in SUFFIXES:
            by_path[path.relative_to(root).as_posix()] = [path]
            by_stem.setdefault(path.stem, []).append(path)
    listing.total, classes = len(listing.rows), listing.class_names
    if not any(row.lesion for row in listing.rows):
        listing.notes += (NO_LESIONS,)
    for row in listing.rows:
        if row.image and row.image not in by_path:      # ./a.jpg, b\\a.jpg, ~/root/a.jpg
            path = Path(os.path.expanduser(row.image.replace("\\", "/")))
            inside = path.is_relative_to(root.absolute())
            row.image = (path.relative_to(root.absolute()) if inside else path).as_posix()
        row.lesion = row.lesion or row.image
        members.setdefault(row.lesion, []).append(row)
    for row in listing.rows:
        image, label, family = row.image, row.label, members[row.lesion]
        name = image[:image.rfind(".")] if image.lower().endswith(SUFFIXES) else image
        twins = [row.path] if row.path else by_path.get(image) or by_stem.get(name, [])
        one = next((r for r in family if r.label in classes), row)
        named.update(twins)
        # a common re-pack holds every image in two folders; harmless while they are the same
        sizes = {path.stat().st_size for path in twins}
        listing.problems += [(text, [r.image for r in concerned]) for wrong, text, concerned in (
            (not image, "a row without an image id", [row]),
            (ODD.search(image), f"image {image!r} is too long, or holds what cannot be printed or "
                                "decoded: rename it", [row]),
            (label not in classes, f"image {image} has the class {label!r}: write one of "
                                   f"{', '.join(classes)}", [row]),
            (label != one.label, f"lesion {row.lesion} is {one.label} in {one.image} but {label} "
                                 f"in {image}", family),
            (image in good, f"image {image} stands twice: keep one row", []),
            (not twins, f"no {image} below the root: add it or drop its row", [row]),
            (len(sizes) > 1, f"{image} stands in {len(twins)} folders, not the same: keep one",
             [row])) if wrong][:1]
        if twins and image and image not in good:
            row.path, good[image] = twins[0], row
    # files come sorted, so that neither the csv's order nor the disk's changes a split
    listing.rows = [good[image] for image in (good if listing.pixels else sorted(good))]
    return named


def coded(values: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Group names and each value's index into them, (N,) int64, -1 for an unknown value. More than
    six different numbers, such as ages, become four bands of equal width, named by the least and
    the greatest value in them. Raises DataError for more than 20 groups."""
    known = np.array([value.lower() not in UNKNOWN for value in values], bool)
    texts, index = np.array(values, dtype=str)[known], np.full(len(values), -1)
    try:
        numbers = texts.astype(float)
    except ValueError:
        names, index[known] = np.unique(texts, return_inverse=True)
    else:
        bands = numbers
        if len(np.unique(numbers)) > 6:
            bands = np.digitize(numbers, np.linspace(numbers.min(), numbers.max(), 5)[1:-1])
        kept, index[known] = np.unique(bands, return_inverse=True)
        ends = [(numbers[bands == b].min(), numbers[bands == b].max()) for b in kept]
        names = [f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in ends]
    if len(names) > 20:
        raise DataError(f"data.group: {len(names)} groups, {names[0]}, {names[1]} and so on; "
                        "choose a column with at most 20 different values")
    return tuple(map(str, names)), index
