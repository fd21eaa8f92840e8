"""report.md and report.html from a run folder: one list of blocks, written down twice.

    python -m extras.report runs/NAME       score the stored predictions again, rewrite the report

The html file needs nothing else and holds no absolute path. Below, `r` is results.json.
"""
import base64
import collections
import json
import re
import sys
import zipfile
import zlib
from html import escape
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import yaml

from engine.command import Parser, one_line
from engine.run import locked, write_bytes
from extras import measures, plots

FORMAT = 3          # of results.json
FULL = ("accuracy", "sensitivity", "specificity", "balanced_accuracy", "auroc", "auroc_malignant")
SHARES = ("precision", "recall", "right", "label_fidelity_oracle", "val_balanced_accuracy",
          "nearer", "hard out of fold", "wrong out of fold", "parents wrong", "children wrong",
          "balanced accuracy on val")
WORDS = {"auroc": "AUROC", "auroc_malignant": "AUROC, malignant", "frechet": "Frechet distance",
         "all": "all test images", "hard": "hard cases", "worst_group": "worst group"}
LEGEND = ("p", "Percent, with the 95 % interval for new lesions and new trainings in brackets; "
          f'"{plots.TOO_SMALL}": fewer lesions than evaluate.min_count. Hard: what students of '
          "real images, in no arm, get wrong. Gap: the largest sensitivity of a group less the "
          "smallest; some of it is chance, so compare the arms.")
CAPTIONS = {
    "children": "Parents above their children: group asked for, judge's probability, kept or not",
    "data": "Training images by class and group",
    "types": "One lesion carried to every group"}


@one_line("report")
def main(argv: list[str] | None = None) -> int:
    """Score a run again, rewrite its results.json and its report; returns the exit status."""
    parser = Parser("report", __doc__)
    parser.add_argument("run", type=Path, help="a run folder, runs/NAME")
    folder = parser.parse_args(argv).run
    try:
        with locked(folder):
            r, predictions = stored(folder)
            c = r["config"]["evaluate"]
            scored = measures.everything(
                predictions, **{key: c[key] for key in ("min_count", "draws", "margin")})
            for arm, entry in scored["arms"].items():       # the predictions do not know it
                entry["added"] = r["arms"][arm]["added"]
            write_bytes(folder / "results.json", (json.dumps(r | scored, indent=1) + "\n").encode())
            write(folder)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder}: results.json or predictions.npz is damaged "
                         f"({type(error).__name__}: {error}); run it again") from None
    print(f"{scored['verdict']}\nreport: {folder / 'report.md'} and {folder / 'report.html'}")
    return 0


def stored(folder: Path) -> tuple[dict, dict]:
    """results.json and predictions.npz. Raises OSError, or ValueError naming the file."""
    path = folder / "results.json"
    try:
        r = json.loads(path.read_text(encoding="utf-8"))
        if r["format"] != FORMAT:
            raise ValueError(f"its format is {r['format']}, not {FORMAT}")
        path = folder / "predictions.npz"
        with np.load(path, allow_pickle=False) as arrays:
            return r, dict(arrays)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be used: {error}; run it again") from None


def write(folder: Path) -> None:
    """Write report.md, report.html and pictures/*.svg into a run folder; errors as in `stored`."""
    folder, log, pictures, torn = Path(folder), [], {}, 0
    r, _ = stored(folder)
    for line in (folder / "log.jsonl").read_text("utf-8", "replace").splitlines():
        try:
            match json.loads(line):
                case {"event": "loss", "stage": str(name), "step": int(), "loss": float(x)} as e:
                    log += [e] * (bool(re.fullmatch(r"[\w.]+", name)) and 0 < x < 1e9)
                case {"event": "stage", "stage": str(), "seconds": int() | float()} as e:
                    log.append(e)
        except (ValueError, RecursionError):        # a kill may leave half a line
            torn += 1
    r["notes"] += [f"{torn} line(s) of log.jsonl cannot be read"] * bool(torn)
    for path in sorted((folder / "pictures").glob("*.png")):
        image = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        pictures[path.stem] = ("png", CAPTIONS.get(path.stem, path.stem), path.stem,
                               f'<img alt="" src="{image}"/>')
    publish(folder, opening(r, log, pictures) + [
        ("section", title, inner) for title, inner in contents(r, log, pictures).items()])


