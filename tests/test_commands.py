"""Every command: one line and a sensible status whatever the outputs are, nothing lost, nothing
reused in silence; and what a run knows of the images it saw."""
import csv
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import classifier
import data
import finished
import loop
import predict
import score_on
from conftest import TINY
from datasets.layouts import read_csv
from engine import config as configuration
from engine.command import Parser, launch, one_line
from engine.run import Run, RunError, commit, csv_bytes, digests
from extras import estimate, external
from test_report import fake_results, fake_run

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the small finished run."""
    return Path(shutil.copytree(tiny, tmp_path / "runs/tiny"))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def ended(call, *arguments):
    """The exit status of a command that ends by SystemExit."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    return stop.value.code


# ---- the outputs ---------------------------------------------------------------------------------

@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "stopped"), (MemoryError(), 2, "out of memory; halve"),
    (torch.OutOfMemoryError("CUDA\nmore"), 2, "CUDA; halve"), (ValueError("a\n b"), 2, "a b"),
    (OSError(28, "No space left", "f.png"), 2, "f.png: No space left")])
def test_what_ends_a_command_is_one_line(error, status, words, capsys):
    @one_line("x.py")
    def main():
        raise error
    assert ended(main) == status
    line = capsys.readouterr().err.strip()
    assert line.startswith("x.py: ") and words in line and "\n" not in line


def test_a_full_disk_under_the_output(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert ended(one_line("x.py")(lambda: print("text"))) == 2
        full.flush()                            # what could not be written is let go
    assert "No space left" in capsys.readouterr().err


def test_an_output_of_few_letters_and_closed_ones(monkeypatch, capsys):
    with open("said", "w", encoding="ascii") as said:
        monkeypatch.setattr(sys, "stdout", said)
        one_line("x.py")(lambda: print("n\u00e6vus"))()
    assert Path("said").read_text() == "n\\xe6vus\n"
    monkeypatch.setattr(sys, "stdout", None)
    assert ended(one_line("x.py")(lambda: None)) == 2
    assert "standard output is closed" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stderr", None)
    assert ended(one_line("x.py")(lambda: sys.stderr.isatty() or sys.exit(3))) == 3


@pytest.mark.parametrize("name", ["predict", "show_data", "train_ddpm", "train_student", "score_on",
                                  "loop"])
def test_help_has_an_example_and_a_version(name, capsys):
    main = importlib.import_module(name).main
    assert ended(main, ["--help"]) == 0
    assert f"{name}.py " in capsys.readouterr().out.split("--version")[1]
    assert ended(main, ["--version"]) == 0
    assert capsys.readouterr().out == f"commit {commit()}\n"


def test_wrong_arguments_are_one_line(capsys):
    assert ended(Parser("x.py", "").parse_args, ["--no\n"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("x.py: unrecognized arguments: --no")


# ---- where a run lies ----------------------------------------------------------------------------

def stop(run):
    run.stage("s", lambda: 1)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "cache", "a\nb", "/abs"])
def test_a_name_that_is_no_folder_s(name, capsys):
    assert launch(stop, {}, ["--config", str(TINY), "--name", name]) == 2
    assert capsys.readouterr().err.startswith(f"loop.py: --name: found {name!r}")
    assert not Path("runs").exists()


def test_a_name_and_the_folder_that_is_no_run(capsys):
    assert launch(stop, {}, ["--config", str(TINY), "--name", "five"]) == 0
    assert Path("runs/five/checkpoints/s.pt").exists()
    assert launch(stop, {}, ["--resume", "runs/five", "--name", "six"]) == 2
    shutil.copy(HERE / "config.yaml", ".")                      # the project's own folder, say
    assert launch(stop, {}, ["--resume", "."]) == 2
    assert not Path("checkpoints").exists()
    assert "no run there" in capsys.readouterr().err


def test_runs_is_a_link_to_nowhere(capsys):
    Path("runs").symlink_to("absent")
    assert launch(stop, {}, ["--config", str(TINY)]) == 2       # and does not search for ever
    assert capsys.readouterr().err == (
        "loop.py: runs: no folder, but a file or a link to nowhere; move it away\n")


def test_a_finished_run_says_so_at_once(copy, capsys):
    before = files(copy)
    assert not ended(loop.main, ["--resume", "runs/tiny"])
    assert "runs/tiny is finished" in capsys.readouterr().out and files(copy) == before


def test_what_another_config_or_other_data_made_is_set_aside(config, splits, tmp_path, capsys):
    run = Run(tmp_path, config)
    run.begin(splits)
    run.stage("s", lambda: 1)
    for name in ("synthetic/nv/1_0.png", "pictures/data.png", "results.json"):
        run.write("x", "")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = files(tmp_path)
    run.begin(splits)                               # nothing is other: nothing happens
    assert files(tmp_path) == before and not capsys.readouterr().out
    fewer = {**splits, "train": splits["train"].subset(np.arange(100))}
    run.begin(fewer)
    assert "changed" in capsys.readouterr().out and run.stage("s", lambda: 2) == 2
    assert {*files(tmp_path / "before")} == {*before} - {"lock", "config.yaml"}
    assert not (tmp_path / "synthetic").exists() and not (tmp_path / "pictures").exists()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert len(seen["train"]["pixels"]) == 100 and seen["fingerprint"] == run.fingerprint
    run.begin(splits)
    assert {*files(tmp_path / "before-2")} >= {"seen.json", "checkpoints/s.pt"}


def test_the_plan_is_every_stage_in_its_order(tiny, copy, capsys):
    """Every network of the run, as log.jsonl has them, and the synthesis of every arm."""
    c = configuration.load(copy / "config.yaml")
    run = Run(copy, c)
    arms = {name: loop.ARMS[name] for name in c.loop.arms}
    (copy / "checkpoints/critic.pt").unlink()
    estimate.tell(run, data.load(c.data)["train"], arms, ["random", "guided"])
    lines = map(json.loads, (tiny / "log.jsonl").read_text().splitlines())
    trained = dict.fromkeys(e["stage"] for e in lines if e["event"] == "loss")
    assert [*trained] == [s for s in run.plan if s not in ("random_1", "guided_1", "report")]
    count = len(run.plan)
    assert f"{count} stages; {count - 2} are done, about" in capsys.readouterr().out
    run.plan = {"a": 10.0, "b": 60.0, "c": 60.0}
    run.pace = 2.0
    progress = run.progress("b")
    assert (progress.stage, progress.later) == ("stage 2 of 3, b", 120.0)
    progress.shown = progress.begun = -1e6
    progress(1, 2)
    assert "left (of the run " in capsys.readouterr().err


# ---- a finished run that is read -----------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    (("size: 16", "size: 32"), "data.size was 16, is 32"),
    (("network: auto", "network: resnet18"), "classifier.network was auto, is resnet18")])
