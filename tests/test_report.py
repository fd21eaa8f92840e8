"""The report says what results.json says, in both writings, and needs nothing but itself."""
import base64
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import yaml
from PIL import Image

from engine.run import locked
from evaluate import COMPARED, outcome
from extras import measures, plots, report

ARMS = ("real", "replay", "guided", "naive")
CLASSES = ("nv", "<b>mel</b> & co|")
SHORT = ("accuracy", "sensitivity", "specificity", "balanced_accuracy")
FULL = (*SHORT, "auroc", "auroc_malignant")
MORE = ("sensitivity_at_90", "sensitivity_at_95", "equal_opportunity_gap")
VERDICT = "no gain over replay: +0.4 points of balanced accuracy, 95 % interval -1.1 to +1.9"
MARK = "optimistic: mined on the test set"
NONE = {"value": None, "low": None, "high": None}


def entry(rng):
    value, below, above = rng.uniform(0.3, 0.7), *rng.uniform(0.01, 0.2, 2)
    return {"value": value, "low": value - below, "high": value + above}


def fake_results(arms=ARMS, groups=("I", "VI")):
    """Random numbers in the shape of results.json; `naive` is mined on the test set."""
    rng = np.random.default_rng(0)
    subsets = {"all": FULL + (MORE if groups else MORE[:2]), "hard": FULL}
    if groups:
        subsets["worst_group"] = FULL
    arm = lambda name: {
        "added": 0 if name == "real" else 70, "optimistic": name == "naive", "seeds": 2,
        "test": {s: {m: entry(rng) for m in metrics} for s, metrics in subsets.items()},
        "per_group": {g: {"n": 30, "sensitivity": entry(rng), "specificity": entry(rng)}
                      for g in groups},
        "per_class": {c: {"n": 20, "recall": entry(rng), "auroc": entry(rng)}
                      for c in CLASSES},
        "per_subtype": {"acral": {"n": 40, "recall": {"value": 0.625, "low": 0.5, "high": 0.75}}}}
    asked = "guided" if "guided" in arms else arms[-1]
    pairs = [(asked, b) for b in arms if b != asked]
    pairs += [(a, "real") for a in arms[1:] if a != asked]
    results = {
        "format": 3, "name": "fake", "fingerprint": "1f", "verdict": VERDICT,
        "worst_group": groups[-1] if groups else None, "hard": {"n": 12},
        "config": {"data": {"root": "/home/someone/ham", "where": "C:\\Users\\someone\\ham"},
                   "guidance": {"targets": "hard",
                                "objectives": {"class_evidence": 1.0, "hardness": 0.1}},
                   "evaluate": {"min_count": 10, "draws": 50, "margin": 1.0, "lr": 1e-5,
                                "answer": "no", "list": [1, 2.5, None], "empty": {}}},
        "environment": {"device": "cpu", "torch": "2.9", "commit": None},
        "splits": {s: {"images": 40, "lesions": 38, "classes": dict.fromkeys(CLASSES, 20),
                       "groups": dict.fromkeys(groups, 20)} for s in ("train", "val", "test")},
        "notes": ["left out 3 of 9"], "leak": {"all": 0.0}, "pseudo": {},
        "jitter": {"chosen": 0.3, "val_balanced_accuracy": {"0.3": 0.811}},
        "arms": {name: arm(name) for name in arms},
        "comparisons": [
            {"arm": a, "against": b, "subset": s, "metric": m, "optimistic": "naive" in (a, b),
             **(e := {k: v - 0.5 for k, v in entry(rng).items()}),
             "outcome": outcome(e["low"], e["high"], 0.01)}
            for s in subsets for m in COMPARED[s] for a, b in pairs],
        "rounds": [{"hard out of fold": 0.2 + i / 10, "parents wrong": {"naive": 0.75},
                    "balanced accuracy on val": {"naive": 0.815, "guided": 0.0}} for i in (0, 1)],
        "filter": {"naive": {"candidates": 9, "kept": 7, "nonfinite": 0}},
        "generator": {"guided": {"n": 7, "frechet": 12.5, "precision": None, "recall": 0.5},
                      "real (val)": {"n": 7, "frechet": 2.25, "precision": 0.5, "recall": 0.875}}}
    if "guided" in arms:
        results["arms"]["guided"]["test"]["hard"]["specificity"] = NONE
        results["arms"]["real"]["per_group"].get("VI", {})["sensitivity"] = NONE
        wanted = {"arm": "guided", "against": "replay", "subset": "hard"}
        row = next(c for c in results["comparisons"] if wanted.items() <= c.items())
        row |= {"value": None, "low": None, "high": None, "outcome": None}
    return results


