"""Images from disk: exact counts of the real set, decoding, the cache, folders, every error."""
import csv
import io
import os
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from datasets import images, layouts
from datasets.layouts import HAM_CLASSES, DataError

HAM = Path(__file__).parents[2] / "shared" / "data" / "ham10000"
needs_ham = pytest.mark.skipif(not HAM.is_dir(), reason="HAM10000 is not on this machine")
OPTIONS = dict(malignant=["mel"], image_column="", label_column="", lesion_column="", group="",
               split_by="lesion", skip_bad=False)
TURNED = Image.Exif()
TURNED[0x0112] = 6                   # orientation: the camera was held a quarter turn to the left
ROWS = [("L1", "i1", "nv"), ("L1", "i2", "nv"), ("L2", "i3", "mel"), ("L3", "i4", "bkl")]


def everything(kind, root, size=8, cache=None, progress=None, **options):
    """What images.read gives, as attributes; sides, the data set's own splits, among them."""
    section = SimpleNamespace(kind=kind, root=root, size=size, **OPTIONS | options)
    arrays, names, sides = images.read(section, cache, progress)
    return SimpleNamespace(**arrays, **names, sides=sides)


def ham(root, size, cache=None, progress=None):
    return everything("ham10000", root, size, cache, progress)


def folder(root, size, malignant):
    return everything("folder", root, size, malignant=malignant)


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
    with pytest.raises(DataError, match=match) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------- the real HAM10000

