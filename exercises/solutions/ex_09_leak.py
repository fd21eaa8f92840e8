"""A solution of exercise 9. The leaks: images are shuffled, not lesions; the children of fold k are
learnt from; the test set helps to choose the threshold."""
import numpy as np
from ex_09_leak import CHILDREN, IMAGES


def test_split(split):
    for seed in range(5):
        sides = [set(part.lesions) for part in split(IMAGES, seed).values()]
        assert len(set.union(*sides)) == sum(map(len, sides))


def test_learns_from(learns_from):
    for k in range(3):
        asked = IMAGES.lesions[IMAGES.folds == k]
        assert not np.isin(learns_from(IMAGES, CHILDREN, k).lesions, asked).any()


def test_threshold(threshold):
    val = np.linspace(0, 1, 50)
    others = [np.linspace(low, low + 1, 40) for low in (-9, -0.5, 0, 0.5, 9)]
    assert len({float(threshold(val, test)) for test in others}) == 1
