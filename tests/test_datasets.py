"""What data sets look like on disk: exact counts of the real tables, and every way to be wrong."""
import csv
import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import checks, images, layouts
from datasets.layouts import HAM_CLASSES, DataError
from test_images import class_folders, everything as load, refuse

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real tables are not on this machine")


def photo(path: Path, number: int) -> None:
    """A picture unlike that of any other number below 1,000."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (25 * (number % 10), 25 * (number // 10 % 10), 25 * (number // 100))
    Image.new("RGB", (10, 10), colour).save(path)


def table(path: Path, rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    path.write_text(text.getvalue())


# ---------------------------------------------------------------------------- ISIC

@needs_real
def test_isic_2019_table_is_exact():
    files = sorted((REAL / "metadata").glob("ISIC*"))
    listing = layouts.isic(files, "age_approx")
    assert len(listing.rows) == 25331 == len({row.image for row in listing.rows})
    assert Counter(row.label for row in listing.rows) == dict(
        nv=12875, mel=4522, bcc=3323, bkl=2624, ak=867, scc=628, vasc=253, df=239)
    lesions = [row.lesion for row in listing.rows if row.lesion]
    assert (len(lesions), len(set(lesions))) == (23247, 11847)
    names, index = layouts.coded([row.group for row in listing.rows])
    assert names == ("0 to 20", "25 to 40", "45 to 60", "65 to 85") and (index < 0).sum() == 437
    refuse("no column 'age'.*age_approx", layouts.isic, files, "age")


def test_isic_2018(tmp_path):
    names = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    one_hot = [[f"ISIC_{i}", *(f"{float(i % 3 == c)}" for c in range(7))] for i in range(9)]
    truth = tmp_path / "ISIC2018_Task3_Training_GroundTruth.csv"
    table(truth, [["image", *names], *one_hot])
    for i in range(9):
        photo(tmp_path / f"images/ISIC_{i}.jpg", i)
    alone = load("isic", tmp_path)
    assert alone.class_names == ("mel", "nv", "bcc")         # those that have an image
    assert list(alone.labels) == [0, 1, 2] * 3 and list(alone.lesions) == list(alone.sources)
    table(tmp_path / "ISIC2018_Task3_Training_LesionGroupings.csv",
          [["image", "lesion_id", "diagnosis_confirm_type"],
           *([f"ISIC_{i}", f"L{i % 3}", "histopathology"] for i in range(9))])
    assert list(load("isic", tmp_path).lesions) == ["L0", "L1", "L2"] * 3
    two, none, unk = [row.copy() for row in one_hot[:3]]
    two[2], none[2], unk[3] = "1.0", "0.0", "0.0"
    two[0], none[0] = "ISIC_0", "ISIC_1"
    none[1] = "0.0"
    table(truth, [["image", *names, "UNK"], *([*row, "0.0"] for row in (two, none, *one_hot[3:])),
                  [*unk, "1.0"]])
    message = refuse(r"3 problem\(s\)", load, "isic", tmp_path)
    assert all(part in message for part in ("class 'mel+nv'", "class ''", "class 'unk'"))
    table(truth, [["image", "a", "b"], ["ISIC_0", "1", "0"]])
    refuse("images of 0 classes; wanted columns", load, "isic", tmp_path)
    shutil.copy(truth, tmp_path / "ISIC2018_Task3_Test_GroundTruth.csv")
    refuse(r"2 ISIC\*GroundTruth.csv below it", load, "isic", tmp_path)


# ---------------------------------------------------------------------------- Fitzpatrick17k

@needs_real
def test_fitzpatrick17k_table_is_exact():
    path = REAL / "metadata" / "fitzpatrick17k.csv"
    rows = layouts.read_csv(path, ("md5hash", "fitzpatrick_scale"))
    assert len(rows) == 16577 == len({row["md5hash"] for row in rows})
    assert Counter(row["fitzpatrick_scale"] for row in rows) == {
        "1": 2947, "2": 4808, "3": 3308, "4": 2781, "5": 1533, "6": 635, "-1": 565}
    sick = {"three_partition_label": {"malignant"}, "nine_partition_label": {
        "malignant epidermal", "malignant melanoma", "malignant dermal",
        "malignant cutaneous lymphoma"}}
    for label, classes in zip(layouts.PARTITIONS, (3, 9, 114)):
        listing = layouts.fitzpatrick17k([path], label, "fitzpatrick_scale")
        assert len(listing.class_names) == classes and len(listing.rows) == 16577 - 17
        assert set(listing.malignant) == sick.get(label, set(listing.malignant))
        assert listing.notes == ("rows left out that qc calls wrongly labelled: 17",)
    assert {"melanoma", "basal cell carcinoma"} < set(listing.malignant)
    assert "psoriasis" in listing.class_names and "psoriasis" not in listing.malignant
    types = Counter(row.group for row in listing.rows)
    wrong = Counter(row["fitzpatrick_scale"] for row in rows if row["qc"].startswith("3"))
    assert types["VI"] == 635 - wrong["6"] and types["-1"] == 565 - wrong["-1"]
    refuse("data.label_column: 'dx'", layouts.fitzpatrick17k, [path], "dx", "")


def test_fitzpatrick17k_loads(tmp_path):
    head = ["md5hash", "fitzpatrick_scale", "label", "nine_partition_label",
            "three_partition_label", "qc"]
    kinds = (["acne", "inflammatory", "non-neoplastic"], ["melanoma", "malignant melanoma",
                                                          "malignant"])
    rows = [[f"{i:032x}", [1, 6, -1][i % 3], *kinds[i % 2], ""] for i in range(6)]
    rows[5][-1] = "3 Wrongly labelled"
    table(tmp_path / "fitzpatrick17k.csv", [head, *rows])
    for i in range(5):
        photo(tmp_path / f"{i:032x}.jpg", i)
    loaded = load("fitzpatrick17k", tmp_path, label_column="label", group="fitzpatrick_scale")
    assert (loaded.class_names, loaded.malignant) == (("acne", "melanoma"), (False, True))
    assert loaded.group_names == ("I", "VI") and list(loaded.groups) == [0, 1, -1, 0, 1]
    assert loaded.notes == ("rows left out that qc calls wrongly labelled: 1", layouts.NO_LESIONS)


# ---------------------------------------------------------------------------- DermaMNIST

def derma(root: Path, size: int = 28, told: list | None = None) -> dict:
    """A small DermaMNIST of 28, 7 and 7 images; `told`: the csv's columns beside it."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 28), ("val", 7), ("test", 7)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, size, size, 3), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 7)[:, None]
    root.mkdir(exist_ok=True)
    np.savez_compressed(root / f"dermamnist_{size}.npz", **arrays)
    if told:
        rows = [[f"{split[:2]}{i}", f"{split}-lesion-{i}", HAM_CLASSES[i % 7], split,
                 ("male", "female")[i % 2]]
                for i in range(28) for split in ("test", "train", "val")   # splits lie mixed in it
                if i < len(arrays[f"{split}_labels"])]
        table(root / "DermaMNIST-C.csv", [told, *rows])
    return arrays


