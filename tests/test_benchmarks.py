"""Every benchmark is there to be run, and those that need no long training do run: at their
smallest size."""
import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
from extras import measures

HERE = Path(__file__).resolve().parents[1]
BENCHMARKS = HERE / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))    # as when one is run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_answers_help(path, capsys, monkeypatch):
    if "import diffusers" in path.read_text() or "from diffusers" in path.read_text():
        pytest.importorskip("diffusers")
    module = importlib.import_module(path.stem)
    if not hasattr(module, "main"):
        return                                      # a part of others
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0 and "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_is_imported_is_there(path):
    """Of our own modules; also where diffusers is not installed and the import itself fails."""
    ours = {p.stem for p in (*HERE.glob("*.py"), *SCRIPTS)} | {"engine", "datasets", "extras"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ours - {
                "diffusers_unet", "speed", "quality_per_cost"}:
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(
                    f"{node.module}.{name.name}"), f"{path.name}: {node.module}.{name.name}"


def test_run_by_their_path_from_another_folder(tmp_path):
    done = subprocess.run([sys.executable, str(BENCHMARKS / "coverage.py"), "--studies", "x"],
                          cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and "--studies" in done.stderr


def test_load():
    import load
    load.write_images(60)
    for _ in range(2):                              # decoded, then from the cache
        assert sum(map(len, load.load(60).values())) == 60
    load.nearest(60)
    load.ledger(60)
    assert len(list(Path("ledger/synthetic").glob("*/*.png"))) == 60


def test_hostile_inputs(tiny):
    import hostile
    kinds = [kind for kind in hostile.KINDS if kind != hostile.SLOW]
    found = hostile.tried(tiny, 20, 0, kinds)
    assert found["wrong"] == 0 and found["refused"] > 7


def test_hostile_sees_what_is_wrong():
    import hostile

    def case(call, holds=lambda status: ""):
        return hostile.Case("", "x", call, holds)

    def line(*words):
        return lambda: print(*words, sep="\n", file=sys.stderr) or 2
    assert hostile.knock(case(line("x: no"))) == (2, "")
    for call in (line("x: no", "x: more"), line("no"), line(), lambda: {}["a"], lambda: 1):
        assert hostile.knock(case(call))[1]
    assert hostile.knock(case(lambda: 0, lambda status: "gone"))[1] == "gone"


def test_sensitivity_of_the_survey_is_the_report_s():
    """when_does_it_help.tables against measures.everything, on made-up predictions."""
    import when_does_it_help as survey
    rng, n, seeds = np.random.default_rng(0), 200, 3
    p = {"class_names": np.array(["nv", "mel"]), "group_names": np.array(["I", "VI"]),
         "subtype_names": np.array([], str), "malignant": np.array([False, True]),
         "arms": np.array(["real"]), "seeds": np.arange(seeds), "optimistic": np.array([False])}
    for split in ("val", "test"):
        labels = rng.integers(0, 2, n)
        sick = np.clip(0.3 * labels + rng.uniform(0, 0.7, (seeds, n)), 0, 1)
        probs = np.stack([1 - sick, sick], -1)
        p |= {f"{split}_labels": labels, f"{split}_groups": rng.integers(0, 2, n),
              f"{split}_subtypes": np.full(n, -1), f"{split}_reference": probs,
              f"{split}_lesions": np.arange(n).astype(str), f"{split}_probs_real": probs}
    test = measures.everything(p, draws=50)["arms"]["real"]["test"]
    found = survey.tables(p, "real", evaluate.subsets(p, 10)[0], np.ones((n, 1)), 10)
    assert set(found) == set(survey.METRICS)
    for (subset, metric), table in found.items():
        assert table.mean() == pytest.approx(test[subset][metric]["value"], abs=1e-6)


def test_what_you_should_see_writes_its_table_between_its_marks(tmp_path, monkeypatch, capsys):
    import what_you_should_see
    page, config = tmp_path / "page.md", tmp_path / "small.yaml"
    config.write_text(f"extends: {HERE / 'configs/tiny.yaml'}\ndata: {{train: 160, val: 60}}\n"
                      "unet: {width: 16}\nddpm: {batch: 4, T: 60}\nevaluate: {oracle: 100}\n"
                      "classifier: {steps: 3, guide_steps: 3, batch: 8}\n")
    page.write_text("before\n<!-- small -->\nold\n<!-- end of small -->\nafter\n")
    arguments = ["--config", str(config), "--page", str(page), "--steps", "2"]
    for _ in range(2):                          # the second time nothing is trained again
        what_you_should_see.main(arguments)
    text = page.read_text()
    assert text.startswith("before\n<!-- small -->\n") and "old" not in text
    assert text.endswith("\n<!-- end of small -->\nafter\n")
    assert text.count("| ![2 steps](tour/seen_small_2.png) |") == 1
    assert "A student: loss " in text and "at t = 45." in text
    assert (tmp_path / "tour/seen_small_2.png").exists()
    log = (tmp_path / "runs/what_you_should_see/small/log.jsonl").read_text()
    assert log.count('"stage": "ddpm_2", "seconds"') == 1

    page.write_text("no marks\n")
    with pytest.raises(SystemExit) as stopped:
        what_you_should_see.main(arguments)
    assert stopped.value.code == 2 and page.read_text() == "no marks\n"
    assert "<!-- small -->" in capsys.readouterr().err