def metadata() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image, lesion, dx) columns, read independently of datasets."""
    with open(HAM / "HAM10000_metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(np.array([row[key] for row in rows]) for key in ("image_id", "lesion_id", "dx"))


@pytest.fixture(scope="module")
def whole_ham(tmp_path_factory):
    """Where the decoded pixels of all HAM10000 are kept for every test here."""
    return tmp_path_factory.mktemp("ham") / "cache"


@needs_ham
def test_ham10000_counts_are_exact():
    rows = [(row["lesion_id"], row["dx"]) for row in layouts.read_csv(
        HAM / "HAM10000_metadata.csv", ("lesion_id", "dx"))]
    lesions, repeats = np.unique([lesion for lesion, _ in rows], return_counts=True)
    assert (len(rows), len(lesions), (repeats > 1).sum(), repeats.max()) == (10015, 7470, 1956, 6)
    published = {"akiec": (327, 228), "bcc": (514, 327), "bkl": (1099, 727), "df": (115, 73),
                 "mel": (1113, 614), "nv": (6705, 5403), "vasc": (142, 98)}
    for name, wanted in published.items():
        of_class = [lesion for lesion, dx in rows if dx == name]
        assert (len(of_class), len(set(of_class))) == wanted
    assert set(published) == set(HAM_CLASSES)


def classes(loaded) -> dict[str, int]:
    """Images a class."""
    return {name: int((loaded.labels == i).sum()) for i, name in enumerate(loaded.class_names)}


@needs_ham
def test_whole_ham10000_loads(whole_ham):
    whole = ham(HAM, 16, whole_ham)
    assert whole.notes == ("images that repeat another, pixel for pixel, and count as the same "
                           "lesion: 2",)                     # as the data's own notes say
    assert len(whole.images) == 10015 and len(set(whole.lesions)) == 7470
    assert classes(whole) == dict(akiec=327, bcc=514, bkl=1099, df=115, mel=1113, nv=6705, vasc=142)
    assert whole.group_names == () and set(whole.groups) == {-1} and whole.sides is None


@needs_ham
def test_ham10000_images_load_as_isic_2019(whole_ham):
    """The same photographs under the same names; the other 15,316 are not on this machine."""
    refuse(r"15316 problem\(s\).*no ISIC_0000000 below", everything, "isic", HAM.parent, 16,
           whole_ham)
    loaded = everything("isic", HAM.parent, 16, whole_ham, skip_bad=True, group="sex")
    with open(HAM.parent / "metadata" / "ISIC_2019_Training_Metadata.csv", newline="") as file:
        sex = {row["image"]: row["sex"] or "unknown" for row in csv.DictReader(file)}
    assert len(loaded.images) == 10015 and len(set(loaded.lesions)) == 7470
    assert classes(loaded) == dict(mel=1113, nv=6705, bcc=514, ak=130, bkl=1099, df=115, vasc=142,
                                   scc=197)
    groups = [(*loaded.group_names, "unknown")[i] for i in loaded.groups]
    assert Counter(groups) == Counter(sex[name] for name in metadata()[0])
    assert loaded.notes[0].startswith("data.skip_bad left out 15316 of 25331 images")
    sick = [name for name, bad in zip(loaded.class_names, loaded.malignant) if bad]
    assert sick == ["mel", "bcc", "ak", "scc"]


@needs_ham
@pytest.mark.parametrize("name", ["HAM10000_metadata", "HAM10000_metadata.csv"])
def test_real_images_load_in_any_layout(tmp_path, name):
    ids, lesions, dx = metadata()
    chosen = np.concatenate([np.flatnonzero(dx == label)[:6] for label in HAM_CLASSES])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    with open(HAM / "HAM10000_metadata.csv") as file:
        lines = file.read().splitlines()
    with open(tmp_path / "deep" / name, "w") as file:
        file.write("\n".join([lines[0]] + [lines[1 + i] for i in chosen[::-1]]))
    for i, row in enumerate(chosen):
        found = next(HAM.glob(f"*/{ids[row]}.jpg"))
        shutil.copy(found, tmp_path / ("deep", "deep/er")[i % 2] / found.name)
    loaded = ham(tmp_path, 16)
    order = np.argsort(ids[chosen])
    assert list(loaded.sources) == list(ids[chosen][order])
    assert list(loaded.lesions) == list(lesions[chosen][order])
    assert [HAM_CLASSES[i] for i in loaded.labels] == list(dx[chosen][order])
    bad = [name for name, malignant in zip(loaded.class_names, loaded.malignant) if malignant]
    assert bad == ["akiec", "bcc", "mel"]
    assert set(loaded.groups) == {-1} and loaded.group_names == ()
    # pixels against an independent way: mean over the 150 x 150 centre of the full decoding
    with Image.open(next(HAM.glob(f"*/{loaded.sources[0]}.jpg"))) as image:
        centre = np.asarray(image.convert("RGB"), float)[:, 25:175]
    assert np.abs(loaded.images[0].mean((1, 2)) - centre.mean((0, 1))).max() < 2


# ---------------------------------------------------------------------------- HAM10000, made small

def test_ham_layout_order_and_malignant(tmp_path):
    forward = ham(ham_folder(tmp_path / "a"), 8)
    backward = ham(ham_folder(tmp_path / "b", ROWS[::-1], "HAM10000_metadata"), 8)
    for name in ("images", "labels", "groups", "lesions", "sources"):
        assert np.array_equal(getattr(forward, name), getattr(backward, name))
    assert forward.images.dtype == np.uint8 and forward.images.shape == (4, 3, 8, 8)
    assert forward.labels.dtype == forward.groups.dtype == np.int64
    assert forward.lesions.dtype.kind == forward.sources.dtype.kind == "U"
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
    assert len(ham(root, 8).images) == 4   # the same bytes: harmless
    Image.new("RGB", (30, 30), "red").save(twin)
    refuse("i1 stands in 2 folders, not the same", ham, root, 8)


def test_ham_file_errors(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    refuse("data.root: .*nowhere' is not a folder", ham, nowhere, 8)
    refuse("no HAM10000_metadata.csv", ham, tmp_path, 8)
    table = tmp_path / "HAM10000_metadata.csv"
    for content, match in ((b"", "no rows"), (b"lesion_id,image_id,dx\n", "no rows"),
                           (b"lesion_id,image_id\nL,i\n", "no column dx"),
                           (b"lesion_id|image_id|dx\nL|i|nv\n", r"found 'lesion_id\|image_id\|dx'"),
                           (b"\xff\xfe\x00nonsense", "not a readable csv")):
        table.write_bytes(content)
        refuse(match, ham, tmp_path, 8)
    table.unlink()
    root = ham_folder(tmp_path / "fine")
    for content in (b"\xef\xbb\xbflesion_id,image_id,dx\n\nL1,i1,nv\n",   # BOM, blank line
                    b"dx\timage_id\tlesion_id\nnv\ti1\tL1",              # tabs
                    b'lesion_id;image_id;dx;age, years\nL1;"i1";nv;5,5'):    # semicolons
        (root / "meta" / "HAM10000_metadata.csv").write_bytes(content)
        assert list(ham(root, 8).sources) == ["i1"]


# ---------------------------------------------------------------------------- decoding and cache

def test_decode_takes_the_central_square(tmp_path):
    frame = np.zeros((60, 80, 3), np.uint8)
    frame[:, 10:70] = (200, 100, 50)
    frame[20:40, 30:50] = (10, 20, 250)   # a lesion in the very middle
    Image.fromarray(frame).save(tmp_path / "a.png")
    image = images.decode(tmp_path / "a.png", 12)
    assert image.shape == (3, 12, 12) and image.dtype == np.uint8
    assert image[:, 0, 0].tolist() == [200, 100, 50]
    assert np.abs(image[:, 6, 6] - np.array([10.0, 20, 250])).max() < 10   # Lanczos rings
    assert np.array_equal(image, image[:, ::-1, ::-1])   # centred: no half-pixel shift
    Image.fromarray(frame.transpose(1, 0, 2)).save(tmp_path / "b.png")
    upright = images.decode(tmp_path / "b.png", 12).astype(int).transpose(0, 2, 1)
    assert np.abs(upright - image).max() <= 1   # PIL rounds between its two passes


def test_decode_modes(tmp_path):
    for mode, colour in (("L", 90), ("RGBA", (9, 9, 9, 255)), ("P", 7), ("CMYK", (0, 0, 0, 165))):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (9, 9), colour).save(path)
        assert images.decode(path, 4).shape == (3, 4, 4)
    two = Image.new("L", (20, 10), 255)
    two.paste(0, (0, 0, 10, 10))
    two.crop((0, 0, 20, 10)).save(tmp_path / "turned.png", exif=TURNED)
    upright = images.decode(tmp_path / "turned.png", 4)
    assert upright[0, 0].max() < 20 and upright[0, -1].min() > 235    # its left side is its top
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match="more than 8 bits"):
        images.decode(tmp_path / "deep.png", 4)


@pytest.mark.parametrize("suffix", layouts.SUFFIXES)
def test_every_suffix_is_read(tmp_path, suffix):
    root = class_folders(tmp_path)
    Image.new("RGB", (12, 9), (250, 0, 250)).save(root / "nv" / f"new{suffix.upper()}")
    loaded = folder(root, 8, ["mel"])
    new = list(loaded.sources).index(f"nv/new{suffix.upper()}")
    assert np.abs(loaded.images[new].mean((1, 2)) - (250, 0, 250)).max() < 6


def test_two_pictures_in_one_jpeg(tmp_path):
    """What telephones write (MPO) is read as its first picture."""
    first, second = (Image.new("RGB", (12, 9), (level,) * 3) for level in (40, 200))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert np.abs(images.decode(tmp_path / "a.jpg", 4).astype(int) - 40).max() < 3


def test_no_other_program_is_started_whatever_a_file_is_called(tmp_path):
    root = class_folders(tmp_path)
    for name, content in (("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"),
                          ("b.png", b"%PDF-1.4\n"), ("c.jpg", b"\0\0\1\0\1\0" + bytes(60))):
        (root / "nv" / name).write_bytes(content)
    message = refuse(r"3 problem\(s\)", folder, root, 8, ["mel"])
    for name in ("a.jpg", "b.png", "c.jpg"):
        assert f"nv/{name} cannot be decoded (cannot identify image file" in message


def encoded(form, **options) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((20, 15), 90).convert("RGB").save(buffer, form, **options)
    return buffer.getvalue()


# an orientation, and the place of the image's data given as text
EXIF = (b"Exif\0\0MM\0*\0\0\0\x08\0\2" + struct.pack(">HHL", 0x0111, 2, 4) + b"abc\0"
        + struct.pack(">HHLHHL", 0x0112, 3, 1, 6, 0, 0))


PNG = encoded("PNG").split(b"IDAT", 1)


@pytest.mark.parametrize("content, error", [
    (encoded("JPEG", exif=EXIF), struct.error),
    (b"IDAT".join([PNG[0][:-4] + b"\0\0\0\1", PNG[1]]), SyntaxError),
    (b"P6\n9 9\nx\n", ValueError), (encoded("TIFF")[:-100], OSError), (b"", OSError)],
    ids=["exif", "png", "ppm", "tiff", "empty"])
def test_whatever_pillow_raises_is_a_file_that_cannot_be_decoded(tmp_path, content, error):
    root = class_folders(tmp_path)
    (root / "nv" / "bad.jpg").write_bytes(content)
    with pytest.raises(error):
        images.decode(root / "nv" / "bad.jpg", 8)
    message = refuse(r"1 problem\(s\).*nv/bad.jpg cannot be decoded \(.+\): replace", folder, root,
                     8, ["mel"])
    assert str(tmp_path) not in message.split(":", 1)[1]


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_end_in_an_image_or_in_unreadable(tmp_path):
    rng = np.random.default_rng(0)
    for form in images.FORMATS * 40:
        content = bytearray(encoded(form))
        for at in rng.integers(0, rng.choice([60, len(content)]), 3):
            content[at] = rng.integers(256)
        (tmp_path / "a.jpg").write_bytes(content)
        try:
            assert images.decode(tmp_path / "a.jpg", 4).shape == (3, 4, 4)
        except images.UNREADABLE:
            pass


@pytest.mark.parametrize("form, at", [("PNG", 16), ("BMP", 18), ("PPM", 3)])
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, form, at):
    """A head that states 8,193 x 8,192 pixels, before 300 of them: decoded, it would be cut off."""
    root, content = class_folders(tmp_path), bytearray(encoded(form))
    if form == "PNG":
        content[at:at + 8] = struct.pack(">II", 8193, 8192)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif form == "BMP":
        content[at:at + 8] = struct.pack("<II", 8193, 8192)
    else:
        content[at:at + 5] = b"8193 8192"
    (root / "nv" / "bomb.png").write_bytes(content)
    message = refuse(r"nv/bomb.png cannot be decoded \(8193 x 8192 pixels, over 67,108,864", folder,
                     root, 8, ["mel"])
    assert "1 problem(s)" in message


def test_jpeg_draft_changes_little(tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).resize((640, 480))
    smooth.save(tmp_path / "a.jpg", quality=95)
    smooth.save(tmp_path / "a.png")
    reduced, full = (images.decode(tmp_path / name, 80).astype(int) for name in ("a.jpg", "a.png"))
    assert np.abs(reduced - full).mean() < 2


def test_cache_hit_miss_and_damage(tmp_path, monkeypatch):
    root, cache = ham_folder(tmp_path / "in"), tmp_path / "run" / "images"

    def load(size=8):
        """The images, and how many of them were decoded."""
        seen = []
        loaded = ham(root, size, cache, lambda *done: seen.append(done)).images
        assert seen == [(i + 1, 4) for i in range(len(seen))]
        return loaded, len(seen)
    first, decoded = load()
    assert decoded == 4
    again, decoded = load()
    assert decoded == 0 and np.array_equal(first, again)
    assert load(12)[1] == 4 and load()[1] == 4 and load()[1] == 0   # another size, and back

    path = Path(f"{cache}.npz")
    good = path.read_bytes()
    for content in (good[:-50], b"", b"{", b"PK\x03\x04", encoded("PNG")):
        path.write_bytes(content)
        assert load()[1] == 4 and load()[1] == 0, content[-4:]
    np.save(str(path), first)                                       # a plain array, no archive
    os.replace(f"{path}.npy", path)
    assert load()[1] == 4
    path.unlink()
    assert load()[1] == 4
    assert [path.name for path in cache.parent.iterdir()] == ["images.npz"]
    picture = next(root.glob("*/i2.jpg"))
    Image.new("RGB", (12, 9), "white").save(picture, quality=30)   # the file's size changes
    changed, decoded = load()
    assert decoded == 4 and changed[1].min() > 250
    monkeypatch.setattr(images, "VERSION", 999)
    assert load()[1] == 4


def test_cache_sees_a_file_replaced_by_one_of_equal_size(tmp_path):
    root, cache = ham_folder(tmp_path / "in"), tmp_path / "images"
    picture, before = next(root.glob("*/i1.jpg")), ham(root, 8, cache).images
    size, changed = picture.stat().st_size, picture.stat().st_mtime_ns
    Image.new("RGB", (12, 9), "white").save(picture, quality=10)
    picture.write_bytes(picture.read_bytes().ljust(size, b"\0"))
    os.utime(picture, ns=(changed, changed + 1))           # a nanosecond later
    after = ham(root, 8, cache).images
    assert picture.stat().st_size == size
    assert before[0].max() < 5 and after[0].min() > 250 and np.array_equal(before[1:], after[1:])


def test_cached_images_are_in_memory_and_writable(tmp_path):
    root, cache = ham_folder(tmp_path / "in"), tmp_path / "images"
    for _ in range(2):
        loaded = ham(root, 8, cache).images
        assert type(loaded) is np.ndarray and loaded.flags.writeable


def test_a_damaged_byte_anywhere_never_changes_the_images(tmp_path):
    root, path = ham_folder(tmp_path / "in"), tmp_path / "images.npz"
    whole, calls = ham(root, 8, tmp_path / "images").images, []
    good = path.read_bytes()
    pixels = good.index(whole.tobytes())
    for at in range(0, len(good), 9):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1:])
        loaded = ham(root, 8, tmp_path / "images", lambda *done: calls.append(at))
        assert np.array_equal(loaded.images, whole)
    assert {at for at in range(0, len(good), 9) if 0 <= at - pixels < whole.size} <= set(calls)


def test_a_cache_clears_what_killed_processes_left_and_nothing_else(tmp_path):
    root, cache = ham_folder(tmp_path / "in"), tmp_path / "images"
    dead, alive, other = (Path(f"{cache}{end}") for end in (
        f".npz.{2 ** 22 + 1}.tmp", ".npz.1.tmp", f"2.npz.{2 ** 22 + 1}.tmp"))    # no pid is as high
    for path in (dead, alive, other):
        path.write_bytes(b"half")
    ham(root, 8, cache)
    assert alive.exists() and other.exists()
    assert dead.exists() != Path("/proc/self").exists()


def test_cache_of_objects_is_refused_and_errors_name_the_file(tmp_path):
    root, cache = ham_folder(tmp_path / "in"), tmp_path / "images"
    ham(root, 8, cache)
    with np.load(f"{cache}.npz") as arrays:
        kept = dict(arrays)
    kept["images"] = np.array([{"a": 1}] * 4, dtype=object)         # even with the right key
    np.savez(f"{cache}.npz", **kept)
    assert ham(root, 8, cache).images.dtype == np.uint8
    next(root.glob("*/i2.jpg")).write_bytes(b"no jpeg")
    message = refuse("i2 cannot be decoded", ham, root, 8, tmp_path / "none" / "c")
    assert str(tmp_path) not in message.split(":", 1)[1]
    (tmp_path / "file").write_text("")
    good = ham_folder(tmp_path / "good")
    refuse("cache .*choose another", ham, good, 8, tmp_path / "file" / "c")
    (tmp_path / "full.npz").mkdir()                                 # written, but not put in place
    refuse("cache .*choose another", ham, good, 8, tmp_path / "full")
    assert not list(tmp_path.glob("*.tmp"))


# ---------------------------------------------------------------------------- folders

def test_folder(tmp_path):
    root = class_folders(tmp_path / "set")
    (root / "nv" / "notes.txt").write_text("ignored")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(b"ignored")
    loaded = folder(root, 8, ["mel"])
    assert loaded.class_names == ("benign", "mel", "nv")
    assert loaded.malignant == (False, True, False)
    assert classes(loaded) == {"benign": 4, "mel": 4, "nv": 4}
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
