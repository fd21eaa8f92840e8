"""Few labels among many images: who may see which label, and what a guess counts."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import loop
import score_on
from conftest import SMALL, new
from engine import config as configuration
from engine.run import Run
from extras import few_labels, networks

FEW = ["data.labelled=0.3", "loop.arms=[real, pseudo, guided]", "loop.seeds=1",
       "ddpm.steps=10", "guidance.start=recoloured", "guidance.targets=groups", "loop.share=0.5"]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    return Run(tmp_path, configuration.load(tmp_path / "small.yaml", FEW))


@pytest.fixture
def splits(run):
    splits = data.load(run.config.data)
    return splits | few_labels.hide(run.config.data, splits)


def whole(count=600):
    c = configuration.load(Path(__file__).parents[1] / "configs/tiny.yaml")
    return c, data.load(c.replace("data", train=count, seed=3).data)


def test_train_is_parted_by_lesion_and_alike_for_every_class():
    c, splits = whole()
    train = splits["train"]

    def hidden(labelled, folds=3, seed=0):
        return few_labels.hide(c.replace("data", labelled=labelled, folds=folds, seed=seed).data,
                               splits)
    parts = hidden(0.2)
    known, rest = parts["train"], parts["unlabelled"]
    assert sorted([*known.sources, *rest.sources]) == sorted(train.sources)
    assert not set(known.lesions) & set(rest.lesions)
    assert set(known.folds) == {0, 1, 2} and set(rest.folds) == {-1}
    for label in range(4):
        count, total = (len(set(of.lesions[of.labels == label])) for of in (known, train))
        assert count == max(3, round(0.2 * total))
    assert len(set(hidden(0.001, 5)["train"].lesions)) == 4 * 5
    assert set(hidden(0.2, seed=1)["train"].lesions) != set(known.lesions)
    assert hidden(1.0) == {}


def trained(place, run, splits):
    """What is learnt from these splits: train after the vote, what the generator and a student of
    it make, and what is told."""
    place.mkdir()
    run = Run(place, run.config.replace("classifier", steps=8, guide_steps=3))
    train, seen, told = few_labels.guess(run, splits, 0.3, loop.student, loop.predict, loop.mixed,
                                         sure=0.3)
    images, weights = loop.mixed(run, train)
    generator = networks.train_generator(run, train, seen, weights)
    student = loop.student(run, "judge", images, weights, 1, 0.3)
    learnt = [torch.cat([w.flatten().float() for w in network.state_dict().values()])
              for network in (generator.unet, generator.guide, student)]
    return train, learnt, told


def test_labels_that_are_not_told_change_nothing(run, splits, tmp_path):
    train, learnt, told = trained(tmp_path / "a", run, splits)
    rest = splits["unlabelled"]
    other = splits | {"unlabelled": dataclasses.replace(rest, labels=(rest.labels + 2) % 4)}
    again, found, otherwise = trained(tmp_path / "b", run, other)
    assert all(torch.equal(a, b) for a, b in zip(learnt, found))
    assert np.array_equal(train.labels, again.labels)
    assert {key for key in told if told[key] != otherwise[key]} == {"right"}    # counted, no more
    assert told["pseudo_labels"] > 20 and told["labels"] == len(splits["train"])


def test_a_run_with_few_labels_ends_in_its_report(tmp_path):
    folder = new(tmp_path, *FEW, "classifier.steps=45", "classifier.batch=8",
                 "data.labelled=0.5")
    results = json.loads((folder / "results.json").read_text())
    assert list(results["arms"]) == ["real", "pseudo", "guided"]
    told = results["pseudo"]
    assert told["labels"] == results["splits"]["train"]["images"] - told["pseudo_labels"]
    assert told["pseudo_labels"] > 0 < told["unsure"]
    assert "few labels" in (folder / "report.md").read_text().lower()
    with np.load(folder / "predictions.npz") as p:
        arms = [p[f"test_probs_{arm}"] for arm in ("real", "pseudo", "guided")]
    assert not np.array_equal(arms[0], arms[1]) and not np.array_equal(arms[1], arms[2])
    own = configuration.load(folder / "config.yaml")    # the unlabelled were learnt from as well
    assert score_on.score_on(folder, "itself", own)["learnt_from"] == 160 + 60


@pytest.fixture
def guessing(run, splits):
    """After the vote, by teachers who say what the file's name adds up to: (train, seen, votes)."""
    rest, asked = splits["unlabelled"], []
    votes = np.full((len(rest), 4), 0.05)
    number = np.array([int(source[-6:]) for source in rest.sources])
    votes[np.arange(len(rest)), number % 4] = np.where(number % 3, 0.85, 0.6)

    def student(run, name, images, weights, seed, jitter):
        assert images is splits["train"] and len(weights) == len(images)
        asked.append(name)

    def predict(run, network, images):
        assert images is rest.images
        return votes
    train, seen, told = few_labels.guess(run, splits, 0.3, student, predict, loop.mixed)
    assert len(set(asked)) == few_labels.TEACHERS
    assert told["pseudo_labels"] + told["unsure"] == len(rest)
    return train, seen, votes


