"""Several draws pooled: the interval by simulation, the whole on a run of two draws."""
import json

import numpy as np
import pytest

from conftest import SMALL, go
from extras import draws, measures, report
from test_evaluate import predictions

NONE = {"value": None, "low": None, "high": None}


def test_the_mean_over_draws_has_the_textbook_t_interval_and_a_wider_one_for_splits():
    values = [.01, .02, .03, .04]
    half = 3.18245 * np.std(values, ddof=1) / 2         # t of 3 degrees of freedom at .975
    assert draws.over_draws(values) == pytest.approx(
        {"value": .025, "low": .025 - half, "high": .025 + half}, abs=1e-6)
    wider = draws.over_draws(values, overlap=.75)       # four times 1 / 4
    assert wider["high"] - .025 == pytest.approx(2 * half, abs=1e-6)
    assert draws.over_draws([.01, None]) == NONE
    assert draws.over_draws([.1, .9], limits=(0, 1))["low"] == 0


def test_intervals_over_draws_hold_the_truth():
    rng = np.random.default_rng(0)
    found = [draws.over_draws((rng.normal(0, .01, 5)).tolist()) for _ in range(2000)]
    assert 0.935 <= np.mean([e["low"] <= 0 <= e["high"] for e in found]) <= 0.965


def results(seed, gain, worst="g1"):
    """A results.json as far as pooling reads it."""
    p = predictions(gain={"guided": gain}, seed=seed)
    found = measures.everything(p, draws=100)
    found["arms"] = {arm: a | {"added": 10} for arm, a in found["arms"].items()}
    return found | {"worst_group": worst, "pseudo": {}, "rounds": [{"hard out of fold": seed / 10,
                                                      "children wrong": {"guided": 0.5}}],
                    "config": {"data": {"kind": "phantom"}, "evaluate": {"margin": 1.0}},
                    "splits": {part: {"images": n} for part, n in
                               (("train", 200), ("test", 100))}}


def test_every_number_is_the_mean_of_the_draws():
    found = [results(seed, 1.0) for seed in (1, 2, 3, 4)]
    r = draws.pooled(found)
    for i, row in enumerate(r["comparisons"]):
        each = [of["comparisons"][i] for of in found]
        assert all(c["arm"] == row["arm"] and c["metric"] == row["metric"] for c in each)
        at_once = 2 if row["arm"] == "guided" else 1
        assert {k: row[k] for k in NONE} == draws.over_draws([c["value"] for c in each], at_once)
        assert row["uncorrected"] == {k: row[k] for k in NONE}
        assert [c["value"] for c in row["draws"]] == [c["value"] for c in each]
    value = r["arms"]["guided"]["test"]["all"]["accuracy"]["value"]
    assert value == pytest.approx(np.mean(
        [of["arms"]["guided"]["test"]["all"]["accuracy"]["value"] for of in found]))
    assert r["rounds"] == [{"hard out of fold": 0.25, "children wrong": {"guided": 0.5}}]
    assert r["verdict"].startswith("mean of 4 draws: guided is better than real, random: ")
    splits = draws.pooled([of | {"config": of["config"] | {"data": {"kind": "csv"}}}
                           for of in found])
    first = splits["comparisons"][0]
    assert splits["overlap"] == 0.5 and first["high"] > first["uncorrected"]["high"]
    assert json.loads(json.dumps(r, allow_nan=False)) == r


def test_what_a_draw_lacks_has_no_mean():
    found = [results(1, 0.0), results(2, 0.0, None)]
    for a in found[1]["arms"].values():
        del a["test"]["worst_group"], a["test"]["all"]["equal_opportunity_gap"]
    found[1]["comparisons"] = [c for c in found[1]["comparisons"] if c["subset"] != "worst_group"]
    r = draws.pooled(found)
    assert {c["subset"] for c in r["comparisons"]} == {"all", "hard"} and r["worst_group"] is None
    assert "worst group" not in str(report.first_table(r)[0][2])


