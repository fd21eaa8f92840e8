"""extras/measures.py against something independent: tables by hand, brute force, simulation."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
from extras import measures
from test_evaluate import CLASSES, MALIGNANT, pairs_won, predictions

NONE = {"value": None, "low": None, "high": None}
ONE = np.ones((10_000, 1))      # weights of the sample itself


# ---- metrics ---------------------------------------------------------------------------------

def test_a_weighted_area_is_that_of_repeated_data():
    rng = np.random.default_rng(2)
    scores, positive = rng.integers(0, 10, 60) / 10, rng.random(60) < 0.5
    weights = rng.integers(0, 4, (60, 25))
    for column, found in zip(weights.T, evaluate.auroc(scores, positive, weights.astype(float))):
        again = np.repeat(scores, column), np.repeat(positive, column), ONE[:column.sum()]
        assert found == pytest.approx(evaluate.auroc(*again)[0], abs=1e-12)


def test_threshold_spares_the_asked_share_of_the_benign_and_no_more():
    rng = np.random.default_rng(4)
    for specificity in (0.9, 0.95):
        for n in (10, 20, 37, 40):
            scores, sick = rng.random(n + 15), np.arange(n + 15) >= n
            t = measures.threshold_at_specificity(scores, sick, specificity)
            assert (scores[:n] <= t).mean() >= specificity - 1e-12
            lower = max(s for s in scores[:n] if s < t)  # any lower t would fall short
            assert (scores[:n] <= lower).mean() < specificity
    assert np.isnan(measures.threshold_at_specificity(scores, sick | True, 0.9))
    ties = np.array([.1] * 8 + [.5] * 2 + [.9])
    assert measures.threshold_at_specificity(ties, np.arange(11) == 10, 0.9) == .5


def test_the_interval_of_a_gap_covers_it():
    rng, inside = np.random.default_rng(12), 0
    rates, group = np.array([.92, .9, .86, .8, .65]), np.repeat(np.arange(5), 100)
    for _ in range(200):
        right = rng.random((1, 500)) < rates[group]
        weights = evaluate.lesion_weights(np.arange(500), 200, rng)
        by_group = [evaluate.share(right, group == g, weights) for g in range(5)]
        table = measures.gap(by_group)
        found = evaluate.interval(table, np.zeros(200))
        inside += found["low"] <= .27 <= found["high"]
    assert 0.88 <= inside / 200 <= 0.98


# ---- everything ------------------------------------------------------------------------------

def test_everything_is_the_score_and_more_rounded():
    p = predictions(gain={"guided": 1.0})
    s, plain = measures.everything(p, draws=200), evaluate.score(p, draws=200)
    assert json.loads(json.dumps(s, allow_nan=False)) == s
    for key in ("comparisons", "worst_group", "hard"):
        assert s[key] == measures.rounded(plain[key])
    for arm, entry in plain["arms"].items():
        for subset, found in measures.rounded(entry["test"]).items():
            assert found.items() <= s["arms"][arm]["test"][subset].items()
            assert (len(s["arms"][arm]["test"][subset]) > 6) == (subset == "all")
    nested = {"a": [0.12345678, {"b": [0.5, 1]}], "n": 3, "s": "x", "none": None}
    assert measures.rounded(nested) == {**nested, "a": [0.123457, {"b": [0.5, 1]}]}
    assert measures.rounded([np.float64(1 / 3)], 2) == [.33]


def test_the_groups_and_subtypes_of_an_arm_by_hand():
    p = predictions(gain={"guided": 1.0})
    s = measures.everything(p, draws=50)
    guided, labels = s["arms"]["guided"], p["test_labels"]
    of = p["test_subtypes"] == 1
    recall = (p["test_probs_guided"].argmax(2) == labels)[:, of].mean()
    assert guided["per_subtype"]["s1"]["recall"]["value"] == pytest.approx(recall, abs=1e-6)
    assert guided["per_subtype"]["s1"]["n"] == of.sum()
    group = p["test_groups"] == 0
    called = MALIGNANT[p["test_probs_guided"].argmax(2)]
    found = guided["per_group"]["g0"]
    assert found["n"] == group.sum()
    for name, right, side in (("sensitivity", called, MALIGNANT[labels]),
                              ("specificity", ~called, ~MALIGNANT[labels])):
        assert found[name]["value"] == pytest.approx(right[:, group & side].mean(), abs=1e-6)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]


def test_every_class_has_its_interval():
    p = predictions(n=200)
    s = measures.everything(p, draws=50)["arms"]["guided"]
    for c, (name, cell) in enumerate(s["per_class"].items()):
        of = p["test_labels"] == c
        assert name == CLASSES[c] and cell["n"] == of.sum()
        each = {"recall": (p["test_probs_guided"][:, of].argmax(2) == c).mean(),
                "auroc": np.mean([pairs_won(probs[:, c], of) for probs in p["test_probs_guided"]])}
        for key, value in each.items():
            assert cell[key]["value"] == pytest.approx(value, abs=1e-6)
        for key in ("recall", "auroc"):
            assert cell[key]["low"] <= cell[key]["value"] <= cell[key]["high"]
    assert s["test"]["all"]["auroc"]["value"] == pytest.approx(
        np.mean([cell["auroc"]["value"] for cell in s["per_class"].values()]), abs=1e-6)


def test_sensitivity_at_a_threshold_of_val_sums_the_malignant_classes():
    p = predictions(("real",), seeds=2)
    found = measures.everything(p, draws=50)["arms"]["real"]["test"]["all"]
    for name, specificity in (("sensitivity_at_90", .9), ("sensitivity_at_95", .95)):
        each = []
        for on_val, on_test in zip(p["val_probs_real"], p["test_probs_real"]):
            benign = sorted((on_val[:, 2] + on_val[:, 3])[p["val_labels"] < 2])
            t = next(t for t in benign if np.mean(np.array(benign) <= t) >= specificity)
            each.append(((on_test[:, 2] + on_test[:, 3])[p["test_labels"] >= 2] > t).mean())
        assert found[name]["value"] == pytest.approx(np.mean(each), abs=1e-6)
    p["val_labels"][:] = 3                      # nobody to choose a threshold by
    found = measures.everything(p, draws=50)["arms"]["real"]["test"]["all"]
    assert found["sensitivity_at_90"] == NONE and found["sensitivity"]["value"] is not None


def test_small_cells_have_no_interval():
    p = predictions()
    p["test_groups"][:] = 0
    p["test_groups"][:5] = 1
    p["test_lesions"][p["test_subtypes"] == 1] = "one"          # many images of one lesion
    p["test_labels"][p["test_labels"] == 2] = 3
    s = measures.everything(p, draws=50)
    guided = s["arms"]["guided"]
    assert guided["per_group"]["g1"] == {"n": 5, "sensitivity": NONE, "specificity": NONE}
    assert guided["per_group"]["g2"]["n"] == 0
    assert guided["per_subtype"]["s1"]["recall"] == NONE and guided["per_subtype"]["s1"]["n"] > 10
    assert guided["per_class"]["bcc"] == {"n": 0, "recall": NONE, "auroc": NONE}
    assert guided["test"]["all"]["equal_opportunity_gap"] == NONE       # one group is left
    p["test_labels"] = np.where(np.arange(160) < 5, 0, 3)
    mel = measures.everything(p, draws=50)["arms"]["guided"]["per_class"]["mel"]
    assert mel["recall"]["value"] > 0 and mel["auroc"] == NONE  # 5 are others


def test_gaps_between_groups_by_hand():
    p = predictions(groups=4, n=400)
    p["test_groups"][p["test_groups"] == 3] = 0
    p["test_groups"][:8] = 3                                # eight images: left out
    sick = MALIGNANT[p["test_labels"]]
    s = measures.everything(p, draws=200)
    for arm in ("real", "guided"):
        called, gaps = MALIGNANT[p[f"test_probs_{arm}"].argmax(2)], []
        for seed in called:
            rate = [np.mean(seed[(p["test_groups"] == g) & sick]) for g in range(3)]
            gaps.append(max(rate) - min(rate))
        found = s["arms"][arm]["test"]["all"]["equal_opportunity_gap"]
        assert found["value"] == pytest.approx(np.mean(gaps), abs=1e-6)
        assert 0 <= found["low"] <= found["value"] < found["high"] <= 1
    one = measures.everything(predictions(groups=1), draws=50)["arms"]["real"]
    assert one["test"]["all"]["equal_opportunity_gap"] == NONE          # nothing to compare with
    none = measures.everything(predictions(groups=0, subtypes=0), draws=50)["arms"]["real"]
    assert "equal_opportunity_gap" not in none["test"]["all"]
    assert none["per_group"] == none["per_subtype"] == {}


@pytest.mark.parametrize("arms", [("real",), ("real", "replay"), ("random", "guided")])
@pytest.mark.parametrize("seeds, groups, subtypes", [(1, 0, 0), (2, 3, 2)])
def test_everything_takes_any_arms(arms, seeds, groups, subtypes):
    s = measures.everything(predictions(arms, 60, seeds, groups, subtypes), draws=30)
    json.dumps(s, allow_nan=False)
    assert list(s["arms"]) == list(arms)


@pytest.mark.parametrize("key, value, words", [
    ("test_labels", None, "test_labels"), ("val_probs_real", None, "val_probs_real"),
    ("test_probs_guided", np.ones((2, 160, 3)) / 3, "test_probs_guided"),
    ("malignant", MALIGNANT[:2], "malignant"), ("test_lesions", np.arange(3), "test_lesions"),
    ("test_reference", np.ones((2, 160, 4)), "test_reference must .* sum to 1"),
    ("test_probs_real", np.full((2, 160, 4), np.nan), "test_probs_real must be finite"),
    ("test_probs_real", np.tile([2., -1, 0, 0], (2, 160, 1)), "test_probs_real .* not negative"),
    ("arms", None, "arms"), ("test_labels", np.full(160, 4), "test_labels must be some, in 0..3"),
    ("val_labels", np.zeros(0, int), "val_labels must be some, in 0..3")])
def test_everything_names_the_key_that_is_wrong(key, value, words):
    p = predictions()
    p.pop(key)
    if value is not None:
        p[key] = value
    with pytest.raises(ValueError, match=words):
        measures.everything(p, draws=5)


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
    assert measures.frechet_distance(a, b) == pytest.approx(closed, abs=1e-8)
    s1, s2 = (np.cov(rng.normal(size=(3, 9))) for _ in range(2))  # not commuting
    a, b = exact_gaussian(rng, 50, m1, s1), exact_gaussian(rng, 50, m2, s2)
    trace = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()  # another route to the same root
    closed = ((m1 - m2)**2).sum() + np.trace(s1) + np.trace(s2) - 2 * trace
    assert measures.frechet_distance(a, b) == pytest.approx(closed, abs=1e-8)
    assert measures.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_precision_and_recall_with_known_answers():
    line = np.arange(10.0)[:, None]  # third-nearest fellow: 2 away inside, 3 at the ends
    assert measures.precision_recall(line, line + 0.5) == (1, 1)
    assert measures.precision_recall(line, line + 100) == (0, 0)
    # one mode of two: every fake is real-like, half of the reals are reached
    modes = np.concatenate([line, line + 1000])
    assert measures.precision_recall(modes, line + 0.25) == (1, .5)
    # fakes 11, 12, 13, 20: the ends of the line reach 3, so 11 and 12 are in; the fakes' radii are
    # 9, 8, 7, 9, so 2..9 of the reals are reached by 11, and nothing below
    fake = np.array([[11.], [12.], [13.], [20.]])
    assert measures.precision_recall(line, fake) == (.5, .8)


def test_nearest_distance_by_brute_force():
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(23, 2, 3)), rng.normal(size=(31, 2, 3))
    table = np.sqrt(((a[:, None] - b[None])**2).sum((2, 3)))
    for chunk in (1, 7, 512):
        distance, index = measures.nearest_distance(a, b, chunk=chunk)
        assert index.tolist() == table.argmin(1).tolist()
        assert distance == pytest.approx(table.min(1), abs=1e-12)
    images = rng.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)  # uint8 must not wrap around
    distance, index = measures.nearest_distance(images[::-1], images)
    assert (distance == 0).all() and index.tolist() == [5, 4, 3, 2, 1, 0]
    assert [len(found) for found in measures.nearest_distance(a[:0], b)] == [0, 0]


def test_distances_between_thumbnails_are_grey_levels():
    image = np.full((1, 3, 32, 32), 100, np.uint8)
    distance, _ = measures.nearest(image + 7, image)
    assert np.isclose(distance[0], 7, atol=1e-4)
    small = measures.thumbnails(np.arange(48, dtype=np.uint8).reshape(1, 3, 4, 4), side=2)
    assert small.dtype == np.float32 and small[0, 0, 0, 0] == pytest.approx(2.5 / 12 ** 0.5)


def test_a_turned_copy_is_found():
    known = np.random.default_rng(9).integers(0, 256, (10_020, 3, 16, 16), dtype=np.uint8)
    images, where = known[10_010:10_014], np.arange(10_010, 10_014)     # in the second block
    for turned in (images, images.transpose(0, 1, 3, 2), images[:, :, ::-1], images[:, :, :, ::-1],
                   np.rot90(images, axes=(2, 3)), images[:, :, ::-1, ::-1].transpose(0, 1, 3, 2)):
        distance, index = measures.nearest(np.ascontiguousarray(turned), known)
        assert np.allclose(distance, 0, atol=1e-3) and (index == where).all()
    assert measures.nearest(images, known[:1000])[0].min() > 50


def image_set(n, seed, groups=3, size=8):
    rng = np.random.default_rng(seed)
    return SimpleNamespace(
        images=rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8),
        labels=rng.integers(0, 4, n), groups=rng.integers(-1, groups, n) if groups else -np.ones(n),
        class_names=tuple(CLASSES), group_names=("I", "II", "III")[:groups])


def test_sets_are_compared_at_the_same_mixture():
    a, b = image_set(150, 1), image_set(220, 2)
    chosen = measures.same_mixture([a, b], 0)
    cells = [s.labels[i] * 10 + s.groups[i] for s, i in zip((a, b), chosen)]
    assert sorted(cells[0]) == sorted(cells[1])
    assert all(len(set(i)) == len(i) for i in chosen)
    for cell in np.unique(a.labels * 10 + a.groups):
        fewer = min(((s.labels * 10 + s.groups) == cell).sum() for s in (a, b))
        assert (cells[0] == cell).sum() == fewer
    none = image_set(220, 2, groups=0)                      # knows no groups: classes alone
    chosen = measures.same_mixture([a, none], 0)
    fewer = np.minimum(np.bincount(a.labels), np.bincount(none.labels))
    for s, i in zip((a, none), chosen):
        assert (np.bincount(s.labels[i], minlength=4) == fewer).all()


def test_the_quality_of_a_generator_that_copies_and_of_one_that_does_not():
    train, test, val = (image_set(400, seed) for seed in (1, 2, 3))
    copies = SimpleNamespace(**{**vars(train), "images": train.images[:, :, ::-1].copy()})

    def features(images):               # (N, 3): the mean of every channel
        return images.reshape(len(images), 3, -1).mean(2)

    def votes(images):                  # knows the copied images' classes, calls the others 0
        known = {image.tobytes(): y for image, y in zip(copies.images, copies.labels)}
        return np.array([known.get(image.tobytes(), 0) for image in images])
    sets = {"guided": copies, "real (val)": val}
    found = measures.generator_quality(features, votes, sets, test, train.images, 5, oracle=True)
    guided, real = found["guided"], found["real (val)"]
    assert guided["label_fidelity_oracle"] == 1 and real["label_fidelity_oracle"] < .5
    *chosen, of_test = measures.same_mixture([copies, val, test], 5)
    apart = [measures.nearest(s.images[index], train.images)[0]
             for s, index in ((val, chosen[1]), (test, of_test))]
    pairs = (apart[0][:, None] < apart[1]).mean() + (apart[0][:, None] == apart[1]).mean() / 2
    assert guided["nearer"] == 1 and real["nearer"] == pytest.approx(pairs) and 0.4 < pairs < 0.6
    assert guided["n"] == real["n"] == len(of_test) > 100
    for row, s, index in zip((guided, real), (copies, val), chosen):
        ours, theirs = features(s.images[index]), features(test.images[of_test])
        assert row["frechet"] == pytest.approx(measures.frechet_distance(theirs, ours), abs=1e-6)
        assert [row["precision"], row["recall"]] == pytest.approx(
            measures.precision_recall(theirs, ours), abs=1e-6)
    plain = measures.generator_quality(
        lambda images: np.tile(features(images), 134), votes, sets, test, train.images[:20], 5)
    for row in plain.values():          # as many features as that: too few images
        assert row["frechet"] is row["precision"] is row["recall"] is None
        assert not [key for key in row if key.startswith("label")]
    assert plain["guided"]["n"] == guided["n"] <= 400
