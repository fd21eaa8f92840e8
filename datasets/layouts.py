"""What each data set's files look like: a folder on disk becomes one row an image, nothing decoded.

HAM10000: Tschandl, Rosendahl, Kittler, Sci. Data 5:180161 (2018), doi:10.7910/DVN/DBW86T.
ISIC 2018, task 3: Codella et al., arXiv 1902.03368. ISIC 2019: HAM10000 with BCN_20000 (Combalia
et al., arXiv 1908.02288) and MSK (Codella et al., arXiv 1710.05006).
Fitzpatrick17k: Groh et al., arXiv 2104.09957. DermaMNIST: Yang et al., Sci. Data 10:41 (2023);
corrected, DermaMNIST-C and -E: Abhishek, Jain, Hamarneh, Sci. Data 12:196 (2025).
"""
import csv
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png")
HAM_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
ISIC_COLUMNS = ("MEL", "NV", "BCC", "AK", "AKIEC", "BKL", "DF", "VASC", "SCC", "UNK")
# akiec, ak (actinic keratosis, Bowen's disease) count as malignant: carcinoma in situ, treated
MALIGNANT = ("ak", "akiec", "bcc", "mel", "scc")
PARTITIONS = ("three_partition_label", "nine_partition_label", "label")   # of Fitzpatrick17k
SKIN_TYPES = dict(zip("123456", ("I", "II", "III", "IV", "V", "VI")))
UNKNOWN = ("", "-1", "na", "nan", "none", "unknown")     # how files say that a value is not known
SPLITS = ("train", "val", "test")
BROKEN = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, zlib.error,
          zipfile.BadZipFile)                            # what a damaged or foreign npz raises


class DataError(ValueError):
    """One line: the file or key, what was found there, and what to write instead."""


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
    """What a data set says of its images: what can be decoded, and what is wrong with the rest.

    problems: (one line, ids of the images it concerns) each; total: rows before anything was left
    out on their account; notes: what was left out by rule, or found out; pixels: where the images
    are not files, a function that gives them one by one, uint8 (H, W, 3), in the order of rows.
    """
    rows: list[Row]
    class_names: tuple[str, ...]
    malignant: tuple[str, ...]
    notes: tuple[str, ...] = ()
    pixels: Callable[[], Iterator[np.ndarray]] | None = None
    problems: list[tuple[str, list[str]]] = field(default_factory=list)
    total: int = 0


def read(kind: str, root, malignant, image_column: str, label_column: str, lesion_column: str,
         group: str) -> Listing:
    """The listing of the data set of this kind below `root`.

    kind: "ham10000", "isic" (2019, or 2018 task 3), "fitzpatrick17k", "dermamnist", "folder" or
    "csv". malignant: names of malignant classes, for folder and csv; the others know theirs. The
    columns: see config.yaml. group: the column that names each image's group, or "".
    Raises DataError where no listing can be made at all.
    """
    files = files_below(root)
    if kind == "ham10000":
        listing = ham10000(files, group)
    elif kind == "isic":
        listing = isic(files, group)
    elif kind == "fitzpatrick17k":
        listing = fitzpatrick17k(files, label_column, group)
    elif kind == "dermamnist":
        listing = dermamnist(files, group)
    elif kind in ("folder", "csv"):
        if kind == "folder":
            rows = folder(files, root)
        else:
            table = the_file(files, "*.csv")
            columns = (image_column, label_column, lesion_column, group)
            rows = [Row(*(row.get(column, "") for column in columns))
                    for row in read_csv(table, columns)]
        names = tuple(sorted({row.label for row in rows} - {""}))
        unknown = sorted(set(malignant) - set(names))
        if unknown or not 0 < len(set(malignant)) < len(names):
            what = f"{unknown[0]!r} is no class" if unknown else f"found {malignant!r}"
            raise DataError(f"data.malignant: {what}; write a list of some, not all, of the "
                            f"classes found: {', '.join(names)}")
        listing = Listing(rows, names, tuple(malignant))
    else:
        raise DataError(f"data.kind: {kind!r} is unknown; write phantom, ham10000, isic, "
                        "fitzpatrick17k, dermamnist, folder or csv")
    check(listing, files, Path(root))
    return listing


# ---------------------------------------------------------------------------- the kinds

def ham10000(files: list[Path], group: str) -> Listing:
    """HAM10000_metadata[.csv] and the images in any folders."""
    table = the_file(files, "HAM10000_metadata.csv", "HAM10000_metadata")
    rows = [Row(row["image_id"], row["dx"], row["lesion_id"], row.get(group, ""))
            for row in read_csv(table, ("image_id", "dx", "lesion_id", group))]
    return Listing(rows, HAM_CLASSES, MALIGNANT)


