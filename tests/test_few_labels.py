"""Few labels among many images: who may see which label, and what a guess counts."""
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine import config as configuration
import data
from extras import external
import loop
import mining
from engine.run import RunFolder

TINY = Path(__file__).resolve().parents[1] / "configs/tiny.yaml"
FEW = ["data.labelled=0.3", "data.train=160", "data.val=60", "data.test=80",
       "loop.arms=[real, pseudo, random, guided]", "loop.seeds=1", "ddpm.steps=10",
       "classifier.steps=30", "classifier.guide_steps=10", "guidance.steps=3",
       "guidance.start=recoloured", "guidance.targets=both", "guidance.classifier_free=1",
       "evaluate.draws=100", "evaluate.oracle=100", "loop.share=0.5", "loop.surplus=4"]


def started(folder, *overrides):
    folder.mkdir(exist_ok=True)
    return loop.Experiment(configuration.load(TINY, [*FEW, *overrides]), RunFolder(folder))


def go(folder, monkeypatch):
    monkeypatch.setattr(loop, "SURE", 0.35)     # barely trained, they are sure of little
    e = started(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(e.config.as_dict()))
    e.go()
    with np.load(folder / "predictions.npz") as stored:
        return json.loads((folder / "results.json").read_text()), dict(stored)


def test_train_is_parted_by_lesion_and_alike_for_every_class():
    whole = data.load_phantom(16, 3, 600, 40, 40)["train"]
    parts = data.few_labels(whole, 0.2, 3, seed=0)
    known, rest = parts["train"], parts["unlabelled"]
    assert sorted([*known.sources, *rest.sources]) == sorted(whole.sources)
    assert not set(known.lesions) & set(rest.lesions)
    for label in range(4):
        count, total = (len(set(of.lesions[of.labels == label])) for of in (known, whole))
        assert count == max(3, round(0.2 * total))
    assert len(set(data.few_labels(whole, 0.001, 5, 0)["train"].lesions)) == 4 * 5
    assert set(data.few_labels(whole, 0.2, 3, seed=1)["train"].lesions) != set(known.lesions)


def test_labels_that_are_not_told_change_nothing(tmp_path, monkeypatch):
    results, predictions = go(tmp_path / "a", monkeypatch)
    load = data.load

    def scrambled(*args, **kwargs):
        splits = load(*args, **kwargs)
        rest = splits["unlabelled"]
        return splits | {"unlabelled": dataclasses.replace(rest, labels=3 - rest.labels)}
    monkeypatch.setattr(data, "load", scrambled)
    other, found = go(tmp_path / "b", monkeypatch)
    assert all(np.array_equal(found[key], predictions[key]) for key in predictions)
    assert list(results["arms"]) == ["real", "pseudo", "random", "guided"]
    differ = {key for key in results["pseudo"] if results["pseudo"][key] != other["pseudo"][key]}
    assert differ == {"right"}              # counted, and nothing else
    assert results["pseudo"]["pseudo_labels"] > 20 and results["pseudo"]["unsure"] > 0
    assert "few labels" in (tmp_path / "a/report.md").read_text()
    arms = [predictions[f"test_probs_{arm}"] for arm in ("real", "pseudo", "guided")]
    assert not np.array_equal(arms[0], arms[1]) and not np.array_equal(arms[1], arms[2])
    monkeypatch.setattr(data, "load", load)     # --on knows that the unlabelled were learnt from
    own = configuration.load(tmp_path / "a/config.yaml")
    assert external.score_on(tmp_path / "a", "itself", own)["learnt_from"] == 160 + 60


@pytest.fixture
def guessing(tmp_path, monkeypatch):
    """A prepared experiment after the vote, by teachers who say what the file's name adds up to."""
    e = started(tmp_path / "run")
    e.prepare()
    e.jitter, rest = 0.3, e.splits["unlabelled"]
    votes = np.full((len(rest), 4), 0.05)
    number = np.array([int(source[-6:]) for source in rest.sources])
    votes[np.arange(len(rest)), number % 4] = np.where(number % 3, 0.85, 0.6)
    monkeypatch.setattr(e, "student", lambda *args: None)
    monkeypatch.setattr(e, "predict", lambda network, images: votes)
    e.label_the_rest()
    return e, votes


def test_a_lesion_gets_the_class_of_its_mean_vote_and_joins_train_where_it_is_sure(guessing):
    e, votes = guessing
    rest, sure = e.splits["unlabelled"], {}
    for lesion in np.unique(rest.lesions):
        mean = votes[rest.lesions == lesion].mean(0)
        if mean.max() > loop.SURE:
            sure[lesion] = mean.argmax()
    joined = e.train.subset(np.arange(len(e.labelled), len(e.train)))
    assert set(joined.lesions) == set(sure) and 0 < len(sure) < len(np.unique(rest.lesions))
    assert all(sure[lesion] == label for lesion, label in zip(joined.lesions, joined.labels))
    assert set(joined.folds) == {0, 1}
    assert len(joined) + len(e.unsure) == len(rest) and len(e.seen) == 160


def test_guesses_have_a_weight_of_their_own_and_are_never_mined(guessing):
    e, _ = guessing
    few, share = len(e.labelled), e.config.loop.share
    images, weights = e.mixed(e.train, e.train.subset(np.arange(30)))
    n = len(e.train)
    parts = [weights[:few].sum(), weights[few:n].sum(), weights[n:].sum()]
    assert np.allclose(parts, [(1 - share) * (1 - loop.GUESSED), (1 - share) * loop.GUESSED, share])
    of_class = [weights[few:n][images.labels[few:n] == c].sum() for c in range(4)]
    assert np.allclose(of_class, of_class[0])
    everything_wrong = np.eye(4, dtype=np.float32)[(e.train.labels + 1) % 4]
    assert set(e.mine(e.train, everything_wrong, 10_000, 1)) == set(range(few))


def test_strangers_of_labels_have_labels_and_of_guesses_guesses(guessing):
    e, _ = guessing
    chosen = np.arange(0, len(e.train), 2)
    other = e.strangers(chosen, 1)
    assert ((other < len(e.labelled)) == (chosen < len(e.labelled))).all()
    assert (mining.cells(e.train)[other] == mining.cells(e.train)[chosen]).all()
