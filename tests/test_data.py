"""The data: splits without leaks, exact counts of the real set, caches, loaders and every error."""
import csv
import inspect
import json
import shutil
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from datasets import layouts as datasets

HAM = Path(__file__).parents[2] / "shared" / "data" / "ham10000"
needs_ham = pytest.mark.skipif(not HAM.is_dir(), reason="HAM10000 is not on this machine")
OPTIONS = dict(malignant=["mel"], image_column="", label_column="", lesion_column="", group="",
               skip_bad=False)
TURNED = Image.Exif()
TURNED[0x0112] = 6                   # orientation: the camera was held a quarter turn to the left
ROWS = [("L1", "i1", "nv"), ("L1", "i2", "nv"), ("L2", "i3", "mel"), ("L3", "i4", "bkl")]


def everything(kind, root, size=8, cache=None, progress=None, **options):
    """All images of a data set as one ImageSet."""
    return data.load_images(kind, root, size, **OPTIONS | options, cache=cache,
                            progress=progress)[0]


def ham(root, size, cache=None, progress=None):
    return everything("ham10000", root, size, cache, progress)


def folder(root, size, malignant):
    return everything("folder", root, size, malignant=malignant)


def made(lesions: int = 400, classes: int = 4, seed: int = 0) -> data.ImageSet:
    """A set of black 2 x 2 images in random order, 1 to 6 a lesion, with long-tailed classes."""
    rng = np.random.default_rng(seed)
    weights = np.array([8, 4, 2, 1])[:classes]
    label = rng.choice(classes, lesions, p=weights / weights.sum())
    repeats = rng.integers(1, 7, lesions)
    labels = np.repeat(label, repeats)
    order = rng.permutation(len(labels))
    images = np.zeros((len(labels), 3, 2, 2), np.uint8)
    return data.ImageSet(
        images, labels[order], rng.integers(-1, 3, len(labels)),
        np.repeat([f"L{i:04d}" for i in range(lesions)], repeats)[order],
        np.full(len(labels), -1), np.array([f"i{i:05d}" for i in range(len(labels))]),
        tuple(f"c{i}" for i in range(classes)), ("I", "II", "III"),
        (True,) + (False,) * (classes - 1))


