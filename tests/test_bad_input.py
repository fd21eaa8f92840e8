"""Malformed input through the program's own front door: one line and status 2, or as documented.

Every row goes through the command line; an experiment that ends once the data are split stands in
for the whole one. benchmarks/hostile.py goes on with thousands of random ones.
"""
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import ddpm
import loop
from datasets import layouts
from engine import config as configuration
from engine.command import launch
from engine.run import fingerprint
from extras import external, few_labels
from guidance import OBJECTIVES
from test_config import FILES, OVERRIDES

HERE = Path(__file__).parents[1]
TINY = HERE / "configs/tiny.yaml"
KNOWN = {"loop.arms": (*loop.ARMS, "all"), "guidance.sampler": ddpm.SAMPLERS,
         "guidance.objectives": OBJECTIVES}


@pytest.fixture
def front_door(tmp_path, monkeypatch, capsys):
    """front_door(arguments) -> the one line, or the splits if there is nothing to complain of."""
    monkeypatch.chdir(tmp_path)
    found = []

    def prepare_only(run):
        splits = data.load(run.config.data, run.cache)
        splits |= few_labels.hide(run.config.data, splits)
        found.append(splits | external.load_made(run.config, splits["train"]))

    def knock(*arguments):
        status = launch(prepare_only, KNOWN, [str(a) for a in arguments])
        lines = capsys.readouterr().err.splitlines()
        if status == 0:
            return found.pop()
        assert status == 2 and len(lines) == 1 and lines[0].startswith("loop.py: "), lines
        assert not list(Path("runs").glob("*[!cache]*")), "a run folder is left behind"
        return lines[0]
    return knock


# ---- config --------------------------------------------------------------------------------------

MORE_OVERRIDES = [
    ("ddpm.steps='5'", "ddpm.steps", "'5'"), ("ddpm.steps=[5]", "ddpm.steps", "whole number"),
    ("ddpm.steps={a: 5}", "ddpm.steps", "whole number"), ("ddpm.steps=5e3", "ddpm.steps", "5e3"),
    ("ddpm.steps=1_0.5", "ddpm.steps", "10.5"), ("ddpm.steps=-3", "ddpm.steps", "at least 1"),
    ("ddpm.steps=2001-12-14", "ddpm.steps", "date"), ("ddpm.steps=2001-13-45", "--set", "month"),
    ("ddpm.batch=1", "ddpm.batch", "between"), ("ddpm.batch=1000000000", "ddpm.batch", "between"),
    (f"ddpm.lr={10 ** 400}", "ddpm.lr", "finite"), ("ddpm.lr=1e400", "ddpm.lr", "text"),
    ("ddpm.lr=1,5", "ddpm.lr", "'1,5'"), ("ddpm.lr=2", "ddpm.lr", "between"),
    ("ddpm.ema=1", "ddpm.ema", "between"), ("ddpm.T=9", "ddpm.T", "between"),
    ("ddpm.T=2e3", "ddpm.T", "2e3"), ("ddpm.schedule=", "ddpm.schedule", "cosine"),
    ("ddpm.schedule=\"a\\nb\"", "ddpm.schedule", "cosine"),
    ("data.train=39", "data.train", "between"), (f"data.train={10 ** 12}", "data.train", "between"),
    (f"data.seed={2 ** 70}", "data.seed", "between"), ("data.seed=-1", "data.seed", "between"),
    ("data.size=16.0", "data.size", "16.0"), ("data.size=0x", "data.size", "'0x'"),
    ("data.root=null", "data.root", "None"), ("data.root=[a]", "data.root", "text"),
    ("data.kind=[phantom]", "data.kind", "text"), ("data.kind=PHANTOM", "data.kind", "PHANTOM"),
    ("data.split_by=patient", "data.split_by", "lesion"), ("data.folds=21", "data.folds", "20"),
    ("data.folds=20", "class", "folds"),                # a class of the tiny phantom is too rare
    ("data.malignant=[1]", "data.malignant[0]", "text"), ("unet.width=0", "unet.width", "between"),
    ("unet.width=16.", "unet.width", "16.0"), ("unet.multipliers=[0]", "multipliers[0]", "between"),
    ("unet.multipliers=[1, 2, 4, 8, 16]", "data.size", "multiple of 32"),
    ("unet.multipliers={1: 2}", "--set", "in quotes"), ("unet.blocks=9", "unet.blocks", "between"),
    ("unet.patch=3", "data.size", "multiple of 6"), ("unet.attention=-1", "unet.attention", "0"),
    ("classifier.steps=nan", "classifier.steps", "'nan'"),
    ("classifier.jitter=[0.3, 4]", "classifier.jitter[1]", "between"),
    ("classifier.jitter=[.nan]", "classifier.jitter[0]", "finite"),
    ("guidance.depth=1.01", "guidance.depth", "between"),
    ("guidance.objectives.class_evidence=-0.1", "guidance.objectives.class_evidence", "between"),
    ("guidance.objectives.class_evidense=1", "class_evidense", "did you mean 'class_evidence'"),
    ("guidance.objectives.beauty=1", "guidance.objectives.beauty", "class_evidence, hardness"),
    ("guidance.objectives=0.1", "guidance.objectives", "numbers by name"),
    ("guidance.sampler=euler", "guidance.sampler", "ddim, ddpm, dpm"),
    ("guidance.sampler=[ddim]", "guidance.sampler", "text"),
    ("guidance.sampler=ddpm", "guidance.sampler", "guidance.start: parent"),
    ("evaluate.draws=1000000000", "evaluate.draws", "between"),
    ("loop.arms=guided", "loop.arms", "list"), ("loop.arms=[real, [guided]]", "arms[1]", "text"),
    ("loop.arms=[REAL]", "loop.arms[0]", "real"),
    ("loop.arms=[real, mirror]", "loop.arms[1]", "noise, noise_hard, external, random"),
    ("loop.device=", "loop.device", "auto"), ("loop.device=mps", "loop.device", "auto or cpu"),
    ("loop.device=cuda:x", "loop.device", "auto"), ("loop.device=cuda:99", "loop.device", "auto"),
    ("loop.bf16=maybe", "loop.bf16", "auto"), ("loop.deterministic=maybe", "deterministic", "true"),
    ("loop.deterministic=1", "loop.deterministic", "true or false"),
    ("loop.share=0", "loop.share", "between"), ("loop.surplus=0.5", "loop.surplus", "between"),
    ("loop.seeds=3.0", "loop.seeds", "3.0"), ("loop.rounds=21", "loop.rounds", "20"),
    ("loop.added=.inf", "loop.added", "finite"), ("loop.margin=2", "loop.margin", "between"),
    (".=1", "--set", "section.key=value"), ("a.=1", "--set", "section.key=value"),
    ("extends.x=1", "extends", "unknown section"), ("loop.seed.more=1", "loop.seed.more", "known"),
    ("loop.seeds=&a 3", "--set", "plain values"), ("loop.seeds=*a", "--set", "plain values"),
    ("loop.seeds=!!int 3", "--set", "plain values"), ("loop.seeds=\"", "--set", ""),
]


