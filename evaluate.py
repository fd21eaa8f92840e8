"""The numbers: metrics, one rule for intervals, four outcomes. Numpy alone.

N images, C classes, R seeds, D bootstrap draws of the lesions, draw 0 the sample itself. weights
(N, D): how often a draw counts an image; a table (R, D): a metric of each seed in each draw.
Sources: Efron & Tibshirani 1993 (bootstrap), Searle et al. 1992 (variance components).
"""
import math
from statistics import NormalDist

import numpy as np

# What arms are compared in; sensitivity too, since the mean can rise at its cost.
COMPARED = {
    "all": ("balanced_accuracy", "sensitivity"),
    "hard": ("accuracy", "auroc"),
    "worst_group": ("balanced_accuracy", "sensitivity")}


def vote(probs):
    """The seeds' joint decision: argmax of the mean probability. (R, N, C) to (N,)."""
    return probs.mean(0).argmax(-1)


def hard_cases(reference, labels):
    """(N,) bool: what the cross-fit students (K, N, C), who are in no arm, get wrong together."""
    # by the errors of `real`, partly bad luck, any other arm would look better than it is
    return vote(reference) != labels


# ---- metrics ---------------------------------------------------------------------------------

def balanced_accuracy(probs, labels):
    """Mean recall over the classes that occur. probs: (N, C); labels: (N,)."""
    right = probs.argmax(-1) == labels
    recalls = [right[labels == c].mean() for c in np.unique(labels)]
    return float(np.mean(recalls))


def auroc(scores, positive, weights):
    """Area under the ROC curve of scores (..., N): (..., D), nan if a side is empty."""
    if scores.ndim > 1:  # seed by seed
        return np.stack([auroc(s, positive, weights) for s in scores])
    ours, rest = scores[positive], scores[~positive]  # (P,), (M,)

    # weight of the k lowest negatives: sorted once for all draws
    order = rest.argsort()
    below = weights[~positive][order].cumsum(0)
    below = np.pad(below, ((1, 0), (0, 0)))  # (1 + M, D)
    lower = np.searchsorted(rest, ours, "left", order)
    upper = np.searchsorted(rest, ours, "right", order)

    # P(a positive scores higher than a negative), a tie counts half
    count = weights[positive]
    won = count * (below[lower] + below[upper]) / 2
    return won.sum(0) / (count.sum(0) * below[-1])


def share(hits, of, weights):
    """Weighted share of hits (R, N) among the images `of` (N,) bool: (R, D)."""
    weights = weights[of]
    return hits[:, of].astype(float) @ weights / weights.sum(0)


def mean_known(values):
    """Mean over the first axis, nan left out: a draw may lack a class."""
    return np.nansum(values, 0) / np.isfinite(values).sum(0)


# 0 / 0 is nan: nobody to count
@np.errstate(invalid="ignore")
def tables(probs, labels, malignant, weights, lesions, min_count):
    """{metric: (R, D)} of probs (R, N, C), labels (N,), malignant (C,) bool, lesions (N,)."""
    sick, guess = malignant[labels], probs.argmax(-1)
    right = guess == labels  # (R, N)
    told = malignant[guess] == sick  # (R, N)
    each = [labels == c for c in range(len(malignant))]
    recalls = [share(right, of, weights) for of in each]
    areas = [auroc(probs[..., c], of, weights) for c, of in enumerate(each)]

    # the lesions behind each, nan if too few; behind a mean over classes the rarest's
    sizes = np.array([len(set(lesions[of])) for of in each])
    rarest = min(sizes[sizes > 0], default=0)
    ill, well = sizes[malignant].sum(), sizes[~malignant].sum()
    p_sick = probs[..., malignant].sum(-1)  # (R, N)
    found = {
        "accuracy": (sizes.sum(), share(right, labels >= 0, weights)),
        "balanced_accuracy": (rarest, mean_known(recalls)),
        "sensitivity": (ill, share(told, sick, weights)),
        "specificity": (well, share(told, ~sick, weights)),
        "auroc": (rarest, mean_known(areas)),
        "auroc_malignant": (min(ill, well), auroc(p_sick, sick, weights))}
    return {
        metric: table if n >= min_count else table * np.nan
        for metric, (n, table) in found.items()}


# ---- one rule for intervals ------------------------------------------------------------------

def lesion_weights(lesions, draws, rng):
    """(N, 1 + draws): how often an image counts when lesions are drawn with replacement."""
    # a lesion's images come and go together: they are no independent evidence
    names, which = np.unique(lesions, return_inverse=True)
    even = np.full(len(names), 1 / len(names))
    drawn = rng.multinomial(len(names), even, draws).T  # by lesion
    return np.column_stack([np.ones(len(which)), drawn[which]])