COLUMNS = ["image_id", "lesion_id", "dx", "split", "sex"]


@pytest.mark.parametrize("size", [28, 64])
def test_dermamnist_keeps_its_own_splits(tmp_path, size):
    arrays = derma(tmp_path, size)
    loaded = load("dermamnist", tmp_path, size)
    assert Counter(loaded.sides) == dict(train=28, val=7, test=7)
    for split in layouts.SPLITS:
        here, wanted = loaded.sides == split, arrays[f"{split}_images"].transpose(0, 3, 1, 2)
        assert np.array_equal(loaded.images[here], wanted)     # the npz's size: not a pixel moved
        assert np.array_equal(loaded.labels[here], arrays[f"{split}_labels"][:, 0])
    assert loaded.sources[loaded.sides == "test"][3] == "test-000003"
    assert loaded.class_names == HAM_CLASSES


@pytest.mark.parametrize("columns", [COLUMNS, ["image", "other", "diag", "split", "sex"]])
def test_dermamnist_corrected_and_extended(tmp_path, columns):
    derma(tmp_path, told=columns)
    loaded = load("dermamnist", tmp_path, 28, group="sex")
    assert Counter(loaded.sides) == dict(train=28, val=7, test=7)
    assert loaded.sources[29] == "va1" and loaded.group_names == ("female", "male")
    assert list(loaded.groups[:4]) == [1, 0, 1, 0]
    assert loaded.lesions[29] == ("val-lesion-1" if columns == COLUMNS else "va1")