@pytest.mark.parametrize("override, key, hint", OVERRIDES + MORE_OVERRIDES,
                         ids=lambda text: text[:40])
def test_a_wrong_value(override, key, hint, front_door):
    line = front_door("--config", TINY if (override, key, hint) in MORE_OVERRIDES else
                      HERE / "config.yaml", "--set", override)
    assert key in line and hint in line


MORE_FILES = [
    (b"\xff\xfed\x00a\x00", "utf-8"), (b"\x00", "c.yaml"), (b"ddpm: {steps: \x07}", "c.yaml"),
    ("ddpm:\n  steps: 3\n steps: 4\n", "line"), ("ddpm: {steps: 3\nloop: {seed: 1}", "line"),
    ("ddpm: {steps: 3}\nddpm: {lr: 0.1}\n", "'ddpm' stands twice"), ("--- {}\n--- {}\n", "line 2"),
    ("ddpm: null\n", "must hold keys"), ("ddpm: [steps, 3]\n", "must hold keys"),
    ("1: {a: 2}\n", "in quotes"), ("{[1]: 2}\n", "in quotes"), ("%YAML 9.9\n---\na: 1\n", "line"),
    ("extends: .\n", "cannot be read"), ("extends: [a]\n", "extends"),
    ("extends: \"a\\0b\"\n", "cannot be read"), ("<<: {ddpm: {steps: 3}}\n", "merge"),
    ("ddpm: &a {steps: *a}\n", "plain values"), ("a: " + "[" * 1000, "recursion"),
    ("ddpm: {steps: " + "9" * 5000 + "}\n", "2,000"), ("x: !!python/name:os.system\n", "plain"),
    ("x: !!python/object/apply:os.mkdir [unpickled]\n", "plain"), ("x: !mine 3\n", "plain"),
    ("".join(f"{c}: &{c} [{', '.join(['*' + b] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi")),
     "plain values"),
]


