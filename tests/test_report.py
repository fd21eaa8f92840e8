"""The report says what results.json says, in both writings, and needs nothing but itself."""
import base64
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from extras import plots
from extras import report

ARMS = ("real", "replay", "guided", "naive")
CLASSES = ("nv", "<b>mel</b> & co|")
MEASURES = ("accuracy", "sensitivity", "specificity", "balanced_accuracy", "auroc")
VERDICT = "no gain over replay: +0.4 points of balanced accuracy, 95 % interval -1.1 to +1.9"
MARK = "optimistic: mined on the test set"


def entry(rng):
    value, below, above = rng.uniform(0.3, 0.7), *rng.uniform(0.01, 0.2, 2)
    return {"value": value, "low": value - below, "high": value + above}


def fake_results(arms=ARMS, groups=("I", "VI")):
    """Random numbers in the shape of results.json; `naive` is mined on the test set."""
    rng = np.random.default_rng(0)
    none = {"value": None, "low": None, "high": None}
    arm = lambda name: {
        "added": 0 if name == "real" else 70, "optimistic": name == "naive", "seeds": [{}, {}],
        "test": {s: {m: entry(rng) for m in MEASURES} for s in ("all", "hard", "worst_group")},
        "per_group": {g: {"n": 30, "sensitivity": entry(rng), "specificity": entry(rng)}
                      for g in groups},
        "per_subtype": {"acral": {"n": 40, "recall": 0.625, "low": 0.5, "high": 0.75}},
        "mended": 3, "broken": 2, "confusion": [[9, 1], [2, 8]]}
    results = {
        "format": 1, "name": "fake", "verdict": VERDICT, "worst_group": "VI", "hard": {"n": 12},
        "config": {"data": {"root": "/home/someone/ham", "where": "C:\\Users\\someone\\ham"},
                   "evaluate": {"min_count": 10, "lr": 1e-5, "answer": "no", "list": [1, 2.5, None],
                                "empty": {}}},
        "environment": {"device": "cpu", "torch": "2.9", "commit": None},
        "splits": {s: {"images": 40, "lesions": 38, "classes": dict.fromkeys(CLASSES, 20),
                       "groups": dict.fromkeys(groups, 20)} for s in ("train", "val", "test")},
        "arms": {name: arm(name) for name in arms},
        "rounds": [{"round": 1, "kept": 600, "dropped": {"judge": 101},
                    "val": {"accuracy": 0.815}}],
        "generator": {"guided": {"n": 7, "frechet": 12.5, "kid": None},
                      "real (val)": {"n": 7, "frechet": 2.25, "kid": 0.5}},
        "comparisons": [
            {"arm": a, "against": b, "subset": s, "metric": m,
             **{{"value": "difference"}.get(k, k): v - 0.5 for k, v in entry(rng).items()},
             **({"mcnemar_p": 0.0123, "holm_p": 0.0246} if (s, m) == ("all", "accuracy") else {})}
            for a, b in [(a, "real") for a in arms[1:]] + [("guided", b) for b in arms[1:]]
            if (a, b) != ("guided", "guided")
            for s in ("all", "hard", "group:I") for m in ("accuracy", "balanced_accuracy")]}
    if "guided" in arms:
        results["arms"]["guided"]["test"]["hard"]["specificity"] = none
        results["arms"]["guided"]["test"]["worst_group"]["auroc"] = None
        results["arms"]["real"]["per_group"].get("VI", {})["sensitivity"] = none
        wanted = {"arm": "guided", "against": "replay", "subset": "hard", "metric": "accuracy"}
        row = next(c for c in results["comparisons"] if wanted.items() <= c.items())
        row |= {"difference": None, "low": None, "high": None}
    return results


def fake_run(folder, **kwargs):
    results, rng = fake_results(**kwargs), np.random.default_rng(1)
    (folder / "pictures").mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    labels = rng.integers(0, 2, 40)
    probs = {f"test_probs_{a}": rng.dirichlet((1, 1), (2, 40)).astype(np.float32)
             for a in results["arms"]}
    np.savez(folder / "predictions.npz", class_names=np.array(CLASSES), test_labels=labels,
             malignant=np.array([False, True]), **probs)
    lines = [{"event": "loss", "stage": stage, "step": i, "loss": 2.0 / (i + 1), "time": "x"}
             for stage in ("ddpm", "student_naive_0", "student_real_1") for i in range(250)]
    lines += [{"event": "stage", "stage": s, "seconds": n} for s, n in
              (("ddpm", 45.0), ("student_naive_0", 10.0), ("student_real_1", 20.0))]
    lines += [{"event": "cost", "plain": 1.0, "guided": 9.0},       # a resumed run logs it again
              {"event": "cost", "plain": 4.0, "guided": 10.0}]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "lo')
    for name in ("hard", "data", "one_more"):
        picture = Image.fromarray(rng.integers(0, 255, (8, 20, 3), dtype=np.uint8))
        picture.save(folder / f"pictures/{name}.png")
    report.write(folder)
    read = lambda name: (folder / name).read_text(encoding="utf-8")
    return results, read("report.md"), read("report.html")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *fake_run(folder)


