"""The images: one container, splits that keep a lesion on one side, folds, and which training
images become parents of synthetic ones. Numpy alone; every draw is from a seed.

What a data set's files look like, decoding and the phantom's drawing: datasets/.
"""
from dataclasses import dataclass, replace

import numpy as np

from datasets import checks, phantom
from datasets import images as files
from datasets.layouts import SPLITS, DataError

CHILDREN = 5        # at most of one parent


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images and all that the loop knows of each. Checked when made, then read-only;
    raises DataError if shapes, dtypes or ranges are wrong."""
    images: np.ndarray                  # uint8 (N, 3, H, W)
    labels: np.ndarray                  # int64 (N,), index into class_names
    groups: np.ndarray                  # skin type or another attribute, -1 unknown
    lesions: np.ndarray                 # str: the unit that never straddles a split
    folds: np.ndarray | None            # of cross-fitting, -1 none
    sources: np.ndarray                 # str: the image id; a synthetic image's parent's
    class_names: tuple[str, ...]
    group_names: tuple[str, ...]
    malignant: tuple[bool, ...]         # one a class
    subtypes: np.ndarray | None = None  # hidden, -1 unknown: no model is told
    subtype_names: tuple[str, ...] = ()
    guessed: np.ndarray | None = None   # bool: the label is a pseudo-label
    notes: tuple[str, ...] = ()         # what loading left out or found

    def __post_init__(self):
        for name, value in checks.checked(vars(self)).items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index) -> "ImageSet":
        """The images that `index` picks: (M,) int, in that order, or (N,) bool."""
        index = np.asarray(index)
        if index.size == 0 and index.dtype != bool:
            index = index.astype(np.int64)  # numpy makes an empty list float
        return replace(self, **{name: getattr(self, name)[index]
                                for name in checks.PER_IMAGE})

    def extend(self, other: "ImageSet") -> "ImageSet":
        """These images, then `other`'s. Raises DataError unless names and image size agree."""
        checks.alike(self, other)
        both = {name: [getattr(self, name), getattr(other, name)]
                for name in checks.PER_IMAGE}
        return replace(self, **{name: np.concatenate(pair)
                                for name, pair in both.items()})


# ---- loading ---------------------------------------------------------------------------------

def load(c, cache=None, progress=None) -> dict[str, ImageSet]:
    """The splits train (with folds), val and test of one data set. A data set's own are kept.
    c: the config's section `data`, explained in config.yaml. cache: path prefix of the decoded
    images; progress: called as progress(done, total). Raises DataError."""
    if c.kind == "phantom":
        splits = {name: load_phantom(c, name, getattr(c, name))
                  for name in SPLITS}
    else:
        splits = split_files(c, *load_files(c, cache, progress))
    train = add_folds(splits["train"], c.folds, c.seed)
    return {**splits, "train": train}


def load_phantom(c, name: str, count: int) -> ImageSet:
    """`count` images of one draw of the phantom: train, val, test or oracle."""
    arrays, names = phantom.collect(name, count, c.size, c.seed)
    return ImageSet(**arrays, **names, folds=None)


def load_files(c, cache=None, progress=None):
    """All images of a real data set, and (N,) the data set's own splits, or None."""
    arrays, names, sides = files.read(c, cache, progress)
    return ImageSet(**arrays, **names, folds=None), sides


# ---- splits and folds: no lesion on two sides ------------------------------------------------

def split_files(c, whole: ImageSet, sides) -> dict[str, ImageSet]:
    """Train, val and test of a real data set; sides: (N,) where it says so itself, or None.
    c.split_by: "lesion", or "image", the common mistake, to show what it leaks."""
    if sides is not None:
        return {name: whole.subset(sides == name) for name in SPLITS}
    units = whole.sources if c.split_by == "image" else whole.lesions
    return split_lesions(whole, c.val_fraction, c.test_fraction,
                         c.seed, units)


def lesions_by_class(whole: ImageSet, seed: int, purpose: int,
                     units: np.ndarray | None = None):
    """Each image's lesion number (N,), and per class its lesion numbers, shuffled.
    Lesions are sorted by id before the shuffle, and every (seed, purpose, class) has its own
    stream, so neither the order of files nor another class changes the result."""
    ids = whole.lesions if units is None else units
    labels = whole.labels
    _, first, lesion = np.unique(ids, return_index=True, return_inverse=True)
    label = labels[first]                       # of each lesion
    odd = np.flatnonzero(label[lesion] != labels)
    if odd.size:
        raise DataError(f"lesion {ids[odd[0]]} carries two labels")
    shuffled = []
    for y in range(len(whole.class_names)):
        rng = np.random.default_rng([seed, purpose, y])
        shuffled.append(rng.permutation(np.flatnonzero(label == y)))
    return lesion, shuffled


