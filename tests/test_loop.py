"""The loop as a whole: the tiny run, interrupted, resumed; and its parts by brute force."""
import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import classifier
from engine import config as configuration
import data
import evaluate
from extras import external
import loop
import mining
from datasets import phantom
from extras import report
from engine import run as runfolder
from engine.run import RunFolder
from test_classifier import weights

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
    folder = tiny / "synthetic"
    rows = list(csv.DictReader((folder / "synthetic.csv").open()))
    assert {row["image"] for row in rows} == {f"{p.parent.name}/{p.name}"
                                             for p in folder.glob("*/*.png")}
    c = configuration.load(TINY)
    train = data.load(**vars(c.data))["train"]
    where = {source: i for i, source in enumerate(train.sources)}
    for row in rows:
        parent = where[row["parent"]]
        assert row["class"] == train.class_names[train.labels[parent]]
        assert int(row["fold"]) == train.folds[parent]
        assert row["group"] != train.group_names[train.groups[parent]]
        assert row["image"].startswith(row["class"] + "/") and 0 <= float(row["judge"]) <= 1
    assert len(rows) >= json.loads((tiny / "results.json").read_text())["arms"]["guided"]["added"]


def test_the_synthetic_images_load_as_folders_and_as_a_csv(tiny):
    root = tiny / "synthetic"
    rows = sorted(csv.DictReader((root / "synthetic.csv").open()), key=lambda row: row["image"])
    names = dict(image_column="image", label_column="class", lesion_column="parent")
    for kind, group in (("folder", ""), ("csv", "group")):
        loaded, sides = data.load_images(kind, root, 16, ["mel"], **names, group=group,
                                         skip_bad=False)
        assert sides is None and len(loaded) == len(rows)
        for i, row in enumerate(rows):
            assert loaded.sources[i] == row["image"]
            assert loaded.class_names[loaded.labels[i]] == row["class"]
            stored = np.asarray(Image.open(root / row["image"]))
            assert np.array_equal(loaded.images[i].transpose(1, 2, 0), stored)
            if kind == "csv":
                assert loaded.group_names[loaded.groups[i]] == row["group"]
                assert loaded.lesions[i] == row["parent"]