def test_a_run_of_two_draws_is_pooled_and_stopped_in_the_second_goes_on_there(
        tmp_path, capsys):
    quick = ["loop.arms=[real, replay]", "loop.seeds=2", "classifier.steps=5",
             "evaluate.min_count=1"]
    (tmp_path / "tiny.yaml").write_text(SMALL)
    folder = go(tmp_path, ["--config", "tiny.yaml", "--draws", 2,
                           *(x for o in quick for x in ("--set", o))])
    found = [json.loads((folder / f"draw-{k}/results.json").read_text()) for k in (0, 1)]
    assert [r["config"]["data"]["seed"] for r in found] == [0, 1]
    assert [r["config"]["loop"]["seed"] for r in found] == [0, 1]
    pooled = (folder / "results.json").read_bytes()
    assert json.loads(pooled)["comparisons"][0]["draws"][1]["value"] == (
        found[1]["comparisons"][0]["value"])
    report = (folder / "report.md").read_text()
    assert "replay minus real, draw-1" in (
        folder / "pictures/draws_all_balanced_accuracy.svg").read_text()
    assert "mean of 2 draws: replay is" in report and "draw-0" in report
    assert (folder / "report.html").read_text().count("<svg") == report.count(".svg)")

    before = (folder / "draw-0/predictions.npz").stat().st_mtime_ns
    for name in ("results.json", "draw-1/results.json", "draw-1/checkpoints/student_real_0.pt"):
        (folder / name).unlink()
    capsys.readouterr()
    go(tmp_path, ["--resume", folder / "draw-1"], status=2)
    assert f"go on with all: python loop.py --resume {folder}" in capsys.readouterr().err
    go(tmp_path, ["--resume", folder])
    assert (folder / "results.json").read_bytes() == pooled
    assert (folder / "draw-0/predictions.npz").stat().st_mtime_ns == before
    assert "mean of 2 draws" in capsys.readouterr().out

    # a change of how it is scored reaches every draw, and nothing is trained again
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("margin: 1.0", "margin: 99.0"))
    go(tmp_path, ["--resume", folder])
    margins = [json.loads((folder / name / "results.json").read_text())["config"]["evaluate"]
               ["margin"] for name in ("draw-0", "draw-1", ".")]
    assert margins == [99.0] * 3
    (folder / "draws").write_text("x")
    go(tmp_path, ["--resume", folder], status=2)
    assert "draws: found 'x'" in capsys.readouterr().err


def test_a_kill_before_the_first_draw_forgets_no_draw(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(SMALL)
    folder = go(tmp_path, ["--config", "tiny.yaml", "--draws", 2, "--set", "loop.arms=[real]",
                           "--set", "data.kind=folder", "--set", "data.malignant=[mel]",
                           "--set", "data.root=nowhere"], status=2)
    assert not folder.exists()
    folder.mkdir(parents=True)
    (folder / "draws").write_text("2")
    (folder / "config.yaml").write_text((tmp_path / "tiny.yaml").read_text() + "\n")
    (folder / "lock").touch()
    capsys.readouterr()
    go(tmp_path, ["--resume", folder, "--set", "loop.seeds=1"], status=2)
    assert "keeps its config, name and draws" in capsys.readouterr().err


def test_a_data_set_with_its_own_splits_has_one_draw(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(SMALL)
    go(tmp_path, ["--config", "tiny.yaml", "--draws", 2, "--set", "data.kind=dermamnist",
                  "--set", "data.root=x"], status=2)
    assert "so there is one draw" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, says", [
    (["--draws", "1"], "--draws: write 2 to 99, found 1"),
    (["--draws", "-3"], "--draws: write 2 to 99"), (["--draws", "x"], "--draws")])
def test_wrong_numbers_of_draws_are_one_line(arguments, says, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(SMALL)
    try:
        go(tmp_path, ["--config", "tiny.yaml", *arguments], status=2)
    except SystemExit as end:
        assert end.code == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1 and not (tmp_path / "runs").exists()
