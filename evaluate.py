"""The numbers: metrics, one rule for intervals, and the verdict. Numpy alone.

N images, C classes, R seeds, D bootstrap draws of the lesions, draw 0 the sample itself. weights
(N, D): how often a draw counts an image; a table (R, D): a metric of each seed in each draw.
Sources: Efron & Tibshirani 1993 (bootstrap), Owen 2007 (resampling crossed factors).
"""
import numpy as np

# What arms are compared in: a mean over classes where enough are of the rarest one.
COMPARED = {
    "all": "balanced_accuracy",
    "hard": "accuracy",
    "worst_group": "balanced_accuracy"}


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


def seed_spread(seeds, draws, rng):
    """(draws,) of Student's t with seeds - 1 degrees of freedom; zeros for one seed."""
    return rng.standard_t(seeds - 1, draws) if seeds > 1 else np.zeros(draws)


def interval(table, spread, limits=(0, 1)):
    """Mean over seeds with its 95 % interval, for new lesions and newly trained students.

        draw = mean_r table[r, draw] + [s2 > w2] sqrt(s2 / R) t

    s2: variance between R seeds; w2: what the draws of lesions explain of it; t: `spread`. Holds
    the truth in 94 to 97 %; drawing the seeds as well does in 80 to 99 % (test_evaluate.py)."""
    value, drawn = table[:, 0], table[:, 1:]
    mean = drawn.mean(0)
    if np.isnan(value).any() or np.isfinite(mean).sum() < 2:
        return {"value": None, "low": None, "high": None}
    if len(value) > 1:
        apart = drawn - value[:, None]
        chance = np.nanmean(apart.var(0, ddof=1))
        between = value.var(ddof=1)
        # all of it: of three seeds the excess is too unsure
        if between > chance:
            mean = mean + np.sqrt(between / len(value)) * spread
    low, high = np.nanpercentile(mean, [2.5, 97.5]).clip(*limits)
    return {"value": float(value.mean()), "low": float(low), "high": float(high)}


def paired_difference(ours, theirs, spread):
    """interval() of ours - theirs: the same lesions and seeds drawn for both arms."""
    return interval(ours - theirs, spread, (-1, 1))


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


def score(predictions, *, min_count=10, draws=2000, seed=0):
    """What results.json says of the arms, whichever there are, from predictions.npz."""
    p = dict(predictions)
    labels, lesions = p["test_labels"], p["test_lesions"]
    masks, worst = subsets(p, min_count)

    # drawn once for all arms: that pairs them
    rng = np.random.default_rng(seed)
    weights = lesion_weights(lesions, draws, rng)
    spread = seed_spread(len(p["seeds"]), draws, rng)

    arms, drawn = {}, {}
    for arm, optimistic in zip(p["arms"].tolist(), p["optimistic"].tolist()):
        probs, test = p[f"test_probs_{arm}"], {}
        for subset, of in masks.items():
            found = tables(
                probs[:, of], labels[of], p["malignant"],
                weights[of], lesions[of], min_count)
            drawn[arm, subset] = found[COMPARED[subset]]
            test[subset] = {m: interval(t, spread) for m, t in found.items()}
        arms[arm] = {"optimistic": optimistic, "seeds": len(probs), "test": test}

    rows = compare(arms, drawn, spread)
    return {
        "arms": arms, "comparisons": rows,
        "hard": {"n": int(masks["hard"].sum())},
        "worst_group": worst, "verdict": verdict(arms, rows)}


def compare(arms, drawn, spread):
    """Rows of every arm against `real` and of `guided` against every other, by subset."""
    rows = []
    for (a, subset), ours in drawn.items():
        for b in arms:
            wanted = a == "guided" or b == "real"
            if a == b or not wanted:
                continue
            found = paired_difference(ours, drawn[b, subset], spread)
            rows.append({
                "arm": a, "against": b,
                "subset": subset, "metric": COMPARED[subset],
                "difference": found.pop("value"), **found,
                "optimistic": any(arms[of]["optimistic"] for of in (a, b))})
    return rows


def verdict(arms, rows):
    """One honest sentence on `guided`: a gain is claimed only over the best control."""
    if "guided" not in arms:
        return "no verdict: the run has no guided arm"
    if arms["guided"]["optimistic"]:
        return "no verdict: guided is optimistic: mined on the test set"
    # controls: the arms that were not mined on the test set
    rows = [r for r in rows if r["subset"] == "all" and not r["optimistic"]]
    over = {r["against"]: r for r in rows if r["arm"] == "guided"}
    if not over:
        return "no verdict: the run has no control arm"
    if any(r["low"] is None for r in rows):
        return "no verdict: n too small"

    gain = {}
    for arm, r in over.items():
        points = [100 * r[k] for k in ("difference", "low", "high")]
        text = "{:+.1f} points of balanced accuracy, 95 % interval {:+.1f} to {:+.1f}"
        gain[arm] = text.format(*points)
    # the best control is the one that guided gains least over
    best = min(over, key=lambda arm: over[arm]["difference"])
    doubt = [arm for arm in over if over[arm]["low"] <= 0]  # not beaten
    # `random` beats `real`, the one arm that it is compared with
    lifted = [r for r in rows if r["arm"] == "random" and r["low"] > 0]
    if over[best]["high"] < 0:
        said = f"guided is worse than {best}: {gain[best]}"
    elif doubt == ["random"] and lifted:
        said = (
            "the gain is the counterfactuals', not the mining's: guided and random "
            f"beat real, but guided over random is {gain['random']}")
    elif best in doubt:
        said = f"no gain over {best}: {gain[best]}"
    elif list(over) == ["real"]:
        said = (
            f"guided beats real: {gain['real']}; no other control was run, "
            "so any added images might do the same")
    elif doubt:
        said = (
            f"guided beats {best}, the best control: {gain[best]}; "
            f"not settled against {' and '.join(doubt)}")
    else:
        said = f"guided beats every control: {gain[best]} over {best}, the best of them"
    # `interval` leaves out what one seed cannot show
    if arms["guided"]["seeds"] == 1:
        said += "; one seed, so the spread between trainings is not in the interval"
    return said
