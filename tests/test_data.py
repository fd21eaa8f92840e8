"""The data: splits without leaks, folds, parents by cell, the container and every error."""
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest

import data
from data import ImageSet
from datasets import checks
from datasets.layouts import HAM_CLASSES
from engine import config
from test_datasets import derma
from test_images import class_folders, ham_folder, metadata, needs_ham, refuse

TINY = Path(__file__).parents[1] / "configs/tiny.yaml"


def section(**values):
    """The config's section data, by default of the phantom."""
    return config.load(TINY).replace("data", **values).data


@pytest.fixture(scope="module")
def train():
    """The train split of the phantom of configs/tiny.yaml."""
    return data.load(section())["train"]


def made(lesions: int = 400, classes: int = 4, seed: int = 0) -> ImageSet:
    """A set of black 2 x 2 images in random order, 1 to 6 a lesion, with long-tailed classes."""
    rng = np.random.default_rng(seed)
    weights = np.array([8, 4, 2, 1])[:classes]
    label = rng.choice(classes, lesions, p=weights / weights.sum())
    repeats = rng.integers(1, 7, lesions)
    labels = np.repeat(label, repeats)
    order = rng.permutation(len(labels))
    images = np.zeros((len(labels), 3, 2, 2), np.uint8)
    return ImageSet(
        images, labels[order], rng.integers(-1, 3, len(labels)),
        np.repeat([f"L{i:04d}" for i in range(lesions)], repeats)[order],
        np.full(len(labels), -1), np.array([f"i{i:05d}" for i in range(len(labels))]),
        tuple(f"c{i}" for i in range(classes)), ("I", "II", "III"),
        (True,) + (False,) * (classes - 1))


# ---------------------------------------------------------------------------- splits

@pytest.mark.parametrize("seed", range(8))
def test_no_lesion_straddles_a_split_or_a_fold(seed):
    whole = made(seed=seed)
    splits = data.split_lesions(whole, 0.15, 0.2, seed)
    splits["train"] = data.add_folds(splits["train"], 3, seed)
    sides = [set(part.lesions) for part in splits.values()]
    assert sum(map(len, sides)) == len(set(whole.lesions)) == len(set.union(*sides))
    everything = np.concatenate([part.sources for part in splits.values()])
    assert sorted(everything) == sorted(whole.sources)
    for lesion in sides[0]:
        assert len(set(splits["train"].folds[splits["train"].lesions == lesion])) == 1


@pytest.mark.parametrize("seed", range(4))
def test_splits_and_folds_are_stratified_within_rounding(seed):
    whole = made(seed=seed)
    splits = data.split_lesions(whole, 0.15, 0.2, seed)
    train = data.add_folds(splits["train"], 3, seed)
    for label in range(4):
        def lesions(part, where=slice(None)):
            return len(set(part.lesions[where][part.labels[where] == label]))
        total = lesions(whole)
        for name, share in (("val", 0.15), ("test", 0.2)):
            assert abs(lesions(splits[name]) - share * total) <= 0.5
        in_folds = [lesions(train, train.folds == k) for k in range(3)]
        assert max(in_folds) - min(in_folds) <= 1 and sum(in_folds) == lesions(train)
    whole_folds = [len(set(train.lesions[train.folds == k])) for k in range(3)]
    assert max(whole_folds) - min(whole_folds) <= 1   # the rounding does not pile up in fold 0


def test_split_depends_on_the_seed_but_not_on_the_order_of_rows():
    whole = made()
    mixed = whole.subset(np.random.default_rng(3).permutation(len(whole)))

    def sides(image_set, seed):
        splits = data.split_lesions(image_set, 0.1, 0.2, seed)
        train = data.add_folds(splits["train"], 4, seed)
        return ({name: set(part.sources) for name, part in splits.items()},
                dict(zip(train.sources, train.folds)))
    assert sides(whole, 5) == sides(mixed, 5)
    assert sides(whole, 5) != sides(whole, 6)


def test_one_class_does_not_move_another():
    whole = made(classes=4)
    fewer = whole.subset((whole.labels != 0) | (whole.lesions > "L0100"))
    moved, kept = (data.split_lesions(part, 0.1, 0.2, 0)["test"] for part in (whole, fewer))
    assert set(moved.lesions[moved.labels > 0]) == set(kept.lesions[kept.labels > 0])
    assert set(moved.lesions) != set(kept.lesions)


