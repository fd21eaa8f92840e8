"""Few labels among many images: hidden classes, pseudo-labels, and parents for the rarest cells."""
import json
from dataclasses import replace

import numpy as np

from classifier import balanced_weights
from data import CHILDREN, ImageSet, add_folds, by_turns, lesions_by_class

TEACHERS, SURE = 4, 0.8     # students that vote on an unlabelled image's class; least probability
GUESSED = 0.6               # weight of the pseudo-labelled images beside those with a label


def hide(c, splits: dict) -> dict:
    """A smaller "train", and "unlabelled", if c.labelled < 1 (c: the config's section data): that
    share of each class's lesions, at least c.folds, stays. The others' labels are for counts."""
    if c.labelled == 1:
        return {}
    train = splits["train"]
    lesion, by_class = lesions_by_class(train, c.seed, purpose=2)
    kept = [members[:max(c.folds, round(c.labelled * len(members)))] for members in by_class]
    known = np.isin(lesion, np.concatenate(kept))
    return {"train": add_folds(train.subset(known), c.folds, c.seed),
            "unlabelled": replace(train.subset(~known), folds=np.full((~known).sum(), -1))}


def guess(run, splits: dict, jitter: float, student, predict, mixed, sure: float = SURE):
    """(train, seen, what happened): students of the labels vote on the lesions without one. Those
    they are sure of join train, as guessed; seen holds all, for the generator and the filter."""
    train = splits["train"]
    if "unlabelled" not in splits:
        return train, train, {}
    rest = splits["unlabelled"]
    teachers = run.shared(lambda s: student(
        run, f"teacher_{s}", *mixed(run, train), run.seed("teacher", s), jitter), range(TEACHERS))
    votes = np.mean([predict(run, teacher, rest.images) for teacher in teachers], axis=0)
    lesion = np.unique(rest.lesions, return_inverse=True)[1]     # each has one class and one fold
    votes = np.array([np.bincount(lesion, of) / np.bincount(lesion) for of in votes.T]).T[lesion]
    guessed = replace(rest, labels=votes.argmax(1), folds=lesion % run.config.data.folds,
                      guessed=np.ones(len(rest), bool))
    certain, right = votes.max(1) > sure, guessed.labels == rest.labels
    told = {"labels": len(train), "pseudo_labels": int(certain.sum()),
            "right": float(right[certain].mean()) if certain.any() else None,
            "unsure": int((~certain).sum())}
    print(json.dumps(told), flush=True)
    train = train.extend(guessed.subset(certain))
    return train, train.extend(guessed.subset(~certain)), told


def weights(train: ImageSet) -> np.ndarray:
    """How often each image is drawn, (N,), sum 1: GUESSED of a batch is pseudo-labelled."""
    found = np.zeros(len(train))
    for part, share in ((train.guessed, GUESSED), (~train.guessed, 1 - GUESSED)):
        found[part] = share * balanced_weights(train.labels[part])
    return found


def even_parents(images: ImageSet, synthetic: ImageSet | None, count: int,
                 seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` parents and the group to carry each to: the cell with fewest images by then, those of
    `synthetic` included. A parent is of that class and another group, and goes to no cell twice.
    Without two groups, classes even out; a parent has CHILDREN variations."""
    rng, queues, targets, taken = np.random.default_rng(seed), [], [], []
    groups = range(len(images.group_names)) if len(images.group_names) > 1 else [-1]
    known = [images] if synthetic is None else [images, synthetic]
    for y in rng.permutation(len(images.class_names)):
        for g in rng.permutation(groups):
            pool = np.flatnonzero((images.labels == y) & ((images.groups != g) | (g < 0)))
            queues.append(np.tile(rng.permutation(pool), CHILDREN if g < 0 else 1))
            targets.append(np.full(len(queues[-1]), g))
            taken.append(sum(((s.labels == y) & ((s.groups == g) | (g < 0))).sum() for s in known))
    order = by_turns(queues, taken)[:count]
    return np.concatenate(queues)[order], np.concatenate(targets)[order]