class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches kill -9."""


def test_a_run_killed_anywhere_and_resumed_gives_the_same_bytes(tiny, tmp_path, monkeypatch):
    """Killed before and after the rename of files of every stage; before it, the temporary file
    stays behind. benchmarks/interrupt.py does it with kill -9 at random moments."""
    rename, kills = os.replace, [
        ("ddpm.partial.pt", True), ("ddpm.pt", False), ("guided_1.pt", False),
        (".png", True), ("synthetic.csv", False), ("student_random_1.pt", False),
        ("predictions.npz", True), ("results.json", False)]

    def replace(source, target):
        if kills and Path(target).name.endswith(kills[0][0]):
            if kills.pop(0)[1]:
                rename(source, target)
            raise Killed
        rename(source, target)
    monkeypatch.setattr(runfolder.os, "replace", replace)
    monkeypatch.setattr(loop.Experiment, "estimate", lambda self: 0)     # only to save time
    arguments = ["--config", str(TINY)]
    while kills:
        with pytest.raises(Killed):
            go(tmp_path, arguments)
        arguments = ["--resume", "runs/tiny"]
    folder = go(tmp_path, arguments)
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
        f"data: {{kind: folder, root: {tmp_path / 'photos'}, malignant: [mel, bcc], "
        "val_fraction: 0.2}\n"
        "ddpm: {steps: 40}\nclassifier: {steps: 30, guide_steps: 20, jitter: [0.1, 0.5]}\n"
        "guidance: {start: parent, hardness_scale: 0.1, "
        "classifier_free: 1.5, targets: both}\n"
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
    holds_no_place_or_name(folder, str(tmp_path))


def holds_no_place_or_name(folder, place):
    """But for its config, the run folder says nothing of where it was made."""
    assert place in (folder / "config.yaml").read_text()
    for path in (p for p in folder.rglob("*") if p.is_file() and p.name != "config.yaml"):
        content = path.read_bytes()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                content = "".join(str(arrays[k].tolist()) for k in arrays.files
                                  if arrays[k].dtype.kind == "U").encode()
        for secret in (place, str(HERE), f"{Path.home()}/"):
            assert secret.encode() not in content, (path, secret)


def test_synthetic_images_are_an_external_arm(tiny, tmp_path):
    table = tiny / "synthetic/synthetic.csv"
    ledger = {row["image"]: row for row in csv.DictReader(table.open())}
    (tmp_path / "tiny.yaml").write_text(
        f"extends: {TINY}\nguidance: {{external: {table}}}\n"
        "classifier: {steps: 20}\nloop: {seeds: 1, arms: [real, balanced, external]}\n")
    run = go(tmp_path, ["--config", "tiny.yaml"])
    results = json.loads((run / "results.json").read_text())
    assert list(results["arms"]) == ["real", "balanced", "external"]
    names = {path.stem for path in (run / "checkpoints").glob("*.pt")}
    assert not {"ddpm", "guide", "guided_1"} & names        # nobody needs a generator of our own
    made = torch.load(run / "checkpoints/external.pt", weights_only=True)
    fates = results["filter"]["external"]
    of = {np.asarray(Image.open(tiny / "synthetic" / name)).transpose(2, 0, 1).tobytes(): row
          for name, row in ledger.items()}
    assert all(image.tobytes() in of for image in made["images"].numpy())
    assert fates["candidates"] == len(ledger) == sum(fates[f] for f in loop.FATES)
    assert 0 < results["arms"]["external"]["added"] <= fates["kept"]
    assert results["generator"]["external"]["n"] > 0
    images = external.load_made(
        str(table), data.load(**vars(configuration.load(TINY).data))["train"], 16)
    for source, group in zip(images.sources, images.groups):
        assert images.group_names[group] == ledger[source.removeprefix("external/")]["group"]


def test_a_run_of_real_images_alone_makes_none(tmp_path):
    run = go(tmp_path, ["--config", str(TINY), "--set", "loop.arms=[real]", "--set", "loop.seeds=1",
                        "--set", "classifier.steps=10"])
    assert not (run / "synthetic").exists()
    assert {path.stem for path in (run / "checkpoints").glob("*.pt")} == {
        "judge", "crossfit_1_0", "crossfit_1_1", "student_real_0"}
    assert "hard cases" in (run / "report.md").read_text().lower()


def test_a_run_that_is_held_is_not_scored_again(tiny, capsys):
    before = (tiny / "results.json").read_bytes()
    with runfolder.locked(tiny):
        assert evaluate.main([str(tiny)]) == 2
    assert "another process" in capsys.readouterr().err
    assert evaluate.main([str(tiny)]) == 0 and (tiny / "results.json").read_bytes() == before


def test_on_its_own_data_set_an_external_test_is_the_test(tiny, capsys):
    """What the run learnt or chose from is left out, so its own test images remain."""
    assert evaluate.main([str(tiny), "--on", str(TINY)]) == 0
    said = capsys.readouterr().out
    results, found = (json.loads((tiny / name).read_text())
                      for name in ("results.json", "external_tiny.json"))
    assert found["learnt_from"] == 360 and found["splits"]["test"] == results["splits"]["test"]
    for arm, entry in results["arms"].items():
        assert found["arms"][arm]["test"] == entry["test"]
        assert found["arms"][arm]["confusion"] == entry["confusion"]
        assert report.interval(entry["test"]["all"]["accuracy"]) in said


def test_on_another_data_set_names_are_mapped(tiny, tmp_path, monkeypatch, capsys):
    drawn = phantom.draw(90, 24, 8)
    folders = ["NV", "sk", "BCC", "MEL"]                   # one class under another name
    for i, (image, label) in enumerate(zip(drawn["images"], drawn["labels"])):
        path = tmp_path / "photos" / folders[label] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    (tmp_path / "other.yaml").write_text(
        f"extends: {TINY}\ndata: {{kind: folder, malignant: [MEL], val_fraction: 0.2}}\n")
    load = data.load_whole

    def grouped(kind, **given):             # BCC and MEL have group VI, the others "old"
        s = load(kind, **given)
        return loop.replace(s, groups=s.labels // 2, group_names=("VI", "old"))
    monkeypatch.setattr(data, "load_whole", grouped)
    arguments = ["--on", str(tmp_path / "other.yaml"), "--set", f"data.root={tmp_path / 'photos'}"]
    assert evaluate.main([str(tiny), *arguments]) == 0
    found = json.loads((tiny / "external_other.json").read_text())
    counts = np.bincount(drawn["labels"], minlength=4).tolist()
    assert found["unmapped"] == {"sk": counts[1]} and found["absent"] == ["bkl"]
    assert found["splits"]["test"]["classes"] == dict(zip(phantom.CLASS_NAMES, [
        counts[0], 0, counts[2], counts[3]]))
    sizes = {name: of["n"] for name, of in found["arms"]["guided"]["per_group"].items()}
    assert sizes == dict.fromkeys(("I", "II", "III", "IV", "V"), 0) | {
        "VI": counts[2] + counts[3], "old": counts[0]}
    assert f"sk {counts[1]}" in capsys.readouterr().out
    # the same images through --predict: the confusion must be that of the csv's answers
    out = tmp_path / "probabilities.csv"
    arguments = ["--predict", str(tmp_path / "photos"), "--checkpoint", str(tiny),
                 "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["classifier.py", *arguments])
        classifier.main()
    rows, confusion = list(csv.DictReader(out.open())), np.zeros((4, 4), int)
    assert len(rows) == 90
    for row in rows:
        probs = [float(row[name]) for name in phantom.CLASS_NAMES]
        assert abs(sum(probs) - 1) < 1e-4
        folder = folders.index(row["image"].split("/")[0])
        confusion[folder, np.argmax(probs)] += folder != 1
    assert confusion.tolist() == found["arms"]["guided"]["confusion"]
    (tmp_path / "photos/NV/cut.png").write_bytes(b"\x89PNG")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["classifier.py", *arguments])
        classifier.main()
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "NV/cut.png cannot be decoded" in said[-1]
    assert said[-1].startswith("classifier.py: ")


def test_published_weights_start_students_and_guide(tmp_path, capsys):
    torch.save(weights("resnet18"), tmp_path / "w.pth")
    overrides = ["classifier.network=resnet18", f"classifier.weights={tmp_path / 'w.pth'}"]
    e = loop.Experiment(configuration.load(TINY, overrides), RunFolder(tmp_path))
    e.prepare()
    x = torch.zeros(2, 3, 16, 16)
    guide, students = e.new_resnet(1, noise_levels=50), [e.new_resnet(s) for s in (1, 2)]
    assert guide(x, torch.tensor([0, 9])).shape == students[0](x).shape == (2, 4)
    for network in (guide, *students):
        assert torch.equal(network.conv1.weight, weights("resnet18")["conv1.weight"])
    assert not torch.equal(students[0].fc.weight, students[1].fc.weight)
    (tmp_path / "w.pth").write_bytes(b"no weights")
    capsys.readouterr()
    go(tmp_path, ["--config", str(TINY), "--set", overrides[0], "--set", overrides[1]], status=2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loop.py")]
    assert len(said) == 1 and "classifier.weights" in said[0] and "w.pth" in said[0]


# ---- parts ------------------------------------------------------------------------------------

@pytest.fixture
def experiment(tmp_path):
    """A prepared experiment without networks, on tiny phantom data."""
    e = loop.Experiment(configuration.load(TINY), RunFolder(tmp_path))
    e.prepare()
    return e


def test_images_from_elsewhere_that_are_ours_are_dropped(experiment, monkeypatch):
    """Whoever made them may have copied any split; the judge agrees with everything here."""
    e, few = experiment, slice(6)
    own = [e.splits[name].images[few] for name in ("train", "val", "test")]
    new = np.random.default_rng(0).integers(0, 256, own[0].shape, dtype=np.uint8)
    given = e.train.subset(np.arange(24))
    given = loop.replace(given, images=np.concatenate([*(x[:, :, ::-1] for x in own), new]))
    monkeypatch.setattr(e, "predict", lambda network, images: np.eye(4, dtype=np.float32)[
        given.labels])
    e.judge, e.copy_distance = "judge", 3.0
    made = e.candidates("external", "external", given, 1,
                        lambda: (np.arange(24), np.full(24, -1)))
    assert (made.fate[:18] == loop.FATES.index("copy")).all() and (made.fate[18:] == 0).all()


def test_checkpoints_belong_to_what_files_hold_and_not_to_where_they_lie(tmp_path):
    def word(*overrides, splits={}):
        return loop.owner(configuration.load(TINY, overrides), splits)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"weights")
    first = word(f"classifier.weights={tmp_path / 'a.pth'}", "classifier.network=resnet18")
    assert first == word(f"classifier.weights={tmp_path / 'b.pth'}", "classifier.network=resnet18")
    (tmp_path / "b.pth").write_bytes(b"others")
    assert first != word(f"classifier.weights={tmp_path / 'b.pth'}", "classifier.network=resnet18")
    assert word() == word("evaluate.draws=100") != word("loop.share=0.2")
    images = data.load_phantom(16, 0, 40, 40, 40)["train"]
    assert len({word(splits={"external": images.subset(np.arange(n))}) for n in (9, 10)}) == 2


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
    assert (np.bincount(everything, minlength=len(train))[hard] == mining.CHILDREN).all()
    assert set(everything) == set(hard)
    for count in (7, 20, 60, 150):                                      # fewer and more than hard
        chosen = experiment.mine(train, probs, count, 1)
        cells = mining.cells(train)
        taken = {c: (cells[chosen] == c).sum() for c in np.unique(cells[hard])}
        room = {c: mining.CHILDREN * (cells[hard] == c).sum() for c in taken}
        most = max(taken.values())
        assert len(chosen) == count and all(taken[c] >= min(room[c], most - 1) for c in taken)
        repeats = np.bincount(chosen, minlength=len(train))
        for c in taken:                                                 # all before any again
            of = repeats[hard][cells[hard] == c]
            assert of.max() - of.min() <= 1
    with pytest.raises(data.DataError, match="loop.margin"):
        probs[hard, train.labels[hard]] = 0.9
        experiment.mine(train, probs, 5, 1)


def test_targets_by_group_fill_the_rarest_cell_first(experiment):
    train = experiment.train
    real = np.zeros((4, 6), int)
    np.add.at(real, (train.labels, train.groups), 1)
    for count in (30, 200):
        parents, targets = mining.even_out(experiment.train, None, count, 1)
        filled = real.copy()
        for parent, target in zip(parents, targets):
            y = train.labels[parent]
            assert filled[y, target] == filled.min() and train.groups[parent] != target
            filled[y, target] += 1
        assert len({*zip(parents, targets)}) == len(parents) == count
    # what an earlier round added counts as well
    rare = np.argwhere(real == real.min())[0]
    added = train.subset(np.flatnonzero(train.labels == rare[0])[:1].repeat(50))
    added = loop.replace(added, groups=np.full(50, rare[1]))
    parents, targets = mining.even_out(experiment.train, added, 30, 1)
    assert not ((train.labels[parents] == rare[0]) & (targets == rare[1])).any()
    # without groups, or with one, the classes even out, each parent at most CHILDREN times
    for group, names in ((-1, ()), (0, ("all",))):
        experiment.train = loop.replace(train, groups=np.full(len(train), group), group_names=names)
        parents, targets = mining.even_out(experiment.train, None, 60, 1)
        assert (targets == -1).all() and np.bincount(parents).max() <= mining.CHILDREN
        filled = np.bincount(train.labels) + np.bincount(train.labels[parents], minlength=4)
        assert filled.max() - filled.min() > 1 and np.ptp(np.sort(filled)[:2]) <= 1


def test_hard_cases_and_groups_halve_a_round(experiment):
    train, chosen = experiment.train, {}
    probs = np.full((len(train), 4), 0.25, np.float32)
    for aim in ("hard", "groups", "both"):
        experiment.config = loop.replace(experiment.config, guidance=loop.replace(
            experiment.config.guidance, targets=aim))
        chosen[aim] = np.stack(experiment.choose(1, probs, None, 41), 1)
    assert (chosen["hard"][:, 0] == experiment.mine(
        train, probs, 41, experiment.seed("mine", 1))).all()
    assert chosen["both"].shape == (42, 2) and (chosen["groups"][:21] == chosen["both"][1::2]).all()
    assert (chosen["both"][::2, 0] == chosen["hard"][:21, 0]).all()


def test_strangers_share_cell_and_repetition_and_nothing_else(experiment):
    cells = mining.cells(experiment.train)
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


def test_near_copies_of_training_images_are_never_written(experiment, monkeypatch):
    """Every other image that is made is its parent, one grey level off and turned."""
    e, noise = experiment, np.random.default_rng(0)

    def synthesise(parents, *_, **__):
        images = noise.integers(0, 256, parents.images.shape, dtype=np.uint8)
        images[::2] = np.rot90(parents.images[::2], axes=(2, 3)).clip(0, 254) + 1
        made.append(images)
        return images, np.ones(len(images), bool), 0

    def predict(network, images):                   # the judge agrees, the students are unsure
        probs = np.full((len(images), 4), 0.25, np.float32)
        return probs + np.eye(4, dtype=np.float32)[labels[0]] if network == "judge" else probs
    made, labels = [], [None]
    mine = e.mine

    def mined(*arguments):
        chosen = mine(*arguments)
        labels[0] = e.train.labels[chosen]
        return chosen
    for name, value in (("synthesise", synthesise), ("predict", predict), ("mine", mined),
                        ("student", lambda name, *_: name)):
        monkeypatch.setattr(e, name, value)
    e.jitter = 0.1
    e.train_judge()
    done = e.round(1, None)
    e.write_synthetic([done])
    entry = done["entry"]
    written = [np.asarray(Image.open(p)).transpose(2, 0, 1)
               for p in e.run.folder.glob("synthetic/*/*.png")]
    assert entry["dropped"]["copy"] >= len(made[0][::2]) and len(written) == entry["kept"] > 20
    assert e.nearest(np.stack(written))[0].min() > e.copy_distance
    copies = {image.tobytes() for image in made[0][::2]}
    assert not copies & {image.tobytes() for image in written}


def test_a_recoloured_start_keeps_the_recoloured_image_where_little_noise_is_added(experiment):
    e = experiment
    e.unet, e.guide = e.new_unet(1), e.new_resnet(1, noise_levels=e.config.ddpm.T).eval()
    e.students, parents = [], e.train.subset(np.arange(40))
    targets, seeds = mining.other_groups(parents, 0), np.arange(40)
    given = loop.replace(e.config, guidance=loop.replace(e.config.guidance, strength=0.05, steps=1))
    before, e.config = e.config, given
    try:
        made, plain = (e.synthesise(parents, targets, seeds, start=start, scales=(0, 0))[0]
                       for start in ("recoloured", "parent"))
    finally:
        e.config = before
    wanted = loop.recoloured(e.train, parents, targets, 0)

    def off(a, b):
        return np.abs(a.astype(float) - b).mean()
    assert off(parents.images, wanted) > 2 * off(made, wanted)
    assert off(plain, parents.images) < off(made, parents.images)


def test_the_batch_size_of_sampling_and_the_threads_change_last_digits_alone(experiment,
                                                                             monkeypatch):
    e, threads = experiment, torch.get_num_threads()
    e.unet, e.guide = e.new_unet(1), e.new_resnet(1, noise_levels=e.config.ddpm.T).eval()
    e.students = [e.new_resnet(2).eval()]
    with torch.no_grad():
        for i, weight in enumerate(e.unet.parameters()):        # untrained, its last layer is 0
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    parents = e.train.subset(np.arange(20))

    def images():
        targets = mining.other_groups(parents, 0)
        return np.stack([e.synthesise(parents, targets, np.arange(20), start=start)[0]
                         for start in ("counterfactual", "recoloured", "noise")]).astype(int)
    whole = images()
    monkeypatch.setattr(loop, "CHUNK", 3)
    in_parts = images()
    assert whole.std() > 10 and abs(whole - in_parts).max() <= 2
    assert (whole != in_parts).mean() < 0.05

    x, none = loop.to_float(e.tensor(parents.images)), torch.zeros(20, dtype=torch.int64)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        with torch.no_grad():
            found.append(torch.cat([e.unet(x, none, none, none).flatten(),
                                    e.students[0](x).flatten()]))
    torch.set_num_threads(threads)
    assert torch.allclose(*found, atol=1e-4)


def test_determinism_is_asked_of_torch_where_the_config_says_so(tmp_path):
    try:
        loop.Experiment(configuration.load(TINY, ["loop.deterministic=true"]), RunFolder(tmp_path))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_targets_are_any_group_but_the_own(experiment):
    train = experiment.train
    drawn = np.stack([mining.other_groups(train, seed) for seed in range(200)])
    assert (drawn != train.groups).all()
    for own in range(6):
        share = np.bincount(drawn[:, train.groups == own].ravel(), minlength=6) / 200
        share /= share.sum()
        assert share[own] == 0 and abs(np.delete(share, own) - 0.2).max() < 0.05
    unknown = loop.replace(train, groups=np.full(len(train), -1))
    assert set(mining.other_groups(unknown, 0)) == set(range(6))


def test_margins_by_hand():
    probs = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], np.float32)
    assert np.allclose(mining.margins(probs, np.array([0, 2, 1])), [0.3, -0.2, 0.0])


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


def test_sets_are_compared_at_the_same_mixture(experiment):
    a, b = experiment.splits["val"], experiment.splits["test"]
    chosen = loop.same_mixture([a, b], 0)
    cells = [s.labels[i] * 10 + s.groups[i] for s, i in zip((a, b), chosen)]
    assert sorted(cells[0]) == sorted(cells[1])
    assert all(len(set(i)) == len(i) for i in chosen)
    for cell in np.unique(a.labels * 10 + a.groups):
        fewer = min(((s.labels * 10 + s.groups) == cell).sum() for s in (a, b))
        assert (cells[0] == cell).sum() == fewer
    none = loop.replace(b, groups=np.full(len(b), -1))      # knows no groups: classes alone
    chosen = loop.same_mixture([a, none], 0)
    fewer = np.minimum(np.bincount(a.labels), np.bincount(b.labels))
    for s, i in zip((a, none), chosen):
        assert (np.bincount(s.labels[i], minlength=4) == fewer).all()


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


def test_compiling_is_for_long_trainings_on_a_gpu(monkeypatch):
    def picked(device, *overrides):
        return loop.pick_compile(configuration.load(TINY, overrides), torch.device(device))
    assert not picked("cpu", "ddpm.steps=20000") and not picked("cuda")
    assert picked("cpu", "loop.compile=true") and not picked("cuda", "loop.compile=false")
    there = {"triton", "gcc"}
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: name in there or None)
    monkeypatch.setattr(loop.shutil, "which", lambda name: name if name in there else None)
    assert picked("cuda", "ddpm.steps=20000")
    for tool in ("triton", "gcc"):
        there.remove(tool)
        assert not picked("cuda", "ddpm.steps=20000")
        there.add(tool)
