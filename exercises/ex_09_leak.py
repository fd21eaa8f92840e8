"""Exercise 9: three planted leaks.

Difficulty 3/5 - Importance 5/5 - 40 minutes

A leak is test or held-out information that reaches what is being scored. It never raises an error;
it makes the numbers better. Below are three functions of a loop like ours, each with one planted.

Predict first: which of the three would you have seen in a review? Which would raise the reported
accuracy most on a data set where a quarter of the lesions were photographed twice?

Find each leak, then write the three tests at the end. A test is given a function and asserts what
an honest one keeps; IMAGES and CHILDREN are there to try it on. It has to be green on an honest
function, red on the one below, and red on another one, hidden, with a leak of the same kind that
is rarer or smaller: so test the property, not this bug. The hidden ones stand in the file that
marks: do not open it before. Your test is better than the marks if it also fails where only val and
test share a lesion, and where only the last fold leaks.

    python -m pytest exercises/test_09_leak.py

What you should see: 3 passed.
Where the answer stands: docs/running.md, "Where test could leak", and
exercises/solutions/ex_09_leak.py.
"""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

import data

# 200 pictures of 160 or so lesions in 3 folds, and a child of each on the next skin type. A child
# keeps its parent's label, lesion, source and fold.
IMAGES = data.add_folds(data.load_phantom(SimpleNamespace(size=16, seed=0), "train", 200), 3, 0)
CHILDREN = replace(IMAGES, groups=(IMAGES.groups + 1) % 6)


def split(images, seed):
    """{"train", "val", "test"}: no lesion stands in two of them."""
    order = np.random.default_rng(seed).permutation(len(images))
    val, test = len(order) * 15 // 100, len(order) * 20 // 100
    return {"val": images.subset(order[:val]), "test": images.subset(order[val:val + test]),
            "train": images.subset(order[val + test:])}


def learns_from(train, synthetic, k):
    """What student k, who will be asked about fold k, learns from: images and children."""
    return train.subset(train.folds != k).extend(synthetic)


def threshold(val_scores, test_scores):
    """The score above which a lesion is called malignant: nine in ten benign ones lie below.
    val_scores, test_scores: of the benign images, (N,) and (M,)."""
    return np.quantile(np.concatenate([val_scores, test_scores]), 0.9)


def test_split(split):
    """Assert that split(images, seed) keeps every lesion on one side."""
    raise NotImplementedError


def test_learns_from(learns_from):
    """Assert that learns_from(train, synthetic, k) holds nothing of fold k."""
    raise NotImplementedError


def test_threshold(threshold):
    """Assert that threshold(val_scores, test_scores) does not look at test."""
    raise NotImplementedError