def test_dermamnist_a_picture_in_two_splits_is_one_lesion(tmp_path):
    arrays = derma(tmp_path)
    arrays["test_images"][4] = arrays["train_images"][11]       # both of class 4
    arrays["test_images"][1] = arrays["val_images"][1]
    np.savez(tmp_path / "dermamnist_28.npz", **arrays)
    loaded = load("dermamnist", tmp_path, 28)
    lesion = dict(zip(loaded.sources, loaded.lesions))
    assert lesion["test-000004"] == lesion["train-000011"]
    assert lesion["test-000001"] == lesion["val-000001"] and len(set(loaded.lesions)) == 40
    assert loaded.notes == (
        layouts.NO_LESIONS,
        "images that repeat another, pixel for pixel, and count as the same lesion: 2",
        "images moved to the split where their lesion already stands: 2")
    side = dict(zip(loaded.sources, loaded.sides))
    assert side["test-000004"] == "train" and side["test-000001"] == "val"
    own = load("dermamnist", tmp_path, 28, split_by="image")
    assert [s.split("-")[0] for s in own.sources] == list(own.sides) and len(own.notes) == 2


def test_dermamnist_errors(tmp_path):
    arrays = derma(tmp_path, told=COLUMNS)
    lines = (tmp_path / "DermaMNIST-C.csv").read_text().splitlines()
    for changed in (lines[:-1], [line.replace("tr7,", "tr0,") for line in lines],
                    [line.replace("tr7,", ",") for line in lines],
                    [line.replace(",bkl,", ",df,") for line in lines]):
        (tmp_path / "DermaMNIST-C.csv").write_text("\n".join(changed))
        refuse("not the images of dermamnist_28.npz, or an id", load, "dermamnist", tmp_path)
    (tmp_path / "DermaMNIST-C.csv").unlink()
    refuse("data.group: 'sex' needs the csv", load, "dermamnist", tmp_path, group="sex")
    path = tmp_path / "dermamnist_28.npz"
    whole = path.read_bytes()
    for changed, match in (
            ({"val_labels": arrays["val_labels"][:-1]}, "val_images: found uint8"),
            ({"val_images": arrays["val_images"].astype(float)}, "found float64"),
            ({"val_images": arrays["val_images"][..., 0]}, r"\(7, 28, 28\), wanted uint8 \(7, H"),
            ({"val_labels": arrays["val_labels"] + 5}, "val-000002 has the class '7'")):
        np.savez(path, **arrays | changed)
        refuse(match, load, "dermamnist", tmp_path)
    np.savez(path, **{k: v for k, v in arrays.items() if k != "test_labels"})
    refuse("test_labels cannot be read", load, "dermamnist", tmp_path)
    path.write_bytes(whole[:-300])
    refuse("train_labels cannot be read", load, "dermamnist", tmp_path)
    start = whole.index(b"val_images.npy") + 500
    path.write_bytes(whole[:start] + bytes(200) + whole[start + 200:])
    refuse("val_images cannot be read", load, "dermamnist", tmp_path)
    shutil.copy(path, tmp_path / "dermamnist.npz")
    refuse(r"2 dermamnist\*.npz below it", load, "dermamnist", tmp_path)