def split_lesions(whole: ImageSet, val_fraction: float,
                  test_fraction: float, seed: int,
                  units: np.ndarray | None = None) -> dict[str, ImageSet]:
    """Split by lesion (or by other units, (N,)), stratified by class: none stands on two sides.
    Of every class's lesions val_fraction go to val and test_fraction to test (rounded, at least
    one each), the rest to train. HAM10000 has up to 6 photographs of a lesion; splitting images at
    random instead would leave 35 % of the test images with a sister in train.
    Raises DataError if a class has too few lesions."""
    lesion, by_class = lesions_by_class(whole, seed, 0, units)
    side = np.empty(lesion.max(initial=-1) + 1, np.int64)       # 0, 1, 2 by lesion
    for name, members in zip(whole.class_names, by_class):
        count = len(members)
        val = max(1, int(val_fraction * count + 0.5))
        test = max(1, int(test_fraction * count + 0.5))
        if val + test >= count:
            raise DataError(f"class {name!r} has {count} lesion(s): too few for"
                            " train, val and test; add some or drop it")
        numbers = [val, test, count - val - test]
        side[members] = np.repeat([1, 2, 0], numbers)
    return {name: whole.subset(side[lesion] == i)
            for i, name in enumerate(SPLITS)}


def add_folds(train: ImageSet, folds: int, seed: int) -> ImageSet:
    """The same images with `folds` cross-fitting folds over lesions, stratified by class.
    Raises DataError if a class has fewer lesions than folds: some student would never see it."""
    if folds < 2:
        raise DataError(f"data.folds: {folds}; write 2 or more")
    lesion, by_class = lesions_by_class(train, seed, purpose=1)
    fold = np.empty(lesion.max(initial=-1) + 1, np.int64)       # by lesion
    start = 0       # a class goes on where the last one stopped: equal folds
    for name, members in zip(train.class_names, by_class):
        count = len(members)
        if count < folds:
            raise DataError(f"class {name!r} has {count} lesion(s) in train for"
                            f" {folds} folds; add some or use fewer folds")
        fold[members] = (start + np.arange(count)) % folds
        start += count
    return replace(train, folds=fold[lesion])


# ---- parents: which images, and the group each is carried to ---------------------------------

def margins(probs: np.ndarray, images: ImageSet) -> np.ndarray:
    """Probability of the true class less that of the best other: negative is wrong. (N,). 1 for a
    pseudo-label, which is never hard: what contradicts a guess may be right."""
    image = np.arange(len(images))
    own, others = probs[image, images.labels], probs.copy()     # (N,), (N, C)
    others[image, images.labels] = -1
    margin = own - others.max(1)
    return np.where(images.guessed, 1.0, margin)


def cells(images: ImageSet) -> np.ndarray:
    """The class x group cell of every image, a number: (N,) int64."""
    return images.labels * (len(images.group_names) + 1) + images.groups + 1


def by_turns(queues: list[np.ndarray], joined=None) -> np.ndarray:
    """The order in which the entries of the concatenated queues are served, by turns; queue i joins
    in after joined[i] turns (0 for all where none is given)."""
    turn = [np.arange(len(queue)) + (joined[i] if joined else 0)
            for i, queue in enumerate(queues)]
    return np.argsort(np.concatenate(turn), kind="stable")


def least_of_each(cells: list[np.ndarray], size: int, most: int):
    """(size,) counts: of every cell as many as the set with fewest of it has. Where that is over
    `most`, cells take turns. cells: each set's images by cell, (n,) in 0..size - 1."""
    counts = [np.bincount(of, minlength=size) for of in cells]
    turns = [np.full(n, cell) for cell, n in enumerate(np.min(counts, 0))]
    chosen = np.concatenate(turns)[by_turns(turns)][:most]
    return np.bincount(chosen, minlength=size)


def hard_parents(pool: np.ndarray, images: ImageSet,
                 count: int, seed: int) -> np.ndarray:
    """`count` parents, or as many as there are, among the images at the indices `pool`.
    The cells take turns, so that a cell with few hard cases gives as many parents as one with many;
    within a cell all are taken before any again, none more than CHILDREN times."""
    rng, cell = np.random.default_rng(seed), cells(images)[pool]
    queues = []
    for one in rng.permutation(np.unique(cell)):
        members = rng.permutation(pool[cell == one])            # all, before any again
        queues.append(np.tile(members, CHILDREN))
    return np.concatenate(queues)[by_turns(queues)][:count]


def matched(kinds: np.ndarray, chosen: np.ndarray, seed: int) -> np.ndarray:
    """For every parent in `chosen` a random one of its kind, repeated as often: no mining,
    the same cells. kinds: (N,) of all images."""
    rng, swap = np.random.default_rng(seed), {}
    for kind in np.unique(kinds[chosen]):
        distinct = np.unique(chosen[kinds[chosen] == kind])
        others = np.flatnonzero(kinds == kind)      # itself among them
        swap |= zip(distinct, rng.choice(others, len(distinct), False))
    return np.array([swap[i] for i in chosen])


def other_groups(parents: ImageSet, seed: int) -> np.ndarray:
    """The group each parent is carried to: any but its own, all alike; -1 without groups."""
    groups, rng = len(parents.group_names), np.random.default_rng(seed)
    if groups < 2:
        return np.full(len(parents.groups), -1)
    known = parents.groups >= 0                     # else any group will do
    other = rng.integers(0, np.where(known, groups - 1, groups))
    return other + (known & (other >= parents.groups))