@pytest.mark.parametrize("content, hint", FILES + MORE_FILES, ids=lambda c: repr(c)[:40])
def test_a_wrong_file(content, hint, front_door):
    Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert hint in front_door("--config", "c.yaml") and not Path("unpickled").exists()


# ---- tables and images --------------------------------------------------------------------------

COLUMNS = "lesion_id,image_id,dx\n"
LINES = [f"L{i:02d},I{i:02d},{layouts.HAM_CLASSES[i % 7]}\n" for i in range(28)]   # L02 is bkl
HAM = ("--config", TINY, "--set", "data.kind=ham10000", "--set", "data.root=root")


def picture(mode="RGB", size=(20, 16), seed=99):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def ham(text=None):
    """A HAM10000 of 4 lesions a class, a photograph each; `text` instead of its table."""
    Path("root").mkdir()
    for i in range(28):
        Path(f"root/I{i:02d}.jpg").write_bytes(encoded(picture(seed=i)))
    text = COLUMNS + "".join(LINES) if text is None else text
    Path("root/HAM10000_metadata.csv").write_bytes(
        text if isinstance(text, bytes) else text.encode())


def lines(change):
    """The table with its third line changed."""
    return COLUMNS + "".join(LINES[:2]) + change + "".join(LINES[3:])


WHOLE = COLUMNS + "".join(LINES)
TABLES = [  # (name, content, hint of the refusal or None: read as documented)
    ("as it should be", WHOLE, None), ("empty", "", "rows"), ("header alone", COLUMNS, "rows"),
    ("no header", "".join(LINES), "lesion_id"), ("semicolons", WHOLE.replace(",", ";"), None),
    ("tabs", WHOLE.replace(",", "\t"), None), ("pipes", WHOLE.replace(",", "|"), "image_id"),
    ("byte order mark", "\ufeff" + WHOLE, None), ("Windows line ends", WHOLE.replace("\n", "\r\n"),
                                                  None),
    ("old Mac line ends", WHOLE.replace("\n", "\r"), None),
    ("blank lines", WHOLE.replace("\n", "\n\n"), None), ("spaces", WHOLE.replace(",", " , "), None),
    ("a column twice", WHOLE.replace("\n", ",x\n").replace("dx,x", "dx, dx"),
     "metadata.csv: two columns dx; its first line must name"),
    ("no lesion_id", WHOLE.replace("lesion_id", "lesion"), "lesion_id"),
    ("no dx", WHOLE.replace("dx", "diagnosis"), "dx"), ("DX", WHOLE.replace("dx", "DX"), "dx"),
    ("more columns", "".join(line.replace("\n", ",60,male\n") for line in
                             (COLUMNS, *LINES)), None),
    ("no end of line at the end", WHOLE[:-1], None), ("utf-16", WHOLE.encode("utf-16"), "csv"),
    ("latin-1", WHOLE.replace("L01", "L\xe9").encode("latin-1"), "utf-8"),
    ("bytes", bytes(range(256)), "csv"), ("zeros", bytes(1000), "csv"),
    ("an image", encoded(picture()), "csv"), ("a cell of 200,000 letters", lines("L02,I02," +
                                                                                 "x" * 200000), ""),
    ("an open quote", lines('"L02,I02,nv\n'), ""), ("a short row", lines("L02,I02\n"), "I02"),
    ("a long row", lines("L02,I02,bkl,more,more\n"), "line 4: 5 fields, where the header names 3"),
    ("a long row after a blank one", lines("\nL02,,I02,bkl\n"), "line 5: 4 fields"),
    ("dot and slash", lines("L02,./I02.jpg,bkl\n"), None),
    ("an escape in an id", lines("L02,\x1b[2JI02,bkl\n"), r"'\x1b[2JI02' is too long, or holds"),
    ("a long id", lines(f"L02,{'I' * 300},bkl\n"), "is too long"),
    ("no id", lines("L02,,nv\n"), "image id"),
    ("no lesion", lines(",I02,bkl\n"), None), ("unknown dx", lines("L02,I02,wart\n"), "wart"),
    ("dx in capitals", lines("L02,I02,NV\n"), "NV"), ("two rows", WHOLE + LINES[0], "twice"),
    ("no such image", lines("L02,I99,nv\n"), "I99"), ("extension", lines("L02,I02.jpg,bkl\n"),
                                                      None),
    ("up and out", lines("L02,../I02,nv\n"), "../I02"),
    ("absolute", lines("L02,/I02,nv\n"), "/I02"),
    ("a zero byte", lines("L02,I\0,nv\n"), "root"), ("two labels of a lesion",
                                                    lines("L01,I02,nv\n"), "L01"),
    ("one class", COLUMNS + "".join(LINES[1::7]), "'akiec' has 0 lesion"),
    ("one lesion", COLUMNS + LINES[0], "lesion"),
    ("one lesion of a class", COLUMNS + "".join(LINES[:7]), "'akiec' has 1 lesion"),
    ("fewer lesions than folds", COLUMNS + "".join(LINES[:23]), "1 lesion(s) in train for 2 folds"),
    ("all of one lesion", COLUMNS + "".join(f"L,I{i:02d},nv\n" for i in range(28)), "lesion"),
]


