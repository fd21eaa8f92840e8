"""evaluate.py against something independent: tables by hand, brute force, simulation."""
import json
import math
from statistics import NormalDist

import numpy as np
import pytest

import coverage
import evaluate as ev
from extras.verdict import verdict

CLASSES, MALIGNANT = ["nv", "bkl", "bcc", "mel"], np.array([False, False, True, True])


def rows(guesses, classes=4, sure=0.7):
    """Probabilities (N, C) whose argmax is the given guess."""
    rest = (1 - sure) / (classes - 1)
    return np.where(np.eye(classes, dtype=bool)[np.asarray(guesses, int)], sure, rest)


def predictions(arms=("real", "random", "guided"), n=160, seeds=2, groups=3, subtypes=2, gain=None,
                seed=0):
    """A small predictions.npz in memory; gain adds to the true class's logit of an arm."""
    rng = np.random.default_rng(seed)
    p = {"class_names": np.array(CLASSES), "malignant": MALIGNANT, "arms": np.array(arms),
         "group_names": np.array([f"g{i}" for i in range(groups)], str),
         "subtype_names": np.array([f"s{i}" for i in range(subtypes)], str),
         "seeds": np.arange(seeds), "optimistic": np.zeros(len(arms), bool)}
    for split in ("val", "test"):
        lesions = rng.integers(0, n // 2, n)
        labels = rng.integers(0, 4, n // 2)[lesions]
        p[f"{split}_labels"] = labels
        p[f"{split}_groups"] = rng.integers(0, groups, n) if groups else np.full(n, -1)
        p[f"{split}_subtypes"] = rng.integers(-1, subtypes, n) if subtypes else np.full(n, -1)
        p[f"{split}_lesions"] = np.array([f"L{i}" for i in lesions])
        p[f"{split}_sources"] = np.arange(n).astype(str)
        base = rng.normal(size=(n, 4)) + 1.5 * np.eye(4)[labels]

        def draw(k, extra=0.0):
            z = np.exp(base + 0.5 * rng.normal(size=(k, n, 4)) + extra * np.eye(4)[labels])
            return (z / z.sum(-1, keepdims=True)).astype(np.float32)

        p[f"{split}_reference"] = draw(3)
        for arm in arms:
            p[f"{split}_probs_{arm}"] = draw(seeds, (gain or {}).get(arm, 0.0))
    return p


def measured(probs, labels, lesions=None, min_count=1):
    """The metrics of one student, by the program."""
    labels = np.asarray(labels)
    lesions = np.arange(len(labels)) if lesions is None else lesions
    found = ev.tables(probs[None], labels, MALIGNANT, np.ones((len(labels), 1)), lesions, min_count)
    return {metric: float(table[0, 0]) for metric, table in found.items()}


def pairs_won(scores, positive):
    """AUROC as it is defined, over all pairs."""
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    return np.mean(pairs) if pairs else math.nan


def by_hand(probs, labels):
    """The same metrics, counted image by image."""
    guess, sick = [int(np.argmax(row)) for row in probs], MALIGNANT[labels]
    right = [g == y for g, y in zip(guess, labels)]
    occurring = sorted(set(labels.tolist()))
    areas = [pairs_won(probs[:, c], labels == c) for c in occurring]
    return {"accuracy": sum(right) / len(right),
            "balanced_accuracy": np.mean([np.mean([r for r, y in zip(right, labels) if y == c])
                                          for c in occurring]),
            "sensitivity": np.mean([g in (2, 3) for g, s in zip(guess, sick) if s]),
            "specificity": np.mean([g in (0, 1) for g, s in zip(guess, sick) if not s]),
            "auroc": np.mean(areas), "auroc_malignant": pairs_won(probs[:, 2] + probs[:, 3], sick)}


# ---- metrics ---------------------------------------------------------------------------------

def test_metrics_agree_with_a_table_made_by_hand():
    #                 nv: 2 of 3 right    bkl 1/2   bcc 0/1  mel 3/4
    labels = np.array([0, 0, 0,           1, 1,     2,       3, 3, 3, 3])
    guess = np.array([0, 0, 3,            1, 0,     3,       3, 3, 3, 1])
    m = measured(rows(guess), labels)
    assert m["accuracy"] == pytest.approx(0.6)
    assert m["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 0 + 3 / 4) / 4)
    assert m["sensitivity"] == pytest.approx(4 / 5)     # a bcc called mel is still malignant
    assert m["specificity"] == pytest.approx(4 / 5)
    # P(malignant) is .8 where the guess is bcc or mel, .2 elsewhere: 25 pairs, 16 won, 8 tied
    assert m["auroc_malignant"] == pytest.approx((16 + 0.5 * 8) / 25)
    part = measured(rows([0, 3, 3, 3]), [1, 3, 3, 3])
    assert (part["accuracy"], part["sensitivity"], part["specificity"]) == (.75, 1, 1)
    assert part["balanced_accuracy"] == pytest.approx(0.5)      # over the two that are there


def test_balanced_accuracy_by_hand():
    probs = np.eye(3)[[0, 0, 1, 2, 2, 2]]
    assert np.isclose(ev.balanced_accuracy(probs, np.array([0, 0, 0, 1, 2, 2])),
                      (2 / 3 + 0 + 1) / 3)


def test_too_few_lesions_give_nan():
    labels = np.array([0] * 12 + [3] * 9 + [2] * 3)
    m = measured(rows(labels), labels, min_count=10)
    assert m["sensitivity"] == m["specificity"] == m["auroc_malignant"] == 1    # 12 malignant
    assert math.isnan(m["balanced_accuracy"]) and math.isnan(m["auroc"])        # 3 of bcc
    # 12 images of one lesion are one lesion
    m = measured(rows(labels), labels, np.where(labels == 0, 0, np.arange(24)), min_count=10)
    assert math.isnan(m["specificity"]) and math.isnan(m["auroc_malignant"]) and m["accuracy"] == 1
    assert all(math.isnan(v) for v in measured(rows([]), np.zeros(0, int)).values())


def test_auroc_is_the_share_of_pairs_won_with_ties_as_half():
    rng = np.random.default_rng(1)
    for n in (5, 40, 90):
        scores, positive = rng.integers(0, 8, n) / 8, rng.random(n) < 0.4
        positive[:2] = True, False
        assert ev.auroc(scores, positive, np.ones((n, 1))) == pytest.approx(
            pairs_won(scores, positive), abs=1e-12)
    with np.errstate(invalid="ignore"):
        assert np.isnan(ev.auroc(scores, np.ones(90, bool), np.ones((90, 1)))).all()


def test_tables_are_the_metrics_of_the_repeated_images_counted_one_by_one():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, 50)
    probs = rng.dirichlet(np.ones(4), (3, 50)).round(1)         # ties, too
    weights = rng.integers(0, 3, (50, 6)).astype(float)
    weights[labels == 1, 5] = 0                                 # a draw that lacks a class
    found = ev.tables(probs, labels, MALIGNANT, weights, np.arange(50), 1)
    for r in range(3):
        for d in range(6):
            again = np.repeat(np.arange(50), weights[:, d].astype(int))
            for name, value in by_hand(probs[r, again], labels[again]).items():
                assert found[name][r, d] == pytest.approx(value, abs=1e-12), name


def test_votes_and_hard_cases():
    labels = np.array([0, 1, 2, 3])
    sure, unsure = rows([0, 0, 2, 0], sure=.9), rows([1, 1, 2, 3], sure=.4)
    assert ev.vote(np.stack([unsure, sure])).tolist() == [0, 0, 2, 0]
    assert ev.hard_cases(np.stack([unsure, sure]), labels).tolist() == [False, True, False, True]


# ---- statistics ------------------------------------------------------------------------------

def test_lesion_weights_draw_lesions_whole():
    lesions = np.array(["b", "a", "b", "c", "a", "b"])
    weights = ev.lesion_weights(lesions, 4000, np.random.default_rng(0))
    assert weights.shape == (6, 4001) and (weights[:, 0] == 1).all()
    assert (weights[0] == weights[[2, 5]]).all() and (weights[1] == weights[4]).all()
    assert (weights[[0, 1, 3]].sum(0) == 3).all()  # as many lesions as there are
    assert weights[3, 1:].mean() == pytest.approx(1, abs=.04)
    assert weights[3, 1:].var() == pytest.approx(2 / 3, abs=.06)  # binomial(3, 1/3)


def arms_pair(rng, lesions, seeds, spread, gain):
    """Right or wrong (R, N) of two arms whose true accuracies differ by a known amount.

    An image is right where a normal score exceeds 0: a mean of .8 (+ gain) plus noise by lesion,
    image, whole seed, seed x lesion, and arm x lesion, of the given standard deviations.
    """
    which = np.repeat(np.arange(lesions), rng.integers(1, 4, lesions))
    by_lesion, by_image, by_seed, crossed, by_arm = spread
    shared = by_lesion * rng.normal(size=lesions)[which]
    scores = [0.8 + arm_gain + shared + by_arm * rng.normal(size=lesions)[which]
              + by_seed * rng.normal(size=(seeds, 1))
              + crossed * rng.normal(size=(seeds, lesions))[:, which]
              + by_image * rng.normal(size=(seeds, len(which))) for arm_gain in (0, gain)]
    total = math.sqrt(sum(s * s for s in spread))
    truth = NormalDist().cdf((0.8 + gain) / total) - NormalDist().cdf(0.8 / total)
    return which, scores[0] > 0, scores[1] > 0, truth


SPREADS = {  # by lesion, image, whole seed, seed x lesion, arm x lesion
    "usual": (1, .5, .03, .4, .3), "seeds err on different lesions": (1, .5, 0, .6, .2),
    "arms differ by lesion": (1, .5, 0, .1, .8), "whole seeds differ": (1, .5, .15, .3, .3)}


def realistic(spread, seeds, runs=200, lesions=100, draws=150, whole=True):
    """How often the 95 % interval of a difference holds the truth, where images are right or wrong
    and a lesion has several."""
    rng, inside = np.random.default_rng(11), 0
    for _ in range(runs):
        which, before, after, truth = arms_pair(rng, lesions, seeds, spread, 0.25)
        units = which if whole else np.arange(len(which))
        weights = ev.lesion_weights(units, draws, rng)
        before, after = (arm @ weights / weights.sum(0) for arm in (before, after))
        found = ev.interval(after - before, limits=(-1, 1))
        inside += found["low"] <= truth <= found["high"]
    return inside / runs


@pytest.mark.parametrize("name", SPREADS)
def test_intervals_of_a_difference_of_right_and_wrong_answers_cover_the_truth(name):
    assert 0.92 <= realistic(SPREADS[name], 3)


def test_resampling_images_instead_of_lesions_would_cover_too_little():
    assert realistic((1, 0, 0, 0, 1.5), 3, whole=False) < 0.9 < realistic((1, 0, 0, 0, 1.5), 3)


@pytest.mark.parametrize("seeds, errors, trainings", [
    (3, "shared", 0), (3, "separate", 4), (5, "half", 1)])
def test_intervals_hold_what_they_promise(seeds, errors, trainings):
    """A small part of benchmarks/coverage.py, with room for the chance of 250 studies."""
    found = coverage.measured(250, seeds, errors, trainings)
    assert 0.91 <= found["holds the truth"] <= 0.995
    assert 0.86 <= found["the narrower half"]
    assert found["better than all 6"] + found["worse than any of 6"] <= 0.06


def test_seeds_drawn_with_the_lesions_would_cover_too_little_and_so_would_no_seeds_at_all():
    """The simulation can tell: without the spread between trainings the promise is broken."""
    low, high = coverage.simulated(100, 5, 3, "shared", 4)[0][:, 0].T
    rng, inside = np.random.default_rng(0), 0
    for _ in range(100):
        weights = ev.lesion_weights(np.arange(coverage.LESIONS), 50, rng)
        ours, theirs = coverage.study(rng, weights, 2, 3, "shared", 4)
        found = ev.interval((ours - theirs).mean(0)[None], limits=(-9, 9))
        inside += found["low"] <= 0 <= found["high"]
    assert inside <= 75 < ((low <= 0) & (high >= 0)).sum()


@pytest.mark.parametrize("inside, df, t", [     # from the printed tables
    (.95, 1, 12.706), (.95, 2, 4.303), (.95, 3, 3.182), (.95, 8, 2.306), (.95, 30, 2.042),
    (.99, 2, 9.925), (.99, 5, 4.032), (.999, 10, 4.587), (.5, 1, 1.0)])
def test_student_t_has_the_printed_quantiles(inside, df, t):
    assert ev.t_quantile(inside, df) == pytest.approx(t, abs=6e-4)


def test_student_t_with_many_degrees_of_freedom_is_normal():
    assert ev.t_quantile(.95, 10**4) == pytest.approx(NormalDist().inv_cdf(.975), abs=1e-3)


def test_interval_of_one_seed_and_of_undefined_tables():
    table = np.concatenate([[.5], np.linspace(.4, .6, 1001)])[None]
    half = 1.959964 * .2 / 12**.5           # the normal one of a uniform spread
    assert ev.interval(table) == pytest.approx(
        {"value": .5, "low": .5 - half, "high": .5 + half}, abs=1e-3)
    none = {"value": None, "low": None, "high": None}
    assert ev.interval(np.full((2, 6), np.nan)) == none
    assert ev.interval(np.array([[.9, .9, np.nan, np.nan]])) == none
    assert ev.interval(np.array([[.9, .9, 1., np.nan]]))["value"] == .9
    # undefined for one seed of two: such a draw counts for neither
    holed = np.array([[.5, .4, .5, .6, np.nan], [.5, .4, .5, .6, 9.]])
    assert ev.interval(holed) == ev.interval(holed[:, :4])


def test_a_loss_is_a_gain_seen_from_the_other_arm():
    ours, theirs = np.random.default_rng(3).random((2, 3, 41))
    gain, loss = (ev.interval(a - b, limits=(-1, 1)) for a, b in ((ours, theirs), (theirs, ours)))
    assert gain == pytest.approx(
        {"value": -loss["value"], "low": -loss["high"], "high": -loss["low"]})


def test_without_lesion_noise_the_interval_is_the_textbook_t_interval_of_the_seeds():
    values = np.array([.5, .6, .7, .8])
    found = ev.interval(np.repeat(values[:, None], 5, 1))
    half = 3.18245 * values.std(ddof=1) / 2     # t of 3 degrees of freedom at .975
    assert found == pytest.approx({"value": .65, "low": .65 - half, "high": .65 + half}, abs=1e-5)


def test_six_intervals_at_once_are_the_bonferroni_ones():
    rng = np.random.default_rng(0)
    one = np.concatenate([[[.5]], rng.normal(.5, .01, (1, 4000))], 1)
    alone, six = ev.interval(one), ev.interval(one, at_once=6)
    wider = NormalDist().inv_cdf(1 - .025 / 6) / NormalDist().inv_cdf(.975)
    assert six["high"] - .5 == pytest.approx(wider * (alone["high"] - .5))


def test_seed_noise_is_that_of_the_textbook_analysis_of_randomised_blocks():
    """Two arms: the variance of their difference. More: the mean over all pairs of arms."""
    values = np.random.default_rng(1).normal(size=(4, 5))
    of_two, df = ev.seed_noise(values[:2])
    assert of_two == pytest.approx((values[0] - values[1]).var(ddof=1)) and df == 4
    pairs = [(values[a] - values[b]).var(ddof=1) for a in range(4) for b in range(a)]
    assert ev.seed_noise(values) == pytest.approx((np.mean(pairs), 12))
    assert ev.seed_noise(values + np.arange(5.)) == pytest.approx((np.mean(pairs), 12))


# ---- the verdict -----------------------------------------------------------------------------

@pytest.mark.parametrize("low, high, said", [
    (.001, .03, "better"), (.001, .009, "better"), (-.03, -.001, "worse"), (-.01, .01, "equal"),
    (-.002, .009, "equal"), (-.002, .011, "not settled"), (-.03, .002, "not settled"),
    (0., .02, "not settled"), (-.001, 0., "equal"), (0., 0., "not settled"),
    (.03, .03, "not settled")])         # no spread at all: too few to tell
def test_four_outcomes(low, high, said):
    assert ev.outcome(low, high, 0.01) == said


def told(seeds=3, optimistic=(), asked="guided", worst=None, **against):
    """verdict() of controls given as name=(difference, low, high) of the arm asked against them."""
    arms = {name: {"optimistic": name in optimistic, "seeds": seeds} for name in (*against, asked)}

    def row(other, subset, metric, difference, low, high):
        return {"arm": asked, "against": other, "subset": subset, "metric": metric,
                "value": difference, "low": low, "high": high,
                "outcome": low is not None and ev.outcome(low, high, 0.01),
                "optimistic": bool({asked, other} & set(optimistic))}
    found = [row(name, "all", "balanced_accuracy", *values) for name, values in against.items()]
    decoy = [row(name, "hard", "accuracy", .5, .4, .6) for name in against]
    if worst:
        decoy += [row(name, "worst_group", "balanced_accuracy", .1, .05, .15) for name in against]
        decoy += [row(name, "worst_group", "sensitivity", -.1, -.15, -.05) for name in against]
    return verdict({
        "comparisons": decoy[:1] + found + decoy[1:], "arms": arms, "worst_group": worst})


def test_every_verdict():
    clear, unclear, worse = (.02, .005, .035), (-.004, -.019, .012), (-.03, -.05, -.01)
    level = (.001, -.006, .008)
    assert told(real=clear, recolour=(.013, .003, .021)) == (
        "guided is better than real, recolour: +1.3 points of balanced accuracy over recolour "
        "(95 % interval +0.3 to +2.1, of all 2 at once)")
    assert told(real=clear, recolour=unclear, random=level) == (
        "guided is better than real; equal within the margin to random; not settled against "
        "recolour: -0.4 points of balanced accuracy over recolour "
        "(95 % interval -1.9 to +1.2, of all 3 at once)")
    assert told(real=clear, replay=worse).startswith(
        "guided is worse than replay; better than real: -3.0 points")
    assert told(real=clear) == (
        "guided is better than real: +2.0 points of balanced accuracy over real "
        "(95 % interval +0.5 to +3.5)")
    assert told(real=clear, worst="VI") == told(real=clear) + (
        "; in the worst group, VI, it is better than real: +10.0 points of balanced accuracy "
        "over real (95 % interval +5.0 to +15.0); it is worse than real: -10.0 points of "
        "sensitivity over real (95 % interval -15.0 to -5.0)")
    assert told(real=clear, asked="external").startswith("external is better than real")
    assert told(real=clear, seeds=1).endswith("is not in the intervals")
    # an arm mined on the test set is no control
    assert told(real=clear, leak=worse, optimistic=["leak"]) == told(real=clear)
    assert told() == told(leak=worse, optimistic=["leak"]) == (
        "no verdict: the run has no control arm")
    assert told(real=(None, None, None)) == (
        "guided is not judged by balanced accuracy: n too small")


# ---- score -----------------------------------------------------------------------------------

def test_score_adds_up():
    p = predictions(gain={"guided": 1.0})
    s = ev.score(p, draws=300)
    assert json.loads(json.dumps(s, allow_nan=False)) == s
    guided = s["arms"]["guided"]
    assert guided["seeds"] == 2 and guided["optimistic"] is False
    hard = p["test_reference"].mean(0).argmax(1) != p["test_labels"]
    masks = {"all": hard | ~hard, "hard": hard,
             "worst_group": p["test_groups"] == int(s["worst_group"][1])}
    assert list(guided["test"]) == list(masks) and s["hard"]["n"] == hard.sum()
    for subset, mask in masks.items():
        each = [by_hand(probs[mask], p["test_labels"][mask]) for probs in p["test_probs_guided"]]
        enough = [m for m, found in guided["test"][subset].items() if found["value"] is not None]
        assert len(guided["test"][subset]) == 6 and {"accuracy", "sensitivity"} <= {*enough}
        for metric in enough:
            found = guided["test"][subset][metric]
            assert found["value"] == pytest.approx(np.mean([e[metric] for e in each]))
            assert found["low"] <= found["value"] <= found["high"]
    wanted = [(subset, metric) for subset, metrics in ev.COMPARED.items() for metric in metrics]
    assert {(r["arm"], r["against"], r["subset"], r["metric"]) for r in s["comparisons"]} == {
        (*pair, *what) for what in wanted
        for pair in (("random", "real"), ("guided", "real"), ("guided", "random"))}
    row = next(r for r in s["comparisons"] if (r["arm"], r["against"], r["metric"]) ==
               ("guided", "random", "accuracy"))
    gap = [s["arms"][a]["test"]["hard"]["accuracy"]["value"] for a in ("guided", "random")]
    assert row["value"] == pytest.approx(gap[0] - gap[1])
    assert row["low"] < row["value"] < row["high"] and row["optimistic"] is False
    assert verdict(s).startswith("guided is better than real, random: ")
    assert ev.score(p, draws=300) == s  # the same bytes again
    assert ev.score(p, draws=300, seed=1) != s


def test_pairing_makes_the_difference_of_equal_arms_exactly_nothing():
    p = predictions(("real", "guided"))
    p["test_probs_guided"], p["val_probs_guided"] = p["test_probs_real"], p["val_probs_real"]
    comparisons = ev.score(p, draws=50)["comparisons"]
    assert len(comparisons) == 6
    for row in comparisons:
        assert {row["value"], row["low"], row["high"]} <= {0, None}


@pytest.mark.parametrize("arms", [("real",), ("real", "guided"), ("real", "replay"),
                                  ("random", "guided"), ("guided",)])
@pytest.mark.parametrize("seeds, groups", [(1, 0), (2, 3)])
def test_score_takes_any_arms(arms, seeds, groups):
    s = ev.score(predictions(arms, 60, seeds, groups), draws=30)
    json.dumps(s, allow_nan=False)
    assert list(s["arms"]) == list(arms)
    assert (s["worst_group"] is None) == (groups == 0)
    assert ("worst_group" in s["arms"][arms[0]]["test"]) == (groups > 0)
    assert isinstance(verdict(s), str)


def test_optimistic_arms_are_marked_and_claim_nothing():
    p = predictions(("real", "guided", "leaked"), seeds=4, gain={"leaked": 3.0, "guided": 1.0})
    p["optimistic"][2] = True
    s = ev.score(p, draws=50)
    assert [a for a in s["arms"] if s["arms"][a]["optimistic"]] == ["leaked"]
    assert all(r["optimistic"] == ("leaked" in (r["arm"], r["against"])) for r in s["comparisons"])
    assert verdict(s).startswith("guided is better than real: ")


def test_no_hard_case_and_small_groups_have_no_interval():
    p = predictions()
    p["test_reference"] = rows(p["test_labels"])[None]
    missed = (p["val_labels"] + (p["val_groups"] == 1)) % 4
    p["val_reference"] = rows(missed)[None]             # g1 would be the worst by far
    p["test_groups"][:] = 0
    p["test_groups"][:5] = 1
    s = ev.score(p, draws=50)
    assert s["hard"]["n"] == 0 and s["worst_group"] == "g0"     # the others are too small
    none = {"value": None, "low": None, "high": None}
    assert all(found == none for found in s["arms"]["guided"]["test"]["hard"].values())
    assert all(r["value"] is None for r in s["comparisons"] if r["subset"] == "hard")


def test_the_worst_group_is_the_reference_students():
    p = predictions()
    for split in ("val", "test"):
        right = np.where(p[f"{split}_groups"] == 1, (p[f"{split}_labels"] + 1) % 4,
                         p[f"{split}_labels"])
        p[f"{split}_reference"] = np.stack([rows(right)] * 2)
    s = ev.score(p, draws=20)
    assert s["worst_group"] == "g1" and s["hard"]["n"] == (p["test_groups"] == 1).sum()


def test_the_worst_group_is_chosen_without_a_look_at_test_or_at_any_arm():
    p, other = predictions(), predictions(seed=5)
    given = {k for k in p if k.startswith("test_") and k not in ("test_groups", "test_lesions")
             or "_probs_" in k}
    assert {ev.subsets({**p, **{k: other[k] for k in given}}, 10)[1], ev.subsets(p, 10)[1]} == {
        ev.score(p, draws=20)["worst_group"]}
