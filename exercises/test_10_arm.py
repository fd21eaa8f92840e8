"""Marks exercise 10."""
import ex_10_arm
import numpy as np
import pytest
from ex_09_leak import IMAGES

import evaluate

ARMS = "real", "mirror", "guided"


def claimed(mine, seed, gain=0.0):
    """Whether guided comes out better than every other arm; gain: to its true class's logit."""
    rng, n = np.random.default_rng(seed), 240
    p = {"arms": np.array(ARMS), "seeds": np.arange(3), "optimistic": np.zeros(3, bool),
         "class_names": np.array(["nv", "bkl", "bcc", "mel"]), "group_names": np.array([], str),
         "malignant": np.array([False, False, True, True])}
    for split in ("val", "test"):
        labels = rng.integers(0, 4, n)
        probs = mine.null_probs(labels, (*ARMS, "nobody"), 3, rng)
        probs["guided"] = probs["guided"] * np.exp(gain * np.eye(4)[labels])
        p |= {f"{split}_probs_{arm}": probs[arm] for arm in ARMS}
        p |= {f"{split}_reference": probs["nobody"], f"{split}_labels": labels,
              f"{split}_lesions": np.arange(n).astype(str), f"{split}_groups": np.full(n, -1)}
    rows = evaluate.score(p, draws=100)["comparisons"]
    return all(row["outcome"] == "better" for row in rows if
               (row["arm"], row["metric"]) == ("guided", "balanced_accuracy"))


def check_the_arm(mine):
    targets = np.zeros(len(IMAGES), int)
    found = np.asarray(mine.mirrored(None, IMAGES, targets, {}).images)
    assert found.dtype == np.uint8 and found.shape == IMAGES.images.shape
    assert (found[:, :, 3, 2] == IMAGES.images[:, :, 3, 13]).all()
    assert (found[:, :, :, ::-1] == IMAGES.images).all()


def check_the_null_is_one(mine):
    labels = np.random.default_rng(0).integers(0, 4, 2000)
    probs = mine.null_probs(labels, ARMS, 3, np.random.default_rng(1))
    assert set(probs) == set(ARMS) and probs["mirror"].shape == (3, 2000, 4)
    assert np.allclose(probs["guided"].sum(-1), 1) and (probs["guided"] >= 0).all()
    right = {arm: probs[arm].argmax(-1) == labels for arm in ARMS}
    assert all(0.6 <= right[arm].mean() <= 0.9 for arm in ARMS)
    assert np.ptp([right[arm].mean() for arm in ARMS]) < 0.03       # equally good
    one, other = right["real"][0], right["guided"][0]               # hard for one, hard for others
    assert 0.2 < np.corrcoef(one, other)[0, 1] < 0.99


def check_the_verdict(mine):
    assert sum(claimed(mine, seed) for seed in range(12)) <= 1
    assert sum(claimed(mine, seed, gain=1.5) for seed in range(6)) >= 5


@pytest.mark.parametrize("check", [check_the_arm, check_the_null_is_one, check_the_verdict])
def test_yours(check):
    check(ex_10_arm)