def fake_run(folder, results):
    """A run folder of these results with its report: (report.md, report.html)."""
    rng = np.random.default_rng(1)
    (folder / "pictures").mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    probs = {f"test_probs_{a}": rng.dirichlet((1, 1), (2, 40)).astype(np.float32)
             for a in results["arms"]}
    np.savez(folder / "predictions.npz", class_names=np.array(CLASSES),
             test_labels=rng.integers(0, 2, 40), malignant=np.array([False, True]), **probs)
    lines = [{"event": "loss", "stage": stage, "step": i, "loss": 2.0 / (i + 1), "time": "x"}
             for stage in ("ddpm", "student_naive_0", "student_real_1") for i in range(250)]
    lines += [{"event": "stage", "stage": s, "seconds": n} for s, n in
              (("ddpm", 45.0), ("student_naive_0", 10.0), ("student_real_1", 20.0),
               ("naive_1", 0.0))]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "lo')
    for name in ("hard", "data", "one_more", "children"):
        picture = Image.fromarray(rng.integers(0, 255, (8, 20, 3), dtype=np.uint8))
        picture.save(folder / f"pictures/{name}.png")
    report.write(folder)
    return tuple((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, results = tmp_path_factory.mktemp("run"), fake_results()
    return folder, results, *fake_run(folder, results)


def percent(e, sign=""):
    if e["value"] is None:
        return "n too small"
    value, low, high = (format(100 * e[k], f"{sign}.1f") for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def tables(md):
    """Every table of the markdown, as {first cell: the other cells}."""
    found = re.findall(r"(?:^\|.*\|\n)+", md, re.M)
    cells = lambda line: [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
    return [{cells(line)[0]: cells(line)[1:] for line in t.splitlines()} for t in found]


def section(md, title):
    return md.split(f"\n## {title}\n")[1].split("\n## ")[0]


def text_of(html):
    return re.sub(r"<[^>]+>", "", re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", html, flags=re.S))


def test_it_opens_with_verdict_facts_forest_pictures_and_one_table(run):
    _, _, md, html = run
    opening = md.split("\n## ")[0].split("\n\n")
    assert opening[:3] == ["# Report: fake", VERDICT, "arms: 4; seeds: 2; test images: 40; "
                           "minutes: 1.2; device: cpu."]
    assert [part.split("(")[-1] for part in opening if part.startswith("![")] == [
        "pictures/forest_all_balanced_accuracy.svg)", "pictures/children.png)"]
    assert len(tables(md.split("\n## ")[0])) == 1
    order = [html.index(word) for word in (
        "<h1", 'class="verdict"', 'class="p"', 'class="svg"', 'class="png"', 'class="table"',
        "<details>")]
    assert order == sorted(order)
    assert html.count("<figure") - html.split("<details>")[0].count("<figure") > 20
    titles = re.findall(r"<summary><h2>(.*?)</h2>", html)
    assert titles == re.findall(r"^## (.*)", md, re.M) == [
        "Differences", "Without a threshold", "By group", "By class", "By hidden subtype",
        "Loss curves", "Pictures", "Rounds", "Filter", "The generator", "Splits", "Settings",
        "Versions and hardware", "Minutes"]


def test_the_first_table_equals_results(run):
    _, results, md, html = run
    found = tables(md)[0]
    assert list(found)[2:] == ["real", "replay", "guided", f"naive ({MARK})"]
    for arm, cells in zip(results["arms"].values(), list(found.values())[2:]):
        test = arm["test"]
        wanted = [*(test["all"][m] for m in SHORT),
                  *(test["worst_group"][m] for m in ("balanced_accuracy", *SHORT[1:3])),
                  test["all"]["equal_opportunity_gap"], test["hard"]["accuracy"],
                  test["hard"]["auroc"]]
        assert cells == [*map(percent, wanted), str(arm["added"])]
        assert all(cell in text_of(html) for cell in cells)


def test_the_folded_tables_equal_results(run):
    _, results, md, html = run
    arms = results["arms"].values()
    found = tables(section(md, "Without a threshold"))[0]
    assert list(found.values())[2:] == [
        [percent(a["test"]["all"][m]) for m in (*FULL[-2:], *MORE[:2])] for a in arms]
    for title, key, members, metrics in (
            ("By group", "per_group", ("I", "VI"), ("sensitivity", "specificity")),
            ("By class", "per_class", CLASSES, ("recall", "auroc")),
            ("By hidden subtype", "per_subtype", ("acral",), ("recall",))):
        for metric, found in zip(metrics, tables(section(md, title))):
            assert list(found.values())[2:] == [
                [str(results["arms"]["real"][key][member]["n"]),
                 *(percent(a[key][member][metric]) for a in arms)] for member in members]
    assert all(cell in text_of(html) for t in tables(md) for row in list(t.values())[2:]
               for cell in row if "[" in cell)


def test_differences_equal_results(run):
    _, results, md, _ = run
    found = tables(section(md, "Differences"))[0]
    assert found["comparison"] == [
        "all test images: balanced accuracy", "all test images: sensitivity",
        "hard cases: accuracy", "hard cases: AUROC", "worst group: balanced accuracy",
        "worst group: sensitivity"]
    pairs = {}
    for c in results["comparisons"]:
        name = " minus ".join(f"naive ({MARK})" if a == "naive" else a
                              for a in (c["arm"], c["against"]))
        pairs.setdefault(name, []).append(f"{percent(c, '+')} {c['outcome'] or ''}".strip())
    first = [name for name in pairs if name.startswith("guided")]
    assert dict(list(found.items())[2:]) == pairs
    assert list(found)[2:][:len(first)] == first and len(first) == 3


def test_other_tables(run):
    _, results, md, _ = run
    by_first = {first: cells for t in tables(md) for first, cells in t.items()}
    assert by_first["hard out of fold"] == ["20.0 %", "30.0 %"]
    assert by_first[f"balanced accuracy on val: naive ({MARK})"] == ["81.5 %"] * 2
    assert by_first[f"parents wrong: naive ({MARK})"] == ["75.0 %"] * 2
    assert by_first["kept"] == ["7"] and by_first["recall"] == ["50.0 %", "87.5 %"]
    assert by_first["Frechet distance"] == ["12.5", "2.25"]
    assert by_first["precision"] == ["n too small", "50.0 %"]
    assert by_first["chosen"] == ["0.3"]
    assert by_first["images"] == ["40"] * 3 and by_first["total"] == ["1.2"]
    assert by_first["student"] == ["0.5"]
    assert "left out 3 of 9." in section(md, "Splits")
    assert "1 line(s) of log.jsonl cannot be read." in section(md, "Splits")
    assert "commit" not in section(md, "Versions and hardware")


def test_settings_are_yaml_without_a_place(run):
    _, results, md, html = run
    expected = json.loads(json.dumps(results["config"]))
    expected["data"] |= {"root": "ham", "where": "ham"}
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", md, re.S)[1]) == expected
    assert "someone" not in md + html


def test_html_stands_alone(run):
    folder, _, md, html = run
    assert "http" not in html and "<script" not in html and "url(" not in html
    assert str(folder) not in md + html and not re.search(r"(src|href)=\"(?!data:)", html)
    inside = [base64.b64decode(d) for d in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    names = ("children", "data", "hard", "one_more")    # the known ones first, as in the captions
    assert inside == [(folder / f"pictures/{name}.png").read_bytes() for name in names]
    links = re.findall(r"\]\((.*?)\)", md)
    assert all((folder / link).is_file() for link in links) and len(links) == 4 + html.count("<svg")
    assert not list(folder.rglob("*.tmp"))


def test_markup_in_any_text_is_escaped(tmp_path):
    """A tag in every text of results.json, as key and as value, and none of them in the html."""
    tag = "<i>x</i>"

    def hostile(value, key=""):
        if isinstance(value, dict):
            return {(f"{k}{tag}" if key in ("classes", "groups", "per_class", "per_group", "leak",
                                            "per_subtype", "generator", "filter", "environment")
                     and k not in ("all", "device", "commit") else k): hostile(v, k)
                    for k, v in value.items()}
        if isinstance(value, list):
            return [hostile(v, key) for v in value]
        fixed = key in ("arm", "against", "subset", "metric", "targets")
        return value + tag if isinstance(value, str) and not fixed else value

    results = fake_results()
    results["environment"]["commit"], results["leak"]["nv"] = "abc", 0.5
    results["leak"]["all"] = 0.5
    md, html = fake_run(tmp_path, hostile(results))
    assert "<i>" not in html and "<b>" not in html
    assert "<i>" not in md.split("```")[0] and "<b>" not in md          # a code block is no html
    for words in ("abc", "cpu", "fake", VERDICT, "VI", "acral", "left out 3 of 9", "co|", "nv",
                  "real (val)"):
        assert f"{words}&lt;i&gt;x&lt;/i&gt;" in html, words
    ET.fromstring(re.search(r"<details>.*</details>", html, re.S)[0].join(("<a>", "</a>")))


def test_optimistic_arm_is_marked_wherever_a_number_stands(run):
    folder, _, md, html = run
    lines = [line for line in md.splitlines() if "naive" in line and re.search(r"\d", line)]
    assert len(lines) >= 7 and all(MARK in line for line in lines)
    rows = [row for row in re.findall(r"<tr>.*?</tr>", html) if "naive" in row]
    assert rows and all(MARK in row for row in rows)
    drawings = [p.read_text() for p in folder.glob("pictures/*.svg")]
    # a label is broken into lines: compare without the breaks
    said = [re.sub(r"(<[^>]*>|\s)+", " ", d.split("</desc>")[1]) for d in drawings if "naive" in d]
    assert [d.count("naive") for d in said] == [d.count(f"naive ({MARK})") for d in said]
    assert sorted(d.count(MARK) for d in said) == [1, 1, 1, 2, 2, 2]


def test_optimistic_guided_is_marked_everywhere(tmp_path):
    results = fake_results()
    results["arms"]["guided"]["optimistic"] = True
    md, _ = fake_run(tmp_path, results)
    for name in ("forest_all_balanced_accuracy", "forest_hard_accuracy"):
        assert f"guided ({MARK})" in (tmp_path / f"pictures/{name}.svg").read_text(), name
    shown = md[:md.index("## Settings")]
    assert all(MARK in line for line in shown.splitlines() if re.search(r"\bguided\b.*\d", line))


def test_svg_files_are_xml_with_title_and_no_variables(run):
    folder = run[0]
    names = {p.stem for p in folder.glob("pictures/*.svg")}
    assert names == {"forest_all_balanced_accuracy", "forest_hard_accuracy",
                     "forest_worst_group_sensitivity", "loss_ddpm", "loss_student",
                     "rounds_hard_out_of_fold", "rounds_parents_wrong",
                     "rounds_balanced_accuracy_on_val"}
    for path in folder.glob("pictures/*.svg"):
        root = ET.parse(path).getroot()
        assert [child.tag.split("}")[1] for child in root][:3] == ["title", "desc", "rect"]
        assert root.get("viewBox")
        assert not re.search(r"var\(|currentColor|\bnan\b|\binf\b", path.read_text())


def test_forest_marks_lie_where_the_ticks_say(run):
    """The numbers under the axis give the line from points to places; the marks must lie on it."""
    folder, results, _, _ = run
    parts = list(ET.parse(folder / "pictures/forest_all_balanced_accuracy.svg").getroot().iter())
    ticks = [(float(t.text), float(t.get("x"))) for t in parts if t.get("class") == "tick"]
    slope, start = np.polyfit(*zip(*ticks), 1)
    marks = [(float(t.get("cx")), float(t.get("cy"))) for t in parts if t.get("class") == "marker"]
    rows = [c for c in results["comparisons"]
            if (c["subset"], c["metric"]) == ("all", "balanced_accuracy")]
    expected = [slope * 100 * c["value"] + start for c in rows]
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
        plots.forest([("a", *[None] * 3)], "t", "x"),
        plots.curves([(long, [0, 123456], [1e-4, 1e3]), ("b", [7], [2.0])], "t", "step", "loss")]
    for drawing in drawings:
        root = ET.fromstring(plots.standalone(drawing))
        x0, y0, width, height = map(float, root.get("viewBox").split())
        for t in root.iter("{http://www.w3.org/2000/svg}text"):
            if t.get("transform"):
                continue
            size = 0.5 * float(t.get("font-size")) * len(t.text or "")  # half as wide as high
            x, y = float(t.get("x")), float(t.get("y"))
            left = x - size * {"start": 0, "middle": 0.5, "end": 1}[t.get("text-anchor")]
            assert x0 <= left and left + size <= x0 + width + 1, t.text
            assert y0 <= y - 9 and y <= y0 + height, t.text


@pytest.mark.parametrize("kwargs", [{"arms": ("real",)}, {"groups": ()},
                                    {"arms": ("a", "b"), "groups": ("old",)},
                                    {"groups": ("light", "dark", "unknown")}])
def test_fewer_arms_or_groups(tmp_path, kwargs):
    results = fake_results(**kwargs)
    md, html = fake_run(tmp_path, results)
    for name, arm in results["arms"].items():
        assert percent(arm["test"]["all"]["accuracy"]) in md
    assert ("## By group" in md) == (kwargs.get("groups") != ())
    assert ("## Differences" in md) == ("forest_all" in md) == (kwargs.get("arms") != ("real",))
    assert ("worst_group" in results["arms"][next(iter(results["arms"]))]["test"]) == (
        "worst" in md.split("\n## ")[0])


def test_a_leaking_split_is_said_at_the_top(tmp_path):
    md, _ = fake_run(tmp_path, fake_results() | {"leak": {"all": 0.42, "nv": 0.5}})
    assert "lesion is also in train: all 42 %, nv 50 %." in md.split("![")[0]


def test_another_format_is_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(fake_results() | {"format": 1}))
    with pytest.raises(ValueError, match="results.json.* format is 1, not 3; run it again"):
        report.write(tmp_path)


# ---- python -m extras.report runs/NAME ----------------------------------------------------------

def predictions(arms=("real", "guided")):
    rng, n = np.random.default_rng(3), 60
    part = lambda split: {
        f"{split}_labels": rng.integers(0, 2, n), f"{split}_groups": rng.integers(0, 2, n),
        f"{split}_subtypes": np.full(n, -1),
        f"{split}_sources": np.array([f"i{i}" for i in range(n)]),
        f"{split}_lesions": np.array([f"L{i}" for i in range(n)]),
        f"{split}_reference": rng.dirichlet((1, 1), (3, n)),
        **{f"{split}_probs_{arm}": rng.dirichlet((1, 1), (2, n)) for arm in arms}}
    return {"class_names": np.array(CLASSES), "group_names": np.array(["I", "VI"]),
            "subtype_names": np.array([], str), "malignant": np.array([False, True]),
            "arms": np.array(arms), "seeds": np.arange(2), "optimistic": np.zeros(len(arms), bool),
            **part("val"), **part("test")}


def test_scoring_again_gives_what_measures_gives_and_keeps_the_rest(tmp_path, capsys):
    results = fake_results()
    fake_run(tmp_path, results)
    np.savez(tmp_path / "predictions.npz", **predictions())
    assert report.main([str(tmp_path)]) == 0
    scored = measures.everything(predictions(), min_count=10, draws=50)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["arms"]) == ["real", "guided"]        # nothing vouches for the others
    assert [found["arms"][arm]["added"] for arm in found["arms"]] == [0, 70]
    assert found["arms"]["guided"]["test"] == scored["arms"]["guided"]["test"]
    assert found["comparisons"] == scored["comparisons"] and found["verdict"] == scored["verdict"]
    assert found["rounds"] == results["rounds"] and found["config"] == results["config"]
    md = (tmp_path / "report.md").read_text()
    assert percent(found["arms"]["guided"]["test"]["all"]["accuracy"]) in md
    said = capsys.readouterr().out
    assert scored["verdict"] in said and str(tmp_path / "report.html") in said


@pytest.mark.parametrize("damage, says", [
    (lambda folder: (folder / "results.json").unlink(), "results.json"),
    (lambda folder: (folder / "results.json").write_text('{"form'), "results.json cannot be used"),
    (lambda folder: (folder / "results.json").write_text("[]"), "results.json cannot be used"),
    (lambda folder: (folder / "results.json").write_text('{"format": 1}'), "format is 1, not 3"),
    (lambda folder: (folder / "predictions.npz").unlink(), "predictions.npz"),
    (lambda folder: (folder / "predictions.npz").write_bytes(b""), "predictions.npz cannot be"),
    (lambda folder: (folder / "predictions.npz").write_bytes(b"PK\3\4 rest"), "predictions.npz"),
    (lambda folder: (folder / "predictions.npz").write_text("text"), "predictions.npz cannot be")])
def test_what_cannot_be_scored_ends_in_one_line(tmp_path, capsys, damage, says):
    fake_run(tmp_path, fake_results())
    damage(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert said.startswith("report: ") and said.count("\n") == 1 and says in said


def test_a_missing_run_and_one_at_work_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path / "nowhere")])
    with locked(tmp_path), pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "nowhere" in lines[0] and "another process" in lines[1]