def test_a_lesion_gets_the_class_of_its_mean_vote_and_joins_train_where_it_is_sure(guessing,
                                                                                  splits):
    (train, seen, votes), rest, sure = guessing, splits["unlabelled"], {}
    few = len(splits["train"])
    for lesion in np.unique(rest.lesions):
        mean = votes[rest.lesions == lesion].mean(0)
        if mean.max() > few_labels.SURE:
            sure[lesion] = mean.argmax()
    joined = train.subset(np.arange(few, len(train)))
    assert set(joined.lesions) == set(sure) and 0 < len(sure) < len(np.unique(rest.lesions))
    assert all(sure[lesion] == label for lesion, label in zip(joined.lesions, joined.labels))
    assert set(joined.folds) == {0, 1} and joined.guessed.all()
    for lesion in set(joined.lesions):
        assert len(set(joined.folds[joined.lesions == lesion])) == 1
    assert not train.guessed[:few].any() and np.array_equal(train.images[:few],
                                                            splits["train"].images)
    assert len(seen) == 160 and np.array_equal(seen.images[:len(train)], train.images)


def test_without_hidden_labels_nobody_votes(run, splits):
    plain = {"train": splits["train"]}
    assert few_labels.guess(run, plain, 0.3, None, None, None) == (
        splits["train"], splits["train"], {})


def test_guesses_have_a_weight_of_their_own_and_are_never_mined(guessing, run, splits):
    (train, _, _), few, share = guessing, len(splits["train"]), run.config.loop.share
    images, weights = loop.mixed(run, train, train.subset(np.arange(30)))
    n = len(train)
    parts = [weights[:few].sum(), weights[few:n].sum(), weights[n:].sum()]
    real, guessed = 1 - share, few_labels.GUESSED
    assert np.allclose(parts, [real * (1 - guessed), real * guessed, share])
    of_class = [weights[few:n][images.labels[few:n] == c].sum() for c in range(4)]
    assert np.allclose(of_class, of_class[0])
    for real in ("labels", "cells"):                # arms real and balanced: the labels alone
        images, weights = loop.mixed(run, train, real=real)
        assert len(images) == len(weights) == few and np.isclose(weights.sum(), 1)
    everything_wrong = np.eye(4, dtype=np.float32)[(train.labels + 1) % 4]
    many = run.config.replace("guidance", targets="hard").replace("loop", added=20.0)
    hard = Run(run.folder, many)
    assert set(loop.mine(hard, train, everything_wrong, 20 * few, None, 1)[0]) == set(range(few))


def test_the_students_that_mine_learn_from_labels_alone(guessing, run, splits, tmp_path):
    """Other guesses change nothing in them."""
    train, learnt = guessing[0], []
    given = run.config.replace("classifier", steps=2)
    for number, labels in enumerate((train.labels, np.where(train.guessed, 3 - train.labels,
                                                            train.labels))):
        place = tmp_path / str(number)
        place.mkdir()
        _, probs = loop.cross_fit(Run(place, given), 1, loop.replace(train, labels=labels), None,
                                  0.3)
        learnt.append(probs)
    assert np.array_equal(*learnt)


def test_the_matched_of_labels_have_labels_and_of_guesses_guesses(guessing, run):
    train, chosen = guessing[0], np.arange(0, len(guessing[0]), 2)
    kit = loop.Kit(run, "random_1", 1, train, None, [])
    source, other, _ = loop.parents_for(kit, loop.ARMS["random"], (chosen, chosen * 0), {}, [])
    assert source is train and (train.guessed[other] == train.guessed[chosen]).all()
    assert (data.cells(train)[other] == data.cells(train)[chosen]).all()


def test_parents_for_the_rarest_cells_fill_the_rarest_first():
    train = whole(240)[1]["train"]
    real = np.zeros((4, 6), int)
    np.add.at(real, (train.labels, train.groups), 1)
    for count in (30, 200):
        parents, targets = few_labels.even_parents(train, None, count, 1)
        filled = real.copy()
        for parent, target in zip(parents, targets):
            y = train.labels[parent]
            assert filled[y, target] == filled.min() and train.groups[parent] != target
            filled[y, target] += 1
        assert len({*zip(parents, targets)}) == len(parents) == count
    # what an earlier round added counts as well
    rare = np.argwhere(real == real.min())[0]
    added = train.subset(np.flatnonzero(train.labels == rare[0])[:1].repeat(50))
    added = dataclasses.replace(added, groups=np.full(50, rare[1]))
    parents, targets = few_labels.even_parents(train, added, 30, 1)
    assert not ((train.labels[parents] == rare[0]) & (targets == rare[1])).any()
    # without groups, or with one, the classes even out, each parent at most CHILDREN times
    for group, names in ((-1, ()), (0, ("all",))):
        alone = dataclasses.replace(train, groups=np.full(len(train), group), group_names=names)
        parents, targets = few_labels.even_parents(alone, None, 60, 1)
        assert (targets == -1).all() and np.bincount(parents).max() <= data.CHILDREN
        filled = np.bincount(train.labels) + np.bincount(train.labels[parents], minlength=4)
        assert filled.max() - filled.min() > 1 and np.ptp(np.sort(filled)[:2]) <= 1
