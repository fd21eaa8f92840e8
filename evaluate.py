"""The numbers: metrics, paired statistics, the verdict, and the generator's quality.

    python evaluate.py runs/NAME     score a run again from its stored predictions; write its report
    python evaluate.py runs/NAME --on configs/other.yaml    its students on another data set

Numpy alone: pure functions of arrays that never read a model. N images, C classes, R seeds, D
bootstrap draws. A number whose cell holds fewer than `min_count` lesions is None ("n too small").

Sources: Guo et al. 2017 (calibration error), Efron & Tibshirani 1993 (bootstrap), Owen 2007
(resampling crossed factors), McNemar 1947, Holm 1979, Heusel et al. 2017 (Frechet distance),
Binkowski et al. 2018 (kernel distance), Kynkaanniemi et al. 2019 (precision and recall), Hardt et
al. 2016 (equal opportunity, equalised odds).
"""
import argparse
import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np

SHORT = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "auroc_malignant")
# what gets intervals and paired differences
COMPARED = SHORT + ("auroc", "auprc", "ece", "sensitivity_at_90", "sensitivity_at_95")
THRESHOLDS = {"sensitivity_at_90": 0.90, "sensitivity_at_95": 0.95}  # name: specificity on val


# ---- metrics of one student ------------------------------------------------------------------

def check_probs(probs: np.ndarray, labels: np.ndarray) -> None:
    """Raise ValueError unless probs (..., N, C) are distributions and labels (N,) lie in 0..C-1."""
    if probs.ndim < 2 or labels.shape != probs.shape[-2:-1]:
        raise ValueError(f"probabilities {probs.shape} do not fit labels {labels.shape}")
    if not np.isfinite(probs).all() or (probs < 0).any():
        raise ValueError("probabilities must be finite and not negative")
    if (abs(probs.sum(-1) - 1) > 1e-3).any():  # 1e-3: float32, or rows saved as float16
        raise ValueError("every row of probabilities must sum to 1")
    if labels.size and (labels.min() < 0 or labels.max() >= probs.shape[-1]):
        raise ValueError(f"labels must lie in 0..{probs.shape[-1] - 1}")


