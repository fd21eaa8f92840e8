"""The loop as a whole: the tiny run, interrupted, resumed; and its parts by brute force."""
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config as configuration
import data
import loop
import phantom
from runfolder import RunError, RunFolder, clock, new_folder

HERE = Path(__file__).parents[1]
TINY = HERE / "configs/tiny.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An unbroken run of configs/tiny.yaml."""
    return go(tmp_path_factory.mktemp("tiny"), ["--config", str(TINY)])


def go(where: Path, arguments, status=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        assert loop.main(arguments) == status
    return where / "runs/tiny"


def test_the_run_folder_holds_what_it_should(tiny):
    results = json.loads((tiny / "results.json").read_text())
    assert list(results["arms"]) == ["real", "replay", "recolour", "random", "guided"]
    wanted = {"accuracy", "sensitivity", "specificity", "balanced_accuracy", "auroc", "ece",
              "per_class", "per_group", "hard"}
    added = {results["arms"][arm]["added"] for arm in results["arms"] if arm != "real"}
    assert len(added) == 1 and results["arms"]["real"]["added"] == 0      # as many in every arm
    for arm in results["arms"].values():
        assert len(arm["seeds"]) == 2
        assert all(wanted <= set(seed["test"]) for seed in arm["seeds"])
    assert results["splits"]["train"]["images"] == 240 and len(results["rounds"]) == 1
    assert configuration.load(tiny / "config.yaml").as_dict() == results["config"]
    for name in ("data", "hard", "children", "types", "guided", "composition", "neighbours",
                 "mended"):
        assert Image.open(tiny / f"pictures/{name}.png").width > 50
    for event in map(json.loads, (tiny / "log.jsonl").read_text().splitlines()):
        assert {"time", "event"} <= set(event)
    assert "guided" in (tiny / "report.md").read_text()


def test_the_ledger_says_where_every_image_is_from(tiny):
    folder = tiny / "synthetic/round_1"
    rows = list(csv.DictReader((folder / "synthetic.csv").open()))
    assert {row["file"] for row in rows} == {f"{p.parent.name}/{p.name}"
                                             for p in folder.glob("*/*.png")}
    c = configuration.load(TINY)
    train = data.load(**vars(c.data))["train"]
    where = {source: i for i, source in enumerate(train.sources)}
    for row in rows:
        parent = where[row["parent"]]
        assert row["class"] == train.class_names[train.labels[parent]]
        assert int(row["fold"]) == train.folds[parent]
        assert row["group"] != train.group_names[train.groups[parent]]
        assert row["file"].startswith(row["class"] + "/") and 0 <= float(row["judge"]) <= 1
    assert len(rows) >= json.loads((tiny / "results.json").read_text())["arms"]["guided"]["added"]


def test_the_synthetic_images_load_as_folders_and_as_a_csv(tiny):
    rows = list(csv.DictReader((tiny / "synthetic/round_1/synthetic.csv").open()))
    rows.sort(key=lambda row: row["file"])
    names = dict(image_column="file", label_column="class", lesion_column="parent")
    for kind, root, group in (("folder", "synthetic", ""), ("folder", "synthetic/round_1", ""),
                              ("csv", "synthetic/round_1", "group")):
        loaded, sides = data.load_images(kind, tiny / root, 16, ["mel"], **names, group=group,
                                         skip_bad=False)
        assert sides is None and len(loaded) == len(rows)
        for i, row in enumerate(rows):
            assert loaded.sources[i].endswith(row["file"])
            assert loaded.class_names[loaded.labels[i]] == row["class"]
            stored = np.asarray(Image.open(tiny / "synthetic/round_1" / row["file"]))
            assert np.array_equal(loaded.images[i].transpose(1, 2, 0), stored)
            if kind == "csv":
                assert loaded.group_names[loaded.groups[i]] == row["group"]
                assert loaded.lesions[i] == row["parent"]


class Stopped(KeyboardInterrupt):
    pass


def test_a_run_stopped_anywhere_and_resumed_gives_the_same_bytes(tiny, tmp_path, monkeypatch):
    save = RunFolder.save
    stops = ["ddpm.partial", "guide", "guided_1", "student_random_1"]

    def stopping(self, name, content):
        if stops and name == stops[0]:
            if not name.endswith("partial"):
                stops.pop(0)
                raise Stopped               # before the write: the stage is lost, not half there
            stops.pop(0)
            save(self, name, content)
            raise Stopped
        save(self, name, content)
    monkeypatch.setattr(RunFolder, "save", stopping)
    folder = go(tmp_path, ["--config", str(TINY)], status=130)
    while stops:
        go(tmp_path, ["--resume", "runs/tiny"], status=130)
    go(tmp_path, ["--resume", "runs/tiny"])
    files = sorted(p.relative_to(tiny) for p in tiny.rglob("*") if p.suffix in (".png", ".csv"))
    assert len(files) > 20
    for name in [*files, Path("results.json"), Path("config.yaml"), Path("predictions.npz")]:
        assert (tiny / name).read_bytes() == (folder / name).read_bytes(), name


def test_folders_without_groups_all_arms_two_rounds_and_the_leak_shown(tmp_path):
    drawn = phantom.draw(200, 16, 3)
    for i, (image, label) in enumerate(zip(drawn["images"], drawn["labels"])):
        path = tmp_path / "photos" / phantom.CLASS_NAMES[label] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    (tmp_path / "tiny.yaml").write_text(
        f"extends: {TINY}\n"
        "data: {kind: folder, root: photos, malignant: [mel, bcc], val_fraction: 0.2}\n"
        "ddpm: {steps: 40}\nclassifier: {steps: 30, guide_steps: 20, jitter: [0.1, 0.5]}\n"
        "guidance: {start: parent, hardness_scale: 0.1, likeness_scale: 0.1, "
        "classifier_free: 1.5}\n"
        "loop: {rounds: 2, seeds: 1, arms: [all], mine_from: test, surplus: 4.0, added: 0.2}\n")
    folder = go(tmp_path, ["--config", "tiny.yaml"])
    results = json.loads((folder / "results.json").read_text())
    assert list(results["arms"]) == ["real", "replay", "recolour", "noise", "random", "guided",
                                     "leaked"]
    assert [a for a in results["arms"] if results["arms"][a]["optimistic"]] == ["leaked"]
    assert [r["round"] for r in results["rounds"]] == [1, 2]
    assert all("val_balanced_accuracy" in r for r in results["rounds"])
    assert "optimistic: mined on the test set" in (folder / "report.md").read_text()
    assert results["jitter"]["chosen"] in (0.1, 0.5)


# ---- parts ------------------------------------------------------------------------------------

@pytest.fixture
def experiment(tmp_path):
    """A prepared experiment without networks, on tiny phantom data."""
    e = loop.Experiment(configuration.load(TINY), RunFolder(tmp_path))
    e.prepare()
    return e


def test_no_student_judges_what_it_or_its_child_has_seen(experiment, monkeypatch):
    seen = {}

    def student(name, images, weights, seed, jitter):
        assert len(weights) == len(images) and np.isclose(weights.sum(), 1)
        seen[name] = set(images.lesions)
        return name
    monkeypatch.setattr(experiment, "student", student)
    monkeypatch.setattr(experiment, "predict", lambda name, images: np.full(
        (len(images), 4), float(name[-1]), np.float32))
    experiment.jitter, train = 0.1, experiment.train
    children = train.subset(np.arange(0, len(train), 3))
    students = experiment.cross_fit(1, children)
    probs = experiment.out_of_fold(students, train.images, train.folds)
    for i in range(len(train)):
        student = f"crossfit_1_{int(probs[i, 0])}"
        assert train.lesions[i] not in seen[student]
    assert set().union(*seen.values()) == set(train.lesions)


def test_a_share_of_every_batch_is_added_images_and_classes_are_even_in_both(experiment):
    train, share = experiment.train, experiment.config.loop.share
    images, weights = experiment.mixed(train, train.subset(np.arange(30)))
    assert np.isclose(weights[len(train):].sum(), share) and np.isclose(weights.sum(), 1)
    for part in (slice(0, len(train)), slice(len(train), None)):
        of_class = [weights[part][images.labels[part] == c].sum()
                    for c in np.unique(images.labels[part])]
        assert np.allclose(of_class, of_class[0])


def test_mining_takes_the_wrong_and_unsure_and_the_cells_by_turns(experiment):
    train = experiment.train
    probs = np.full((len(train), 4), 0.1, np.float32)
    probs[np.arange(len(train)), train.labels] = 0.7                    # all right ...
    hard = np.arange(0, len(train), 4)
    probs[hard] = 0.25                                                  # ... but these: margin 0
    everything = experiment.mine(train, probs, 10_000, 1)
    assert (np.bincount(everything, minlength=len(train))[hard] == loop.CHILDREN).all()
    assert set(everything) == set(hard)
    for count in (7, 20, 60, 150):                                      # fewer and more than hard
        chosen = experiment.mine(train, probs, count, 1)
        cells = experiment.cells(train)
        taken = {c: (cells[chosen] == c).sum() for c in np.unique(cells[hard])}
        room = {c: loop.CHILDREN * (cells[hard] == c).sum() for c in taken}
        most = max(taken.values())
        assert len(chosen) == count and all(taken[c] >= min(room[c], most - 1) for c in taken)
        repeats = np.bincount(chosen, minlength=len(train))
        for c in taken:                                                 # all before any again
            of = repeats[hard][cells[hard] == c]
            assert of.max() - of.min() <= 1
    with pytest.raises(data.DataError, match="loop.margin"):
        probs[hard, train.labels[hard]] = 0.9
        experiment.mine(train, probs, 5, 1)


def test_strangers_share_cell_and_repetition_and_nothing_else(experiment):
    cells = experiment.cells(experiment.train)
    chosen = np.repeat(np.arange(0, 120, 3), np.arange(40) % 4 + 1)
    other = experiment.strangers(chosen, 1)
    assert (cells[other] == cells[chosen]).all() and len(np.unique(other)) == 40
    assert len({*zip(chosen, other)}) == 40                             # a mapping, one to one
    common = cells[chosen] == np.bincount(cells).argmax()
    seen = {int(experiment.strangers(chosen, s)[common][0]) for s in range(300)}
    assert len(seen) > 0.9 * (cells == np.bincount(cells).argmax()).sum()   # any of the cell


def test_a_turned_copy_is_found(experiment):
    images = experiment.train.images[:5]
    for turned in (images.transpose(0, 1, 3, 2), images[:, :, ::-1], images[:, :, :, ::-1],
                   images[:, :, ::-1, ::-1].transpose(0, 1, 3, 2)):
        distance, index = experiment.nearest(np.ascontiguousarray(turned))
        assert np.allclose(distance, 0, atol=1e-3)
        assert (experiment.train.images[index] == images).all()


def test_targets_are_any_group_but_the_own(experiment):
    train = experiment.train
    drawn = np.stack([experiment.targets(train, seed) for seed in range(200)])
    assert (drawn != train.groups).all()
    for own in range(6):
        share = np.bincount(drawn[:, train.groups == own].ravel(), minlength=6) / 200
        share /= share.sum()
        assert share[own] == 0 and abs(np.delete(share, own) - 0.2).max() < 0.05
    unknown = loop.replace(train, groups=np.full(len(train), -1))
    assert set(experiment.targets(unknown, 0)) == set(range(6))


def test_margins_by_hand():
    probs = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], np.float32)
    assert np.allclose(loop.margins(probs, np.array([0, 2, 1])), [0.3, -0.2, 0.0])


