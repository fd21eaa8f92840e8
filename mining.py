"""Which training images become parents of synthetic ones, and the skin type each is carried to.

`images` below is a set with labels (N,) int64, groups (N,) int64 with -1 for unknown, class_names
and group_names (data.ImageSet). A cell is a class x group. numpy alone; every draw is from a seed.
"""
from collections.abc import Sequence

import numpy as np

CHILDREN = 5        # at most of one parent: on the phantom, one for every other skin type


def margins(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probability of the true class less that of the best other: negative is wrong. (N,)."""
    own = probs[np.arange(len(labels)), labels]
    others = probs.copy()
    others[np.arange(len(labels)), labels] = -1
    return own - others.max(1)


def cells(images) -> np.ndarray:
    """The class x group cell of every image, a number."""
    return images.labels * (len(images.group_names) + 1) + images.groups + 1


def by_turns(lines: Sequence[np.ndarray], taken: Sequence[int] = ()) -> np.ndarray:
    """The order in which the entries of the concatenated lines are served, a line after the other
    by turns; line i joins in after taken[i] turns (0 for all where none is given)."""
    turn = [first + np.arange(len(line)) for line, first in zip(lines, taken or [0] * len(lines))]
    return np.argsort(np.concatenate(turn), kind="stable")


def from_each_cell(pool: np.ndarray, images, count: int, seed: int) -> np.ndarray:
    """`count` parents among the images at the indices `pool`, the hard ones.

    The cells take turns, so that a cell with few hard cases gives as many parents as one with many;
    within a cell all are taken before any again, none more than CHILDREN times. Fewer than `count`
    are returned where that is not enough.
    """
    rng, cell = np.random.default_rng(seed), cells(images)[pool]
    lines = [np.tile(rng.permutation(pool[cell == one]), CHILDREN)
             for one in rng.permutation(np.unique(cell))]
    return np.concatenate(lines)[by_turns(lines)][:count]


def even_out(images, synthetic, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` parents and the group to carry each to, evening out the cells.

    Each goes to the cell that has fewest images by then, those of the set `synthetic` (or None)
    included; its parent is of that class and of another group. No parent goes to one cell twice:
    that would be the same image again. Without two groups, classes even out, and a parent has
    CHILDREN variations.
    """
    rng, lines, targets, taken = np.random.default_rng(seed), [], [], []
    groups = range(len(images.group_names)) if len(images.group_names) > 1 else [-1]
    known = [images] if synthetic is None else [images, synthetic]
    for y in rng.permutation(len(images.class_names)):
        for g in rng.permutation(groups):
            pool = np.flatnonzero((images.labels == y) & ((images.groups != g) | (g < 0)))
            lines.append(np.tile(rng.permutation(pool), CHILDREN if g < 0 else 1))
            targets.append(np.full(len(lines[-1]), g))
            taken.append(sum(((s.labels == y) & ((s.groups == g) | (g < 0))).sum() for s in known))
    order = by_turns(lines, taken)[:count]
    return np.concatenate(lines)[order], np.concatenate(targets)[order]


def strangers(kinds: np.ndarray, chosen: np.ndarray, seed: int) -> np.ndarray:
    """For every parent in `chosen` a random one of its kind, repeated as often.

    kinds: (N,) of all images. Each distinct parent is exchanged for another image, so that what is
    made of them differs in nothing but the mining.
    """
    rng, swap = np.random.default_rng(seed), {}
    for kind in np.unique(kinds[chosen]):
        distinct = np.unique(chosen[kinds[chosen] == kind])
        swap |= zip(distinct, rng.choice(np.flatnonzero(kinds == kind), len(distinct), False))
    return np.array([swap[i] for i in chosen])


def other_groups(parents, seed: int) -> np.ndarray:
    """The group each parent is carried to: any but its own, all alike; -1 without groups."""
    groups, rng = len(parents.group_names), np.random.default_rng(seed)
    if groups < 2:
        return np.full(len(parents.groups), -1)
    known = parents.groups >= 0
    other = rng.integers(0, np.where(known, groups - 1, groups))
    return other + (known & (other >= parents.groups))