def test_a_config_that_was_changed_after_the_run(copy, change, words):
    text = (copy / "config.yaml").read_text()
    assert change[0] in text
    (copy / "config.yaml").write_text(text.replace(*change))
    with pytest.raises(RunError, match=words):
        finished.Finished(copy)


def test_reading_changes_nothing(copy, capsys):
    Image.new("RGB", (20, 20)).save("one.png")
    path = copy / "checkpoints/student_guided_0.pt"
    path.write_bytes(path.read_bytes()[:-100])
    before = files(copy)
    assert ended(predict.main, [str(copy), "one.png"]) == 2
    assert files(copy) == before and "student_guided_0.pt" in capsys.readouterr().err
    path.unlink()
    assert ended(predict.main, [str(copy), "one.png"]) == 2
    assert "is missing" in capsys.readouterr().err and not Path("probabilities.csv").exists()


def test_one_photograph_and_where_its_answer_goes(tiny, capsys):
    Image.new("RGB", (20, 20)).save("=one.png")
    Path("mine.csv").write_text("my,own\n")
    for out, status in (("mine.csv", 2), ("x.txt", 2), (".", 2), ("mine.csv/x.csv", 2)):
        assert ended(predict.main, [str(tiny), "=one.png", f"--out={out}"]) == status
        assert out in capsys.readouterr().err.splitlines()[-1]
    assert Path("mine.csv").read_text() == "my,own\n"
    for _ in range(2):                                          # its own is written again
        assert predict.main([str(tiny), "=one.png", "--out=deep/a.csv"]) == 0
        assert "wrote deep/a.csv: 1 images" in capsys.readouterr().out
    [row] = csv.DictReader(Path("deep/a.csv").open())
    assert row["image"] == "'=one.png" and abs(sum(map(float, [*row.values()][1:])) - 1) < 1e-4