# ---------------------------------------------------------------------------- csv and folder

CSV = dict(image_column="file", label_column="class", lesion_column="patient", group="tone",
           malignant=["mel"])


def own(root: Path, files=("a.jpg", "deep/b.jpg", "c", "d.jpg"), outside=()) -> Path:
    """Four images in a csv, and rows for `outside` files."""
    for i, name in enumerate(files):
        photo(root / f"{Path(name).with_suffix('')}.jpg", i)
    rows = [[name, ("mel", "nv")[i % 2], f"p{i}", ("dark", "light", "", "dark")[i]]
            for i, name in enumerate(files)]
    table(root / "list.csv", [["file", "class", "patient", "tone"], *rows,
                              *([name, "nv", "", ""] for name in outside)])
    return root


def test_csv(tmp_path):
    root = own(tmp_path)
    (root / "d.jpg").rename(root / "deep" / "d.jpg")            # by its name alone, in any folder
    loaded = load("csv", root, **CSV)
    assert list(loaded.sources) == ["a.jpg", "c", "d.jpg", "deep/b.jpg"]
    assert list(loaded.lesions) == ["p0", "p2", "p3", "p1"]
    assert [loaded.class_names[y] for y in loaded.labels] == ["mel", "mel", "nv", "nv"]
    assert loaded.group_names == ("dark", "light") and list(loaded.groups) == [0, -1, 0, 1]
    assert list(loaded.images[:, 0, 0, 0] // 20) == [0, 2, 3, 1]           # each its own picture
    without = load("csv", root, **CSV | {"lesion_column": "", "group": ""})
    assert list(without.lesions) == list(without.sources) and without.group_names == ()
    refuse("no column sex", load, "csv", root, **CSV | {"group": "sex"})
    refuse("'bcc' is no class", load, "csv", root, **CSV | {"malignant": ["bcc"]})
    (root / "other.csv").write_text("file\n")
    refuse(r"2 \*.csv below it: list.csv, other.csv", load, "csv", root, **CSV)


def test_nothing_outside_the_root_is_read(tmp_path):
    photo(tmp_path / "secret.jpg", 9)
    outside = ["../secret.jpg", "deep/../../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg",
               "away/secret.jpg"]
    root = own(tmp_path / "root", outside=outside)
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "away").symlink_to(tmp_path, target_is_directory=True)
    (root / "inside.jpg").symlink_to(root / "a.jpg")
    message = refuse(r"5 problem\(s\)", load, "csv", root, **CSV)
    assert all(f"no {name} below the root" in message for name in outside)
    assert len(load("csv", root, **CSV, skip_bad=True).images) == 4


@pytest.mark.parametrize("spelling", ["./{}", "deep\\{}", "{root}/{}", "~/set/{}"])
def test_an_image_below_the_root_is_found_however_it_is_spelt(tmp_path, monkeypatch, spelling):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = "deep/" * (spelling[0] == "d")
    root, names = tmp_path / "set", [f"{folder}{letter}.jpg" for letter in "abc"]
    text = (own(root, names) / "list.csv").read_text()
    for name in names:
        other = spelling.format(name.removeprefix(folder), root=root)
        text = text.replace(name, other)
    (root / "list.csv").write_text(text)
    assert list(load("csv", root, **CSV).sources) == names


