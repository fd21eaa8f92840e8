"""examples/: each shows what it says, and refuses bad input in one line."""
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
CONFIG = ["--config", str(HERE / "configs/tiny.yaml")]
SMALL = [f"--set={change}" for change in (
    "data.train=80", "data.val=60", "data.test=40", "ddpm.steps=3", "classifier.steps=3",
    "unet.width=16", "ddpm.batch=8")]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def example(name):
    """The main function of examples/name."""
    spec = importlib.util.spec_from_file_location(name[:-3], HERE / "examples" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_show_data_from_another_folder(tmp_path):
    command = [sys.executable, str(HERE / "examples/show_data.py"), *CONFIG, *SMALL]
    said = subprocess.run([*command, "--out", "deep/er/sheet.png"], check=True, text=True,
                          stdout=subprocess.PIPE).stdout
    assert re.findall(r"^(\w+): (\d+) images", said, re.M) == [
        ("train", "80"), ("val", "60"), ("test", "40")]
    counts = re.search(r"train:.* nv (\d+), bkl (\d+), bcc (\d+), mel (\d+)", said)
    assert sum(map(int, counts.groups())) == 80
    assert "whose lesion is also in train: all 0%" in said
    assert Image.open(tmp_path / "deep/er/sheet.png").format == "PNG"


def test_show_data_of_class_folders_does_not_claim_that_nothing_leaks(tmp_path, capsys):
    for i in range(24):
        path = tmp_path / "photos" / ("nv", "mel")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 10 * i).convert("RGB").save(path)
    example("show_data.py")([*CONFIG, "--set=data.kind=folder", "--set=data.root=photos",
                             "--set=data.malignant=[mel]"])
    said = capsys.readouterr().out
    assert "also in train: unknown: every image counts as a lesion of its own\n" in said
    assert "test has 2 lesions of mel where 10 are wanted (evaluate.min_count)" in said


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm"])
def test_train_ddpm(tmp_path, capsys, sampler):
    example("train_ddpm.py")([*CONFIG, *SMALL, "--sampler", sampler, "--steps", "2"])
    said = capsys.readouterr().out
    assert said.endswith("wrote ddpm.png: a row a class, a pair a group, real and from pure noise "
                         f"by {sampler} in 2 steps\n")
    width, height = Image.open(tmp_path / "ddpm.png").size
    assert width > 12 * 16 and height > 4 * 16          # 2 x 6 types, 4 classes, 16 pixels each


def test_one_batch_is_learnt_by_heart(capsys):
    example("train_ddpm.py")([*CONFIG, "--overfit-one-batch", "--set=data.train=40",
                              "--set=data.val=40", "--set=data.test=40", "--set=unet.width=16",
                              "--set=ddpm.batch=4", "--set=unet.multipliers=[1]"])
    losses = [float(x) for x in re.findall(r"\d\.\d{3}", capsys.readouterr().out)]
    assert len(losses) == 10 and losses[-1] < losses[0] / 10


def test_train_student(capsys):
    example("train_student.py")([*CONFIG, *SMALL])
    said = capsys.readouterr().out
    found = dict(re.findall(r"(\w[\w ]*) (\d\.\d{3})", said))
    assert {"accuracy", "sensitivity", "specificity", "balanced accuracy", "auroc"} <= set(found)
    assert all(0 <= float(value) <= 1 for value in found.values())


ON_A_RUN = {    # what each writes and says, on the small run
    "forward.py": ([], r"^ +\d+ +[\d.]+ +[\d.]+$", 10),
    "sample.py": (["--class", "mel", "--group", "VI", "--sampler", "dpm", "--steps", "3",
                   "--guidance", "2", "--count", "9"], r"9 of mel on VI, dpm in 3 steps", 1),
    "steer.py": (["--scales", "0", "3"], r"^guidance [03]: .* \d+%$", 2),
    "skins.py": ([], r"^  carried to +[IV]+: +\d+ ", 6),
    "guide_by_noise.py": ([], r"^  t = +\d+: [\d.]+$", 10),
    "broken.py": ([], r"^(?:wrong sign *: +[1-9]|guide in eval mode: .* by 0%|"
                      r"guide in train mode: .* by [1-9]\d*%)", 3)}


@pytest.mark.parametrize("name", ON_A_RUN)
def test_an_example_on_a_finished_run(tiny, tmp_path, capsys, name):
    arguments, said, times = ON_A_RUN[name]
    example(name)([str(tiny), *arguments])
    found = capsys.readouterr().out
    assert len(re.findall(said, found, re.M)) == times, found
    assert f"wrote {name[:-3]}.png" in found
    assert Image.open(tmp_path / f"{name[:-3]}.png").format == "PNG"


@pytest.mark.parametrize("name, wrong, key", [
    ("sample.py", ["--class", "mole"], "nv, bkl, bcc, mel"), ("sample.py", ["--count", "0"], "1"),
    ("sample.py", ["--steps", "0"], "steps"), ("skins.py", ["--image", "60"], "0 to 59"),
    ("forward.py", ["--image", "-1"], "0 to 59")])
def test_what_a_run_has_not_is_refused_in_one_line(tiny, capsys, name, wrong, key):
    with pytest.raises(SystemExit) as stopped:
        example(name)([str(tiny), *wrong])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: ") and key in line


def test_points_by_the_exact_score_land_where_they_were_asked(tmp_path, capsys):
    example("points.py")(["--steps", "20", "--sampler", "dpm"])
    found = dict(re.findall(r"^(\w+): ([\d.]+)%", capsys.readouterr().out, re.M))
    assert float(found["exact"]) > 95 > float(found["trained"])
    assert Image.open(tmp_path / "points.png").format == "PNG"


@pytest.mark.parametrize("name", ["show_data.py", "train_ddpm.py", "train_student.py"])
@pytest.mark.parametrize("wrong, key", [("ddpm.stepz=3", "stepz"), ("data.folds=1", "data.folds")])
def test_bad_input_ends_in_one_line(tmp_path, capsys, name, wrong, key):
    with pytest.raises(SystemExit) as stopped:
        example(name)([*CONFIG, f"--set={wrong}"])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    assert said.out == "" and line.startswith(f"{name}: ") and key in line