def isic(files: list[Path], group: str) -> Listing:
    """ISIC*GroundTruth.csv (a column of 0 and 1 for each class) and the images in any folders.

    Lesions and groups come from ISIC*Metadata.csv (2019) and ISIC*LesionGroupings.csv (2018) where
    they are there. Classes without an image, and UNK, which says what an image is not, are none.
    """
    table, beside = the_file(files, "ISIC*GroundTruth.csv"), {}
    truth = read_csv(table, ("image",))
    for path in files:
        if fnmatch(path.name, "ISIC*Metadata.csv") or fnmatch(path.name, "ISIC*Groupings.csv"):
            for row in read_csv(path, ("image",)):
                beside.setdefault(row["image"], {}).update(row)
    columns = set().union(*beside.values())
    if group and group not in columns:
        raise DataError(f"data.group: no column {group!r} in an ISIC*Metadata.csv beside "
                        f"{table.name}; found {', '.join(sorted(columns)) or 'no such file'}")
    rows = []
    for row in truth:
        label = "+".join(c.lower() for c in ISIC_COLUMNS if row.get(c) in ("1", "1.0"))
        known = beside.get(row["image"], {})
        rows.append(Row(row["image"], label, known.get("lesion_id", ""), known.get(group, "")))
    found = {row.label for row in rows}
    names = tuple(c.lower() for c in ISIC_COLUMNS[:-1] if c.lower() in found)
    if len(names) < 2:
        raise DataError(f"{table.name}: found images of {len(names)} classes; wanted columns of 0 "
                        f"and 1 such as {', '.join(ISIC_COLUMNS[:-1])}")
    return Listing(rows, names, MALIGNANT)


def fitzpatrick17k(files: list[Path], label: str, group: str) -> Listing:
    """fitzpatrick17k.csv and the images, <md5hash>.jpg in any folders.

    label: one of PARTITIONS: three, nine or 114 classes; malignant are those of the three's
    partition "malignant". Rows that the dermatologists' check (`qc`) calls wrongly labelled are
    left out. Fitzpatrick types are written I to VI.
    """
    if label not in PARTITIONS:
        raise DataError(f"data.label_column: {label!r}; write one of {', '.join(PARTITIONS)}")
    table = read_csv(the_file(files, "fitzpatrick17k.csv"),
                     ("md5hash", *PARTITIONS, "qc", group))
    right = [row for row in table if "wrong" not in row["qc"].lower()]
    rows = [Row(row["md5hash"], row[label], group=row.get(group, "")) for row in right]
    if group.startswith("fitzpatrick_"):
        for row in rows:
            row.group = SKIN_TYPES.get(row.group, "")
    sick = {row[label] for row in right if row["three_partition_label"] == "malignant"}
    names = tuple(sorted({row.label for row in rows} - {""}))
    wrong = len(table) - len(right)
    return Listing(rows, names, tuple(sick),
                   (f"rows left out that qc calls wrongly labelled: {wrong}",) if wrong else ())