def publish(folder: Path, blocks: list) -> None:
    """Both writings of the blocks, and their drawings; the first is the title."""
    blocks = [block for block in blocks if block[-1]]       # no empty section
    inside = (block[2] for block in blocks if block[0] == "section")
    for kind, *_, name, drawing in (b for b in sum(inside, blocks) if b[0] == "svg"):
        write_bytes(folder / "pictures" / f"{name}.svg", plots.standalone(drawing).encode())
    write_bytes(folder / "report.md", markdown(blocks).encode())
    page = HEAD.replace("NAME", escape(blocks[0][1])) + "\n".join(map(html, blocks)) + "\n"
    write_bytes(folder / "report.html", page.encode())


# A block is ("title" | "verdict" | "p" | "code", text), ("table", caption, head, rows), ("section",
# title, blocks), ("svg" | "png", caption, file stem, html).

def opening(r, log, pictures) -> list:
    facts = {"arms": len(r["arms"]), "seeds": max(a["seeds"] for a in r["arms"].values()),
             "test images": r["splits"]["test"]["images"], "minutes": minutes(r, log)["total"],
             **{key: private(r["environment"][key]) for key in ("device", "commit")}}
    leak = ", ".join(f"{name} {100 * share:.0f} %" for name, share in r["leak"].items())
    return [("title", f"Report: {r['name']}"), ("verdict", r["verdict"]),
            *[("p", "Optimistic: split by image. The share of test images whose lesion is also in "
               f"train: {leak}.")] * bool(r["leak"]["all"]),
            ("p", "; ".join(f"{key}: {fact}" for key, fact in facts.items() if fact) + "."),
            *forest(r, "all", "balanced_accuracy"),
            *(block for name, block in pictures.items() if name == "children"), *first_table(r)]


def first_table(r) -> list:
    columns = {said(m): ("all", m) for m in FULL[:4]}
    if r["worst_group"] is not None:
        columns |= {f"worst group, {r['worst_group']}: {said(m)}": ("worst_group", m)
                    for m in ("balanced_accuracy", "sensitivity", "specificity")}
        columns["gap in sensitivity"] = ("all", "equal_opportunity_gap")
    columns |= {f"hard cases: {said(m)}": ("hard", m) for m in ("accuracy", "auroc")}
    return [*arm_table(r, "All test images", columns, ("added",)), LEGEND]


def contents(r, log, pictures) -> dict:
    free = "auroc", "auroc_malignant", "sensitivity_at_90", "sensitivity_at_95"
    return {
        "Differences": differences(r),
        # a moved threshold is no learning: these have none, or one that was fixed on val
        "Without a threshold": arm_table(r, "Without one, or at one fixed on val, whose own error "
                                         "is in no interval", {said(m): ("all", m) for m in free}),
        "By group": members(r, "per_group", "group", ("sensitivity", "specificity")),
        "By class": members(r, "per_class", "class", ("recall", "auroc")),
        "By hidden subtype": members(r, "per_subtype", "subtype", ("recall",)),
        "Loss curves": losses(r, log),
        "Pictures": [pictures[name] for name in sorted(pictures, key=[*CAPTIONS, *pictures].index)
                     if name != "children"],
        "Rounds": rounds(r) + sheet(r, {f"round {i}": e for i, e in enumerate(r["rounds"], 1)}),
        "Filter": sheet(r, r["filter"]),
        "The generator": sheet(r, r["generator"], "In the features of a classifier that no arm "
                               "uses; nearer: to train than a test image is, 50 % is honest"),
        "Splits": [("p", f"{note}.") for note in r["notes"]]
                  + sheet(r, {"few labels": r["pseudo"]}) + sheet(r, r["splits"]),
        "Settings": sheet(r, {"colour jitter": r["jitter"]}) + [
            ("code", yaml.safe_dump(private(r["config"]), sort_keys=False, width=1000))],
        "Versions and hardware": sheet(r, {
            "": {k: v for k, v in private(r["environment"]).items() if v is not None}}),
        "Minutes": sheet(r, {"minutes": minutes(r, log)})}


