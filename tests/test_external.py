"""external.py: images made elsewhere come in with their class and group, or with one clear line;
others' photographs are scored by a finished run's students, names matched."""
import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
import finished
import loop
import predict
import score_on
from conftest import SMALL, new
from data import DataError, ImageSet
from datasets import phantom
from engine import config as configuration
from extras import external, measures, report

HERE = Path(__file__).parents[1]

NOTHING = np.zeros(0, np.int64)
LIKE = ImageSet(np.zeros((0, 3, 8, 8), np.uint8), NOTHING, NOTHING, NOTHING.astype(str), NOTHING,
                NOTHING.astype(str), ("nv", "mel"), ("I", "VI"), (False, True))
PLACES = {"nv/a.png": ("nv", ""), "nv/VI/b.JPG": ("nv", "VI"), "mel/I/c.png": ("mel", "I")}


def read_made(path):
    c = SimpleNamespace(data=SimpleNamespace(size=8),
                        guidance=SimpleNamespace(external=str(path)))
    return external.load_made(c, LIKE)["external"]


def made(root):
    """Three flat images of grey 0, 40 and 80 in the places of PLACES, and a csv that names them."""
    lines = ["image,class,group,note"]
    for i, (place, (name, group)) in enumerate(PLACES.items()):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (40 * i,) * 3).save(root / place)
        lines.append(f"{place},{name},{group},x")
    (root / "made.csv").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("what", ["", "made.csv"])
def test_a_folder_and_a_csv_give_the_same_images(tmp_path, what):
    found = read_made(made(tmp_path) / what)
    assert found.images.shape == (3, 3, 8, 8) and (found.class_names, found.group_names) == (
        LIKE.class_names, LIKE.group_names)
    grey = found.images.mean((1, 2, 3))
    for (place, (name, group)), value in zip(PLACES.items(), (0, 40, 80)):
        i = found.sources.tolist().index(f"external/{place}")
        assert abs(grey[i] - value) < 3 and found.class_names[found.labels[i]] == name
        assert (found.group_names[found.groups[i]] if group else found.groups[i]) == (group or -1)
    assert len(LIKE.extend(found)) == 3                     # fits beside the run's own


def test_every_problem_stands_in_one_line(tmp_path):
    root = made(tmp_path / "set")
    (root / "nv/X").mkdir()
    (root / "nv/broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "outside.png").write_bytes((root / "nv/a.png").read_bytes())
    for place in ("loose.png", "bkl/d.png", "nv/X/e.png"):
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).write_bytes((root / "nv/a.png").read_bytes())
    (root / "bad.csv").write_text("image,class,group\nnv/a.png,nv,X\nabsent.png,nv,\n"
                                  "../outside.png,nv,\nmel/I/c.png,,I\n")
    (root / "twice.csv").write_text("image,class,group\nnv/a.png,nv,\nnv/a.png,nv,\n")
    (root / "short.csv").write_text("image,class\nnv/a.png,nv\n")
    (tmp_path / "empty").mkdir()
    for path, words in (
            (root, ["guidance.external", "4 problem(s)", "loose.png has the class ''", "'bkl'",
                    "'X'", "nv/broken.png cannot be decoded"]),
            (root / "bad.csv", ["4 problem(s)", "no absent.png below", "no ../outside.png below",
                                "group 'X': write one of I, VI", "class ''"]),
            (root / "twice.csv", ["1 problem(s)", "nv/a.png stands twice"]),
            (root / "short.csv", ["short.csv", "group"]),
            (tmp_path / "empty", ["guidance.external", "holds no .jpg"]),
            (tmp_path / "absent", ["guidance.external", "is not a folder"])):
        with pytest.raises(DataError) as error:
            read_made(path)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_names_are_matched_in_any_case():
    assert score_on.matched(["MEL", "SCC", "nv"], ["nv", "mel"]).tolist() == [1, -1, 0]
    assert score_on.matched([], ["nv"]).tolist() == []