def test_split_errors():
    whole = made()
    refuse("too few for train", data.split_lesions, whole, 0.5, 0.5, 0)
    keep = np.flatnonzero(whole.labels == 3)
    two = np.unique(whole.lesions[keep])[:2]
    scarce = whole.subset((whole.labels != 3) | np.isin(whole.lesions, two))
    refuse("class 'c3' has 2 lesion", data.split_lesions, scarce, 0.1, 0.1, 0)
    none = whole.subset(whole.labels != 3)
    refuse("class 'c3' has 0 lesion", data.split_lesions, none, 0.1, 0.1, 0)
    refuse(r"class 'c3' has 2 lesion\(s\) in train for 3 folds", data.add_folds, scarce, 3, 0)
    assert set(data.add_folds(scarce, 2, 0).folds) == {0, 1}
    refuse("data.folds: 1", data.add_folds, whole, 1, 0)
    labels = whole.labels.copy()
    first = np.flatnonzero(whole.lesions == "L0000")
    assert len(first) > 1
    labels[first[0]] = (labels[first[0]] + 1) % 4
    refuse("lesion L0000 carries two labels", data.split_lesions,
           replace(whole, labels=labels), 0.1, 0.2, 0)


# ---------------------------------------------------------------------------- data sets

@needs_ham
def test_ham10000_is_split_into_the_published_figures():
    """By its table alone; the pixels, which join the lesions of two copies, do not matter here."""
    images, lesions, dx = metadata()
    count, none = len(images), np.full(len(images), -1)
    whole = ImageSet(np.zeros((count, 3, 1, 1), np.uint8), np.array([*map(HAM_CLASSES.index, dx)]),
                     none, lesions, none, images, HAM_CLASSES, (), (False,) * 7)
    splits = data.split_lesions(whole, 0.1, 0.2, 0)
    assert [len(set(part.lesions)) for part in splits.values()] == [5228, 747, 1495]
    assert not set(splits["train"].lesions) & set(splits["test"].lesions)


@needs_ham
def test_a_split_by_image_would_leak_a_third_of_the_test_set():
    """The docstring's figure: 70/10/20 by image, share of test images with a sister in train."""
    _, lesion, dx = metadata()
    everywhere, melanoma = [], []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(lesion))
        train, test = order[:7010], order[8012:]
        leaked = np.isin(lesion[test], lesion[train])
        everywhere.append(leaked.mean())
        melanoma.append(leaked[dx[test] == "mel"].mean())
    assert abs(np.mean(everywhere) - 0.35) < 0.01 and abs(np.mean(melanoma) - 0.62) < 0.015


def leaked(splits) -> float:
    """The share of test images whose lesion also stands in train."""
    return np.mean([lesion in set(splits["train"].lesions) for lesion in splits["test"].lesions])


def test_dermamnist_a_lesion_in_two_of_its_splits_is_kept_together(tmp_path):
    arrays = derma(tmp_path)
    arrays["test_images"][4] = arrays["train_images"][11]       # both of class 4
    arrays["test_images"][1] = arrays["val_images"][1]
    np.savez(tmp_path / "dermamnist_28.npz", **arrays)
    wanted = dict(kind="dermamnist", root=str(tmp_path), size=28, folds=2)
    splits = data.load(section(**wanted))
    assert [len(part) for part in splits.values()] == [29, 8, 5]
    assert not set(splits["train"].lesions) & set(splits["test"].lesions)
    assert splits["train"].notes[1:] == (
        "images that repeat another, pixel for pixel, and count as the same lesion: 2",
        "images moved to the split where their lesion already stands: 2")
    assert set(splits["train"].folds) == {0, 1}
    # by image, as released, and the leak is there to be measured
    splits = data.load(section(**wanted, split_by="image"))
    assert [len(part) for part in splits.values()] == [28, 7, 7]
    assert leaked(splits) == 1 / 7 and set(splits["train"].folds) == {0, 1}