def arm_table(r, caption, columns, counts=()):
    """A row an arm; columns: {heading: (subset, metric)}; counts: keys of an arm."""
    rows = [[shown(r, arm), *(interval(a["test"][subset][m]) for subset, m in columns.values()),
             *(str(a[key]) for key in counts)] for arm, a in r["arms"].items()]
    return [("table", caption, ["arm", *columns, *counts], rows)] if columns or counts else []


def compared(r, subset, metric):
    """{"guided minus real": entry}."""
    return {f"{shown(r, c['arm'])} minus {shown(r, c['against'])}": c
            for c in r["comparisons"] if (c["subset"], c["metric"]) == (subset, metric)}


def forest(r, subset, metric):
    rows = [(name, *triple(c)) for name, c in compared(r, subset, metric).items()]
    title = f"Difference of {said(metric)}, {said(subset)}"
    return [("svg", title, f"forest_{subset}_{metric}",
             plots.forest(rows, title, "points"))] if rows else []


def differences(r):
    kinds = list(dict.fromkeys((c["subset"], c["metric"]) for c in r["comparisons"]))
    found = {f"{said(s)}: {said(m)}": compared(r, s, m) for s, m in kinds}
    rows = [[name, *(f"{interval(of[name], '+')} {of[name]['outcome'] or ''}"
                     for of in found.values())]
            for name in next(iter(found.values()), ())]
    asked = shown(r, r["comparisons"][0]["arm"]) if rows else ""
    return [("p", "In percentage points, paired over the same test lesions and seeds; the intervals"
             f" of {asked} hold for all its controls at once. Equal: within "
             f"{r['config']['evaluate']['margin']:g} either way. A hollow mark: the interval holds "
             "zero."), *forest(r, "hard", "accuracy"), *forest(r, "worst_group", "sensitivity"),
            ("table", "", ["comparison", *found], rows)] if rows else []


def members(r, key, kind, metrics):
    """A table a metric: a row a class, group or subtype, a column an arm."""
    sizes = {name: entry["n"] for a in r["arms"].values() for name, entry in a[key].items()}
    return [("table", said(metric), [kind, "n", *(shown(r, arm) for arm in r["arms"])], [
        [name, str(n), *(interval(a[key][name][metric]) for a in r["arms"].values())]
        for name, n in sizes.items()]) for metric in metrics if sizes]


def losses(r, log):
    """One plot for each kind of stage. A resumed run may repeat a step: the last one counts."""
    found, kinds = collections.defaultdict(dict), collections.defaultdict(list)
    for e in log:
        if e["event"] == "loss":
            found[e["stage"]][e["step"]] = e["loss"]
    for stage, curve in found.items():      # student_guided_0 is a student of arm guided
        kind, *rest = stage.split("_")
        arm = "_".join(word for word in rest if not word[:1].isdigit())
        points = np.array_split(sorted(curve.items()), min(100, len(curve)))
        kinds[kind].append((shown(r, arm or kind), *zip(*(some.mean(0) for some in points))))
    return [("svg", f"Loss: {kind}", f"loss_{kind}", plots.curves(
        series, f"Loss: {kind}", "step", "loss")) for kind, series in kinds.items()]


def rounds(r):
    """A plot of everything that changes from round to round, if there is more than one."""
    found = []
    for key in r["rounds"][0] if len(r["rounds"]) > 1 else ():
        of = [e[key] if isinstance(e[key], dict) else {"train": e[key]} for e in r["rounds"]]
        series = [(shown(r, arm), range(1, 1 + len(of)), [max(100 * e[arm], 0.1) for e in of])
                  for arm in of[0] if all(arm in e for e in of)]
        title = f"By round: {said(key)}"
        found += [("svg", title, f"rounds_{key.replace(' ', '_')}",
                   plots.curves(series, title, "round", "percent"))] if series else []
    return found


def minutes(r, log):
    """Minutes of every kind of stage: student_real_0 and student_guided_1 are both "student"."""
    spent = collections.Counter()
    for e in log:
        if e["event"] == "stage":
            spent[shown(r, e["stage"].split("_")[0])] += e["seconds"] / 60
    return {kind: f"{n:.1f}" for kind, n in [*spent.items(), ("total", spent.total())]}


