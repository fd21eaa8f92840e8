"""Further measures: what a report says beyond evaluate.py, and how good generated images are.

N images, C classes, R seeds; weights (N, D) and tables (R, D) as in evaluate.py. Sources: Hardt et
al. 2016 (equal opportunity), Heusel et al. 2017, Kynkaanniemi et al. 2019 (precision, recall)."""
import itertools
import json
import math

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

import data
from evaluate import auroc, interval, lesion_weights, score, share
from extras.verdict import verdict

SAME = 4.0      # grey levels (see `nearest`): storing anew makes up to 3.3, another lesion 7.5
THRESHOLDS = {"sensitivity_at_90": 0.90, "sensitivity_at_95": 0.95}     # name: specificity on val


def check_predictions(p: dict) -> None:
    """Raise ValueError naming the key that predictions.npz lacks, or that does not fit."""
    def need(key, *shape):
        if key not in p:
            raise ValueError(f"predictions.npz has no {key!r}")
        if shape and p[key].shape != shape:
            raise ValueError(f"predictions.npz: {key} is {p[key].shape}, expected {shape}")
        return p[key]
    seeds, classes, arms, *_ = [len(need(key)) for key in (
        "seeds", "class_names", "arms", "group_names", "subtype_names")]
    need("malignant", classes)
    need("optimistic", arms)
    for split in ("val", "test"):
        n = len(need(f"{split}_labels"))
        if not n or not np.isin(p[f"{split}_labels"], range(classes)).all():
            raise ValueError(f"predictions.npz: {split}_labels must be some, in 0..{classes - 1}")
        for key in ("groups", "subtypes", "lesions"):
            need(f"{split}_{key}", n)
        need(f"{split}_reference", len(need(f"{split}_reference")), n, classes)
        for key in ("reference", *(f"probs_{arm}" for arm in p["arms"])):
            probs = need(f"{split}_{key}", *[seeds, n, classes] * (key != "reference"))
            if not (probs >= 0).all() or (abs(probs.sum(-1) - 1) > 1e-3).any():  # 1e-3: float16
                raise ValueError(f"predictions.npz: {split}_{key} must be finite, not negative, "
                                 "and sum to 1 in every row")


def threshold_at_specificity(p_malignant, is_malignant, specificity: float) -> float:
    """The lowest t for which "p > t is malignant" spares at least that share of the benign images.
    p_malignant, is_malignant: (N,), of val, to be applied to test. nan without a benign image."""
    benign = np.sort(p_malignant[~is_malignant])
    rank = max(math.ceil(specificity * len(benign) - 1e-9), 1)
    return float(benign[rank - 1]) if len(benign) else math.nan


def gap(tables: list) -> np.ndarray:
    """The largest rate of a group less the smallest (R, D), of each group's table, nan if it is too
    small. Of sensitivities: equal opportunity. Some of a gap is the chance of few lesions:
    intervals cover a clear gap in 90 to 97 %, but seldom the gap 0."""
    known = [t for t in tables if np.isfinite(t[:, 0]).all()]
    return np.ptp(known, axis=0) if len(known) > 1 else tables[0] * np.nan


@np.errstate(invalid="ignore")      # 0 / 0 is nan: nobody to count
def further(p: dict, arm: str, weights: np.ndarray, min_count: int) -> dict:
    """What `everything` says of an arm beyond evaluate.score, in the shape of results.json."""
    probs, labels, malignant = p[f"test_probs_{arm}"], p["test_labels"], p["malignant"]
    guess, sick, p_sick = probs.argmax(-1), malignant[labels], probs[..., malignant].sum(-1)
    right, told = guess == labels, malignant[guess] == sick

    def known(table, *cells):       # nan where one of the cells has too few lesions
        few = any(len(set(p["test_lesions"][of])) < min_count for of in cells)
        return table * np.nan if few else table

    def entry(table, *cells):
        return interval(known(table, *cells))

    def counted(of):
        return {"n": int(of.sum()), "recall": entry(share(right, of, weights), of)}

    classes, groups, subtypes = (
        {name: p[f"test_{key}"] == i for i, name in enumerate(p[f"{kind}_names"].tolist())}
        for kind, key in (("class", "labels"), ("group", "groups"), ("subtype", "subtypes")))
    p_val, ill = p[f"val_probs_{arm}"][..., malignant].sum(-1), malignant[p["val_labels"]]
    whole = {}
    for name, specificity in THRESHOLDS.items():
        cut = np.array([[threshold_at_specificity(one, ill, specificity)] for one in p_val])
        whole[name] = entry(share(p_sick > cut, sick, weights) + 0 * cut, sick)

    rates = [[known(share(told, of & side, weights), of & side) for of in groups.values()]
             for side in (sick, ~sick)]
    if groups:
        whole["equal_opportunity_gap"] = entry(gap(rates[0]))
    return {
        "whole": whole,
        "per_group": {name: {"n": int(of.sum()), "sensitivity": entry(a), "specificity": entry(b)}
                      for (name, of), a, b in zip(groups.items(), *rates)},
        "per_class": {name: counted(of) | {
            "auroc": entry(auroc(probs[..., c], of, weights), of, ~of)}
            for c, (name, of) in enumerate(classes.items())},
        "per_subtype": {name: counted(of) for name, of in subtypes.items()}}


def everything(predictions, *, min_count: int = 10, draws: int = 2000, margin: float = 1.0,
               seed: int = 0) -> dict:
    """evaluate.score of predictions.npz, or of a mapping like it, with the further measures merged
    in, rounded. Raises ValueError naming the key that is missing or does not fit."""
    p = dict(predictions)       # an open .npz decompresses at every access
    check_predictions(p)
    found = score(p, min_count=min_count, draws=draws, margin=margin, seed=seed)
    rng = np.random.default_rng(seed)           # the same draws again
    weights = lesion_weights(p["test_lesions"], draws, rng)
    for arm, entry in found["arms"].items():
        more = further(p, arm, weights, min_count)
        entry["test"]["all"] |= more.pop("whole")
        entry |= more
    return rounded(found | {"verdict": verdict(found)})


