"""What the arrays of an image set and the names in a data set must be, each with its one line."""
import re
import unicodedata

import numpy as np

PER_IMAGE = {"images": "uint8", "labels": "int64", "groups": "int64", "lesions": "str",
             "folds": "int64", "sources": "str", "subtypes": "int64", "guessed": "bool"}
NAMES = ("class_names", "group_names", "malignant", "subtype_names")
ODD = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|.{300}")  # \ud800: bytes, not utf-8
# No path, and nothing that Windows, a run or its report has taken: a class names a folder in runs
UNFIT = re.compile(r"""\..*|.*[. ]|.*[/\\:*?"<>|].*|(con|prn|aux|nul|com\d|lpt\d)(\..*)?|all|"""
                   r"synthetic\.csv|.{80,}", re.I)


class DataError(ValueError):
    """One line: the file or key, what was found there, and what to write instead."""


def folder_names(names) -> None:
    """Raise DataError unless these classes can be folders side by side on any system."""
    taken = {}
    for name in names:
        twin = taken.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name or ODD.search(name) or UNFIT.fullmatch(name):
            why = "can name no folder" if twin == name else f"differs from {twin!r} in case alone"
            raise DataError(f"class {name!r} {why}: rename it, runs write synthetic/<class>/")


def checked(fields: dict) -> dict:
    """The fields of data.ImageSet: arrays read-only, names as tuples, what is None filled in.
    Raises DataError where a shape, dtype or range is wrong."""
    fields = fields | {name: tuple(fields[name]) for name in (*NAMES, "notes")}
    count, classes = len(fields["images"]), len(fields["class_names"])
    if len(fields["malignant"]) != classes:
        raise DataError(f"ImageSet: malignant has {len(fields['malignant'])} entries for {classes} "
                        "classes; give one bool a class")
    unknown = np.full(count, -1)
    missing = {"folds": unknown, "subtypes": unknown, "guessed": np.zeros(count, bool)}
    ends = {"labels": classes, "groups": len(fields["group_names"]), "folds": np.inf,
            "subtypes": len(fields["subtype_names"])}
    for name, wanted in PER_IMAGE.items():
        values = np.asarray(missing.get(name) if fields[name] is None else fields[name])
        found = "str" if values.dtype.kind == "U" else str(values.dtype)
        shape, fits = f"({count},)", values.shape == (count,)
        if name == "images":
            shape, fits = "(N, 3, H, W)", values.ndim == 4 and values.shape[1] == 3
        if not fits or found != wanted:
            raise DataError(f"ImageSet: {name} must be {wanted} {shape}; found {found} "
                            f"{values.shape}")
        low, end = 0 if name == "labels" else -1, ends.get(name)
        if end is not None and count and not low <= values.min() <= values.max() < end:
            raise DataError(f"ImageSet: {name} must lie in {low}..{end - 1}; found {values.min()}.."
                            f"{values.max()}")
        fields[name] = values.view()      # the lock is on our view: the caller's own stays writable
        fields[name].setflags(write=False)
    return fields


def alike(a, b) -> None:
    """Raise DataError unless two image sets can stand in one."""
    for name in NAMES:
        if getattr(a, name) != getattr(b, name):
            raise DataError(f"ImageSet.extend: {name} differ, {getattr(a, name)} and "
                            f"{getattr(b, name)}; map them to the same tuple first")
    if a.images.shape[1:] != b.images.shape[1:]:
        raise DataError(f"ImageSet.extend: images of {a.images.shape[2:]} and of "
                        f"{b.images.shape[2:]} pixels; load both with the same size")