@pytest.mark.parametrize("name, text, hint", TABLES, ids=[t[0] for t in TABLES])
def test_a_table(name, text, hint, front_door):
    ham(text)
    found = front_door(*HAM)
    if hint is None:
        assert sum(map(len, found.values())) == 28
        assert {str(source).removesuffix(".jpg") for s in found.values()
                for source in s.sources} == {f"I{i:02d}" for i in range(28)}
    else:
        assert isinstance(found, str) and hint in found


def animated():
    return encoded(picture("P"), "GIF", save_all=True, append_images=[picture("P")] * 3)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), exif=exif)


def sixteen_bit():
    return encoded(Image.fromarray(np.full((16, 20), 40000, np.uint16)), "PNG")


def bomb():
    head = b"IHDR" + struct.pack(">IIBBBBB", 63000, 63000, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + struct.pack(">I", zlib.crc32(head))
            + b"\0\0\0\x50IDAT" + bytes(100))


IMAGES = [  # (name, content, None: decoded; or the hint of the refusal)
    ("grey", lambda: encoded(picture("L")), None), ("CMYK", lambda: encoded(picture("CMYK")), None),
    ("palette", lambda: encoded(picture("P"), "PNG"), None),
    ("alpha", lambda: encoded(picture("RGBA"), "PNG"), None), ("16 bits", sixteen_bit, "16"),
    ("grey and alpha", lambda: encoded(picture("LA"), "PNG"), None),
    ("two colours", lambda: encoded(picture("1"), "PNG"), None), ("turned by EXIF", rotated, None),
    ("progressive", lambda: encoded(picture(), progressive=True), None),
    ("animated", animated, None), ("a png called jpg", lambda: encoded(picture(), "PNG"), None),
    ("one pixel", lambda: encoded(picture(size=(1, 1))), None),
    ("one pixel high", lambda: encoded(picture(size=(400, 1))), None),
    ("20,000 pixels wide", lambda: encoded(picture(size=(20000, 2))), None),
    ("a bomb of 4,000,000,000 pixels", bomb, "pixels"), ("empty", lambda: b"", "I02"),
    ("text", lambda: b"no image", "I02"),
    ("zeros", lambda: bytes(5000), "I02"), ("html", lambda: b"<html>404</html>", "I02"),
    ("cut in half", lambda: encoded(picture(size=(200, 160)))[:3000], "I02"),
    ("its head alone", lambda: encoded(picture())[:20], "I02"),
    ("half a png", lambda: encoded(picture(size=(200, 160)), "PNG")[:9000], "I02"),
    ("svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "I02"),
    ("pdf", lambda: b"%PDF-1.4\n", "I02"), ("zip", lambda: b"PK\3\4" + bytes(100), "I02"),
]


@pytest.mark.parametrize("name, content, hint", IMAGES, ids=[i[0] for i in IMAGES])
def test_an_image(name, content, hint, front_door):
    ham()
    Path("root/I02.jpg").write_bytes(content())
    found = front_door(*HAM)
    assert hint in found if hint else sum(map(len, found.values())) == 28


def folder(spoil):
    """root/<class>/*.png, two classes of 10; spoil() makes something of it."""
    for i in range(20):
        path = Path(f"root/{'mel' if i % 2 else 'nv'}/{i:02d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(seed=i), "PNG"))
    spoil()


def remove(pattern):
    return lambda: [path.unlink() for path in Path("root").glob(pattern)]


FOLDERS = [  # (name, what becomes of it, data.malignant, hint)
    ("as it should be", lambda: None, "[mel]", None),
    ("absent", lambda: os.rename("root", "elsewhere"), "[mel]", "data.root"),
    ("a file", lambda: (os.rename("root", "elsewhere"), Path("root").write_text("")), "[mel]",
     "data.root"), ("empty", remove("*/*"), "[mel]", "0 class folders"),
    ("one class", lambda: (remove("nv/*")(), os.rmdir("root/nv")), "[mel]", "1 class folders"),
    ("an empty class", remove("nv/*"), "[mel]", "1 class folders"),
    ("an empty third class", lambda: os.mkdir("root/bcc"), "[mel]", None),
    ("a third class of other files", lambda: (os.mkdir("root/bcc"), Path("root/bcc/a.txt")
                                              .write_text("")), "[mel]", "bcc"),
    ("too few of a class", remove("nv/[01][2-8]*"), "[mel]", "'nv' has 2 lesion"),
    ("malignant unknown", lambda: None, "[melanoma]", "melanoma"),
    ("malignant all", lambda: None, "[mel, nv]", "data.malignant"),
    ("malignant none", lambda: None, "[]", "data.malignant"),
    ("malignant twice", lambda: None, "[mel, mel]", None),
    ("hidden files", lambda: Path("root/nv/.x.png").write_text(""), "[mel]", None),
    ("other files", lambda: Path("root/nv/notes.txt").write_text(""), "[mel]", None),
    ("a damaged image", lambda: Path("root/nv/00.png").write_text("no"), "[mel]", "nv/00.png"),
    ("a folder called x.png", lambda: os.mkdir("root/nv/x.png"), "[mel]", None),
    ("a name of two lines", lambda: os.rename("root/nv", "root/n\nv"), "[mel]", r"'n\nv' can name"),
    ("undecodable", lambda: os.rename("root/nv", b"root/n\xff"), "[mel]", r"class 'n\udcff' can"),
    ("an undecodable image", lambda: os.rename("root/nv/00.png", b"root/nv/\xff.png"), "[mel]",
     r"image 'nv/\udcff.png' is too long, or holds what cannot be printed or decoded: rename it"),
    ("reserved", lambda: os.rename("root/nv", "root/Aux.1"), "[mel]", "'Aux.1' can name no"),
    ("equal but for case", lambda: (os.mkdir("root/NV"), os.rename("root/nv/00.png",
                                                                   "root/NV/0.png")), "[mel]",
     "class 'nv' differs from 'NV' in case alone"),
    ("a linked class", lambda: (os.rename("root/nv", "nv"), os.symlink("../nv", "root/nv")),
     "[mel]", "root/nv holds no .jpg"),
    ("a name with a comma", lambda: os.rename("root/nv", "root/n,v"), "[mel]", None),
]


@pytest.mark.parametrize("name, spoil, malignant, hint", FOLDERS, ids=[f[0] for f in FOLDERS])
def test_a_folder(name, spoil, malignant, hint, front_door):
    folder(spoil)
    found = front_door("--config", TINY, "--set", "data.kind=folder", "--set", "data.root=root",
                       "--set", f"data.malignant={malignant}")
    assert hint in found if hint else sum(map(len, found.values())) == 20


def test_the_table_is_long_enough():
    rows = (OVERRIDES, MORE_OVERRIDES, FILES, MORE_FILES, TABLES, IMAGES, FOLDERS)
    assert sum(map(len, rows)) >= 150


# ---- what must not matter -----------------------------------------------------------------------

def test_the_order_of_files_on_disk_changes_nothing(front_door, monkeypatch):
    ham()
    first, walk = front_door(*HAM), os.walk
    monkeypatch.setattr(os, "walk", lambda *a: ((top, folders[::-1], names[::-1])
                                                for top, folders, names in walk(*a)))
    other = front_door(*HAM)
    c = configuration.load(TINY)
    assert fingerprint(c, first) == fingerprint(c, other)
    assert all(np.array_equal(first[name].images, other[name].images) for name in first)
    assert isinstance(first["train"], data.ImageSet)


def test_the_front_door_is_that_of_the_program(front_door, capsys):
    """What loop.main refuses is what launch refuses with these names."""
    for override in ("guidance.sampler=euler", "loop.arms=[mirror]", "guidance.objectives.x=1",
                     "ddpm.stepz=1"):
        line = front_door("--config", TINY, "--set", override)
        assert loop.main(["--config", str(TINY), "--set", override]) == 2
        assert capsys.readouterr().err == f"{line}\n"