@pytest.mark.parametrize("place", ["{root}/list.csv", "~/set/list.csv", "~/set", "list.csv"])
def test_the_table_itself_can_be_the_root(tmp_path, monkeypatch, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    root = own(tmp_path / "set")
    monkeypatch.chdir(root)
    if place.endswith("csv"):
        (root / "other.csv").write_text("file\n")               # of two, the one that is named
    assert len(load("csv", place.format(root=root), **CSV).images) == 4


def test_a_root_that_is_not_there_is_said_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse(f"data.root: '{tmp_path}/photos' is not a folder", load, "folder", "photos")


@pytest.mark.parametrize("name", [
    "../../x", "/tmp/x", "a/b", "a\\b", "..", ".x", "x.", "a:b", "nul", "COM1.png", "all", "a\x07b",
    "a\u2028b", "x" * 80, "synthetic.csv", "a?"])
def test_a_class_that_could_be_no_folder_is_refused(tmp_path, name):
    root = own(tmp_path)
    text = (root / "list.csv").read_text().replace(",nv,", f",{name},")
    (root / "list.csv").write_text(text, encoding="utf-8")
    message = refuse("class .*: rename it, runs write synthetic/<class>/", load, "csv",
                     root, **CSV, skip_bad=True)
    assert message.isprintable()


def test_odd_but_right_class_names_are_kept(tmp_path):
    names = ("basal cell (BCC)", "n\u00e6vus, m\u00e9lanique", "\u9ed1\u8272\u7d20\u7624", "con 1")
    checks.folder_names(names)
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="in case alone"):       # one folder on a Mac
        checks.folder_names(["n\u00c9vus", "ne\u0301vus"])


def test_what_is_passed_over_is_counted_and_named(tmp_path):
    root = class_folders(tmp_path / "set")
    for name in ("nv/more/a.png", "nv/more/b.png", "mel/c.heic", "mel/notes.txt", "README.md"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "nv/link.png").symlink_to(tmp_path / "elsewhere.png")
    (root / "nv/linked").symlink_to(tmp_path, target_is_directory=True)
    assert load("folder", root).notes == (
        layouts.NO_LESIONS, "files and links that are passed over: 6: 'nv/link.png'; "
        "'nv/linked'; 'mel/c.heic'; 'mel/notes.txt'; 'nv/more/a.png'; 'nv/more/b.png'")
    own(tmp_path / "own")
    photo(tmp_path / "own/more/unnamed.jpg", 8)
    assert load("csv", tmp_path / "own", **CSV).notes == (
        "files and links that are passed over: 1: 'more/unnamed.jpg'",)


# ---------------------------------------------------------------------------- wrong, and dropped

def test_skip_bad_leaves_out_what_is_wrong_and_counts_it(tmp_path):
    root = class_folders(tmp_path / "images")
    bad = ["file,class,patient,tone", "gone.jpg,nv,p9,", "x/0.jpg,nv,p8,"]
    rows = [f"{path.relative_to(root)},{path.parent.name},{path.parent.name}{path.stem},light"
            for path in sorted(root.rglob("*.*"))]
    bad += rows + [rows[0], "extra.jpg,nv,mel1,", "mel/2.jpg,,p7,"]
    photo(root / "extra.jpg", 999)
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no jpeg")
    (root / "list.csv").write_text("\n".join([*bad, "broken.jpg,nv,p6,"]))
    # two rows without a file, one twice, a lesion of two classes, one without, one unreadable
    message = refuse(r"6 problem\(s\)", load, "csv", root, **CSV)
    for part in ("no gone.jpg below", "no x/0.jpg below", "benign/0.PNG stands twice",
                 "lesion mel1 is mel in mel/1.jpg but nv in extra.jpg", "has the class ''",
                 "broken.jpg cannot be decoded"):
        assert part in message
    loaded = load("csv", root, **CSV, skip_bad=True)
    left = {str(path.relative_to(root)) for path in root.rglob("*/*.*")}
    assert set(loaded.sources) == left - {"mel/1.jpg", "mel/2.jpg"} and len(left) == 12
    assert "left out 8 of 18 images for 6 problem(s)" in loaded.notes[0]
    for cache in (None, tmp_path / "cache"):
        for path in root.glob("*/*.*"):
            path.write_bytes(b"none")
        refuse("not one image is left", load, "csv", root, cache=cache, **CSV, skip_bad=True)
        for path in root.glob("*/*.*"):
            path.unlink()
        refuse("not one image is left", load, "csv", root, cache=cache, **CSV, skip_bad=True)