def percent(e, sign=""):
    value, low, high = (format(100 * e[k], f"{sign}.1f") for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def tables(md):
    """Every table of the markdown, as {first cell: the other cells}."""
    found = re.findall(r"(?:^\|.*\|\n)+", md, re.M)
    cells = lambda line: [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
    return [{cells(line)[0]: cells(line)[1:] for line in t.splitlines()} for t in found]


def test_verdict_is_the_first_sentence(run):
    _, _, md, html = run
    assert md.split("\n\n")[:2] == ["# Report: fake", VERDICT]
    body = re.sub(r"<[^>]+>", "\n", html.split("<body>")[1]).split("\n")
    assert [words for words in body if words][:2] == ["Report: fake", VERDICT]


def test_the_last_measured_cost_is_told(run):
    assert ("A guided image took 10 ms, one from pure noise, unguided and in as many steps, 4 ms: "
            "2.5 times as long.") in run[2]


def test_before_and_after_equals_results(run):
    _, results, md, html = run
    for subset, found in zip(("all", "hard", "worst_group"), tables(md)):
        assert list(found)[2:] == ["real, before", "replay", "guided, after", f"naive ({MARK})"]
        for (name, arm), cells in zip(results["arms"].items(), list(found.values())[2:]):
            for measure, cell in zip(MEASURES, cells):
                e = arm["test"][subset][measure]
                undefined = e is None or e["value"] is None
                assert cell == ("n too small" if undefined else percent(e)), (name, subset, measure)
    plain = re.sub(r"<[^>]+>", "", html)
    for table in tables(md)[:3]:
        assert all(cell in plain for row in list(table.values())[2:] for cell in row)


def test_differences_equal_results(run):
    _, results, md, _ = run
    found = next(t for t in tables(md) if "comparison" in t)
    columns = dict(zip(found["comparison"], range(9)))
    pairs = set()
    for c in results["comparisons"]:
        if (c["subset"], c["metric"]) in (("all", "balanced_accuracy"), ("hard", "accuracy")):
            pairs.add((c["arm"], c["against"]))
            mark = f" ({MARK})" if "naive" in (c["arm"], c["against"]) else ""
            cells = found[f"{c['arm']} minus {c['against']}{mark}"]
            subset = {"all": "all test images", "hard": "hard cases, accuracy"}[c["subset"]]
            cell = cells[columns[subset]]
            assert cell == ("n too small" if c["difference"] is None else
                            percent({**c, "value": c["difference"]}, "+"))
            assert cells[-2:] == ["0.012", "0.025"]  # stands in the row of the accuracy
    assert len(found) == 2 + len(pairs)


@pytest.mark.parametrize("low, high, targets, hardness, says", [
    (0.01, 0.03, "hard", 0.1, "Starting from hard cases and guiding toward hardness earned"),
    (-0.01, 0.03, "both", 0, "Starting half from hard cases brought no gain"),
    (-0.03, -0.01, "hard", 0, "Starting from hard cases did harm"),
    (-0.01, 0.03, "groups", 0.1, "Guiding toward hardness (nothing was mined) brought no gain")])
def test_mining_is_judged_by_random_parents_alone(low, high, targets, hardness, says):
    row = {"arm": "guided", "against": "random", "subset": "all", "metric": "balanced_accuracy",
           "difference": (low + high) / 2, "low": low, "high": high}
    other = row | {"against": "real", "difference": 0.2, "low": 0.1, "high": 0.3}
    results = fake_results() | {"comparisons": [row, other]}
    results["config"]["guidance"] = {"targets": targets, "hardness_scale": hardness}
    told = [words for kind, words, *_ in report.differences(results) if kind == "p"]
    assert says in told[-1] and f"[{100 * low:+.1f}, {100 * high:+.1f}] points" in told[-1]
    results["config"]["guidance"] = {"targets": "groups", "hardness_scale": 0}
    assert report.mining(results) == []             # there guided is random
    results["comparisons"] = [other]
    assert report.mining(results) == []


def test_other_tables(run):
    _, results, md, _ = run
    by_first = {first: cells for t in tables(md) for first, cells in t.items()}
    assert by_first["acral"] == ["40", *["62.5 [50.0, 75.0]"] * 4]
    assert by_first["VI"][:2] == ["30", "n too small"]
    assert by_first["I"][2] == percent(results["arms"]["guided"]["per_group"]["I"]["sensitivity"])
    assert by_first["dropped: judge"] == ["101"] and by_first["val: accuracy"] == ["81.5 %"]
    assert by_first["Frechet distance"] == ["12.5", "2.25"]
    assert by_first["kernel distance (KID)"] == ["n too small", "0.5"]
    assert by_first["images"] == ["40"] * 3 and by_first["total"] == ["1.2"]
    assert by_first["student"] == ["0.5"]
    for t in re.findall(r"(?:^\|.*\|\n)+", md, re.M):
        assert len({len(line) for line in t.splitlines()}) == 1, "columns are aligned"


def test_settings_are_yaml_without_a_place(run):
    _, results, md, html = run
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", md, re.S)[1])
    expected = results["config"]
    expected["data"] |= {"root": "ham", "where": "ham"}
    assert settings == expected
    assert "someone" not in md + html


def test_html_stands_alone(run):
    folder, _, md, html = run
    assert "http" not in html and "<script" not in html and "url(" not in html
    assert str(folder) not in md + html and not re.search(r"(src|href)=\"(?!data:|#)", html)
    inside = [base64.b64decode(d) for d in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    names = ("data", "hard", "one_more")  # the known ones first, in the order of the captions
    assert inside == [(folder / f"pictures/{name}.png").read_bytes() for name in names]
    links = re.findall(r"\]\((.*?)\)", md)
    assert all((folder / link).is_file() for link in links) and len(links) == 3 + html.count("<svg")
    assert not list(folder.rglob("*.tmp"))


def test_names_are_escaped(run):
    _, _, md, html = run
    assert "<b>" not in html and "&lt;b&gt;mel&lt;/b&gt; &amp; co|" in html
    assert "<b>" not in md and "&lt;b>mel&lt;/b> &amp; co\\|" in md


def test_optimistic_arm_is_marked_wherever_a_number_stands(run):
    folder, _, md, html = run
    lines = [line for line in md.splitlines() if "naive" in line and re.search(r"\d", line)]
    assert len(lines) == 5 and all(MARK in line for line in lines)
    rows = [row for row in re.findall(r"<tr>.*?</tr>", html) if "naive" in row]
    assert rows and all(MARK in row for row in rows)
    drawings = [p.read_text() for p in folder.glob("pictures/*.svg")]
    # a label is broken into lines: compare without the breaks
    said = [re.sub(r"(<[^>]*>|\s)+", " ", d.split("</desc>")[1]) for d in drawings if "naive" in d]
    named = [len(re.findall("naive minus|minus naive|student naive", d)) for d in said]
    assert sorted(named) == [1, 2, 2] and named == [d.count(MARK) for d in said]


def test_optimistic_guided_marks_every_plot(tmp_path):
    results = fake_results()
    results["arms"]["guided"]["optimistic"] = True
    (tmp_path / "results.json").write_text(json.dumps(results))
    report.write(tmp_path)
    for name in ("sensitivity", "specificity", "confusion_guided", "forest_all", "forest_hard"):
        assert f"({MARK})" in (tmp_path / f"pictures/{name}.svg").read_text(), name
    md = (tmp_path / "report.md").read_text()
    assert all(MARK in line for line in md.splitlines() if re.search(r"\bguided\b.*\d", line))


def test_svg_files_are_xml_with_title_and_no_variables(run):
    folder = run[0]
    names = {p.stem for p in folder.glob("pictures/*.svg")}
    assert names == {"forest_all", "forest_hard", "sensitivity", "specificity", "roc", "loss_ddpm",
                     "loss_student", "confusion_real", "confusion_guided"}
    for path in folder.glob("pictures/*.svg"):
        root = ET.parse(path).getroot()
        assert [child.tag.split("}")[1] for child in root][:3] == ["title", "desc", "rect"]
        assert root.get("viewBox")
        assert not re.search(r"var\(|currentColor|\bnan\b|\binf\b", path.read_text())


def test_forest_marks_lie_where_the_ticks_say(run):
    """The numbers under the axis give the line from points to places; the marks must lie on it."""
    folder, results, _, _ = run
    root = ET.parse(folder / "pictures/forest_all.svg").getroot()
    parts = list(root.iter())
    ticks = [(float(t.text.replace("\N{MINUS SIGN}", "-")), float(t.get("x")))
             for t in parts if t.get("class") == "tick"]
    slope, start = np.polyfit(*zip(*ticks), 1)
    marks = [(float(t.get("cx")), float(t.get("cy"))) for t in parts if t.get("class") == "marker"]
    rows = [c for c in results["comparisons"]
            if (c["subset"], c["metric"]) == ("all", "balanced_accuracy")]
    rows.sort(key=lambda c: c["arm"] != "guided")
    expected = [slope * 100 * c["difference"] + start for c in rows]
    assert len(ticks) >= 3 and slope > 0
    assert [x for x, _ in marks] == pytest.approx(expected, abs=0.05)
    heights = [y for _, y in marks]
    assert heights == sorted(heights) and len(set(heights)) == len(rows)


def test_nothing_leaves_a_picture():
    """Hostile names and extreme numbers: every letter and mark stays inside the view box."""
    long = "a very long name of an arm that nobody would choose minus another one"
    drawings = [
        plots.forest([(long, -90.0, -99.0, -80.0), ("b", 99.0, 98.0, 100.0), ("c", *[None] * 3)],
                     "t", "x"),
        plots.bars_with_intervals([long, "b"], [(long, [(100.0, 99.0, 100.0), (None,) * 3])],
                                  "t", "percent"),
        plots.lines([(long, [0, 123456], [1e-4, 1e3]), ("b", [7], [2.0])], "t", "step", "loss"),
        plots.confusion([[12345, 0], [0, 0]], [long, "b"], "t"),
        plots.confusion(np.eye(9).tolist(), ["basal cell carcinoma"] * 9, "t")]
    for drawing in drawings:
        root = ET.fromstring(drawing)
        x0, y0, width, height = map(float, root.get("viewBox").split())
        for t in root.iter("{http://www.w3.org/2000/svg}text"):
            if t.get("transform"):
                continue
            size = 0.5 * float(t.get("font-size")) * len(t.text or "")  # half as wide as high
            x, y = float(t.get("x")), float(t.get("y"))
            left = x - size * {"start": 0, "middle": 0.5, "end": 1}[t.get("text-anchor")]
            assert x0 <= left and left + size <= x0 + width + 1, t.text
            assert y0 <= y - 9 and y <= y0 + height, t.text


def test_roc_area_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(2)
    scores, sick = rng.integers(0, 6, 60) / 5.0, rng.random(60) < 0.4  # many ties
    pairs = scores[sick][:, None] - scores[~sick][None]
    share = (pairs > 0).mean() + 0.5 * (pairs == 0).mean()
    grid = np.linspace(0, 1, 20001)
    area = np.trapezoid(report.roc_heights(scores, sick, grid), grid)
    assert area == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("kwargs", [{"arms": ("real",)}, {"groups": ()},
                                    {"arms": ("a", "b"), "groups": ("old",)},
                                    {"groups": ("light", "dark", "unknown")}])
def test_fewer_arms_or_groups(tmp_path, kwargs):
    results, md, html = fake_run(tmp_path, **kwargs)
    for name, arm in results["arms"].items():
        assert percent(arm["test"]["all"]["accuracy"]) in md
    assert ("## By" in md.replace("## By hidden", "")) == (kwargs.get("groups") != ())
    assert ("## Differences" in md) == (kwargs.get("arms") != ("real",))
    assert "by group" in html if kwargs.get("groups") == ("old",) else "by group" not in html
    assert ("by skin-tone estimate" in html) == ("dark" in kwargs.get("groups", ()))


def test_what_loading_left_out_stands_with_the_splits(tmp_path):
    results, *_ = fake_run(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results | {"notes": ["left out 3 of 9"]}))
    report.write(tmp_path)
    md = (tmp_path / "report.md").read_text()
    assert "left out 3 of 9." in md[md.index("## Splits"):md.index("## Settings")]


def test_what_is_absent_is_left_out(tmp_path):
    report.write(tmp_path)
    assert (tmp_path / "report.md").read_text() == "# Report: run\n"
    hollow = {"name": "x", "arms": {"real": {}}, "comparisons": [], "rounds": []}
    (tmp_path / "results.json").write_text(json.dumps(hollow))
    report.write(tmp_path)
    assert "##" not in (tmp_path / "report.md").read_text()
    assert "<h2" not in (tmp_path / "report.html").read_text()