def test_the_image_split_leaks_and_the_true_lesions_are_put_back(tmp_path):
    rows = [(f"L{i // 2}", f"i{i:03d}", HAM_CLASSES[i // 2 % 7]) for i in range(140)]
    root, lesion = ham_folder(tmp_path / "ham", rows), {row[1]: row[0] for row in rows}
    splits = data.load(section(kind="ham10000", root=str(root), split_by="image", seed=3,
                               val_fraction=0.25, test_fraction=0.25))
    for part in splits.values():
        assert [lesion[source] for source in part.sources] == list(part.lesions)
    assert leaked(splits) > 0
    train = splits["train"]
    for k in set(train.folds):           # cross-fitting stays by lesion all the same
        assert not set(train.lesions[train.folds == k]) & set(train.lesions[train.folds != k])


def test_load_phantom():
    given = dict(train=200, val=120, test=120, seed=3)
    splits, again = data.load(section(**given)), data.load(section(**given))
    other = data.load(section(**given | {"seed": 4}))
    assert {name: len(part) for name, part in splits.items()} == dict(train=200, val=120, test=120)
    for name, part in splits.items():
        assert np.array_equal(part.images, again[name].images)
        assert not np.array_equal(part.images, other[name].images)
        assert len(set(part.sources)) == len(part) and part.subtypes.min() >= 0
    lesions = [set(part.lesions) for part in splits.values()]
    assert sum(map(len, lesions)) == len(set.union(*lesions))
    assert not np.array_equal(splits["val"].images, splits["test"].images)   # independent draws
    assert set(splits["train"].folds) == {0, 1} and set(splits["test"].folds) == {-1}
    dark = {name: (part.groups >= 3).mean() for name, part in splits.items()}
    assert dark["train"] < 0.3 < 0.38 < min(dark["val"], dark["test"])


def test_the_phantom_s_draws_are_independent_and_one_may_be_larger():
    c = section(train=40, val=40, test=40)
    oracle = data.load_phantom(c, "oracle", 60)
    sets = [oracle, *(data.load_phantom(c, name, 40) for name in ("train", "val", "test"))]
    assert [len(s) for s in sets] == [60, 40, 40, 40]
    assert not set(oracle.lesions) & {lesion for s in sets[1:] for lesion in s.lesions}
    assert len({image.tobytes() for s in sets for image in s.images}) == 180


def test_load_dispatches(tmp_path):
    shares = dict(val_fraction=0.25, test_fraction=0.25, seed=3)
    root = str(class_folders(tmp_path / "set", 8))
    splits = data.load(section(kind="folder", root=root, malignant=["mel"], **shares))
    assert [len(part) for part in splits.values()] == [12, 6, 6]
    assert set(splits["train"].folds) == {0, 1} and set(splits["val"].folds) == {-1}
    rows = [(f"L{i}", f"i{i:02d}", HAM_CLASSES[i % 7]) for i in range(35)]
    c = section(kind="ham10000", root=str(ham_folder(tmp_path / "ham", rows)), **shares)
    splits, (whole, _) = data.load(c), data.load_files(c)
    assert [len(part) for part in splits.values()] == [21, 7, 7] and leaked(splits) == 0
    assert set(whole.folds) == {-1} and len(whole) == 35


# ---------------------------------------------------------------------------- the container

def test_image_set_is_checked_and_frozen():
    whole = made(20)
    own = whole.labels.copy()
    kept = replace(whole, labels=own)
    with pytest.raises(ValueError):
        kept.labels[0] = 1
    own[0] = own[0]   # the caller's array is not locked
    with pytest.raises(FrozenInstanceError):
        kept.labels = own
    count = len(whole)
    for name, value, match in (
            ("images", whole.images.astype(np.float32), "images must be uint8"),
            ("images", whole.images[:, :1], r"\(N, 3, H, W\)"),
            ("labels", whole.labels[:-1], "labels must be int64"),
            ("labels", whole.labels.astype(np.int32), "found int32"),
            ("labels", whole.labels - 1, "labels must lie in 0..3"),
            ("labels", np.full(count, 4), "labels must lie in 0..3; found 4..4"),
            ("groups", np.full(count, 3), "groups must lie in -1..2"),
            ("groups", np.full(count, -2), "groups must lie in -1..2"),
            ("folds", np.full(count, -2), "folds must lie"),
            ("subtypes", np.zeros(count, np.int64), "subtypes must lie in -1..-1"),
            ("guessed", np.zeros(count, np.int64), "guessed must be bool"),
            ("lesions", np.zeros(count, np.int64), "lesions must be str"),
            ("sources", np.array(["a"] * (count - 1)), "sources must be str"),
            ("malignant", (True,), "malignant has 1 entries for 4 classes")):
        refuse(match, replace, whole, **{name: value})


def test_subset_and_extend():
    whole = made(20)
    picked = whole.subset([5, 2, 2])
    assert list(picked.sources) == ["i00005", "i00002", "i00002"]
    assert list(picked.labels) == [whole.labels[i] for i in (5, 2, 2)]
    mask = whole.labels == 1
    assert len(whole.subset(mask)) == mask.sum() and set(whole.subset(mask).labels) == {1}
    assert len(whole.subset([])) == len(whole.subset(~(mask | ~mask))) == 0
    both = whole.extend(picked)
    assert len(both) == len(whole) + 3 and both.class_names == whole.class_names
    for name in checks.PER_IMAGE:
        assert np.array_equal(getattr(both, name)[-3:], getattr(picked, name))
    longer = replace(picked, lesions=np.array(["a much longer name", "b", "c"]))
    assert whole.extend(longer).lesions[-3] == "a much longer name"   # str arrays have a width
    renamed = replace(whole, class_names=("w", "x", "y", "z"))
    refuse("class_names differ", whole.extend, renamed)
    refuse("malignant differ", whole.extend, replace(whole, malignant=(False,) * 4))
    large = replace(whole, images=np.zeros((len(whole), 3, 4, 4), np.uint8))
    refuse(r"\(2, 2\) and of \(4, 4\) pixels", whole.extend, large)


# ---------------------------------------------------------------------------- parents

def test_margins_by_hand():
    probs = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0, 0, 1]], np.float32)
    images = made(4, 3).subset([0, 1, 2, 3])
    images = replace(images, labels=np.array([0, 2, 1, 0]))
    assert np.allclose(data.margins(probs, images), [0.3, -0.2, 0.0, -1])
    guessed = replace(images, guessed=np.array([False, True, False, True]))
    assert np.allclose(data.margins(probs, guessed), [0.3, 1, 0.0, 1])
    assert probs[3, 2] == 1                                             # the caller's stay