def t_quantile(inside, df):
    """t with P(|T| < t) = inside, of Student's t with df degrees of freedom, a whole number."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2  # t = sqrt(df) tan(angle)
        sine, cosine = math.sin(angle), math.cos(angle)
        # Abramowitz & Stegun 26.7.3 for odd df, 26.7.4 for even
        total, term = 0.0, cosine if df % 2 else 1.0
        for k in range(1 + df % 2, df, 2):
            total += term
            term *= cosine**2 * k / (k + 1)
        p = sine * total
        p = (angle + p) * 2 / math.pi if df % 2 else p
        low, high = (angle, high) if p < inside else (low, angle)
    return math.sqrt(df) * math.tan(low)


def seed_noise(values):
    """(variance of a difference of two arms in one seed, its degrees of freedom), from all arms
    together: values (A, R), a metric by arm and seed."""
    # what neither the arm nor the start, the same in all arms, explains
    rest = values - values.mean(1, keepdims=True)
    rest = rest - rest.mean(0)
    df = (len(values) - 1) * (values.shape[1] - 1)
    return 2 * (rest**2).sum() / max(df, 1), df


def interval(table, noise=None, at_once=1, limits=(0, 1)):
    """Mean over seeds with its 95 % interval, for new lesions and newly trained students.

        half^2 = z^2 shared + t^2 between / R

    between: variance between R seeds; shared: of the mean over lesions, by bootstrap, less what
    a seed errs by itself, which is in `between`. noise: between and its degrees of freedom,
    if seed_noise knows them. at_once: so many intervals all hold in 95 % (Bonferroni). One seed
    leaves out the spread between trainings. How often it holds: benchmarks/coverage.py."""
    value, drawn = table[:, 0], table[:, 1:]
    seeds, mean = len(value), drawn.mean(0)
    if np.isnan(value).any() or np.isfinite(mean).sum() < 2:
        return {"value": None, "low": None, "high": None}
    inside = 1 - 0.05 / at_once
    z = NormalDist().inv_cdf((1 + inside) / 2)
    square = z**2 * np.nanvar(mean)
    if seeds > 1:
        between, df = noise or (value.var(ddof=1), seeds - 1)
        apart = drawn - value[:, None]
        chance = np.nanmean(apart.var(0, ddof=1))
        square = max(0, square - z**2 * chance / seeds)
        square += t_quantile(inside, df) ** 2 * between / seeds
    half = math.sqrt(square)
    low, high = np.clip(value.mean() + [-half, half], *limits)
    return {"value": float(value.mean()), "low": float(low), "high": float(high)}


def outcome(low, high, margin):
    """What an interval of a difference says; margin: what is too small to matter."""
    if low is None:
        return None
    if low == high:  # no lesion, no seed differs: too few to tell
        return "not settled"
    if low > 0 or high < 0:
        return "better" if low > 0 else "worse"
    return "equal" if -margin <= low and high <= margin else "not settled"


# ---- a run -----------------------------------------------------------------------------------

def subsets(p, min_count):
    """Masks (N,) of the test images by subset, and the worst group's name, None without groups."""
    labels, names = p["test_labels"], p["group_names"].tolist()
    masks = {"all": labels >= 0}
    masks["hard"] = hard_cases(p["test_reference"], labels)
    # the cross-fit students' worst on val: chosen before any arm or test image
    scores = {}
    for g in range(len(names)):
        of, here = p["val_groups"] == g, p["test_groups"] == g
        if of.any() and len(set(p["test_lesions"][here])) >= min_count:
            probs = p["val_reference"].mean(0)[of]
            scores[g] = balanced_accuracy(probs, p["val_labels"][of])
    if not scores:
        return masks, None
    worst = min(scores, key=scores.get)
    masks["worst_group"] = p["test_groups"] == worst
    return masks, names[worst]


def score(predictions, *, min_count=10, draws=2000, margin=1.0, seed=0):
    """What results.json says of the arms, whichever there are, from predictions.npz."""
    p = dict(predictions)
    labels, lesions = p["test_labels"], p["test_lesions"]
    masks, worst = subsets(p, min_count)

    # drawn once for all arms: that pairs them
    rng = np.random.default_rng(seed)
    weights = lesion_weights(lesions, draws, rng)

    arms, drawn = {}, {}
    for arm, optimistic in zip(p["arms"].tolist(), p["optimistic"].tolist()):
        probs, test = p[f"test_probs_{arm}"], {}
        for subset, of in masks.items():
            found = tables(
                probs[:, of], labels[of], p["malignant"],
                weights[of], lesions[of], min_count)
            test[subset] = {m: interval(t) for m, t in found.items()}
            for metric in COMPARED[subset]:
                drawn.setdefault((subset, metric), {})[arm] = found[metric]
        arms[arm] = {"optimistic": optimistic, "seeds": len(probs), "test": test}

    return {
        "arms": arms, "worst_group": worst,
        "hard": {"n": int(masks["hard"].sum())},
        "comparisons": compare(arms, drawn, margin / 100)}


def compare(arms, drawn, margin):
    """Rows of the arm in question against every control, and of every arm against `real`."""
    honest = [a for a in arms if not arms[a]["optimistic"]]
    asked = "guided" if "guided" in honest else honest[-1]
    rows = []
    for (subset, metric), tables in drawn.items():
        noise = seed_noise(np.stack([tables[a][:, 0] for a in honest]))
        pairs = [(asked, b) for b in arms]
        pairs += [(a, "real") for a in arms if a != asked]
        for a, b in pairs:
            if a == b or b not in arms:
                continue
            # against all controls at once: none is chosen by its result
            at_once = len(honest) - 1 if a == asked else 1
            found = interval(tables[a] - tables[b], noise, at_once, (-1, 1))
            rows.append({
                "arm": a, "against": b,
                "subset": subset, "metric": metric, **found,
                "outcome": outcome(found["low"], found["high"], margin),
                "optimistic": not {a, b} <= {*honest}})
    return rows
