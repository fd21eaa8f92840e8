"""evaluate.py against something independent: tables by hand, brute force, simulation."""
import json
import math
import sys
import types
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate as ev

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


# ---- metrics ---------------------------------------------------------------------------------

def test_metrics_agree_with_a_table_made_by_hand():
    #                 nv: 2 of 3 right    bkl 1/2   bcc 0/1  mel 3/4
    labels = np.array([0, 0, 0,           1, 1,     2,       3, 3, 3, 3])
    guess = np.array([0, 0, 3,            1, 0,     3,       3, 3, 3, 1])
    groups = np.array([0, 0, 0, 0, 1, 0, 1, 1, 1, -1])
    m = ev.metrics(rows(guess), labels, malignant=MALIGNANT, class_names=CLASSES, groups=groups,
                   group_names=["light", "dark"], hard=guess != labels, min_count=1)
    assert m["n"] == 10 and m["accuracy"] == pytest.approx(0.6)
    assert m["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 0 + 3 / 4) / 4)
    assert m["sensitivity"] == pytest.approx(4 / 5)  # a bcc called mel is still malignant
    assert m["specificity"] == pytest.approx(4 / 5)
    assert [m["per_class"][c]["n"] for c in CLASSES] == [3, 2, 1, 4]
    assert [m["per_class"][c]["recall"] for c in CLASSES] == pytest.approx([2 / 3, 1 / 2, 0, 3 / 4])
    # P(malignant) is .8 where the guess is bcc or mel, .2 elsewhere: 25 pairs, 16 won, 8 tied
    assert m["auroc_malignant"] == pytest.approx((16 + 0.5 * 8) / 25)
    dark = m["per_group"]["dark"]  # labels 1 3 3 3, guesses 0 3 3 3
    assert (dark["n"], dark["accuracy"], dark["sensitivity"], dark["specificity"]) == (4, .75, 1, 1)
    assert dark["balanced_accuracy"] == pytest.approx(0.5)  # over the two classes that are there
    assert m["hard"]["n"] == 4 and m["hard"]["accuracy"] == 0
    assert m["sensitivity_at_90"] is None  # no threshold given
    json.dumps(m, allow_nan=False)


def test_too_few_lesions_give_none_and_still_the_count():
    labels = np.array([0] * 12 + [3] * 9 + [2] * 3)
    given = dict(malignant=MALIGNANT, class_names=CLASSES, groups=(labels == 3).astype(int),
                 group_names=["a", "b"], min_count=10)
    m = ev.metrics(rows(labels), labels, **given)
    assert m["per_class"]["nv"]["recall"] == 1 and m["per_class"]["nv"]["auroc"] == 1
    assert m["per_class"]["mel"] == {"n": 9, "recall": None, "auroc": None, "auprc": None}
    assert m["per_class"]["bkl"]["n"] == 0 and m["per_class"]["bkl"]["recall"] is None
    assert m["sensitivity"] == 1  # 12 malignant together
    assert m["per_group"]["b"] == {"n": 9} | dict.fromkeys(ev.SHORT)
    assert m["per_group"]["a"]["specificity"] == 1 and m["per_group"]["a"]["sensitivity"] is None
    # 12 images of one lesion are one lesion
    lesions = np.where(labels == 0, 0, np.arange(24))
    m = ev.metrics(rows(labels), labels, **given, lesions=lesions)
    assert m["per_class"]["nv"]["recall"] is None and m["specificity"] is None
    assert m["accuracy"] == 1
    empty = ev.metrics(rows([]), np.zeros(0, int), malignant=MALIGNANT,
                       class_names=CLASSES, groups=np.zeros(0, int), group_names=[], min_count=0)
    assert empty["n"] == 0 and empty["accuracy"] is None


@pytest.mark.parametrize("change, words", [
    (lambda p, l: (p * .9, l), "sum to 1"), (lambda p, l: (p, l[:-1]), "do not fit 3 labels"),
    (lambda p, l: (np.where(p > .5, np.nan, p), l), "finite"), (lambda p, l: (p, l + 4), "0..3"),
    (lambda p, l: (p * [2, 0, 0, 0] - [1, 0, 0, 0], l), "negative"),
    (lambda p, l: (p[None], l), "do not fit"), (lambda p, l: (p[:, :3], l), "4 class names")])
def test_bad_probabilities_are_one_clear_line(change, words):
    probs, labels = change(rows([0, 1, 2, 3]), np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=words) as error:
        ev.metrics(probs, labels, malignant=MALIGNANT, class_names=CLASSES,
                   groups=labels, group_names=[])
    assert "\n" not in str(error.value)


def test_auroc_is_the_share_of_pairs_won_with_ties_as_half():
    rng = np.random.default_rng(1)
    for n in (5, 40, 90):
        scores, positive = rng.integers(0, 8, n) / 8, rng.random(n) < 0.4
        positive[:2] = True, False
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
        assert ev.auroc(scores, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert math.isnan(ev.auroc(scores, np.ones(90, bool)))


@pytest.mark.parametrize("area", [ev.auroc, ev.auprc])
def test_a_weighted_area_is_that_of_repeated_data(area):
    rng = np.random.default_rng(2)
    scores, positive = rng.integers(0, 10, 60) / 10, rng.random(60) < 0.5
    weights = rng.integers(0, 4, (60, 25))
    for column, found in zip(weights.T, area(scores, positive, weights.astype(float))):
        assert found == pytest.approx(area(np.repeat(scores, column),
                                           np.repeat(positive, column)), abs=1e-12)


def test_auprc_is_the_sum_over_thresholds():
    rng = np.random.default_rng(3)
    for n in (6, 30, 80):
        scores, positive = rng.integers(0, 9, n) / 9, rng.random(n) < 0.3
        positive[0] = True
        area, recall_before = 0.0, 0.0
        for t in sorted(set(scores), reverse=True):
            taken = scores >= t
            recall = (taken & positive).sum() / positive.sum()
            area += (recall - recall_before) * (taken & positive).sum() / taken.sum()
            recall_before = recall
        assert ev.auprc(scores, positive) == pytest.approx(area, abs=1e-12)
    # right, wrong, right, wrong: recall steps at precision 1 and 2/3
    alternating = np.array([True, False, True, False])
    assert ev.auprc(np.array([.9, .8, .7, .6]), alternating) == pytest.approx(5 / 6)


def test_calibration_error_by_hand():
    # bin (.6, .667]: .61, .66, one of two right: |.5 - .635|; bin (.933, 1]: 1, 1, both right: 0;
    # bin (.867, .933]: .9, wrong: .9. Weighted by 2/5, 2/5, 1/5.
    top = np.array([.61, .66, 1.0, 1.0, .9])
    probs = np.stack([top, 1 - top], 1)
    labels = np.array([0, 1, 0, 0, 1])
    assert ev.expected_calibration_error(probs, labels) == pytest.approx(.4 * .135 + .2 * .9)
    # two errors of opposite sign cancel in one bin but not in fifteen
    assert ev.expected_calibration_error(probs, labels, bins=1) == pytest.approx(abs(3 / 5 - .834))


def test_threshold_spares_the_asked_share_of_the_benign_and_no_more():
    rng = np.random.default_rng(4)
    for specificity in (0.9, 0.95):
        for n in (10, 20, 37, 40):
            scores, sick = rng.random(n + 15), np.arange(n + 15) >= n
            t = ev.threshold_at_specificity(scores, sick, specificity)
            assert (scores[:n] <= t).mean() >= specificity - 1e-12
            lower = max(s for s in scores[:n] if s < t)  # any lower t would fall short
            assert (scores[:n] <= lower).mean() < specificity
    assert ev.threshold_at_specificity(scores, sick | True, 0.9) is None
    ties = np.array([.1] * 8 + [.5] * 2 + [.9])
    assert ev.threshold_at_specificity(ties, np.arange(11) == 10, 0.9) == .5


def test_sensitivity_at_a_threshold_takes_the_sum_over_malignant_classes():
    probs = np.array([[.4, .1, .3, .2], [.4, .3, .2, .1], [.1, .1, .1, .7], [.9, .1, 0, 0]])
    m = ev.metrics(probs, np.array([2, 2, 3, 0]), malignant=MALIGNANT, class_names=CLASSES,
                   groups=np.zeros(4, int), group_names=[], min_count=1,
                   thresholds={"sensitivity_at_90": .45, "sensitivity_at_95": .55})
    assert m["sensitivity_at_90"] == pytest.approx(2 / 3)
    assert m["sensitivity_at_95"] == pytest.approx(1 / 3)


def test_hard_mended_and_broken():
    labels = np.array([0, 1, 2, 3])
    sure, unsure = rows([0, 0, 2, 0], sure=.9), rows([1, 1, 2, 3], sure=.4)
    assert ev.hard_cases(np.stack([unsure, sure]), labels).tolist() == [False, True, False, True]
    mended, broken = ev.mended_and_broken(np.array([0, 0, 0, 3]), np.array([1, 0, 2, 3]), labels)
    assert mended.tolist() == [2] and broken.tolist() == [0]


# ---- statistics ------------------------------------------------------------------------------

def test_lesion_weights_draw_lesions_whole():
    lesions = np.array(["b", "a", "b", "c", "a", "b"])
    weights = ev.lesion_weights(lesions, 4000, np.random.default_rng(0))
    assert weights.shape == (6, 4001) and (weights[:, 0] == 1).all()
    assert (weights[0] == weights[[2, 5]]).all() and (weights[1] == weights[4]).all()
    assert (weights[[0, 1, 3]].sum(0) == 3).all()  # as many lesions as there are
    assert weights[3, 1:].mean() == pytest.approx(1, abs=.04)
    assert weights[3, 1:].var() == pytest.approx(2 / 3, abs=.06)  # binomial(3, 1/3)


def test_tables_are_the_metrics_of_the_repeated_images():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, 50)
    probs = rng.dirichlet(np.ones(4), (3, 50))
    weights = rng.integers(0, 3, (50, 6)).astype(float)
    cuts = [{"sensitivity_at_90": c, "sensitivity_at_95": c + .1} for c in (.3, .5, .7)]
    found = ev.tables(probs, labels, MALIGNANT, cuts, weights)
    for r in range(3):
        for d in range(6):
            again = np.repeat(np.arange(50), weights[:, d].astype(int))
            m = ev.metrics(probs[r, again], labels[again], malignant=MALIGNANT, class_names=CLASSES,
                           groups=again, group_names=[], thresholds=cuts[r], min_count=1)
            for name in ev.COMPARED:
                assert found[name][r, d] == pytest.approx(m[name], abs=1e-12), name


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


def coverage(spread, seeds, runs=1200, lesions=100, draws=250, whole=True):
    """How often the 95 % interval holds the true difference, over that many simulated studies."""
    rng, inside = np.random.default_rng(11), 0
    for _ in range(runs):
        which, before, after, truth = arms_pair(rng, lesions, seeds, spread, 0.25)
        units = which if whole else np.arange(len(which))
        weights = ev.lesion_weights(units, draws, rng)
        table = [arm @ weights / weights.sum(0) for arm in (after, before)]
        _, low, high = ev.paired_difference(*table, ev.seed_spread(seeds, draws, rng))
        inside += low <= truth <= high
    return inside / runs


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("name", SPREADS)
def test_intervals_of_a_difference_cover_the_truth(name, seeds):
    assert 0.93 <= coverage(SPREADS[name], seeds) <= 0.97


def test_resampling_images_instead_of_lesions_would_cover_too_little():
    assert coverage((1, .1, 0, .1, .9), 3, runs=300, whole=False) < 0.92


def test_interval_of_one_seed_and_of_undefined_tables():
    table = np.concatenate([[.5], np.linspace(.4, .6, 1001)])[None]
    assert ev.interval(table, np.zeros(1001)) == pytest.approx((.5, .405, .595))
    assert ev.interval(np.full((2, 6), np.nan), np.zeros(5)) == (None, None, None)
    assert ev.interval(np.array([[.9, .9, 1., np.nan]]), np.zeros(3))[0] == .9
    with pytest.raises(ValueError, match="not paired"):
        ev.paired_difference(np.zeros((2, 5)), np.zeros((3, 5)), np.zeros(4))


def test_seed_spread_enters_the_interval_as_a_t_interval():
    """With no lesion noise at all, the interval is the textbook t interval of the seeds."""
    values = np.array([.5, .6, .7, .8])
    table = np.repeat(values[:, None], 40001, 1)
    draws = ev.seed_spread(4, 40000, np.random.default_rng(0))
    value, low, high = ev.interval(table, draws)
    half = 3.182 * values.std(ddof=1) / 2  # t of 3 degrees of freedom at .975
    assert (value, low, high) == pytest.approx((.65, .65 - half, .65 + half), abs=.01)


def test_mcnemar_by_hand():
    def p(only_ours, only_theirs, both=5):
        ours = np.array([1] * only_ours + [0] * only_theirs + [1] * both, bool)
        return ev.mcnemar(ours, np.array([0] * only_ours + [1] * only_theirs + [1] * both, bool))

    assert p(0, 0) == 1 and p(3, 3) == 1 and p(1, 0) == 1
    assert p(5, 0) == p(0, 5) == pytest.approx(2 / 32)
    assert p(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert p(9, 12) == p(12, 9, both=0)
    assert 0 < p(700, 600) < .01 and p(1000, 1100) > 0  # beyond the range of 2.0**-n


def test_holm_by_hand():
    assert ev.holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert ev.holm([.5, .6]) == [1, 1] and ev.holm([]) == [] and ev.holm([.04]) == [.04]


def test_a_lesion_decides_once_by_its_mean_probability():
    probs = np.array([[[.5, .5], [.1, .9], [.6, .4]], [[.9, .1], [.8, .2], [.2, .8]]])
    lesions, labels = np.array(["x", "x", "y"]), np.array([0, 0, 0])
    assert ev.lesion_right(probs, labels, lesions).tolist() == [True, False]
    assert ev.lesion_right(probs, np.array([0, 1, 1]), lesions).tolist() == [True, True, True]


# ---- the verdict -----------------------------------------------------------------------------

def told(seeds=3, optimistic=(), lifted=True, **against):
    """verdict() of arms given as name=(value, difference, low, high) of guided against them;
    lifted: random itself beats real."""
    def arm(name, value):
        return {"optimistic": name in optimistic, "seeds": [{}] * seeds,
                "test": {"all": {"balanced_accuracy": {"value": value}}}}
    arms = {name: arm(name, row[0]) for name, row in against.items()}
    rows_ = [{"arm": "guided", "against": name, "subset": "all", "metric": "balanced_accuracy",
              "difference": d, "low": low, "high": high}
             for name, (_, d, low, high) in against.items()]
    rows_ += [{"arm": "random", "against": "real", "subset": "all", "metric": "balanced_accuracy",
               "difference": .02, "low": .01 if lifted else -.01, "high": .03}]
    decoy = [dict(r, subset="hard", difference=.5, low=.4, high=.6) for r in rows_]
    return ev.verdict(arms | {"guided": arm("guided", .8)}, decoy + rows_ + decoy)


def test_every_verdict():
    clear, unclear, worse = (.02, .005, .035), (-.004, -.019, .012), (-.03, -.05, -.01)
    assert told(real=(.78, *clear), recolour=(.79, .013, .003, .021)) == (
        "guided beats every control: +1.3 points of balanced accuracy, "
        "95 % interval +0.3 to +2.1 over recolour, the best of them")
    assert told(real=(.78, *clear), recolour=(.804, *unclear), random=(.78, *clear)) == (
        "no gain over recolour: -0.4 points of balanced accuracy, 95 % interval -1.9 to +1.2")
    assert told(real=(.78, *clear), replay=(.83, *worse)).startswith(
        "guided is worse than replay: -3.0 points")
    for random in (.804, .77):  # the best control or not: it is not beaten
        assert told(real=(.78, *clear), replay=(.78, *clear), random=(random, *unclear)).startswith(
            "the gain is the counterfactuals', not the mining's: guided and random beat real, but")
        assert not told(lifted=False, real=(.78, *clear), replay=(.78, *clear),
                        random=(random, *unclear)).startswith("the gain")
    assert told(real=(.78, *clear), random=(.83, *worse)).startswith("guided is worse than random")
    assert told(real=(.804, *unclear), random=(.78, *clear)).startswith("no gain over real")
    assert told(real=(.78, *clear), random=(.79, *unclear), replay=(.8, *unclear)).startswith(
        "no gain over replay")
    assert "not settled against replay" in told(real=(.79, *clear), replay=(.7, .1, -.01, .2))
    assert "no other control was run" in told(real=(.78, *clear))
    assert told(real=(.78, *clear), seeds=1).endswith("is not in the interval")
    # an arm mined on the test set is no control, and can claim nothing itself
    assert told(real=(.78, *clear), recolour=(.79, *clear), leak=(.9, *worse),
                optimistic=["leak"]).startswith("guided beats every control")
    assert told(real=(.78, *clear), optimistic=["guided"]) == (
        "no verdict: guided is optimistic: mined on the test set")
    assert told() == told(leak=(.9, *worse), optimistic=["leak"]) == (
        "no verdict: the run has no control arm")
    assert told(real=(None, None, None, None)) == "no verdict: n too small"
    assert ev.verdict({"real": {}}, []) == "no verdict: the run has no guided arm"


# ---- score -----------------------------------------------------------------------------------

def test_score_adds_up():
    p = predictions(gain={"guided": 1.0})
    s = ev.score(p, draws=300)
    assert json.loads(json.dumps(s, allow_nan=False)) == s
    guided = s["arms"]["guided"]
    assert [row["seed"] for row in guided["seeds"]] == [0, 1]
    for subset in ("all", "hard", "worst_group"):
        for metric, found in guided["test"][subset].items():
            each = [row["test"] if subset == "all" else row["test"]["hard"] if subset == "hard"
                    else row["test"]["per_group"][s["worst_group"]] for row in guided["seeds"]]
            if each[0].get(metric) is None:
                assert found["value"] is None or metric not in each[0]
            else:
                assert found["value"] == pytest.approx(np.mean([e[metric] for e in each]))
                assert found["low"] <= found["value"] <= found["high"]
    reference = ev.hard_cases(p["test_reference"], p["test_labels"])
    assert s["hard"]["n"] == reference.sum() == guided["seeds"][0]["test"]["hard"]["n"]
    votes = p["test_probs_guided"].mean(0).argmax(1)
    assert guided["confusion"][2][3] == ((p["test_labels"] == 2) & (votes == 3)).sum()
    before = p["test_probs_real"].mean(0).argmax(1)
    assert guided["mended"] == ((before != p["test_labels"]) & (votes == p["test_labels"])).sum()
    assert s["arms"]["real"]["mended"] == s["arms"]["real"]["broken"] == 0
    recall = (p["test_probs_guided"].argmax(2) == p["test_labels"])[:, p["test_subtypes"] == 1]
    assert guided["per_subtype"]["s1"]["recall"] == pytest.approx(recall.mean())
    assert guided["per_group"]["g0"]["n"] == (p["test_groups"] == 0).sum()
    pairs = {(r["arm"], r["against"]) for r in s["comparisons"]}
    assert pairs == {("random", "real"), ("guided", "real"), ("guided", "random")}
    tested = [r for r in s["comparisons"] if "mcnemar_p" in r]
    assert len(tested) == 3 and all(r["holm_p"] >= r["mcnemar_p"] for r in tested)
    row = next(r for r in s["comparisons"] if (r["arm"], r["against"], r["subset"], r["metric"]) ==
               ("guided", "random", "hard", "sensitivity"))
    gap = [s["arms"][a]["test"]["hard"]["sensitivity"]["value"] for a in ("guided", "random")]
    assert row["difference"] == pytest.approx(gap[0] - gap[1])
    assert s["verdict"].startswith("guided beats every control")
    assert ev.score(p, draws=300) == s  # the same bytes again


def test_pairing_makes_the_difference_of_equal_arms_exactly_nothing():
    p = predictions(("real", "guided"))
    p["test_probs_guided"], p["val_probs_guided"] = p["test_probs_real"], p["val_probs_real"]
    for row in ev.score(p, draws=50)["comparisons"]:
        assert {row["difference"], row["low"], row["high"]} <= {0, None}
        assert row.get("mcnemar_p", 1) == 1


@pytest.mark.parametrize("arms", [("real",), ("real", "guided"), ("real", "replay"),
                                  ("random", "guided"), ("guided",)])
@pytest.mark.parametrize("seeds, groups, subtypes", [(1, 0, 0), (2, 3, 2)])
def test_score_takes_any_arms(arms, seeds, groups, subtypes):
    s = ev.score(predictions(arms, 60, seeds, groups, subtypes), draws=30)
    json.dumps(s, allow_nan=False)
    assert list(s["arms"]) == list(arms)
    assert (s["worst_group"] is None) == (groups == 0)
    assert ("worst_group" in s["arms"][arms[0]]["test"]) == (groups > 0)
    assert ("mended" in s["arms"][arms[-1]]) == ("real" in arms)
    assert isinstance(s["verdict"], str)


def test_every_class_has_its_interval():
    p = predictions(n=200)
    s = ev.score(p, draws=50)["arms"]["guided"]
    for name, cell in s["per_class"].items():
        for key in ("recall", "auroc", "auprc"):
            assert cell[key]["low"] <= cell[key]["value"] <= cell[key]["high"]
            seeds = [seed["test"]["per_class"][name][key] for seed in s["seeds"]]
            assert cell[key]["value"] == pytest.approx(np.mean(seeds))
    assert s["test"]["all"]["auprc"]["value"] == pytest.approx(
        np.mean([cell["auprc"]["value"] for cell in s["per_class"].values()]))


def test_small_cells_have_no_interval():
    p = predictions()
    p["test_groups"][:] = 0
    p["test_groups"][:5] = 1
    s = ev.score(p, draws=50)
    cell = s["arms"]["guided"]["per_group"]["g1"]
    assert cell["n"] == 5 and cell["accuracy"] == {"value": None, "low": None, "high": None}
    assert s["arms"]["guided"]["per_group"]["g2"]["n"] == 0
    assert s["worst_group"] == "g0"
    assert all(r["difference"] is None for r in s["comparisons"] if r["subset"] == "group:g1")


def test_gaps_between_groups_by_hand():
    p = predictions(groups=4, n=400)
    p["test_groups"][p["test_groups"] == 3] = 0
    p["test_groups"][:8] = 3                                # eight images: left out
    sick = MALIGNANT[p["test_labels"]]
    alarms = np.flatnonzero(~sick & (p["test_groups"] == 2))[:20]
    p["test_probs_real"][:, alarms] = rows([3])[0]          # here the false positives lie apart
    s, short = ev.score(p, draws=200), {}
    for arm in ("real", "guided"):
        called, gaps = MALIGNANT[p[f"test_probs_{arm}"].argmax(2)], []
        for seed in called:
            rate = [[np.mean(seed[(p["test_groups"] == g) & (sick == of)]) for g in range(3)]
                    for of in (True, False)]
            gaps.append([max(rate[0]) - min(rate[0]), max(max(r) - min(r) for r in rate)])
        found = [s["arms"][arm]["test"]["all"][f"{name}_gap"]
                 for name in ("equal_opportunity", "equalised_odds")]
        short[arm] = np.mean(gaps, 0)
        assert [f["value"] for f in found] == pytest.approx(short[arm])
        assert all(0 <= f["low"] <= f["value"] < f["high"] <= 1 for f in found)
    row = next(r for r in s["comparisons"] if (r["arm"], r["against"], r["metric"]) ==
               ("guided", "real", "equal_opportunity_gap"))
    assert row["difference"] == pytest.approx((short["guided"] - short["real"])[0])
    one = ev.score(predictions(groups=1), draws=50)["arms"]["real"]["test"]["all"]
    assert one["equal_opportunity_gap"]["value"] is None    # nothing to compare with
    none = ev.score(predictions(groups=0), draws=50)["arms"]["real"]["test"]["all"]
    assert "equal_opportunity_gap" not in none


def test_the_interval_of_a_gap_covers_it():
    rng, inside = np.random.default_rng(12), 0
    rates, group = np.array([.92, .9, .86, .8, .65]), np.repeat(np.arange(5), 100)
    for _ in range(200):
        right = rng.random((1, 500)) < rates[group]
        weights = ev.lesion_weights(np.arange(500), 200, rng)
        by_group = [{"sensitivity": right[:, group == g] @ weights[group == g]
                     / weights[group == g].sum(0), "specificity": None} for g in range(5)]
        table = ev.gaps(by_group)["equal_opportunity_gap"]
        assert table[:, 1:].mean() == pytest.approx(table[0, 0])
        _, low, high = ev.interval(table, np.zeros(200))
        inside += low <= .27 <= high
    assert 0.88 <= inside / 200 <= 0.98


def test_the_worst_group_is_the_reference_students():
    p = predictions()
    for split in ("val", "test"):
        right = np.where(p[f"{split}_groups"] == 1, (p[f"{split}_labels"] + 1) % 4,
                         p[f"{split}_labels"])
        p[f"{split}_reference"] = np.stack([rows(right)] * 2)
    s = ev.score(p, draws=20)
    assert s["worst_group"] == "g1" and s["hard"]["n"] == (p["test_groups"] == 1).sum()


@pytest.mark.parametrize("key, value, words", [
    ("test_labels", None, "test_labels"), ("val_probs_real", None, "val_probs_real"),
    ("test_probs_guided", np.ones((2, 160, 3)) / 3, "test_probs_guided"),
    ("malignant", MALIGNANT[:2], "malignant"), ("test_lesions", np.arange(3), "test_lesions")])
def test_score_names_the_key_that_is_wrong(key, value, words):
    p = predictions()
    p.pop(key)
    if value is not None:
        p[key] = value
    with pytest.raises(ValueError, match=words):
        ev.score(p, draws=5)


# ---- the generator's quality -----------------------------------------------------------------

def exact_gaussian(rng, n, mean, covariance):
    """Samples whose own mean and covariance are exactly the given ones."""
    x = rng.normal(size=(n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(6)
    m1, m2 = rng.normal(size=3), rng.normal(size=3)
    v1, v2 = np.array([1., 4, 9]), np.array([4., 4, .25])
    a, b = exact_gaussian(rng, 50, m1, np.diag(v1)), exact_gaussian(rng, 80, m2, np.diag(v2))
    closed = ((m1 - m2)**2).sum() + ((np.sqrt(v1) - np.sqrt(v2))**2).sum()  # commuting: by parts
    assert ev.frechet_distance(a, b) == pytest.approx(closed, abs=1e-8)
    s1, s2 = (np.cov(rng.normal(size=(3, 9))) for _ in range(2))  # not commuting
    a, b = exact_gaussian(rng, 50, m1, s1), exact_gaussian(rng, 50, m2, s2)
    trace = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()  # another route to the same root
    closed = ((m1 - m2)**2).sum() + np.trace(s1) + np.trace(s2) - 2 * trace
    assert ev.frechet_distance(a, b) == pytest.approx(closed, abs=1e-8)
    assert ev.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="too few: at least 4"):
        ev.frechet_distance(a[:3], b)
    with pytest.raises(ValueError, match="expected"):
        ev.frechet_distance(a, b[:, :2])


def test_kernel_distance_by_double_loop():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(7, 4)), rng.normal(size=(9, 4)) + 0.5

    def mean(x, y, skip):
        k = [(u @ v / 4 + 1)**3 for i, u in enumerate(x) for j, v in enumerate(y)
             if not (skip and i == j)]
        return sum(k) / len(k)

    closed = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert ev.kernel_distance(a, b) == pytest.approx(closed)
    same = [ev.kernel_distance(*rng.normal(size=(2, 20, 4))) for _ in range(300)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(300)  # unbiased: around 0, both signs


def test_precision_and_recall_with_known_answers():
    line = np.arange(10.0)[:, None]  # third-nearest fellow: 2 away inside, 3 at the ends
    assert ev.precision_recall(line, line + 0.5) == (1, 1)
    assert ev.precision_recall(line, line + 100) == (0, 0)
    # one mode of two: every fake is real-like, half of the reals are reached
    modes = np.concatenate([line, line + 1000])
    assert ev.precision_recall(modes, line + 0.25) == (1, .5)
    # fakes 11, 12, 13, 20: the ends of the line reach 3, so 11 and 12 are in; the fakes' radii are
    # 9, 8, 7, 9, so 2..9 of the reals are reached by 11, and nothing below
    fake = np.array([[11.], [12.], [13.], [20.]])
    assert ev.precision_recall(line, fake) == (.5, .8)
    with pytest.raises(ValueError, match="too few"):
        ev.precision_recall(line[:3], line)


def test_nearest_distance_by_brute_force():
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(23, 2, 3)), rng.normal(size=(31, 2, 3))
    table = np.sqrt(((a[:, None] - b[None])**2).sum((2, 3)))
    for chunk in (1, 7, 512):
        distance, index = ev.nearest_distance(a, b, chunk=chunk)
        assert index.tolist() == table.argmin(1).tolist()
        assert distance == pytest.approx(table.min(1), abs=1e-12)
    images = rng.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)  # uint8 must not wrap around
    distance, index = ev.nearest_distance(images[::-1], images)
    assert (distance == 0).all() and index.tolist() == [5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="cannot compare"):
        ev.nearest_distance(a, b[:, :1])


# ---- python evaluate.py runs/NAME --------------------------------------------------------------

@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    written = []
    monkeypatch.setitem(sys.modules, "report", types.SimpleNamespace(write=written.append))
    p = predictions()
    np.savez_compressed(tmp_path / "predictions.npz", **p)
    results = {"config": {"evaluate": {"min_count": 30, "draws": 40}}, "splits": {"test": 160},
               "arms": {"real": {"added": 0, "seeds": [{"minutes": 1.5}, {"minutes": 1.6}]}},
               "rounds": [{"kept": 12}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path, written


def test_rescoring_undoes_an_edited_number(run_folder, capsys):
    folder, written = run_folder
    assert ev.main([str(folder)]) == 0 and written == [folder]
    path = folder / "results.json"
    first = json.loads(path.read_text())
    assert first["verdict"] in capsys.readouterr().out
    assert first["rounds"] == [{"kept": 12}] and first["arms"]["real"]["added"] == 0
    assert [s["minutes"] for s in first["arms"]["real"]["seeds"]] == [1.5, 1.6]
    direct = ev.score(dict(np.load(folder / "predictions.npz")), min_count=30, draws=40)
    assert first["comparisons"] == direct["comparisons"]  # the config's draws and min_count
    edited = json.loads(path.read_text())
    edited["arms"]["guided"]["seeds"][0]["test"]["accuracy"] = 0.999
    edited["arms"]["guided"]["test"]["all"]["accuracy"]["value"] = 0.999
    edited["arms"]["invented"] = edited["arms"]["guided"]
    edited["comparisons"][0]["difference"], edited["verdict"] = 0.5, "a triumph"
    path.write_text(json.dumps(edited))
    assert ev.main([str(folder)]) == 0
    assert json.loads(path.read_text()) == first
    assert sorted(f.name for f in folder.iterdir()) == ["lock", "predictions.npz", "results.json"]


@pytest.mark.parametrize("spoil", [
    lambda f: (f / "results.json").unlink(), lambda f: (f / "predictions.npz").unlink(),
    lambda f: (f / "results.json").write_text("{"),
    lambda f: (f / "predictions.npz").write_text(""),
    lambda f: (f / "predictions.npz").write_bytes(b"PK\x03\x04 cut short"),
    lambda f: np.savez(f / "predictions.npz", arms=np.array(["real"]))])
def test_a_bad_folder_is_one_line_and_status_2(run_folder, capsys, spoil):
    folder, written = run_folder
    spoil(folder)
    assert ev.main([str(folder)]) == 2 and written == []
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: ") and error.count("\n") == 1