def test_cells_are_classes_by_groups_the_unknown_one_of_them(train):
    pairs = {}
    whole = made(300)
    for cell, y, g in zip(data.cells(whole), whole.labels, whole.groups):
        assert pairs.setdefault(cell, (y, g)) == (y, g)
    assert len(set(pairs.values())) == len(pairs) == len({*zip(whole.labels, whole.groups)})
    none = replace(train, groups=np.full(len(train), -1), group_names=())
    assert (data.cells(none) == train.labels).all()


def test_queues_are_served_by_turns_each_from_when_it_joined():
    queues = [np.arange(3), np.arange(10, 11), np.arange(20, 22)]
    served = np.concatenate(queues)[data.by_turns(queues)]
    assert served.tolist() == [0, 10, 20, 1, 21, 2]
    served = np.concatenate(queues)[data.by_turns(queues, [0, 2, 1])]
    assert served.tolist() == [0, 1, 20, 2, 10, 21]


def test_hard_parents_are_taken_from_the_cells_by_turns(train):
    hard = np.arange(0, len(train), 4)
    everything = data.hard_parents(hard, train, 10_000, 1)
    assert (np.bincount(everything, minlength=len(train))[hard] == data.CHILDREN).all()
    assert set(everything) == set(hard)
    cells = data.cells(train)
    for count in (7, 20, 60, 150):                                      # fewer and more than hard
        chosen = data.hard_parents(hard, train, count, 1)
        taken = {c: (cells[chosen] == c).sum() for c in np.unique(cells[hard])}
        room = {c: data.CHILDREN * (cells[hard] == c).sum() for c in taken}
        most = max(taken.values())
        assert len(chosen) == count and all(taken[c] >= min(room[c], most - 1) for c in taken)
        repeats = np.bincount(chosen, minlength=len(train))
        for c in taken:                                                 # all before any again
            of = repeats[hard][cells[hard] == c]
            assert of.max() - of.min() <= 1
    assert set(data.hard_parents(hard, train, 7, 2)) != set(data.hard_parents(hard, train, 7, 1))


def test_matched_parents_share_cell_and_repetition_and_nothing_else(train):
    cells = data.cells(train)
    chosen = np.repeat(np.arange(0, 120, 3), np.arange(40) % 4 + 1)
    other = data.matched(cells, chosen, 1)
    assert (cells[other] == cells[chosen]).all() and len(np.unique(other)) == 40
    assert len({*zip(chosen, other)}) == 40                             # a mapping, one to one
    common = cells[chosen] == np.bincount(cells).argmax()
    seen = {int(data.matched(cells, chosen, s)[common][0]) for s in range(300)}
    assert len(seen) > 0.9 * (cells == np.bincount(cells).argmax()).sum()   # any of the cell


def test_targets_are_any_group_but_the_own(train):
    drawn = np.stack([data.other_groups(train, seed) for seed in range(200)])
    assert (drawn != train.groups).all()
    for own in range(6):
        share = np.bincount(drawn[:, train.groups == own].ravel(), minlength=6) / 200
        share /= share.sum()
        assert share[own] == 0 and abs(np.delete(share, own) - 0.2).max() < 0.05
    unknown = replace(train, groups=np.full(len(train), -1))
    assert set(data.other_groups(unknown, 0)) == set(range(6))
    for names, group in (((), -1), (("all",), 0)):
        alone = replace(train, groups=np.full(len(train), group), group_names=names)
        assert set(data.other_groups(alone, 0)) == {-1}