def rounded(value, digits: int = 6):
    """The same dictionaries and lists, as json holds them, with every float rounded."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), digits))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of two Gaussians fitted to features (n, D), (m, D). Heusel et al. 2017, Eq. 6.

        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^.5 S2 S1^.5)^.5)

    Biased upwards for small n: compare at equal n, m > D, below which S is singular."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    s1, s2 = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    size, axes = np.linalg.eigh(s1)
    root = axes * np.sqrt(np.maximum(size, 0)) @ axes.T
    product = np.linalg.eigvalsh(root @ s2 @ root)      # symmetric: no complex square root needed
    shared = np.sqrt(np.maximum(product, 0)).sum()
    return float(((a.mean(0) - b.mean(0))**2).sum() + np.trace(s1) + np.trace(s2) - 2 * shared)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rows of a (n, D) and b (m, D), float64: (n, m), by |a|^2 + |b|^2 - 2 a.b."""
    square = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(square, 0))


def precision_recall(real, fake, k: int = 3) -> tuple[float, float]:
    """Share of fakes (m, D) among the reals (n, D), of reals among the fakes: within some member's
    distance to its own k-th nearest fellow, so n, m > k. Kynkaanniemi et al. 2019, Eq. 2."""
    def covered(points, members):
        radius = np.partition(distances(members, members), k, axis=1)[:, k]     # 0 is itself
        return float((distances(points, members) <= radius).any(1).mean())
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    return covered(fake, real), covered(real, fake)


def nearest_distance(a, b, chunk: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """The distance of every row of a (n, ...) to the nearest of b (m, ...), and that one's index:
    (n,) float64 and int64."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), np.prod(np.shape(b)[1:])) for x in (a, b))
    index = np.concatenate([distances(a[i:i + chunk], b).argmin(1)
                            for i in range(0, max(1, len(a)), chunk)])
    # Measured again by subtraction: the product form loses the digits of near-copies.
    return np.sqrt(((a - b[index])**2).sum(1)), index


def thumbnails(images: np.ndarray, side: int = 16) -> np.ndarray:
    """uint8 (N, 3, S, S) averaged down to float32 (N, 3, side, side): near-copies differ in noise,
    not here. Scaled so that distances are root mean square grey levels."""
    x = torch.cat([adaptive_avg_pool2d(part.float(), side)
                   for part in torch.tensor(images).split(1000)])
    return x.numpy() / (3 * side * side) ** 0.5


def nearest(images: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance (N,) of images (N, 3, S, S) to the nearest known one in grey levels, in any of the 8
    ways to turn or mirror it (the generator learns from all of them), and which that is (N,)."""
    small, found = thumbnails(images), []
    for first in range(0, len(known), 10_000):                  # a block at a time: memory
        block = thumbnails(known[first:first + 10_000])
        for turns, way in itertools.product(range(4), (1, -1)):
            turned = np.rot90(small, turns, (2, 3))[..., ::way]
            distance, index = nearest_distance(turned, block)
            found.append((distance, first + index))
    distance, index = (np.stack(part) for part in zip(*found))
    best = distance.argmin(0), np.arange(len(images))
    return distance[best], index[best]


def copy_distance(unseen, seen) -> float:
    """Nearer to a seen image is a copy: nearly every unseen one, copies aside, is farther."""
    distance = nearest(unseen.images, seen.images)[0]
    distance = distance[distance > SAME]
    return float(np.quantile(distance, 0.01)) if len(distance) else SAME


def same_mixture(sets: list, seed: int) -> list[np.ndarray]:
    """Indices into each set so that all have as many images of every class x group cell; of every
    class alone if one knows no groups, as images made elsewhere may."""
    rng, grouped = np.random.default_rng(seed), all((s.groups >= 0).any() for s in sets)
    cells = [data.cells(s) if grouped else s.labels for s in sets]
    fewest = {cell: min((of == cell).sum() for of in cells) for cell in np.unique(cells[0])}
    return [np.concatenate([rng.permutation(np.flatnonzero(of == cell))[:n]
                            for cell, n in fewest.items()]).astype(int) for of in cells]


def generator_quality(features, votes, sets: dict, test, known: np.ndarray, seed: int, *,
                      oracle: bool = False) -> dict:
    """The "generator" of results.json: sets {name: ImageSet} beside as much of test (ImageSet).
    features(images) -> (n, D), votes(images) -> (n,): a critic's, whom no arm uses; oracle: they
    are the truth. "nearer": P(an image lies nearer to `known`, what was learnt from, than test)."""
    *chosen, index = same_mixture([*sets.values(), test], seed)
    real, found = features(test.images[index]), {}
    unseen = np.sort(nearest(test.images[index], known)[0])
    for (name, s), index in zip(sets.items(), chosen):
        row = found[name] = {"n": len(index)}
        if oracle and len(index):
            row["label_fidelity_oracle"] = float((votes(s.images[index]) == s.labels[index]).mean())
        distance = nearest(s.images[index], known)[0]
        ranks = [unseen.searchsorted(distance, side) for side in ("left", "right")]
        row["nearer"] = 1 - float(np.mean(ranks)) / len(unseen) if len(index) else None
        row |= dict.fromkeys(("frechet", "precision", "recall"))
        if len(index) > real.shape[1]:          # fewer say nothing: None
            own = features(s.images[index])
            row["frechet"] = frechet_distance(real, own)
            row["precision"], row["recall"] = precision_recall(real, own)
    return found