def sheet(r, columns, caption=""):
    """A table of dictionaries side by side, inner dictionaries laid out as `outer: inner`."""
    rows = {}
    for column, entries in columns.items():
        for key, value in entries.items():
            for inner, v in (value if isinstance(value, dict) else {"": value}).items():
                v = (plots.TOO_SMALL if v is None else v if not isinstance(v, float) else
                     f"{100 * v:.1f} %" if key in SHARES else f"{v:.4g}")
                name = ": ".join(filter(None, (said(key), shown(r, inner))))
                rows.setdefault(name, {})[column] = str(v)
    return [("table", caption, ["", *(shown(r, c) for c in columns)], [
        [name, *(row.get(c, "-") for c in columns)] for name, row in rows.items()])] if rows else []


def said(key: str) -> str:
    return WORDS.get(key, key.replace("_", " ").replace("nonfinite", "non-finite"))


def shown(r, arm: str) -> str:
    optimistic = bool(r["arms"].get(arm, {}).get("optimistic"))
    return arm + " (optimistic: mined on the test set)" * optimistic


def triple(entry):
    """(value, low, high) in percent, None where undefined."""
    entry = entry if isinstance(entry, dict) else {"value": entry}
    return [None if entry.get(k) is None else 100 * entry[k] for k in ("value", "low", "high")]


def interval(entry, sign="") -> str:
    """81.2 [79.0, 83.4] in percent."""
    value, low, high = (None if v is None else format(round(v, 1) + 0.0, f"{sign}.1f")  # no -0.0
                        for v in triple(entry))
    known = value if low is None else f"{value} [{low}, {high}]"
    return plots.TOO_SMALL if value is None else known


def private(value):
    """Settings with the last part alone of any absolute path."""
    if isinstance(value, dict):
        return {k: private(v) for k, v in value.items()}
    if isinstance(value, list):
        return [private(v) for v in value]
    absolute = isinstance(value, str) and (value.startswith("~") or any(
        kind(value).is_absolute() for kind in (PurePosixPath, PureWindowsPath)))
    return PureWindowsPath(value).name if absolute else value


def markdown(blocks) -> str:
    out, safe = [], lambda words: escape(words, quote=False).replace("|", "\\|")
    for block in blocks:
        match block:
            case "section", title, inner:
                out.append(f"## {safe(title)}\n\n{markdown(inner).rstrip()}")
            case "table", caption, head, rows:
                lines = [f"| {' | '.join(map(safe, row))} |" for row in (head, *rows)]
                lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
                out += [f"**{safe(caption)}**"] * bool(caption)
                out.append("\n".join(lines))
            case ("png" | "svg") as kind, caption, stem, _:
                out += [f"**{safe(caption)}**", f"![{safe(caption)}](pictures/{stem}.{kind})"]
            case "code", words:
                out.append(f"```yaml\n{words}```")
            case kind, words:
                out.append("# " * (kind == "title") + safe(words))
    return "\n\n".join(out) + "\n"


def html(block) -> str:
    match block:
        case "section", title, inner:
            return (f"<details><summary><h2>{escape(title)}</h2></summary>\n"
                    + "\n".join(map(html, inner)) + "\n</details>")
        case kind, words:
            tag = {"title": "h1", "code": "pre"}.get(kind, "p")
            return f'<{tag} class="{kind}">{escape(words)}</{tag}>'
        case "table", _, head, rows:
            inner = "<table><tr>" + "".join(f"<th>{escape(words)}</th>" for words in head)
            for name, *cells in rows:
                cells = (escape(cell).partition(" [") for cell in cells)
                inner += f"</tr>\n<tr><th>{escape(name)}</th>" + "".join(
                    f"<td>{value}<small>{mark}{rest}</small></td>" for value, mark, rest in cells)
            inner += "</tr></table>"
        case _, _, _, inner:
            pass
    return f'<figure class="{block[0]}"><figcaption>{escape(block[1])}</figcaption>{inner}</figure>'


HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>NAME</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --page: Canvas; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
.verdict { font-size: 1.25rem; border-left: 4px solid #0072b2; padding: 1rem; }
h2 { display: inline; } figcaption { font-weight: 600; } svg, img { max-width: min(100%, 48rem); }
figure, pre { margin: 1rem 0; overflow-x: auto; }
table { border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #8885; }
th { font-weight: 500; max-width: 18rem; } tr > :first-child { text-align: left; }
td { white-space: nowrap; } small { display: block; }
</style>
"""

if __name__ == "__main__":
    sys.exit(main())