def test_recolouring_carries_one_flat_skin_to_another(experiment):
    train = experiment.train
    flat = np.zeros_like(train.images)
    skins = np.array([[220, 190, 170], [200, 160, 140], [170, 130, 110], [140, 100, 80],
                      [100, 70, 55], [60, 45, 35]])
    flat[:] = skins[train.groups][:, :, None, None]
    train = loop.replace(train, images=flat)
    targets = (train.groups + 1) % 6
    moved = loop.recoloured(train, train, targets, 0)
    assert abs(moved.astype(int) - skins[targets][:, :, None, None]).max() <= 1


def test_distances_between_thumbnails_are_grey_levels():
    image = np.full((1, 3, 32, 32), 100, np.uint8)
    distance, _ = loop.evaluate.nearest_distance(loop.thumbnails(image + 7), loop.thumbnails(image))
    assert np.isclose(distance[0], 7, atol=1e-4)


def test_seeds_are_told_apart():
    made = {loop.derive(s, name, k) for s in range(5) for name in ("student", "judge")
            for k in range(20)}
    assert len(made) == 200 and loop.derive(1, "a") == loop.derive(1, "a")


def test_folders_are_never_overwritten_and_checkpoints_are_checked(tmp_path):
    assert [new_folder(tmp_path, "x").name for _ in range(3)] == ["x", "x-2", "x-3"]
    run = RunFolder(tmp_path)
    run.save("a", {"w": torch.arange(3), "names": ["b"]})
    assert torch.equal(run.load("a")["w"], torch.arange(3)) and run.load("absent") is None
    torch.save({"format": 99, "content": {}}, tmp_path / "checkpoints/b.pt")
    with pytest.raises(RunError, match="b.pt"):
        run.load("b")
    calls = []
    for _ in range(2):
        run.stage("s", lambda progress: calls.append(1) or {"n": len(calls)})
    assert calls == [1]
    assert [clock(s) for s in (5, 200, 7200)] == ["5 s", "3 min", "2 h 00 min"]


