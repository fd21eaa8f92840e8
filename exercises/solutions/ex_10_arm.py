"""A solution of exercise 10."""
import numpy as np

from guidance import Drawn


def mirrored(kit, parents, targets, objectives):
    return Drawn(np.ascontiguousarray(parents.images[..., ::-1]))


def null_probs(labels, arms, seeds, rng):
    shared = 1.5 * np.eye(4)[labels] + rng.normal(size=(len(labels), 4))
    found = {}
    for arm in arms:
        logits = shared + 0.5 * rng.normal(size=(seeds, *shared.shape))
        odds = np.exp(logits)
        found[arm] = odds / odds.sum(-1, keepdims=True)
    return found