def test_no_finished_run_is_one_line(tmp_path):
    with pytest.raises(finished.RunError, match=re.escape(f"{tmp_path}: no finished run")):
        finished.Finished(tmp_path)
    (tmp_path / "config.yaml").write_text(SMALL)
    np.savez(tmp_path / "predictions.npz", class_names=["nv"], arms=["real"])
    for written, words in (("{}", "results.json cannot be used: 'format'; run it again"),
                           ('{"format": 1}', "its format is 1, not 3"), ("[", "results.json")):
        (tmp_path / "results.json").write_text(written)
        with pytest.raises(ValueError, match=words) as error:
            finished.Finished(tmp_path)
        assert "\n" not in str(error.value)
        with pytest.raises(SystemExit) as stop:
            predict.main([str(tmp_path), str(tmp_path)])
        assert stop.value.code == 2


# ---- an arm of a run -----------------------------------------------------------------------------

def test_synthetic_images_are_an_external_arm(tiny, tmp_path):
    table = tiny / "synthetic/synthetic.csv"
    ledger = {row["image"]: row for row in csv.DictReader(table.open())}
    run = new(tmp_path, f"guidance.external={table}", "loop.seeds=1",
              "loop.arms=[real, balanced, external]")
    results = json.loads((run / "results.json").read_text())
    assert list(results["arms"]) == ["real", "balanced", "external"]
    names = {path.stem for path in (run / "checkpoints").glob("*.pt")}
    assert not {"ddpm", "guide", "guided_1_0"} & names      # nobody needs a generator of our own
    rejected = results["filter"]["external"]
    assert rejected["candidates"] == len(ledger) == sum(rejected[r] for r in loop.REASONS)
    assert 0 < results["arms"]["external"]["added"] <= rejected["kept"]
    assert results["generator"]["external"]["n"] > 0

    c = configuration.load(run / "config.yaml")
    made = external.load_made(c, data.load(c.data)["train"])["external"]
    assert len(made) == len(ledger) and set(made.folds) == {-1}
    for image, source, label, group in zip(made.images, made.sources, made.labels, made.groups):
        row = ledger[source.removeprefix("external/")]
        stored = np.asarray(Image.open(tiny / "synthetic" / row["image"]))
        assert np.array_equal(image.transpose(1, 2, 0), stored)
        assert (made.class_names[label], made.group_names[group]) == (row["class"], row["group"])


def changed(image, how):
    """An image (3, S, S) with Pillow's help: a hand that knows nothing of ours."""
    picture, stored = Image.fromarray(image.transpose(1, 2, 0)), io.BytesIO()
    if how == "jpeg":
        picture.save(stored, "JPEG", quality=90)
        picture = Image.open(stored)
    else:
        picture = picture.transpose(how)
    return np.asarray(picture).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def larger():
    """A phantom of 32 pixels, and what the filter knows of it."""
    c = configuration.load(HERE / "configs/tiny.yaml", [
        "data.size=32", "data.train=200", "data.val=100", "data.test=50"])
    splits = data.load(c.data)
    near = measures.copy_distance(splits["val"], splits["train"])
    return SimpleNamespace(seen=splits["train"], too_near=near), splits, c


@pytest.mark.parametrize("how", ["jpeg", Image.FLIP_TOP_BOTTOM, Image.ROTATE_90])
def test_test_images_stored_anew_mirrored_or_turned_are_found(larger, how):
    keep, splits, _ = larger
    images = np.stack([changed(image, how) for image in splits["test"].images])
    assert external.held_out(keep, splits, images).all()


def test_new_images_are_not_taken_for_those_of_test(larger):
    keep, splits, c = larger
    new = data.load_phantom(c.data, "oracle", 100)
    assert external.held_out(keep, splits, new.images).mean() <= 0.12       # a val of 100 says 0.01
    train = splits["train"].images[:50]         # to learn from them again is no leak
    assert external.held_out(keep, splits, train).mean() <= 0.12


@pytest.mark.parametrize("copies", [0, 30, 100])
def test_the_guard_against_copies_stands_although_val_holds_copies(larger, copies):
    keep, splits, _ = larger
    val, train = splits["val"].images.copy(), splits["train"]
    val[:copies] = train.images[:copies]
    near = measures.copy_distance(replace(splits["val"], images=val), train)
    assert near == (measures.SAME if copies == 100 else pytest.approx(keep.too_near, abs=1.5))
    assert near > 2


# ---- a finished run on other images --------------------------------------------------------------