def ham_folder(root: Path, rows=ROWS, name="HAM10000_metadata.csv") -> Path:
    """A small folder in HAM10000's layout: 12 x 9 images in two parts, each of one colour."""
    (root / "meta").mkdir(parents=True)
    lines = ["lesion_id,image_id,dx,age"] + [",".join(row) + ",50.0" for row in rows]
    (root / "meta" / name).write_text("\n".join(lines) + "\n")
    for i, image in enumerate(sorted({row[1] for row in rows} - {""})):
        part = root / f"HAM10000_images_part_{1 + i % 2}"
        part.mkdir(exist_ok=True)
        colour = (40 * (i % 6), 40 * (i // 6 % 6), 40 * (i // 36))
        Image.new("RGB", (12, 9), colour).save(part / f"{image}.jpg")
    return root


def class_folders(root: Path, count: int = 4) -> Path:
    for green, label, suffix in ((60, "benign", ".PNG"), (120, "mel", ".jpg"),
                                 (180, "nv", ".jpeg")):
        (root / label).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (10, 14), (20 * i, green, 90)).save(root / label / f"{i}{suffix}")
    return root


def refuse(match: str, function, *arguments, **options):
    """The call must raise a DataError of one line that matches."""
    with pytest.raises(data.DataError, match=match) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    refuse("below 1", data.split_lesions, whole, 0.5, 0.5, 0)
    refuse("above 0", data.split_lesions, whole, 0.0, 0.2, 0)
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


# ---------------------------------------------------------------------------- the real HAM10000

def metadata() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image, lesion, dx) columns, read independently of data.py."""
    with open(HAM / "HAM10000_metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(np.array([row[key] for row in rows]) for key in ("image_id", "lesion_id", "dx"))


@pytest.fixture(scope="module")
def whole_ham(tmp_path_factory):
    """Where the decoded pixels of all HAM10000 are kept for every test here."""
    return tmp_path_factory.mktemp("ham") / "cache"


@needs_ham
def test_ham10000_counts_are_exact():
    rows = [(row["lesion_id"], row["dx"]) for row in datasets.read_csv(
        HAM / "HAM10000_metadata.csv", ("lesion_id", "dx"))]
    lesions, repeats = np.unique([lesion for lesion, _ in rows], return_counts=True)
    assert (len(rows), len(lesions), (repeats > 1).sum(), repeats.max()) == (10015, 7470, 1956, 6)
    published = {"akiec": (327, 228), "bcc": (514, 327), "bkl": (1099, 727), "df": (115, 73),
                 "mel": (1113, 614), "nv": (6705, 5403), "vasc": (142, 98)}
    for name, wanted in published.items():
        of_class = [lesion for lesion, dx in rows if dx == name]
        assert (len(of_class), len(set(of_class))) == wanted
    assert set(published) == set(datasets.HAM_CLASSES)


@needs_ham
def test_whole_ham10000_loads_and_splits(whole_ham):
    whole = ham(HAM, 16, whole_ham)
    assert whole.notes == ("images that repeat another, pixel for pixel, and count as the same "
                           "lesion: 2",)                     # as the data's own notes say
    assert data.counts(whole) == {
        "images": 10015, "lesions": 7470, "groups": {"unknown": 10015},
        "classes": dict(akiec=327, bcc=514, bkl=1099, df=115, mel=1113, nv=6705, vasc=142)}
    splits = data.split_lesions(whole, 0.1, 0.2, 0)
    assert [len(set(part.lesions)) for part in splits.values()] == [5228, 747, 1495]
    assert not set(splits["train"].lesions) & set(splits["test"].lesions)


@needs_ham
def test_ham10000_images_load_as_isic_2019(whole_ham):
    """The same photographs under the same names; the other 15,316 are not on this machine."""
    refuse(r"15316 problem\(s\).*no ISIC_0000000 below", everything, "isic", HAM.parent, 16,
           whole_ham)
    loaded = everything("isic", HAM.parent, 16, whole_ham, skip_bad=True, group="sex")
    with open(HAM.parent / "metadata" / "ISIC_2019_Training_Metadata.csv", newline="") as file:
        sex = {row["image"]: row["sex"] or "unknown" for row in csv.DictReader(file)}
    assert data.counts(loaded) == {
        "images": 10015, "lesions": 7470, "groups": Counter(sex[name] for name in metadata()[0]),
        "classes": dict(mel=1113, nv=6705, bcc=514, ak=130, bkl=1099, df=115, vasc=142, scc=197)}
    assert loaded.notes[0].startswith("data.skip_bad left out 15316 of 25331 images")
    sick = [name for name, bad in zip(loaded.class_names, loaded.malignant) if bad]
    assert sick == ["mel", "bcc", "ak", "scc"]


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


@needs_ham
@pytest.mark.parametrize("name", ["HAM10000_metadata", "HAM10000_metadata.csv"])
def test_real_images_load_in_any_layout(tmp_path, name):
    images, lesions, dx = metadata()
    chosen = np.concatenate([np.flatnonzero(dx == label)[:6] for label in datasets.HAM_CLASSES])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    with open(HAM / "HAM10000_metadata.csv") as file:
        lines = file.read().splitlines()
    with open(tmp_path / "deep" / name, "w") as file:
        file.write("\n".join([lines[0]] + [lines[1 + i] for i in chosen[::-1]]))
    for i, row in enumerate(chosen):
        found = next(HAM.glob(f"*/{images[row]}.jpg"))
        shutil.copy(found, tmp_path / ("deep", "deep/er")[i % 2] / found.name)
    loaded = ham(tmp_path, 16)
    order = np.argsort(images[chosen])
    assert list(loaded.sources) == list(images[chosen][order])
    assert list(loaded.lesions) == list(lesions[chosen][order])
    assert [datasets.HAM_CLASSES[i] for i in loaded.labels] == list(dx[chosen][order])
    bad = [name for name, malignant in zip(loaded.class_names, loaded.malignant) if malignant]
    assert bad == ["akiec", "bcc", "mel"]
    assert set(loaded.groups) == set(loaded.folds) == set(loaded.subtypes) == {-1}
    # pixels against an independent way: mean over the 150 x 150 centre of the full decoding
    with Image.open(next(HAM.glob(f"*/{loaded.sources[0]}.jpg"))) as image:
        centre = np.asarray(image.convert("RGB"), float)[:, 25:175]
    assert np.abs(loaded.images[0].mean((1, 2)) - centre.mean((0, 1))).max() < 2


# ---------------------------------------------------------------------------- HAM10000, made small

def test_ham_layout_order_and_malignant(tmp_path):
    forward = ham(ham_folder(tmp_path / "a"), 8)
    backward = ham(ham_folder(tmp_path / "b", ROWS[::-1], "HAM10000_metadata"), 8)
    for name in data.PER_IMAGE:
        assert np.array_equal(getattr(forward, name), getattr(backward, name))
    assert list(forward.lesions) == ["L1", "L1", "L2", "L3"]
    assert np.abs(forward.images[:, 0].mean((1, 2)) - [0, 40, 80, 120]).max() < 3


def test_ham_problems_come_in_one_error(tmp_path):
    rows = ROWS + [("L4", "i5", "nv"), ("L4", "i6", "mel"), ("L5", "i1", "nv"), ("L6", "i7", "cat"),
                   ("L7", "i8", "df"), ("L8", "i9", "vasc"), ("L9", "", "nv")]
    root = ham_folder(tmp_path, rows)
    next(root.glob("*/i8.jpg")).unlink()
    broken = next(root.glob("*/i9.jpg"))
    Image.effect_noise((60, 60), 90).save(broken)
    broken.write_bytes(broken.read_bytes()[:-500])   # the end of the pixels is missing
    message = refuse(r"6 problem\(s\)", ham, root, 8)
    for part in ("lesion L4 is nv in i5 but mel in i6", "image i1 stands twice", "class 'cat'",
                 "no i8 below", "i9 cannot be decoded (image file is truncated",
                 "a row without an image id"):
        assert part in message
    shutil.rmtree(root / "HAM10000_images_part_1")
    shutil.rmtree(root / "HAM10000_images_part_2")
    message = refuse(r"11 problem\(s\)", ham, root, 8)
    # ten, and the sign of more
    assert message.count("; ") == 10 and "; ... (data.skip_bad" in message


def test_ham_images_standing_twice(tmp_path):
    root = ham_folder(tmp_path)
    (root / "again").mkdir()
    twin = root / "again" / "i1.jpg"
    shutil.copy(next(root.glob("HAM*/i1.jpg")), twin)
    assert len(ham(root, 8)) == 4   # the same bytes: harmless
    Image.new("RGB", (30, 30), "red").save(twin)
    refuse("i1 stands in 2 folders, not the same", ham, root, 8)


def test_ham_file_errors(tmp_path):
    refuse("data.root: '' is not a folder", ham, "", 8)
    nowhere = str(tmp_path / "nowhere")
    refuse("data.root: .*nowhere' is not a folder", ham, nowhere, 8)
    refuse("no HAM10000_metadata.csv", ham, tmp_path, 8)
    table = tmp_path / "HAM10000_metadata.csv"
    for content, match in ((b"", "no rows"), (b"lesion_id,image_id,dx\n", "no rows"),
                           (b"lesion_id,image_id\nL,i\n", "no column dx"),
                           (b"lesion_id;image_id;dx\nL;i;nv\n", "found 'lesion_id;image_id;dx'"),
                           (b"\xff\xfe\x00nonsense", "not a readable csv")):
        table.write_bytes(content)
        refuse(match, ham, tmp_path, 8)
    table.unlink()
    root = ham_folder(tmp_path / "fine")
    refuse("data.size: 0", ham, root, 0)
    for content in (b"\xef\xbb\xbflesion_id,image_id,dx\n\nL1,i1,nv\n",   # BOM, blank line
                    b"dx\timage_id\tlesion_id\nnv\ti1\tL1"):             # tabs
        (root / "meta" / "HAM10000_metadata.csv").write_bytes(content)
        assert list(ham(root, 8).sources) == ["i1"]


# ---------------------------------------------------------------------------- decoding and cache

def test_decode_takes_the_central_square(tmp_path):
    frame = np.zeros((60, 80, 3), np.uint8)
    frame[:, 10:70] = (200, 100, 50)
    frame[20:40, 30:50] = (10, 20, 250)   # a lesion in the very middle
    Image.fromarray(frame).save(tmp_path / "a.png")
    image = data.decode(tmp_path / "a.png", 12)
    assert image.shape == (3, 12, 12) and image.dtype == np.uint8
    assert image[:, 0, 0].tolist() == [200, 100, 50]
    assert np.abs(image[:, 6, 6] - np.array([10.0, 20, 250])).max() < 10   # Lanczos rings
    assert np.array_equal(image, image[:, ::-1, ::-1])   # centred: no half-pixel shift
    Image.fromarray(frame.transpose(1, 0, 2)).save(tmp_path / "b.png")
    upright = data.decode(tmp_path / "b.png", 12).astype(int).transpose(0, 2, 1)
    assert np.abs(upright - image).max() <= 1   # PIL rounds between its two passes


def test_decode_modes(tmp_path):
    for mode, colour in (("L", 90), ("RGBA", (9, 9, 9, 255)), ("P", 7), ("CMYK", (0, 0, 0, 165))):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (9, 9), colour).save(path)
        assert data.decode(path, 4).shape == (3, 4, 4)
    two = Image.new("L", (20, 10), 255)
    two.paste(0, (0, 0, 10, 10))
    two.crop((0, 0, 20, 10)).save(tmp_path / "turned.png", exif=TURNED)
    upright = data.decode(tmp_path / "turned.png", 4)
    assert upright[0, 0].max() < 20 and upright[0, -1].min() > 235    # its left side is its top
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match="more than 8 bits"):
        data.decode(tmp_path / "deep.png", 4)


def test_a_decompression_bomb_is_refused_and_the_limit_named(tmp_path, monkeypatch):
    root = class_folders(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 140)             # Pillow refuses twice as many
    Image.new("RGB", (15, 20)).save(root / "nv" / "bomb.png")
    message = refuse("nv/bomb.png cannot be decoded.*300 pixels.*limit of 280", folder, root, 8,
                     ["mel"])
    assert "1 problem(s)" in message


def test_jpeg_draft_changes_little(tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).resize((640, 480))
    smooth.save(tmp_path / "a.jpg", quality=95)
    smooth.save(tmp_path / "a.png")
    reduced, full = (data.decode(tmp_path / name, 80).astype(int) for name in ("a.jpg", "a.png"))
    assert np.abs(reduced - full).mean() < 2


def test_cache_hit_miss_and_damage(tmp_path, monkeypatch):
    root, cache, calls = ham_folder(tmp_path / "in"), tmp_path / "run" / "images", []
    plain = data.decode
    monkeypatch.setattr(data, "decode", lambda path, size: calls.append(path) or plain(path, size))

    def load(size=8):
        calls.clear()
        seen = []
        images = ham(root, size, cache, lambda *done: seen.append(done)).images
        assert seen == [(i + 1, 4) for i in range(len(calls))]   # progress counts what is decoded
        return images, len(calls)
    first, decoded = load()
    assert decoded == 4
    again, decoded = load()
    assert decoded == 0 and np.array_equal(first, again)
    assert load(12)[1] == 4 and load()[1] == 4 and load()[1] == 0   # another size, and back

    array, note = Path(f"{cache}.npy"), Path(f"{cache}.json")
    good = array.read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    for path, content in ((array, flipped), (array, good[:-50]), (array, b""), (note, b"{"),
                          (note, b"[]"), (note, b"\xff"), (array, b"PK\x03\x04")):
        path.write_bytes(content)
        assert load()[1] == 4 and load()[1] == 0, (path.name, content[-4:])
    array.unlink()
    assert load()[1] == 4
    assert {path.name for path in cache.parent.iterdir()} == {"images.npy", "images.json"}
    picture = next(root.glob("*/i2.jpg"))
    Image.new("RGB", (12, 9), "white").save(picture, quality=30)   # the file's size changes
    changed, decoded = load()
    assert decoded == 4 and changed[1].min() > 250
    monkeypatch.setattr(data, "LOADER_VERSION", 999)
    assert load()[1] == 4


def test_cache_never_pairs_a_new_array_with_an_old_note(tmp_path, monkeypatch):
    """Killed between the two writes: the old images' note must not vouch for the new array."""
    root, cache = ham_folder(tmp_path / "in"), tmp_path / "images"
    before = ham(root, 8, cache).images
    note = Path(f"{cache}.json").read_bytes()
    picture = next(root.glob("*/i1.jpg"))
    old = picture.read_bytes()
    Image.new("RGB", (12, 9), "white").save(picture, quality=30)
    ham(root, 8, cache)
    Path(f"{cache}.json").write_bytes(note)
    picture.write_bytes(old)
    assert np.array_equal(ham(root, 8, cache).images, before)


