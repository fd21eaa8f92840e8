"""What a run tells: counts, leaks, who takes part, the ledger of what was made, the truth."""
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import classifier
import data
import loop
from conftest import set_to
from datasets import phantom
from datasets.layouts import NO_LESIONS
from engine import config as configuration
from engine.augment import to_float
from engine.run import locked
from engine.training import seeded
from extras import estimate, outcome, report
from test_data import made as made_up


# ---- the data ------------------------------------------------------------------------------------

def test_counts_and_table():
    whole = made_up(60)
    counted = outcome.counts(whole)
    assert counted["images"] == sum(counted["classes"].values()) == sum(counted["groups"].values())
    assert counted["lesions"] == 60 and list(counted["groups"]) == ["I", "II", "III", "unknown"]
    for name, label in zip(whole.class_names, range(4)):
        assert counted["classes"][name] == list(whole.labels).count(label)
    known = whole.subset(whole.groups >= 0)
    assert "unknown" not in outcome.counts(known)["groups"]
    train, test, sick = outcome.described({"train": whole, "test": known}).splitlines()
    first = counted["classes"]["c0"]
    assert train.startswith(f"train: {len(whole)} images of 60 lesions: c0 {first}, ")
    assert train.endswith(f", group unknown {(whole.groups == -1).sum()}")
    assert test.startswith(f"test: {len(known)} images of ") and "unknown" not in test
    names = [name for name, malignant in zip(whole.class_names, whole.malignant) if malignant]
    assert sick == "malignant: " + ", ".join(names)


def test_the_leaked_share_is_that_of_test_images_with_a_sister_in_train():
    whole = made_up(60)
    train, test = whole.subset(np.arange(0, len(whole), 2)), whole.subset(np.arange(1, 99, 2))
    seen = [lesion in set(train.lesions) for lesion in test.lesions]
    found = outcome.leaked_share({"train": train, "test": test})
    assert 0 < found["all"] == np.mean(seen) < 1 and len(found) == 5
    for label, name in enumerate(whole.class_names):
        assert found[name] == np.mean([s for s, y in zip(seen, test.labels) if y == label])
    splits = data.split_lesions(whole, 0.2, 0.2, 0)
    assert set(outcome.leaked_share(splits).values()) == {0}


def test_doubts_are_told_before_anything_is_trained(config):
    """Class folders: no lesion is known, and photographs stand in two splits."""
    whole, rng = made_up(90), np.random.default_rng(0)
    whole = replace(whole, images=rng.integers(0, 256, (len(whole), 3, 16, 16), np.uint8))
    own = {name: replace(s, notes=("a note", NO_LESIONS)) for name, s in
           data.split_lesions(whole, 0.2, 0.3, 0).items()}
    images = own["test"].images.copy()
    images[0] = np.rot90(own["train"].images[3], axes=(1, 2))[:, ::-1].clip(0, 254) + 1
    images[1] = own["val"].images[2]
    own["test"] = replace(own["test"], images=images)
    c = config.replace("evaluate", min_count=12)
    notes = estimate.doubts(c, own)["train"].notes
    few = [f"test has {n} lesions of {name} where 12 are wanted (evaluate.min_count): no verdict "
           "possible" for y, name in enumerate(whole.class_names)
           if (n := len(set(own["test"].lesions[own["test"].labels == y]))) < 12]
    twins = [f"images of test that are one of {split}, turned, mirrored or stored anew: 1: "
             f"{own['test'].sources[i]} = {own[split].sources[j]}"
             for split, i, j in (("train", 0, 3), ("val", 1, 2))]
    assert few and notes == ("a note", NO_LESIONS, *few, *twins)
    known = own | {"train": replace(own["train"], notes=())}
    assert estimate.doubts(config.replace("evaluate", min_count=1), known)["train"].notes == ()