def test_on_its_own_data_set_an_external_test_is_the_test(tiny, tmp_path, capsys):
    """What the run learnt or chose from is left out, so its own test images remain."""
    (tmp_path / "tiny.yaml").write_text(SMALL)
    assert score_on.main([str(tiny), "--on", str(tmp_path / "tiny.yaml")]) == 0
    said = capsys.readouterr().out
    results, found = (json.loads((tiny / name).read_text())
                      for name in ("results.json", "external_tiny.json"))
    assert found["learnt_from"] == 220 and found["splits"]["test"] == results["splits"]["test"]
    for arm, entry in results["arms"].items():
        assert found["arms"][arm]["per_class"] == entry["per_class"]
        assert report.interval(entry["test"]["all"]["accuracy"]) in said
        for subset, metrics in entry["test"].items():
            for metric, cell in metrics.items():
                theirs = found["arms"][arm]["test"][subset][metric]
                for end, value in cell.items():
                    assert value is None or np.isclose(value, theirs[end], atol=1e-6)


FOLDERS = ["NV", "sk", "BCC", "MEL"]                   # one class under another name


@pytest.fixture
def photographs(tmp_path):
    """A csv of 90 phantoms: BCC and MEL have group VI, the others "old". Their labels."""
    drawn = phantom.draw(90, 24, 8)
    lines = ["image,class,skin"]
    for i, (image, label) in enumerate(zip(drawn["images"], drawn["labels"])):
        path = tmp_path / "photos" / FOLDERS[label] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
        lines.append(f"{path.parent.name}/{path.name},{FOLDERS[label]},{('old', 'VI')[label // 2]}")
    (tmp_path / "photos/list.csv").write_text("\n".join(lines))
    (tmp_path / "other.yaml").write_text(SMALL + "\n")
    return drawn["labels"]


def test_on_another_data_set_names_are_mapped(tiny, tmp_path, photographs, capsys):
    settings = ["data.kind=csv", "data.image_column=image", "data.label_column=class",
                "data.group=skin", "data.malignant=[MEL]", f"data.root={tmp_path / 'photos'}"]
    assert score_on.main([str(tiny), "--on", str(tmp_path / "other.yaml"),
                          *(x for s in settings for x in ("--set", s))]) == 0
    found = json.loads((tiny / "external_other.json").read_text())
    counts = np.bincount(photographs, minlength=4).tolist()
    assert found["unmapped"] == {"sk": counts[1]} and found["absent"] == ["bkl"]
    assert found["splits"]["test"]["classes"] == dict(zip(phantom.CLASS_NAMES, [
        counts[0], 0, counts[2], counts[3]]))
    sizes = {name: of["n"] for name, of in found["arms"]["guided"]["per_group"].items()}
    assert sizes == dict.fromkeys(("I", "II", "III", "IV", "V"), 0) | {
        "VI": counts[2] + counts[3], "old": counts[0]}
    assert f"sk {counts[1]}" in capsys.readouterr().out
    # the same images through predict.py: the joint answers, by class
    out = tmp_path / "probabilities.csv"
    arguments = [str(tiny), str(tmp_path / "photos"), "--out", str(out)]
    assert predict.main(arguments) == 0
    rows, confusion = list(csv.DictReader(out.open())), np.zeros((4, 4), int)
    assert len(rows) == 90 and "the students of arm 'guided'" in capsys.readouterr().out
    for row in rows:
        probs = [float(row[name]) for name in phantom.CLASS_NAMES]
        assert abs(sum(probs) - 1) < 1e-4
        folder = FOLDERS.index(row["image"].split("/")[0])
        confusion[folder, np.argmax(probs)] += folder != 1
    assert confusion.sum(1).tolist() == [counts[0], 0, counts[2], counts[3]]
    (tmp_path / "photos/NV/cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(SystemExit) as stop:
        predict.main(arguments)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "NV/cut.png cannot be decoded" in said[-1]
    assert said[-1].startswith("predict.py: ")


def test_a_data_set_without_a_class_of_the_run_is_one_line(tiny, tmp_path, capsys):
    for i in range(4):
        path = tmp_path / "photos" / ("acne", "eczema")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (50 * i, 0, 0)).save(path)
    (tmp_path / "skin.yaml").write_text(SMALL)
    with pytest.raises(SystemExit) as stop:
        score_on.main([str(tiny), "--on", str(tmp_path / "skin.yaml"), "--set", "data.kind=folder",
                       "--set", f"data.root={tmp_path / 'photos'}", "--set",
                       "data.malignant=[acne]"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("score_on.py: --on skin: nothing is left to score; its classes are acne")