def test_a_cache_clears_what_killed_processes_left_and_nothing_else(tmp_path):
    root, cache = ham_folder(tmp_path / "in"), tmp_path / "images"
    dead, alive, other = (Path(f"{cache}{end}") for end in (
        f".npy.{2 ** 22 + 1}.tmp", ".npy.1.tmp", f"2.npy.{2 ** 22 + 1}.tmp"))    # no pid is as high
    for path in (dead, alive, other):
        path.write_bytes(b"half")
    ham(root, 8, cache)
    assert alive.exists() and other.exists()
    assert dead.exists() != Path("/proc/self").exists()


def test_cache_of_objects_is_refused_and_errors_name_the_file(tmp_path):
    root, cache = ham_folder(tmp_path / "in"), tmp_path / "images"
    ham(root, 8, cache)
    np.save(f"{cache}.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    note = json.loads(Path(f"{cache}.json").read_text())
    with open(f"{cache}.npy", "rb") as file:   # even with a checksum that fits
        note["sha256"] = data.hashlib.file_digest(file, "sha256").hexdigest()
    Path(f"{cache}.json").write_text(json.dumps(note))
    assert ham(root, 8, cache).images.dtype == np.uint8
    next(root.glob("*/i2.jpg")).write_bytes(b"no jpeg")
    message = refuse("i2 cannot be decoded", ham, root, 8, tmp_path / "none" / "c")
    assert str(tmp_path) not in message.split(":", 1)[1]
    (tmp_path / "file").write_text("")
    good = ham_folder(tmp_path / "good")
    refuse("cache .*choose another", ham, good, 8, tmp_path / "file" / "c")


# ---------------------------------------------------------------------------- folder, phantom, load

def test_folder(tmp_path):
    root = class_folders(tmp_path / "set")
    (root / "nv" / "notes.txt").write_text("ignored")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(b"ignored")
    loaded = folder(root, 8, ["mel"])
    assert loaded.class_names == ("benign", "mel", "nv")
    assert loaded.malignant == (False, True, False)
    assert data.counts(loaded)["classes"] == {"benign": 4, "mel": 4, "nv": 4}
    assert len(set(loaded.lesions)) == 12 and loaded.sources[0] == "benign/0.PNG"
    assert np.abs(loaded.images[loaded.labels == 1][:, 0].mean((1, 2)) - [0, 20, 40, 60]).max() < 3


def test_folder_errors(tmp_path):
    root = class_folders(tmp_path / "set")
    message = refuse("'melanoma' is no class", folder, root, 8, ["melanoma"])
    assert message.endswith("benign, mel, nv")
    refuse(r"data.malignant: found \[\]", folder, root, 8, [])
    refuse("some, not all", folder, root, 8, ["benign", "mel", "nv"])
    refuse("write a list", folder, root, 8, "mel")
    (root / "mel" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "mel" / "worse.jpg").write_bytes(b"")
    message = refuse(r"2 problem\(s\)", folder, root, 8, ["mel"])
    assert "mel/bad.png" in message and "mel/worse.jpg" in message
    (root / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(root / "deep" / "er" / "a.png")
    refuse("deep holds no .jpg", folder, root, 8, ["mel"])
    (tmp_path / "one" / "mel").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "mel" / "a.png")
    refuse("1 class folders with images", folder, tmp_path / "one", 8, ["mel"])


def test_the_image_split_leaks_and_says_how_much(tmp_path):
    rows = [(f"L{i // 2}", f"i{i:03d}", datasets.HAM_CLASSES[i // 2 % 7]) for i in range(140)]
    root = ham_folder(tmp_path / "ham", rows)
    splits = data.load("ham10000", **ARGUMENTS | {"root": root, "split_by": "image"})
    assert splits["test"].lesions[0].startswith("L")                # the true lesions are put back
    train, test = splits["train"], splits["test"]
    seen = [lesion in set(train.lesions) for lesion in test.lesions]
    found = data.leaked_share(splits)
    assert 0 < found["all"] == np.mean(seen) and len(found) == 8
    mel = [s for s, label in zip(seen, test.labels) if datasets.HAM_CLASSES[label] == "mel"]
    assert found["mel"] == np.mean(mel)
    for k in set(train.folds):           # cross-fitting stays by lesion all the same
        assert not set(train.lesions[train.folds == k]) & set(train.lesions[train.folds != k])


ARGUMENTS = dict(root="", size=16, seed=3, train=200, val=120, test=120, val_fraction=0.25,
                 test_fraction=0.25, split_by="lesion", folds=2, labelled=1.0, **OPTIONS)


def test_load_phantom():
    splits, again = data.load("phantom", **ARGUMENTS), data.load("phantom", **ARGUMENTS)
    other = data.load("phantom", **ARGUMENTS | {"seed": 4})
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


def test_load_dispatches_and_names_what_is_wrong(tmp_path):
    splits = data.load("folder", **ARGUMENTS | {"root": class_folders(tmp_path / "set", 8)})
    assert [len(part) for part in splits.values()] == [12, 6, 6]
    assert set(splits["train"].folds) == {0, 1}
    rows = [(f"L{i}", f"i{i:02d}", datasets.HAM_CLASSES[i % 7]) for i in range(35)]
    splits = data.load("ham10000", **ARGUMENTS | {"root": ham_folder(tmp_path / "ham", rows)})
    assert [len(part) for part in splits.values()] == [21, 7, 7]
    assert set(data.leaked_share(splits).values()) == {0.0}
    refuse("data.kind: 'cifar'", data.load, "cifar", **ARGUMENTS | {"root": tmp_path})
    refuse("data.train 200, data.size 8", data.load, "phantom", **ARGUMENTS | {"size": 8})
    refuse("data.val 0", data.load, "phantom", **ARGUMENTS | {"val": 0})


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
    for name in data.PER_IMAGE:
        assert np.array_equal(getattr(both, name)[-3:], getattr(picked, name))
    longer = replace(picked, lesions=np.array(["a much longer name", "b", "c"]))
    assert whole.extend(longer).lesions[-3] == "a much longer name"   # str arrays have a width
    renamed = replace(whole, class_names=("w", "x", "y", "z"))
    refuse("class_names differ", whole.extend, renamed)
    refuse("malignant differ", whole.extend, replace(whole, malignant=(False,) * 4))
    large = replace(whole, images=np.zeros((len(whole), 3, 4, 4), np.uint8))
    refuse(r"\(2, 2\) and of \(4, 4\) pixels", whole.extend, large)


def test_images_in_a_file_behave_like_an_array(tmp_path):
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (n, 3, 4, 4), np.uint8) for n in (30, 7))
    np.save(tmp_path / "a.npy", first)
    order = rng.permutation(30)
    lazy = data.FileImages([np.load(tmp_path / "a.npy", mmap_mode="r")], order).join(second)
    whole = np.concatenate([first[order], second])
    assert lazy.shape == whole.shape and np.array_equal(lazy, whole)
    mask = rng.random(37) < 0.5
    for key in (3, -1, slice(5, 34, 3), [36, 0, 0], mask, np.empty(0, int), torch.tensor([33, 2])):
        assert np.array_equal(lazy[key], whole[np.asarray(key) if isinstance(key, torch.Tensor)
                                               else key])
    assert np.array_equal(data.pick(lazy, mask), whole[mask])
    assert isinstance(data.pick(lazy, mask), data.FileImages)

    plain = made(60).subset(np.arange(37))
    plain = replace(plain, images=whole)
    stored = replace(plain, images=lazy)
    for index in (mask, [4, 4, 36]):
        a, b = plain.subset(index), stored.subset(index)
        assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in data.PER_IMAGE)
    assert np.array_equal(stored.extend(a).images, plain.extend(a).images)
    assert np.array_equal(a.extend(stored).images, a.extend(plain).images)
    refuse(r"labels must be int64 \(36,\)", replace, stored, images=data.pick(lazy, slice(36)))


def test_training_reads_images_in_a_file_as_it_does_those_in_memory():
    from engine.training import Streamed
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), np.uint8)
    tensor, stored = torch.tensor(images), Streamed(data.FileImages([images], np.arange(50)))
    index = torch.randint(50, (16,))
    assert len(stored) == 50 and torch.equal(stored[index], tensor[index])
    none = Streamed(data.FileImages([images], np.arange(0)))
    for ours, theirs in ((stored, tensor), (none, tensor[:0])):
        assert all(torch.equal(a, b) for a, b in zip(ours.split(20), theirs.split(20), strict=True))