def test_all_are_the_arms_that_can_be_run_in_the_order_of_the_table(run, splits, capsys):
    def arms(given, **sections):
        for section, values in sections.items():
            run = set_to(given, section, **values)
            given = run
        return list(outcome.begin(given, splits, loop.ARMS))
    every = ["real", "balanced", "replay", "recolour", "recolour_random", "noise", "noise_hard",
             "random", "guided"]
    assert arms(run, loop={"arms": ["all"]}) == every
    assert arms(run, loop={"arms": ["all", "leaked"]}) == [*every, "leaked"]
    assert arms(run, loop={"arms": ["guided", "real"]}) == ["real", "guided"]
    assert "pseudo" in arms(run, data={"labelled": 0.5}, loop={"arms": ["all"]})
    assert "external" in arms(run, loop={"arms": ["all"]}, guidance={"external": "made.csv"})
    assert "optimistic" not in capsys.readouterr().out
    none = {name: replace(s, groups=np.full(len(s), -1), group_names=())
            for name, s in splits.items()}
    splits = none | {"test": none["train"]}
    assert arms(run, loop={"arms": ["all"]}) == [a for a in every if a != "balanced"]
    said = capsys.readouterr().out
    assert "'balanced' left out" in said and "guidance.start is 'parent'" in said
    assert "every number below is optimistic" in said and "100%" in said


# ---- a round -------------------------------------------------------------------------------------

def test_the_hardness_of_a_round_is_counted_by_hand_over_the_images_used(run, splits):
    """Ten children, each judged by the student that never saw its parent; six of them are used."""
    run, train = set_to(run, "loop", margin=0.3), splits["train"]
    probs = np.full((len(train), 4), 0.1, np.float32)
    probs[np.arange(len(train)), train.labels] = 0.7
    probs[:6] = 0.25                                                    # unsure: margin 0
    probs[np.arange(6, 10), (train.labels[6:10] + 1) % 4] = 0.9         # wrong
    parents, none = np.array([4, 5, 6, 7, 8, 9, 9, 4, 5, 6]), np.zeros(10)
    m = loop.Candidates(train.subset(parents), parents, train.groups[parents], none, none, none, 3)
    foreign = m._replace(children=splits["test"].subset(parents))
    students = [seeded(s, classifier.build, "small", 16, 4).eval() for s in (1, 2)]
    made = {"guided": [m, m], "leaked": [foreign, foreign]}
    first = outcome.of_round(run, train, probs, students, made)
    wrong = np.array([
        classifier.predict(students[fold], torch.tensor(image[None])).argmax() != label
        for image, fold, label in zip(m.children.images, m.children.folds, m.children.labels)])

    used = [{"guided": np.array(a), "leaked": np.array([b])}
            for a, b in (([0, 2, 5], 0), ([3, 4, 9], 2))]
    asked, val = [], splits["val"]
    answers = np.full((1, len(val), 4), 0.25) + 0.1 * np.eye(4)[val.labels]    # all right

    def student(run, name, images, weights, seed, jitter):
        asked.append((name, len(images)))
        return students[0]
    found = outcome.by_round(
        run, splits, [first, first], made, used, {f"val_probs_{arm}": answers for arm in made},
        student, lambda run, train, added: (train.extend(added), None), 0)
    votes = classifier.predict(students[0], torch.tensor(val.images)).argmax(1)
    early = np.mean([np.mean(votes[val.labels == c] == c) for c in range(4)])
    n = len(train)
    assert asked == [("round_1_guided", n + 3), ("round_1_leaked", n + 1)]
    for entry, here, score in zip(found, ([0, 2, 5], [3, 4, 9]), (early, 1)):
        assert entry == {
            "hard out of fold": 10 / n, "wrong out of fold": 4 / n,
            "parents wrong": {"guided": np.mean(parents[here] >= 6)},
            "children wrong": {"guided": wrong[here].mean()},
            "balanced accuracy on val": dict.fromkeys(made, pytest.approx(score))}


def test_the_ledger_says_where_every_image_is_from(tiny):
    folder = tiny / "synthetic"
    rows = list(csv.DictReader((folder / "synthetic.csv").open()))
    assert {row["image"] for row in rows} == {f"{p.parent.name}/{p.name}"
                                             for p in folder.glob("*/*.png")}
    train = data.load(configuration.load(tiny / "config.yaml").data)["train"]
    where = {source: i for i, source in enumerate(train.sources)}
    for row in rows:
        parent = where[row["parent"]]
        assert row["class"] == train.class_names[train.labels[parent]]
        assert int(row["fold"]) == train.folds[parent]
        assert row["group"] != train.group_names[train.groups[parent]]
        assert row["image"].startswith(row["class"] + "/") and 0 <= float(row["judge"]) <= 1
    assert len(rows) == json.loads((tiny / "results.json").read_text())["arms"]["guided"]["added"]