def cumulated(scores: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores from low to high, and below[k], the weight of the k lowest: (n,), (n + 1, D). Sorted
    once, whatever the number of draws D."""
    order = np.argsort(scores, kind="stable")
    below = np.zeros((len(order) + 1, counts.shape[1]))
    np.cumsum(counts[order], axis=0, out=below[1:])
    return scores[order], below


def auroc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None):
    """Area under the ROC curve: P(a positive scores higher than a negative), a tie counting half.

    scores: (N,); positive: (N,) bool; weights: (N, D) bootstrap counts, or None for one of each.
    Returns a float, or (D,) where weights are given; nan where either side is empty.
    """
    counts = np.ones((len(scores), 1)) if weights is None else weights
    negatives, below = cumulated(scores[~positive], counts[~positive])
    lower = below[np.searchsorted(negatives, scores[positive], "left")]
    upper = below[np.searchsorted(negatives, scores[positive], "right")]
    ours = counts[positive]
    with np.errstate(invalid="ignore"):
        area = (ours * (lower + upper)).sum(0) / 2 / (ours.sum(0) * below[-1])
    return float(area[0]) if weights is None else area


def auprc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None):
    """Average precision: the mean over positives of the precision at that positive's own score.

    The same as the sum over thresholds of (recall step) * precision, ties as one threshold.
    Arguments and result as in `auroc`; nan without positives.
    """
    counts = np.ones((len(scores), 1)) if weights is None else weights

    def at_least(which):    # weight of the images `which` that score as high as each positive
        known, below = cumulated(scores[which], counts[which])
        return below[-1] - below[np.searchsorted(known, scores[positive])]
    hits, ours = at_least(positive), counts[positive]
    taken = np.maximum(hits + at_least(~positive), 1)       # 0 only where the positive counts 0
    with np.errstate(invalid="ignore"):
        precision = (ours * hits / taken).sum(0) / ours.sum(0)
    return float(precision[0]) if weights is None else precision


def expected_calibration_error(probs: np.ndarray, labels: np.ndarray, bins: int = 15,
                               weights: np.ndarray | None = None):
    """Mean |accuracy - confidence| over equal bins of confidence. Guo et al. 2017, Eq. 3.

    probs: (N, C); labels: (N,); weights: (N, D) bootstrap counts, or None for one of each. Returns
    a float in 0..1, or (D,) where weights are given; bins are (low, high].
    """
    counts = np.ones((len(labels), 1)) if weights is None else weights
    confidence = probs.max(1).astype(np.float64)
    where = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)  # 0..bins-1
    gap = np.zeros((bins, len(labels)))
    gap[where, np.arange(len(labels))] = (probs.argmax(1) == labels) - confidence
    with np.errstate(invalid="ignore"):
        error = abs(gap @ counts).sum(0) / counts.sum(0)
    return float(error[0]) if weights is None else error


def threshold_at_specificity(p_malignant: np.ndarray, is_malignant: np.ndarray,
                             specificity: float) -> float | None:
    """The lowest t for which "p > t is malignant" spares at least that share of the benign images.

    p_malignant: (N,) in 0..1; is_malignant: (N,) bool. To be chosen on val, applied to test.
    Returns None where there is no benign image.
    """
    benign = np.sort(p_malignant[~is_malignant])
    if len(benign) == 0:
        return None
    return float(benign[max(math.ceil(specificity * len(benign) - 1e-9), 1) - 1])


def cell_sizes(labels: np.ndarray, malignant: np.ndarray, lesions: np.ndarray) -> dict[str, int]:
    """How many lesions stand behind each compared metric: all, the malignant, the benign."""
    sick = malignant[labels]
    n, n_sick, n_well = (len(np.unique(lesions[m])) for m in (sick | True, sick, ~sick))
    # A mean over classes is no better known than its rarest class that occurs.
    rarest = min((len(np.unique(lesions[labels == c])) for c in np.unique(labels)), default=0)
    return {"accuracy": n, "balanced_accuracy": rarest, "ece": n,
            "auroc": rarest, "auprc": rarest, "sensitivity": n_sick,
            "specificity": n_well, "auroc_malignant": min(n_sick, n_well),
            "sensitivity_at_90": n_sick, "sensitivity_at_95": n_sick}


def short_metrics(probs: np.ndarray, labels: np.ndarray, malignant: np.ndarray,
                  lesions: np.ndarray, min_count: int) -> dict:
    """n and the five metrics of SHORT of one subset; None where the cell is too small."""
    short = {"n": len(labels)} | dict.fromkeys(SHORT)
    if len(labels) == 0:
        return short
    enough = {name: size >= max(min_count, 1)
              for name, size in cell_sizes(labels, malignant, lesions).items()}
    table = {name: row[0, 0] for name, row in
             tables(probs[None], labels, malignant, [{}], np.ones((len(labels), 1))).items()}
    return short | {name: float(table[name]) for name in SHORT if enough[name]}


def metrics(probs: np.ndarray, labels: np.ndarray, *, malignant: np.ndarray, class_names,
            groups: np.ndarray, group_names, hard: np.ndarray | None = None,
            thresholds: dict | None = None, lesions: np.ndarray | None = None,
            min_count: int = 10) -> dict:
    """Every metric of one student on one split, ready for JSON.

    probs: (N, C), rows summing to 1; labels: (N,) int; malignant: (C,) bool; groups: (N,) int, -1
    unknown; hard: (N,) bool; thresholds: {"sensitivity_at_90": t, ...} as chosen on val; lesions:
    (N,) the unit that min_count counts (None: each image is its own).
    Sensitivity and specificity are malignant against benign, decided by whether the argmax class is
    malignant; auroc_malignant and sensitivity_at_* rank by P(malignant) = the sum over malignant
    classes. balanced_accuracy, auroc and auprc are means over the classes that have members.
    Returns None for a number whose cell has fewer than min_count lesions (n is always given).
    Raises ValueError for shapes that disagree, or probabilities that are none.
    """
    probs, labels, malignant = np.asarray(probs), np.asarray(labels), np.asarray(malignant, bool)
    lesions = np.arange(len(labels)) if lesions is None else np.asarray(lesions)
    if probs.shape != (len(labels), len(class_names)) or malignant.shape != probs.shape[1:]:
        raise ValueError(f"probabilities {probs.shape} do not fit {len(labels)} labels, "
                         f"{len(class_names)} class names, malignant {malignant.shape}")
    check_probs(probs, labels)
    for name, array in (("groups", groups), ("lesions", lesions), ("hard", hard)):
        if array is not None and np.shape(array) != labels.shape:
            raise ValueError(f"{name} {np.shape(array)} do not fit labels {labels.shape}")

    def short(mask):
        return short_metrics(probs[mask], labels[mask], malignant, lesions[mask], min_count)

    sizes = cell_sizes(labels, malignant, lesions)
    result = short(np.ones(len(labels), bool))
    per_class, areas, precisions = {}, [], []
    for c, name in enumerate(class_names):
        of = labels == c
        area, precision = auroc(probs[:, c], of), auprc(probs[:, c], of)
        n_of, n_rest = len(np.unique(lesions[of])), len(np.unique(lesions[~of]))
        enough = n_of >= max(min_count, 1)
        both = enough and n_rest >= max(min_count, 1)
        per_class[str(name)] = {
            "n": int(of.sum()),
            "recall": float((probs[of].argmax(1) == c).mean()) if enough else None,
            "auroc": area if both else None, "auprc": precision if both else None}
        if of.any() and not of.all():
            areas.append(area)
            precisions.append(precision)
    large = sizes["accuracy"] >= max(min_count, 1)
    known = sizes["auroc"] >= max(min_count, 1)
    result["auroc"] = float(np.mean(areas)) if known and areas else None
    result["auprc"] = float(np.mean(precisions)) if known and precisions else None
    result["ece"] = expected_calibration_error(probs, labels) if large else None
    p_malignant = probs[malignant[labels]][:, malignant].sum(1)
    for name in THRESHOLDS:
        threshold = (thresholds or {}).get(name)
        known = threshold is not None and sizes[name] >= max(min_count, 1)
        result[name] = float((p_malignant > threshold).mean()) if known else None
    result["per_class"] = per_class
    result["per_group"] = {str(name): short(groups == g) for g, name in enumerate(group_names)}
    result["hard"] = None if hard is None else short(np.asarray(hard, bool))
    return result


def vote(probs: np.ndarray) -> np.ndarray:
    """The seeds' joint decision: argmax of the mean probability. (R, N, C) to (N,) int."""
    return probs.mean(0).argmax(-1)


def hard_cases(reference: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The images that students outside every arm get wrong. (K, N, C), (N,) to (N,) bool.

    reference: probabilities of the K cross-fit students; their mean's argmax decides. The `real`
    arm's own errors would not do: partly they are bad luck, which a second training does not
    repeat, so on them every other arm looks better than `real` (regression to the mean).
    """
    return vote(reference) != labels


def mended_and_broken(real_votes: np.ndarray, arm_votes: np.ndarray,
                      labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the cases that `real` got wrong and the arm right, and the reverse. (N,) each."""
    was_right, is_right = real_votes == labels, arm_votes == labels
    return np.flatnonzero(~was_right & is_right), np.flatnonzero(was_right & ~is_right)


# ---- paired statistics over lesions and seeds ------------------------------------------------

def lesion_weights(lesions: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each image counts when lesions are drawn with replacement.

    A lesion's images come and go together: they are no independent evidence.
    lesions: (N,). Returns (N, 1 + draws) float64; column 0 is the sample itself, all ones. Images
    are rows, so that picking a subset of them copies whole rows.
    """
    _, which = np.unique(lesions, return_inverse=True)
    count = which.max() + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=draws).T.astype(float)
    return np.concatenate([np.ones((len(which), 1)), drawn[which]], axis=1)


def tables(probs: np.ndarray, labels: np.ndarray, malignant: np.ndarray, thresholds,
           weights: np.ndarray) -> dict[str, np.ndarray]:
    """The compared metrics of every seed under every column of weights.

    probs: (R, N, C); thresholds: R dictionaries, as in `metrics`; weights: (N, D).
    Returns {metric: (R, D)}; nan where a draw holds nobody to count.
    """
    guess = probs.argmax(-1)                                                            # (R, N)
    p_malignant = probs[..., malignant].sum(-1)                                         # (R, N)
    sick = malignant[labels]                                                            # (N,)

    def share(hits, of):  # weighted share of hits among the images `of`
        chosen = weights[of]
        with np.errstate(invalid="ignore", divide="ignore"):
            return hits[:, of].astype(float) @ chosen / chosen.sum(0)           # (R, D)

    recalls = np.stack([share(guess == c, labels == c) for c in range(probs.shape[-1])])
    with np.errstate(invalid="ignore"):  # classes without members are left out of the means
        balanced = np.nansum(recalls, 0) / np.isfinite(recalls).sum(0)

        def mean_area(area):
            found = np.array([[area(p[:, c], labels == c, weights) for p in probs]
                              for c in np.unique(labels)])                      # (C, R, D)
            return np.nansum(found, 0) / np.isfinite(found).sum(0)
        areas, precisions = mean_area(auroc), mean_area(auprc)
    ece = np.stack([expected_calibration_error(p, labels, weights=weights) for p in probs])

    def above(name):  # sensitivity at the threshold that val gave each seed
        cut = np.array([[t.get(name)] for t in thresholds], float)                      # (R, 1)
        return np.where(np.isfinite(cut), share(p_malignant > cut, sick), np.nan)

    return {"auroc": areas, "auprc": precisions, "ece": ece, "balanced_accuracy": balanced,
            "accuracy": share(guess == labels, sick | True),
            "sensitivity": share(malignant[guess], sick),
            "specificity": share(~malignant[guess], ~sick),
            "auroc_malignant": np.stack([auroc(p, sick, weights) for p in p_malignant]),
            **{name: above(name) for name in THRESHOLDS}}


def interval(table: np.ndarray, seed_draws: np.ndarray, limits=(0.0, 1.0)) -> tuple:
    """Mean over seeds with its 95 % interval, for new lesions and newly trained students.

        draw = mean_r table[r, draw] + [s2 > w2] sqrt(s2 / R) t

    s2: the metric's variance between the R seeds; w2: how much of it the small number of lesions
    explains, as the lesion draws show it; t: Student's t with R - 1 degrees of freedom. Resampling
    the seeds too, with replacement, would count chance twice where seeds err on different lesions
    (coverage 99 %) and see too little of three seeds where whole trainings differ (80 %); this
    keeps to 94 to 97 % in both (test_evaluate.py). Three seeds make it wide, and rightly so.
    table: (R, 1 + D), column 0 the sample itself; seed_draws: (D,) from `seed_spread`. With one
    seed the training's own spread is unknown and left out.
    Returns (value, low, high), floats, or (None, None, None) where the metric is undefined.
    """
    value, drawn = table[:, 0], table[:, 1:]
    known = np.isfinite(drawn).all(0)
    if not np.isfinite(value).all() or known.sum() < 2:
        return None, None, None
    mean = drawn[:, known].mean(0)
    if len(value) > 1:
        chance = (drawn[:, known] - value[:, None]).var(0, ddof=1).mean()
        between = value.var(ddof=1)
        if between > chance:  # all of it, not the excess: with three seeds the excess is too unsure
            mean = mean + math.sqrt(between / len(value)) * seed_draws[known]
    low, high = np.clip(np.percentile(mean, [2.5, 97.5]), *limits)
    return float(value.mean()), float(low), float(high)


def seed_spread(seeds: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) standard t variates with seeds - 1 degrees of freedom; zeros for one seed."""
    return rng.standard_t(seeds - 1, draws) if seeds > 1 else np.zeros(draws)


def paired_difference(ours: np.ndarray, theirs: np.ndarray, seed_draws: np.ndarray) -> tuple:
    """interval() of ours - theirs: the same lesions drawn, and the same seeds, for both arms.

    ours, theirs: (R, 1 + D) tables of one metric. Returns (difference, low, high).
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"tables {ours.shape} and {theirs.shape} are not paired")
    return interval(ours - theirs, seed_draws, (-1.0, 1.0))


def mcnemar(ours_right: np.ndarray, theirs_right: np.ndarray) -> float:
    """Exact two-sided McNemar test on paired decisions: p of a split as uneven under a fair coin.

    ours_right, theirs_right: (n,) bool, one decision per lesion. Returns p in (0, 1].
    """
    only_ours = int((ours_right & ~theirs_right).sum())
    n = only_ours + int((theirs_right & ~ours_right).sum())
    fewer = min(only_ours, n - only_ours)
    # Integers throughout: 2^-n underflows for n > 1074, their ratio does not.
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def holm(p_values) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m, times m - i + 1, never decreasing."""
    p = np.asarray(p_values, float)
    corrected, largest = np.ones(len(p)), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, float(p[i]) * (len(p) - rank)))
        corrected[i] = largest
    return corrected.tolist()


def lesion_right(probs: np.ndarray, labels: np.ndarray, lesions: np.ndarray) -> np.ndarray:
    """Is each lesion decided rightly, by its mean probability over images and seeds?

    probs: (R, N, C). Returns (lesions,) bool, lesions in sorted order; one whose images carry two
    labels counts as two.
    """
    _, lesion = np.unique(lesions, return_inverse=True)
    _, first, which = np.unique(lesion * probs.shape[-1] + labels, return_index=True,
                                return_inverse=True)
    total = np.zeros((len(first), probs.shape[-1]))
    np.add.at(total, which, probs.mean(0, dtype=np.float64))
    return total.argmax(1) == labels[first]


# ---- scoring a run ---------------------------------------------------------------------------

def check_predictions(p) -> None:
    """Raise ValueError, naming the key, unless predictions.npz holds what `score` needs."""
    def need(key, shape=None):
        if key not in p:
            raise ValueError(f"predictions.npz has no {key!r}")
        if shape is not None and p[key].shape != shape:
            raise ValueError(f"predictions.npz: {key} is {p[key].shape}, expected {shape}")

    for key in ("class_names", "group_names", "subtype_names", "arms", "seeds"):
        need(key)
    classes, seeds = len(p["class_names"]), len(p["seeds"])
    need("malignant", (classes,))
    need("optimistic", p["arms"].shape)
    for split in ("val", "test"):
        need(f"{split}_labels")
        n = len(p[f"{split}_labels"])
        if n == 0:
            raise ValueError(f"predictions.npz: the {split} split is empty")
        for name in ("groups", "subtypes", "lesions"):
            need(f"{split}_{name}", (n,))
        need(f"{split}_reference")
        check_probs(p[f"{split}_reference"], p[f"{split}_labels"])
        for arm in p["arms"]:
            need(f"{split}_probs_{arm}", (seeds, n, classes))
            check_probs(p[f"{split}_probs_{arm}"], p[f"{split}_labels"])


def score_seeds(p, arm: str, min_count: int) -> tuple[list[dict], list[dict]]:
    """Each seed's metrics on val and test, and the thresholds that val gave it."""
    rows, thresholds = [], []
    for r, seed in enumerate(p["seeds"]):
        sick = p["malignant"][p["val_labels"]]
        p_malignant = p[f"val_probs_{arm}"][r][:, p["malignant"]].sum(1)
        cut = {name: threshold_at_specificity(p_malignant, sick, specificity)
               for name, specificity in THRESHOLDS.items()}
        thresholds.append(cut)
        rows.append({"seed": int(seed)} | {split: metrics(
            p[f"{split}_probs_{arm}"][r], p[f"{split}_labels"], malignant=p["malignant"],
            class_names=p["class_names"], groups=p[f"{split}_groups"],
            group_names=p["group_names"], lesions=p[f"{split}_lesions"], thresholds=cut,
            hard=hard_cases(p[f"{split}_reference"], p[f"{split}_labels"]), min_count=min_count)
            for split in ("val", "test")})
    return rows, thresholds


def test_subsets(p, min_count: int) -> tuple[dict[str, np.ndarray], str | None]:
    """Masks (N,) of the test set by name, and the name of the worst group (None without groups).

    The worst group is the one with the lowest balanced accuracy of the reference students on val,
    fixed before any arm or test image is looked at; chosen by the `real` arm's own numbers it would
    flatter every other arm, as with `hard_cases`.
    """
    labels = p["test_labels"]
    subsets = {"all": np.ones(len(labels), bool), "hard": hard_cases(p["test_reference"], labels)}
    right, val_labels = vote(p["val_reference"]) == p["val_labels"], p["val_labels"]
    worst, lowest = None, np.inf
    for g, name in enumerate(p["group_names"]):
        mask = subsets[f"group:{name}"] = p["test_groups"] == g
        here = p["val_groups"] == g
        if here.any() and len(np.unique(p["test_lesions"][mask])) >= max(min_count, 1):
            here = np.mean([right[here & (val_labels == c)].mean()
                            for c in np.unique(val_labels[here])])
            if here < lowest:
                worst, lowest = str(name), here
    if worst is not None:
        subsets["worst_group"] = subsets[f"group:{worst}"]
    for s, name in enumerate(p["subtype_names"]):
        subsets[f"subtype:{name}"] = p["test_subtypes"] == s
    return subsets, worst


def draw_tables(p, arm: str, thresholds, subsets, weights, min_count: int) -> dict:
    """{subset: {metric: (R, 1 + D) table, or None where the cell is too small}} of one arm."""
    found = {}
    for name, mask in subsets.items():
        labels, lesions = p["test_labels"][mask], p["test_lesions"][mask]
        sizes = cell_sizes(labels, p["malignant"], lesions)
        probs = p[f"test_probs_{arm}"][:, mask]
        if name.startswith("subtype:"):  # one class by nature: its accuracy is its recall
            right = (probs.argmax(-1) == labels).astype(float)
            with np.errstate(invalid="ignore"):
                drawn = {"recall": right @ weights[mask] / weights[mask].sum(0)}
            sizes = {"recall": sizes["accuracy"]}
        elif sizes["accuracy"] == 0:
            drawn = dict.fromkeys(COMPARED)
        else:
            drawn = tables(probs, labels, p["malignant"], thresholds, weights[mask])
        found[name] = {metric: table if sizes[metric] >= max(min_count, 1) else None
                       for metric, table in drawn.items()}
    if len(p["group_names"]):
        by_group = [found[f"group:{name}"] for name in p["group_names"]]
        found["all"] |= gaps(by_group)
    probs, lesions = p[f"test_probs_{arm}"], p["test_lesions"]
    for c, name in enumerate(p["class_names"]):         # each class against the rest
        of = p["test_labels"] == c
        n, rest = (len(np.unique(lesions[m])) for m in (of, ~of))
        with np.errstate(invalid="ignore"):
            recall = (probs[:, of].argmax(-1) == c).astype(float) @ weights[of] / weights[of].sum(0)
        areas = {k: np.stack([area(r[:, c], of, weights) for r in probs])
                 for k, area in (("auroc", auroc), ("auprc", auprc))}
        found[f"class:{name}"] = {
            k: table if min(n, n if k == "recall" else rest) >= max(min_count, 1) else None
            for k, table in {"recall": recall, **areas}.items()}
    return found


def gaps(by_group: list[dict]) -> dict:
    """How far apart the groups are: the largest rate less the smallest. Hardt et al. 2016.

    equal_opportunity_gap: of the sensitivity; equalised_odds_gap: the larger of that and the gap of
    the false positive rate, which is that of the specificity. by_group: each group's tables,
    (R, 1 + D) or None where it has too few lesions; a gap of fewer than two groups is None.
    Of few lesions the largest and the smallest rate differ by chance too, so a gap says more beside
    another arm's. Resampling adds that chance once more, so the draws are moved back around the
    sample's own gap: intervals then cover a clear gap in about 90 to 97 %, but seldom the gap 0.
    """
    def gap(rate):
        known = [of[rate] for of in by_group if of[rate] is not None]
        return np.ptp(np.stack(known), axis=0) if len(known) > 1 else None

    def centred(table):
        if table is None:
            return None
        excess = np.nanmean(table[:, 1:], axis=1, keepdims=True) - table[:, :1]
        return np.concatenate([table[:, :1], table[:, 1:] - excess], axis=1)

    missed, alarmed = gap("sensitivity"), gap("specificity")
    odds = None if missed is None or alarmed is None else np.maximum(missed, alarmed)
    return {"equal_opportunity_gap": centred(missed), "equalised_odds_gap": centred(odds)}


def compare(p, drawn: dict, seed_draws: np.ndarray) -> list[dict]:
    """Every arm against `real`, and `guided` against every other, by subset and metric."""
    arms = [str(a) for a in p["arms"]]
    pairs = [(a, "real") for a in arms if a != "real" and "real" in arms]
    pairs += [("guided", a) for a in arms if a not in ("guided", "real") and "guided" in arms]
    optimistic = dict(zip(arms, p["optimistic"].tolist()))
    right = {a: lesion_right(p[f"test_probs_{a}"], p["test_labels"], p["test_lesions"])
             for a in arms}
    p_values = [mcnemar(right[a], right[b]) for a, b in pairs]
    # An arm for show must not cost the honest ones: Holm's family leaves the optimistic out.
    honest = [i for i, pair in enumerate(pairs) if not any(optimistic[a] for a in pair)]
    holm_p = dict(zip(honest, holm([p_values[i] for i in honest])))
    rows = []
    for i, ((arm, against), p_value) in enumerate(zip(pairs, p_values)):
        for subset, by_metric in drawn[arm].items():
            for metric, table in by_metric.items():
                other = drawn[against][subset][metric]
                found = ((None,) * 3 if table is None else
                         paired_difference(table, other, seed_draws))
                row = {"arm": arm, "against": against, "subset": subset, "metric": metric,
                       "difference": found[0], "low": found[1], "high": found[2],
                       "optimistic": optimistic[arm] or optimistic[against]}
                if (subset, metric) == ("all", "accuracy"):
                    row |= {"mcnemar_p": p_value, "holm_p": holm_p.get(i)}
                rows.append(row)
    return rows


def score(predictions, *, min_count: int = 10, draws: int = 2000, seed: int = 0) -> dict:
    """Everything that results.json says about the arms, from the stored predictions alone.

    predictions: a mapping as in predictions.npz: class_names, group_names, subtype_names,
    malignant, arms, seeds, optimistic; for split in val, test: {split}_labels, _groups, _subtypes,
    _lesions (N,), {split}_reference (K, N, C), {split}_probs_{arm} (R, N, C). Any arms will do.
    Returns a JSON-ready dictionary: "arms", "comparisons", "worst_group", "hard", "verdict".
    Raises ValueError naming the key that is missing or does not fit.
    """
    p = dict(predictions)  # an open .npz would decompress at every access
    check_predictions(p)
    rng = np.random.default_rng(seed)
    weights = lesion_weights(p["test_lesions"], draws, rng)  # one draw for all arms: paired
    seed_draws = seed_spread(len(p["seeds"]), draws, rng)
    labels, classes = p["test_labels"], len(p["class_names"])
    subsets, worst = test_subsets(p, min_count)
    arms, drawn = {}, {}

    def summary(table):
        found = (None,) * 3 if table is None else interval(table, seed_draws)
        return dict(zip(("value", "low", "high"), found))

    for arm, optimistic in zip(p["arms"].tolist(), p["optimistic"].tolist()):
        seeds, thresholds = score_seeds(p, arm, min_count)
        drawn[arm] = draw_tables(p, arm, thresholds, subsets, weights, min_count)
        here = {name: {m: summary(t) for m, t in by.items()} for name, by in drawn[arm].items()}
        votes = vote(p[f"test_probs_{arm}"])
        confusion = np.bincount(labels * classes + votes, minlength=classes**2)
        entry = {"optimistic": optimistic, "seeds": seeds,
                 "test": {k: here[k] for k in ("all", "hard", "worst_group") if k in here},
                 "confusion": confusion.reshape(classes, classes).tolist(),
                 "per_group": {}, "per_subtype": {},
                 "per_class": {str(name): {"n": int((labels == c).sum())} | here[f"class:{name}"]
                               for c, name in enumerate(p["class_names"])}}
        if "real" in p["arms"]:
            cases = mended_and_broken(vote(p["test_probs_real"]), votes, labels)
            entry |= {"mended": len(cases[0]), "broken": len(cases[1])}
        for name, mask in subsets.items():
            kind, _, member = name.partition(":")
            if kind == "group":
                entry["per_group"][member] = {"n": int(mask.sum())} | here[name]
            elif kind == "subtype":
                found = here[name]["recall"]
                entry["per_subtype"][member] = {"n": int(mask.sum()), "recall": found["value"],
                                                "low": found["low"], "high": found["high"]}
        arms[arm] = entry
    comparisons = compare(p, drawn, seed_draws)
    return {"arms": arms, "comparisons": comparisons, "worst_group": worst,
            "hard": {"n": int(subsets["hard"].sum())}, "verdict": verdict(arms, comparisons)}


def verdict(arms: dict, comparisons: list[dict], metric: str = "balanced_accuracy") -> str:
    """One honest sentence on `guided`: a gain is claimed only over the best control.

    arms, comparisons: as in score(). Controls are the arms other than guided that were not mined on
    the test set; the best has the highest metric on all test images.
    """
    what = metric.replace("_", " ")
    if "guided" not in arms:
        return "no verdict: the run has no guided arm"
    if arms["guided"]["optimistic"]:
        return "no verdict: guided is optimistic: mined on the test set"
    value = {a: arms[a]["test"]["all"][metric]["value"] for a in arms if not arms[a]["optimistic"]}
    controls = [a for a in value if a != "guided"]
    if not controls:
        return "no verdict: the run has no control arm"
    row = {r["against"]: r for r in comparisons if r["arm"] == "guided"
           and r["subset"] == "all" and r["metric"] == metric}
    if any(row[a]["difference"] is None for a in controls):
        return "no verdict: n too small"

    def told(arm):
        r = row[arm]
        return (f"{100 * r['difference']:+.1f} points of {what}, "
                f"95 % interval {100 * r['low']:+.1f} to {100 * r['high']:+.1f}")

    best = max(controls, key=value.get)
    beaten = [a for a in controls if row[a]["low"] > 0]
    open_ones = [a for a in controls if a not in beaten]
    single = "; one seed, so the spread between trainings is not in the interval" * (
        len(arms["guided"]["seeds"]) == 1)
    if row[best]["high"] < 0:
        return f"guided is worse than {best}: {told(best)}{single}"
    lifted = any(r["arm"] == "random" and r["against"] == "real" and r["subset"] == "all"
                 and r["metric"] == metric and (r["low"] or 0) > 0 for r in comparisons)
    if open_ones == ["random"] and lifted and row["random"]["high"] >= 0:
        return ("the gain is the counterfactuals', not the mining's: guided and random beat real, "
                f"but guided over random is {told('random')}{single}")
    if best not in beaten:
        return f"no gain over {best}: {told(best)}{single}"
    if controls == ["real"]:
        return (f"guided beats real: {told('real')}; no other control was run, so any added images "
                f"might do the same{single}")
    if open_ones:
        return (f"guided beats {best}, the best control: {told(best)}; "
                f"not settled against {' and '.join(open_ones)}{single}")
    return f"guided beats every control: {told(best)} over {best}, the best of them{single}"


# ---- the generator's quality, in any classifier's features -------------------------------------

def check_features(a: np.ndarray, b: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 copies of two (n, D) feature sets; ValueError if they do not fit or are too few."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features {a.shape} and {b.shape}: expected (n, D) and (m, D)")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features must be finite")
    if min(len(a), len(b)) < least:
        raise ValueError(f"{len(a)} and {len(b)} images are too few: at least {least} are needed")
    return a, b


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of two Gaussians fitted to features. Heusel et al. 2017, Eq. 6.

        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^.5 S2 S1^.5)^.5)

    a, b: (n, D), (m, D). To be called FID only in Inception features; biased upwards for small n,
    so compare only at equal n. Raises ValueError unless n and m exceed D (S would be singular).
    """
    a, b = check_features(a, b, np.shape(a)[-1] + 1)
    s1, s2 = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    size, axes = np.linalg.eigh(s1)
    root = axes * np.sqrt(np.maximum(size, 0)) @ axes.T
    product = np.linalg.eigvalsh(root @ s2 @ root)  # symmetric: no complex square root is needed
    shared = np.sqrt(np.maximum(product, 0)).sum()
    return float(((a.mean(0) - b.mean(0))**2).sum() + np.trace(s1) + np.trace(s2) - 2 * shared)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with k(x, y) = (x.y / D + 1)^3. Binkowski et al. 2018, Eq. 4.

    a, b: (n, D), (m, D), at least 2 each. Unbiased, so it is a little negative for equal sources.
    """
    a, b = check_features(a, b, 2)
    n, m = len(a), len(b)

    def kernel(x, y):
        return (x @ y.T / a.shape[1] + 1)**3

    aa, bb = kernel(a, a), kernel(b, b)
    return float((aa.sum() - np.trace(aa)) / (n * (n - 1))
                 + (bb.sum() - np.trace(bb)) / (m * (m - 1)) - 2 * kernel(a, b).mean())