def test_counts_and_table():
    whole = made(60)
    counted = data.counts(whole)
    assert counted["images"] == sum(counted["classes"].values()) == sum(counted["groups"].values())
    assert counted["lesions"] == 60 and list(counted["groups"]) == ["I", "II", "III", "unknown"]
    known = whole.subset(whole.groups >= 0)
    assert "unknown" not in data.counts(known)["groups"]
    lines = data.counts_table({"train": whole, "test": known}).splitlines()
    assert lines[3].split("(malignant)")[1].split() == [
        str(data.counts(part)["classes"]["c0"]) for part in (whole, known)]
    assert lines[0].split() == ["train", "test"]
    assert lines[1].split() == ["images", str(len(whole)), str(len(known))]
    assert lines[-1].split() == ["group", "unknown", str((whole.groups == -1).sum()), "0"]


# ---------------------------------------------------------------------------- pictures

def test_contact_sheet_places_every_pixel():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 3, 6, 4), np.uint8)
    sheet = data.contact_sheet(images, columns=3, scale=2)
    assert sheet.size == (2 + 3 * (4 * 2 + 2), 2 + 2 * (6 * 2 + 2)) and sheet.mode == "RGB"
    pixels = np.asarray(sheet)
    for i, image in enumerate(images):
        y, x = 2 + 14 * (i // 3), 2 + 10 * (i % 3)
        tile = pixels[y:y + 12, x:x + 8]
        assert np.array_equal(tile[::2, ::2], image.transpose(1, 2, 0))
        assert np.array_equal(tile[1::2, 1::2], tile[::2, ::2])
    assert (pixels[16:, 22:] == 255).all()   # the empty sixth cell


def test_contact_sheet_text():
    images = np.zeros((4, 3, 8, 8), np.uint8)
    bare = data.contact_sheet(images, columns=2)
    full = data.contact_sheet(images, ["a", "wider than its image", None, "x\ny \u2192 z"],
                              columns=2, title="a title", row_labels=["first", "second"])
    assert full.width > bare.width and full.height > bare.height
    ink = (np.asarray(full).sum(2) < 200).sum()
    assert ink > 4 * 16 * 16   # the four black images, and some letters
    empty = data.contact_sheet(images[:0], [], title="hard cases")
    assert (np.asarray(empty) < 128).any()   # it says that there are none
    refuse("3 captions for 4", data.contact_sheet, images, ["a"] * 3)
    refuse("1 row_labels for 2", data.contact_sheet, images, columns=2, row_labels=["a"])


def test_class_by_group_sheet_with_and_without_groups():
    whole = made(60)
    with_groups = data.class_by_group_sheet(whole, each=2)
    none = replace(whole, groups=np.full(len(whole), -1), group_names=())
    without = data.class_by_group_sheet(none)
    assert with_groups.width > 0 and without.width > 0
    few = whole.subset([0])   # nearly every cell is empty
    assert data.class_by_group_sheet(few).size[1] == with_groups.size[1]


def test_border_colour_ignores_lesion_and_vignette():
    y, x = np.mgrid[:32, :32] - 15.5
    images = np.empty((2, 3, 32, 32), np.uint8)
    for image, skin in zip(images, ((210, 160, 140), (90, 60, 50))):
        image[:] = np.array(skin)[:, None, None]
        image[:, np.hypot(x, y) < 13] = 20         # a large lesion
        image[:, np.hypot(x, y) > 16] = 0          # a black vignette in the corners
        image[:, 14:17, :] = 5                     # a hair from side to side
    assert np.array_equal(data.border_colour(images), [[210, 160, 140], [90, 60, 50]])
    assert data.border_colour(images).dtype == np.float64
    refuse("at least 8 x 8", data.border_colour, images[:, :, :4, :4])
    many = np.repeat(images, 1200, axis=0)
    assert np.array_equal(data.border_colour(many), np.repeat(data.border_colour(images), 1200, 0))


# sRGB and its CIELAB under D65: the primaries, white and black as tables of CIELAB give them
PUBLISHED = {(255, 0, 0): (53.24, 80.09, 67.20), (0, 255, 0): (87.74, -86.18, 83.18),
             (0, 0, 255): (32.30, 79.19, -107.86), (255, 255, 0): (97.14, -21.55, 94.48),
             (0, 255, 255): (91.11, -48.09, -14.13), (255, 0, 255): (60.32, 98.23, -60.82),
             (255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0), (119, 119, 119): (50.03, 0, 0)}
# L* and b* of the ColorChecker's two skin patches as its maker publishes them, under D50
SKIN = {(194, 150, 130): (65.71, 17.81), (115, 82, 68): (37.99, 14.06)}


def test_srgb_to_cielab_against_published_pairs():
    found = data.to_lab(np.array(list(PUBLISHED)))
    assert np.abs(found - list(PUBLISHED.values())).max() < 0.03
    skin = data.to_lab(np.array(list(SKIN)))[:, [0, 2]]
    assert np.abs(skin - list(SKIN.values())).max() < 1


def test_skin_tone_estimates():
    # L* and b* chosen for angles on both sides of every published threshold, 55 41 28 10 -30
    angles = np.array([56, 54, 42, 40, 29, 27, 11, 9, -29, -31])
    lab = np.stack([50 + 15 * np.tan(np.radians(angles)), np.full(10, 10.0), np.full(10, 15.0)], 1)
    y = (lab[:, 0] + 16) / 116
    xyz = np.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], 1) ** 3 * [0.9505, 1, 1.089]
    linear = xyz @ np.linalg.inv([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192],
                                  [0.1805, 0.0722, 0.9505]])
    rgb = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    images = np.broadcast_to(rgb.round().astype(np.uint8)[:, :, None, None], (10, 3, 16, 16)).copy()
    images[:, :, 4:12, 4:12] = 0                     # a black lesion in the middle changes nothing
    names, index = data.skin_tones(images)
    assert names == data.TONES and list(index) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    names, index = data.skin_tones(images[[9, 0]])
    assert names == ("very light", "dark") and list(index) == [1, 0]
    assert data.TONES[0] in data.skin_tones(np.full((1, 3, 16, 16), 255, np.uint8))[0]


def test_command_line(tmp_path, monkeypatch, capsys):
    asked = []

    def load(path, overrides):   # in place of config.load
        asked.append((path, overrides))
        return SimpleNamespace(data=SimpleNamespace(kind=overrides[0], **ARGUMENTS))
    monkeypatch.setitem(sys.modules, "config", SimpleNamespace(load=load))
    picture = tmp_path / "out" / "data.png"
    words = ["data.py", "--config", "a.yaml", "--out", str(picture), "--set"]
    monkeypatch.setattr(sys, "argv", words + ["phantom"])
    data.main()
    assert "class mel (malignant)" in capsys.readouterr().out and picture.exists()
    assert asked == [("a.yaml", ["phantom"])]
    monkeypatch.setattr(sys, "argv", words + ["ham10000"])
    with pytest.raises(SystemExit) as stop:
        data.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: data.root: '' is not a folder")


def test_load_takes_exactly_the_section_data_of_the_config():
    from engine import config
    wanted = {field.name for field in fields(config.Data)}
    assert wanted == set(inspect.signature(data.load).parameters) - {"cache", "progress"}