def test_the_synthetic_images_load_as_folders_and_as_a_csv(run, splits):
    train, none, parents = splits["train"], np.zeros(60), np.arange(60)
    targets, why = data.other_groups(train.subset(parents), 0), (parents % 3 == 0).astype(int)
    children = replace(train.subset(parents), images=255 - train.images[parents], groups=targets)
    made = loop.Candidates(children, parents, targets, none, none, why, 0)
    passed = np.flatnonzero(why == 0)
    stale = run.folder / "synthetic" / train.class_names[0] / "9_00000.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    outcome.write_synthetic(run, train, [made, made], [passed, passed])
    assert not stale.exists()
    root, c = run.folder / "synthetic", run.config
    rows = sorted(csv.DictReader((root / "synthetic.csv").open()), key=lambda row: row["image"])
    assert len(rows) == 80 and {row["class"] for row in rows} == set(train.class_names)
    columns = dict(image_column="image", label_column="class", lesion_column="parent",
                   group="group")
    for kind, given in (("folder", {}), ("csv", columns)):
        loaded, sides = data.load_files(c.replace("data", kind=kind, root=str(root),
                                                  malignant=["mel"], **given).data)
        assert sides is None and len(loaded) == len(rows)
        for i, row in enumerate(rows):
            assert loaded.sources[i] == row["image"]
            assert loaded.class_names[loaded.labels[i]] == row["class"]
            stored = np.asarray(Image.open(root / row["image"]))
            assert np.array_equal(loaded.images[i].transpose(1, 2, 0), stored)
            number = train.sources.tolist().index(row["parent"])
            assert np.array_equal(loaded.images[i], 255 - train.images[number])
            if kind == "csv":
                assert loaded.group_names[loaded.groups[i]] == row["group"]
                assert train.sources.tolist().index(row["parent"]) % 3


# ---- the end -------------------------------------------------------------------------------------

def test_predictions_are_each_student_s_on_each_split(run, splits):
    """By students that say their own number and the split they are shown."""
    def predict(run, one, images):
        [which] = [i for i, name in enumerate(("val", "test")) if images is splits[name].images]
        return np.full((len(images), 4), 10 * one + which, np.float32)
    p = outcome.predict(run, splits, {"real": [1, 2], "leaked": [3, 4]}, [5, 6, 7], predict)
    for which, split in enumerate(("val", "test")):
        s = splits[split]
        for arm, students in (("real", (1, 2)), ("leaked", (3, 4))):
            found = p[f"{split}_probs_{arm}"]
            assert found.shape == (2, len(s), 4)
            assert found[:, 0, 0].tolist() == [10 * one + which for one in students]
        assert p[f"{split}_reference"][:, 0, 0].tolist() == [50 + which, 60 + which, 70 + which]
        for key in ("labels", "groups", "subtypes", "lesions", "sources"):
            assert np.array_equal(p[f"{split}_{key}"], getattr(s, key))
    assert p["arms"].tolist() == ["real", "leaked"] and p["optimistic"].tolist() == [False, True]
    assert p["seeds"].tolist() == [0, 1] and tuple(p["class_names"]) == phantom.CLASS_NAMES



def test_extracted_features_are_what_the_last_layer_sees(splits):
    network = seeded(1, classifier.build, "small", 16, 4).eval()
    images = torch.tensor(np.concatenate([splits["train"].images] * 4)[:510])
    features = outcome.extract_features(network, images)
    assert features.shape == (510, 128) and features.dtype == np.float32
    logits = torch.tensor(features) @ network.fc.weight.T + network.fc.bias
    with torch.no_grad():
        assert torch.allclose(logits, network(to_float(images)), atol=1e-4)


def test_a_run_that_is_locked_is_not_scored_again(tiny, capsys):
    before = (tiny / "results.json").read_bytes()
    with locked(tiny), pytest.raises(SystemExit, match="2"):
        report.main([str(tiny)])
    assert "another process" in capsys.readouterr().err
    assert report.main([str(tiny)]) == 0
    assert json.loads((tiny / "results.json").read_bytes()) == json.loads(before)