def dermamnist(files: list[Path], group: str) -> Listing:
    """dermamnist*.npz (28 to 224 pixels, the corrected C and E alike) with its own splits.

    Where the csv that it was made from lies beside it (DermaMNIST-C: image_id, lesion_id, dx,
    split and more; E: image, diag, split), its rows of a split are that split's images in order,
    and give the ids, the lesions where it has them, and the groups. Else every image is a lesion.
    """
    path = the_file(files, "dermamnist*.npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = {split: arrays[f"{split}_labels"].reshape(-1) for split in SPLITS}
        rows = [Row(f"{split}-{i:06d}", HAM_CLASSES[label], path=path, split=split)
                for split in SPLITS for i, label in enumerate(labels[split])]
    except BROKEN as error:
        raise DataError(f"{path.name}: no DermaMNIST file ({error}); wanted train_images uint8 "
                        "(N, H, W, 3), train_labels 0 to 6, and so for val and test") from None
    tables = [p for p in files if p.parent == path.parent and p.suffix == ".csv"]
    if tables:
        table = read_csv(the_file(tables, "*.csv"), ("split", group))
        told = [row for split in SPLITS for row in table if row["split"] == split]
        dx = [row.get("dx", row.get("diag")) for row in told]
        ids = [row.get("image_id", row.get("image")) for row in told]
        if dx != [row.label for row in rows] or len({*ids} - {"", None}) < len(rows):
            raise DataError(f"{tables[0].name}: its rows by split (columns image_id or image, dx "
                            f"or diag, split) are not the images of {path.name}, or an id stands "
                            "twice; put the csv of the same release there")
        for row, image, known in zip(rows, ids, told):
            row.image, row.lesion = image, known.get("lesion_id", "")
            row.group = known.get(group, "")
    elif group:
        raise DataError(f"data.group: {group!r} needs the csv of the same release beside "
                        f"{path.name}; write ita, or \"\" for no groups")
    return Listing(rows, HAM_CLASSES, MALIGNANT, pixels=lambda: (
        image for split in SPLITS
        for image in stream(path, f"{split}_images", len(labels[split]))))


def stream(path: Path, name: str, count: int) -> Iterator[np.ndarray]:
    """The images of one array of an npz one by one: at 224 pixels the whole is over a gigabyte."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            np.lib.format.read_magic(file)
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8 or by_column or shape != (count, *shape[1:3], 3):
                raise ValueError(f"found {dtype} {shape}, wanted uint8 ({count}, H, W, 3)")
            for _ in range(count):
                yield np.frombuffer(file.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
    except BROKEN as error:
        raise DataError(f"{path.name}: {name} cannot be read ({error}); replace the file") from None


def folder(files: list[Path], root) -> list[Row]:
    """root/<class>/*.jpg, .jpeg or .png."""
    rows, folders = [], set()
    for path in files:
        parts = path.relative_to(root).parts
        folders |= {parts[0]} if len(parts) > 1 else set()
        if len(parts) == 2 and path.suffix.lower() in SUFFIXES:
            rows.append(Row("/".join(parts), parts[0]))
    names = {row.label for row in rows}
    if len(names) < 2:
        raise DataError(f"data.root: {root} holds {len(names)} class folders with images; "
                        "write root/<class>/*.jpg, .jpeg or .png for at least two classes")
    if folders - names:
        raise DataError(f"data.root: {root}/{min(folders - names)} holds no .jpg, .jpeg or .png "
                        "of its own; put its images directly there or remove it")
    return rows


# ---------------------------------------------------------------------------- what they share

def files_below(root) -> list[Path]:
    """Every file below `root`, sorted by path. Left out: hidden ones, and links that lead out of
    the root: what a data set lists never reads a file elsewhere."""
    if not root or not os.path.isdir(root):
        raise DataError(f"data.root: {root!r} is not a folder; write the one that holds the data")
    found, inside = [], Path(root).resolve()
    for folder_name, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        found += [Path(folder_name, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file() and (
        not path.is_symlink() or path.resolve().is_relative_to(inside)))


def the_file(files: list[Path], *patterns: str) -> Path:
    """The one file whose name matches."""
    found = [path for path in files if any(fnmatch(path.name, p) for p in patterns)]
    if len(found) != 1:
        names = ": " + ", ".join(path.name for path in found) if found else ""
        raise DataError(f"data.root: {len(found) or 'no'} {' or '.join(patterns)} below it{names}; "
                        "there must be one")
    return found[0]


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a csv with a header, stripped; commas or tabs. Raises DataError, also if one of
    `columns` is missing ("" is none, nor is the nameless one that some programs write)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:   # -sig: spreadsheets add a BOM
            header = file.readline()
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter="\t" if "\t" in header else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path.name}: not a readable csv ({error}); write utf-8 text") from None
    columns = [name for name in columns if name]
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing or not rows:
        what = f"column {missing[0]}" if rows else "rows"
        raise DataError(f"{path.name}: no {what}; its first line must name {', '.join(columns)}, "
                        f"found {header.strip()[:80]!r}")
    return [{k: (v or "").strip() for k, v in row.items() if k} for row in rows]


def check(listing: Listing, files: list[Path], root: Path) -> None:
    """Find each row's file and list what is wrong; rows that cannot be decoded are taken out.

    An image id is the file's name, with or without suffix, in any folder, or its path below root.
    """
    by_path, by_stem, first_row, good = {}, {}, {}, {}
    for path in files:
        if path.suffix.lower() in SUFFIXES:
            by_path[path.relative_to(root).as_posix()] = [path]
            by_stem.setdefault(path.stem, []).append(path)
    listing.total = len(listing.rows)
    members = {}
    for row in listing.rows:
        members.setdefault(row.lesion or row.image, []).append(row.image)
    for row in listing.rows:
        row.lesion, image = row.lesion or row.image, row.image
        name = image[:image.rfind(".")] if image.lower().endswith(SUFFIXES) else image
        twins = [row.path] if row.path else by_path.get(image) or by_stem.get(name, [])
        told = (image, row.label)
        if row.label in listing.class_names:
            told = first_row.setdefault(row.lesion, told)
        problem, concerned = None, [image]
        if not image:
            problem = "a row without an image id"
        elif row.label not in listing.class_names:
            problem = (f"image {image} has the class {row.label!r}: write one of "
                       f"{', '.join(listing.class_names)}")
        elif row.label != told[1]:
            problem = f"lesion {row.lesion} is {told[1]} in {told[0]} but {row.label} in {image}"
            concerned = members[row.lesion]
        elif image in good:
            problem, concerned = f"image {image} stands twice: keep one row", []
        elif not twins:
            problem = f"no {image} below the root: add it or drop its row"
        # a common re-pack holds every image in two folders; harmless while they are the same
        elif len({path.stat().st_size for path in twins}) > 1:
            problem = f"{image} stands in {len(twins)} folders, not the same: keep one"
        if problem:
            listing.problems.append((problem, concerned))
        if twins and image and image not in good:
            row.path = twins[0]
            good[image] = row
    # files come sorted, so that neither the csv's order nor the disk's changes a split
    listing.rows = [good[image] for image in (good if listing.pixels else sorted(good))]


def coded(values: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Group names and each value's index into them, (N,) int64, -1 for an unknown value.

    More than six different numbers, such as ages, become four bands of equal width, named by the
    least and the greatest value in them. Raises DataError for more than 20 groups.
    """
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