def test_sets_are_compared_at_the_same_mixture(experiment):
    a, b = experiment.splits["val"], experiment.splits["test"]
    chosen = loop.same_mixture([a, b], 0)
    cells = [s.labels[i] * 10 + s.groups[i] for s, i in zip((a, b), chosen)]
    assert sorted(cells[0]) == sorted(cells[1])
    assert all(len(set(i)) == len(i) for i in chosen)
    for cell in np.unique(a.labels * 10 + a.groups):
        fewer = min(((s.labels * 10 + s.groups) == cell).sum() for s in (a, b))
        assert (cells[0] == cell).sum() == fewer


def test_balanced_accuracy_by_hand():
    probs = np.eye(3)[[0, 0, 1, 2, 2, 2]]
    assert np.isclose(loop.balanced_accuracy(probs, np.array([0, 0, 0, 1, 2, 2])),
                      (2 / 3 + 0 + 1) / 3)


def test_inception_features_come_from_a_torchscript_file(tmp_path):
    class Means(torch.nn.Module):
        def forward(self, x, return_features: bool = False):
            return x.float().mean((2, 3))
    torch.jit.script(Means()).save(tmp_path / "net.pt")
    images = np.random.default_rng(0).integers(0, 256, (70, 3, 8, 8), dtype=np.uint8)
    found = loop.inception_features(str(tmp_path / "net.pt"), torch.device("cpu"))(images)
    assert np.allclose(found, images.mean((2, 3)))
    assert loop.inception_features("", torch.device("cpu")) is None
    (tmp_path / "no.pt").write_bytes(b"nothing")
    for path in ("no.pt", "absent.pt"):
        with pytest.raises(configuration.ConfigError, match="evaluate.inception"):
            loop.inception_features(str(tmp_path / path), torch.device("cpu"))