def test_what_is_unreadable_is_remembered_with_the_cache(tmp_path):
    root = class_folders(tmp_path / "images")
    for name in ("1.jpg", "2.jpg"):        # two: what cannot be read is no copy of one another
        (root / "mel" / name).write_bytes(b"none")
    for _ in range(2):
        refuse(r"2 problem\(s\).*mel/1.jpg cannot", load, "folder", root, 8, tmp_path / "cache")
    calls = []
    loaded = load("folder", root, 8, tmp_path / "cache", lambda *done: calls.append(done),
                  skip_bad=True)
    assert len(loaded.images) == 10 and not calls and len(loaded.notes) == 2


def test_the_same_picture_never_straddles_a_split(tmp_path):
    root = class_folders(tmp_path, 12)
    for i in range(3):
        shutil.copy(root / "nv" / f"{i}.jpeg", root / "nv" / f"copy{i}.jpeg")
    loaded = load("folder", root)
    lesions = dict(zip(loaded.sources, loaded.lesions))
    assert loaded.notes[1:] == ("images that repeat another, pixel for pixel, and count as the "
                                "same lesion: 3",)
    assert all(lesions[f"nv/{i}.jpeg"] == lesions[f"nv/copy{i}.jpeg"] for i in range(3))
    assert len(set(lesions.values())) == 36
    shutil.copy(root / "nv" / "5.jpeg", root / "mel" / "copy.jpg")
    refuse(r"mel/copy.jpg \(mel\) and nv/5.jpeg \(nv\) are the same picture: keep one", load,
           "folder", root)
    assert len(load("folder", root, skip_bad=True).images) == 38
    (root / "zz").mkdir()                                       # of three the last one differs
    (root / "mel" / "copy.jpg").rename(root / "nv" / "6copy.jpeg")
    shutil.copy(root / "nv" / "5.jpeg", root / "zz" / "copy.jpg")
    refuse(r"nv/5.jpeg \(nv\) and nv/6copy.jpeg \(nv\) and zz/copy.jpg \(zz\) are the same", load,
           "folder", root)
    left = load("folder", root, skip_bad=True)
    assert len(left.images) == 38 and not {"nv/5.jpeg", "nv/6copy.jpeg"} & set(left.sources)


def test_lesions_that_share_pictures_become_one():
    rows = [layouts.Row(f"i{i}", "nv", lesion) for i, lesion in enumerate("EDCBAB")]
    twins = [[rows[0], rows[2]], [rows[1], rows[5]], [rows[2], rows[3], rows[0]]]
    assert "".join(images.join_lesions(rows, twins)) == "BBBBAB"
    assert "".join(images.join_lesions(rows, twins[:1])) == "CDCBAB"


# ---------------------------------------------------------------------------- groups

def test_groups_from_a_column():
    names, index = layouts.coded(["male", "", "female", "Unknown", "male", "NA"])
    assert names == ("female", "male") and list(index) == [1, -1, 0, -1, 1, -1]
    names, index = layouts.coded(["3", "10", "-1", "3.0", "nan"])     # few numbers: each its own
    assert names == ("3", "10") and list(index) == [0, 1, -1, 0, -1]
    ages = ["0", "5", "20", "35.0", "40", "80", "85", ""]
    names, index = layouts.coded(ages)
    assert names == ("0 to 20", "35 to 40", "80 to 85") and list(index) == [0, 0, 0, 1, 1, 2, 2, -1]
    assert layouts.coded(["", ""])[0] == ()
    refuse("21 groups, a00, a01", layouts.coded, [f"a{i:02d}" for i in range(21)])