def distance_chunks(a: np.ndarray, b: np.ndarray, chunk: int):
    """Yield (first row, distances (<= chunk, m)) over the rows of a: |a|^2 + |b|^2 - 2 a.b."""
    b = np.asarray(b, np.float64).reshape(len(b), -1)
    square_b = (b * b).sum(1)
    for start in range(0, len(a), chunk):
        rows = np.asarray(a[start:start + chunk], np.float64).reshape(-1, b.shape[1])
        square = (rows * rows).sum(1)[:, None] + square_b - 2 * rows @ b.T
        yield start, np.sqrt(np.maximum(square, 0))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of fakes among the reals, of reals among the fakes. Kynkaanniemi et al. 2019, Eq. 2.

    "Among": within some member's distance to its own k-th nearest fellow. real: (n, D); fake:
    (m, D), more than k each; equal n is advised. Returns (precision, recall) in 0..1.
    """
    real, fake = check_features(real, fake, k + 1)

    def covered(points, members):
        radius = np.concatenate([np.partition(d, k, axis=1)[:, k]  # 0 is the member itself
                                 for _, d in distance_chunks(members, members, 1024)])
        return float(np.concatenate([(d <= radius).any(1) for _, d in
                                     distance_chunks(points, members, 1024)]).mean())

    return covered(fake, real), covered(real, fake)


def nearest_distance(a: np.ndarray, b: np.ndarray,
                     chunk: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """For every row of a, the distance to the nearest row of b, and that row's index.

    a, b: (n, ...) and (m, ...), flattened, any number type. Returns (n,) float64 and (n,) int64.
    """
    if np.shape(a)[1:] != np.shape(b)[1:] or len(b) < 1:
        raise ValueError(f"cannot compare {np.shape(a)} with {np.shape(b)}")
    index = np.zeros(len(a), np.int64)
    for start, distance in distance_chunks(a, b, chunk):
        index[start:start + chunk] = distance.argmin(1)
    # Measured again by subtraction: the product form above loses the digits of near-copies.
    gaps = [np.asarray(x, np.float64) - np.asarray(b[i], np.float64) for x, i in zip(a, index)]
    return np.array([np.sqrt((g * g).sum()) for g in gaps]), index


# ---- python evaluate.py runs/NAME --------------------------------------------------------------

def merge(results: dict, scored: dict) -> dict:
    """results with every number that `score` gives replaced; what the loop alone knows is kept.

    An arm that has no stored predictions is dropped: nothing could vouch for its numbers.
    """
    arms = {}
    for name, new in scored["arms"].items():
        old = results.get("arms", {}).get(name, {})
        before = old.get("seeds", [])
        before = before if len(before) == len(new["seeds"]) else [{}] * len(new["seeds"])
        arms[name] = {**old, **new, "seeds": [{**a, **b} for a, b in zip(before, new["seeds"])]}
    return {**results, **scored, "arms": arms}


def rescore(run_folder: Path) -> dict:
    """Score runs/NAME/predictions.npz again, write results.json in one step, and return it.

    Raises OSError for a missing file, ValueError for one that does not hold what it should.
    """
    from engine.run import write_bytes           # here alone: no number above needs torch
    path = Path(run_folder) / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    given = results.get("config", {}).get("evaluate", {})
    with np.load(Path(run_folder) / "predictions.npz", allow_pickle=False) as predictions:
        scored = score(predictions, **{k: given[k] for k in ("min_count", "draws") if k in given})
    results = merge(results, scored)
    write_bytes(path, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def main(argv: list[str] | None = None) -> int:
    """Score a run again and rewrite its report, or score its students on another data set.

    Returns the exit status: 2 if the folder, the config or the images are bad.
    """
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder, runs/NAME")
    parser.add_argument("--on", type=Path, help="the config of another data set: an external test")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    arguments = parser.parse_args(argv)
    run = arguments.run
    if arguments.set and not arguments.on:
        parser.error("--set changes the config of --on: give both")
    try:
        if arguments.on:
            from engine import config           # here alone: the numbers above know neither config nor model
            from extras import external
            other = config.load(arguments.on, arguments.set)
            print(external.told(external.score_on(run, arguments.on.stem, other)))
            return 0
        from extras import report
        from engine.run import locked
        with locked(run):
            results = rescore(run)
            report.write(run)
    # json's error is a ValueError, RunError a RuntimeError
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        print(f"evaluate.py: {run}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(results["verdict"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