def test_what_the_run_learnt_from_is_left_out_whatever_its_folder_holds_today(tiny, copy, splits):
    """The run as if its images had lain in a folder, to which new ones were added since."""
    root, rng = Path("photos"), np.random.default_rng(0)
    new = rng.integers(0, 256, (30, 3, 16, 16), dtype=np.uint8)
    old = [(s.images[i], s.class_names[s.labels[i]]) for s in splits.values()
           for i in range(len(s))]
    for i, (image, name) in enumerate([*old, *((image, "nv") for image in new)]):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(root / name / f"{i:03d}.png")
    changes = {"kind": "folder", "root": str(root), "malignant": ["bcc", "mel"]}
    sections = configuration.load(copy / "config.yaml").as_dict()
    sections["data"] |= changes
    (copy / "config.yaml").write_text(json.dumps(sections))
    results = json.loads((copy / "results.json").read_text())
    results["config"]["data"] |= changes
    (copy / "results.json").write_text(json.dumps(results))
    found = score_on.score_on(copy, "own", configuration.load(copy / "config.yaml"))
    assert found["learnt_from"] == 160 + 60 and found["other_photographs"] == 0
    assert found["splits"]["test"]["images"] == 100 + 30
    seen = json.loads((copy / "seen.json").read_text())
    seen["val"]["lesions"].append("nv/320.png")                 # one of the new ones
    (copy / "seen.json").write_text(json.dumps(seen))
    found = score_on.score_on(copy, "own", configuration.load(copy / "config.yaml"))
    assert found["other_photographs"] == 1 and found["splits"]["test"]["images"] == 129
    (copy / "seen.json").unlink()
    with pytest.raises(RunError, match="seen.json: cannot tell which images"):
        score_on.score_on(copy, "own", configuration.load(copy / "config.yaml"))


# ---- what others may have written ----------------------------------------------------------------

def test_cells_that_a_spreadsheet_would_run(tmp_path, train):
    rows = [("image", "class", "n"), ("=1+1/a.png", "@x", -1), ("+a", "-b", 2.5), ("a=b", "'c", 0)]
    text = csv_bytes(rows).decode()
    assert text.splitlines() == ["image,class,n", "'=1+1/a.png,'@x,-1", "'+a,'-b,2.5", "a=b,'c,0"]
    odd = loop.replace(train, class_names=("=a", "b", "c", "d"))
    Image.fromarray(train.images[0].transpose(1, 2, 0)).save("-x.png")
    Path("made.csv").write_bytes(csv_bytes([("image", "class", "group"), ("-x.png", "=a", "")]))
    c = configuration.load(configuration.DEFAULTS, [
        "data.size=16", "guidance.external=made.csv", "loop.arms=[real, external]"])
    made = external.load_made(c, odd)["external"]
    assert digests(made.images) == digests(train.images[:1]) and made.labels.tolist() == [0]
    assert made.sources.tolist() == ["external/-x.png"] and read_csv(Path("made.csv"), ())


def test_markup_in_what_a_run_tells_is_text(tmp_path):
    bad = "<script>alert(1)</script>"
    results = fake_results()
    results |= {"name": bad, "verdict": bad, "notes": [bad]}
    results["environment"]["commit"] = results["environment"]["device"] = bad
    results["rounds"] = [{bad: {bad: 0.5}}]
    for text in fake_run(tmp_path, results):
        assert "<script" not in text and "&lt;script" in text


def test_odd_lines_in_the_log_are_left_out(tmp_path):
    fake_run(tmp_path, fake_results())
    whole = (tmp_path / "report.html").read_text()
    odd = ["3", "null", '{"event": "loss"}', '{"event": "loss", "stage": "../../x", "step": 1, '
           '"loss": 1.0}', '{"event": "stage", "stage": 3, "seconds": 1}', "[" * 9999, "\\x00"]
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write("\n" + "\n".join(odd))
    before = {p.name for p in tmp_path.rglob("*")}
    finished.report.write(tmp_path)
    told = (tmp_path / "report.html").read_text()
    assert told == whole.replace("1 line(s) of log.jsonl cannot", "3 line(s) of log.jsonl cannot")
    assert {p.name for p in tmp_path.rglob("*")} == before


# ---- a convolution that is not what it seems -----------------------------------------------------

def test_published_weights_need_more_than_16_pixels():
    weights = ["classifier.network=resnet18", "classifier.weights=w.pth"]
    with pytest.raises(configuration.ConfigError, match="data.size: .* write 32 or more"):
        configuration.load(TINY, weights)
    configuration.load(TINY, [*weights, "data.size=32"])
    # at 32 pixels no stride is over a single pixel
    network, seen = classifier.build("resnet18", 32, 4, published=True), []
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.stride == (2, 2):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    network(torch.zeros(2, 3, 32, 32))
    assert len(seen) == 7 and min(seen) == 2
