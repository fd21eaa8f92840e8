"""report.md and report.html from a run folder: one list of blocks, written down twice.

`write(folder)` reads results.json (every number), predictions.npz (the ROC curves alone),
log.jsonl (the loss curves) and pictures/*.png; what is absent is left out. The html file stands
alone: pictures and plots are inside it, and it needs neither network nor script. No path of this
machine gets in.

    python -c "import pathlib, report; report.write(pathlib.Path('runs/NAME'))"
"""
import base64
import json
import math
import re
from html import escape
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image

from extras import plots
from extras.plots import TOO_SMALL
from engine.run import write_bytes

MARK = "optimistic: mined on the test set"
MEASURES = {"accuracy": "accuracy", "sensitivity": "sensitivity", "specificity": "specificity",
            "balanced_accuracy": "balanced accuracy", "auroc": "AUROC",
            "auroc_malignant": "AUROC, malignant"}
# a moved threshold is no learning: these have none, or one that was fixed on val
MORE_MEASURES = {"auprc": "AUPRC", "ece": "ECE",
                 "sensitivity_at_90": "sensitivity at 90 % specificity",
                 "sensitivity_at_95": "sensitivity at 95 % specificity"}
GAPS = {"equal_opportunity_gap": "equal-opportunity gap (sensitivity)",
        "equalised_odds_gap": "equalised-odds gap (sensitivity or false positives)"}
SPOKEN = {**MEASURES, **MORE_MEASURES, **GAPS,
          "frechet": "Frechet distance", "kid": "kernel distance (KID)"}
PERCENT = {*MEASURES, *MORE_MEASURES, *GAPS, "precision", "recall",
           "label_fidelity_oracle", "label_fidelity_unfiltered"}
EXPLAINED = {
    "filter": "What the filter, the same for every arm, made of the candidates. guided, replay and "
              "recolour hold the parents whose image was kept in all three; every arm adds as many "
              "images as the arm that has fewest.",
    "generator": "In the features of a classifier that no arm uses, against as many test images of "
                 "the same classes and groups (n); the column of real images is the floor. "
                 "Distances to the nearest training image are in grey levels, medians.",
    "counterfactuals": "Counterfactuals beside the truth: how far an image lies from the phantom's "
                       "own picture of the same lesion on the asked skin, in grey levels (median "
                       "of the root mean square; n images, the filtered ones too). The floor is a "
                       "second picture by the phantom."}
CAPTIONS = {"data": "Training images by class and group",
            "hard": "Hard cases: what the students get wrong",
            "types": "One lesion carried to every group",
            "children": "Parents beside their children",
            "guided": "Unguided beside guided",
            "composition": "Real beside generated, class by group, and how many",
            "neighbours": "Synthetic images beside their nearest training images",
            "mended": "Hardest test cases mended and broken"}


def write(folder: Path) -> None:
    """Write folder/report.md, folder/report.html and the plots as folder/pictures/*.svg."""
    folder = Path(folder)
    results = json.loads(read(folder / "results.json") or "{}")
    log, broken = events(read(folder / "log.jsonl") or "")
    results["minutes"] = minutes(log)
    predictions = {}
    if (folder / "predictions.npz").exists():
        with np.load(folder / "predictions.npz", allow_pickle=False) as stored:
            predictions = {k: stored[k] for k in stored.files}
    pictures = [p.stem for p in sorted((folder / "pictures").glob("*.png"))]
    pictures.sort(key=[*CAPTIONS, *(p for p in pictures if p not in CAPTIONS)].index)
    rounds = {f"round {r.get('round', i)}": {k: v for k, v in r.items() if k != "round"}
              for i, r in enumerate(results.get("rounds") or [], 1)}
    known = {k: v for k, v in private(results.get("environment") or {}).items() if v is not None}
    blocks = [
        *opening(results),
        *section("Before and after", *before_and_after(results)),
        *section("Differences", *differences(results)),
        *section(f"By {kind_of_group(results)}", *by_group(results)),
        *section("By hidden subtype", *by_subtype(results)),
        *section("By class", *by_class(results)),
        *section("ROC before and after", *roc(results, predictions)),
        *section("Loss curves", *losses(results, log, broken)),
        *section("Confusion", *confusions(results, predictions)),
        *section("Pictures", *(("picture", stem, marked(results, CAPTIONS.get(
            stem, stem.replace("_", " ").capitalize()))) for stem in pictures)),
        *section("Rounds", sheet(results, rounds)),
        *section("Filter", *explained(results, "filter")),
        *section("The generator", *explained(results, "generator"),
                 *explained(results, "counterfactuals")),
        *section("Splits", *(("p", f"{note}.") for note in results.get("notes") or ()),
                 sheet(results, {"few labels": results.get("pseudo") or {}}),
                 sheet(results, results.get("splits") or {})),
        *section("Settings", ("code", as_yaml(private(results.get("config") or {})))),
        *section("Versions and hardware", sheet(results, {"value": known})),
        *section("Minutes", sheet(results, {"minutes": {
            k: f"{v:.1f}" for k, v in results["minutes"].items()}}), *cost(log)),
    ]
    for block in blocks:
        for stem, _, drawing in block[1] if block[0] == "plots" else ():
            write_bytes(folder / "pictures" / f"{stem}.svg",
                        (plots.standalone(drawing) + "\n").encode())
    write_bytes(folder / "report.md", markdown(blocks).encode())
    write_bytes(folder / "report.html", page(blocks, folder / "pictures").encode())


# ----------------------------------------------------------------------------- what the report says
# A block is ("h1" | "h2" | "p" | "verdict" | "code", text), ("table", caption, head, rows),
# ("plots", [(file stem, title, svg)]) or ("picture", file stem, caption).

def opening(results):
    yield "h1", f"Report: {results.get('name', 'run')}"
    if results.get("verdict"):
        yield "verdict", marked(results, results["verdict"])
    arms, known = results.get("arms") or {}, results.get("environment") or {}
    if (results.get("leak") or {}).get("all"):
        yield "p", ("Optimistic: split by image. The share of test images whose lesion is also in "
                    "train: " + ", ".join(f"{name} {100 * share:.0f} %"
                                             for name, share in results["leak"].items()) + ".")
    seeds = max((len(a.get("seeds", [])) for a in arms.values()), default=0)
    test, total = results.get("splits", {}).get("test", {}), results.get("minutes", {}).get("total")
    facts = [f"{len(arms)} arm{'s' * (len(arms) != 1)}" if arms else "",
             f"{seeds} seed{'s' * (seeds != 1)}" if seeds else "",
             f"{test['images']} test images" if "images" in test else "",
             f"{total:.1f} minutes" if number(total) is not None else "",
             *(f"{k} {known[k]}" for k in ("device", "commit") if known.get(k))]
    if any(facts):
        yield "p", "; ".join(filter(None, facts)) + "."


def before_and_after(results):
    """One table for each subset of the test images, one row for each arm."""
    arms, (before, *after) = results.get("arms") or {}, chosen(results) or [None]
    worst, tables = results.get("worst_group"), []
    sizes = [a.get("per_group", {}).get(worst, {}).get("n") or 0 for a in arms.values()]
    images = results.get("splits", {}).get("test", {}).get("images")
    for subset, words, n, measures, extra in (
            ("all", "All test images", images, MEASURES, ["added", "mended", "broken"]),
            ("hard", "Hard cases: test images that students of real images, none in any arm, get "
             "wrong; any change of training mends a few, so compare with the controls",
             results.get("hard", {}).get("n"), MEASURES, []),
            ("worst_group", f"Worst {kind_of_group(results)}: {worst}", max(sizes, default=0),
             MEASURES, []),
            ("all", "All test images, without a threshold or at one fixed on val", images,
             MORE_MEASURES, []),
            ("all", f"Between the {kind_of_group(results)}s: the largest rate less the smallest; "
             "some of it is chance, so compare the arms", images, GAPS, [])):
        tests = {arm: a.get("test", {}).get(subset) or {} for arm, a in arms.items()}
        measures = {m: w for m, w in measures.items() if any(m in test for test in tests.values())}
        extra = [k for k in extra if any(k in a for a in arms.values())]
        roles = {before: ", before", after[0]: ", after"} if after else {}
        rows = [[arm + roles.get(arm, ""), *(interval(test.get(m, "")) for m in measures),
                 *(str(arms[arm].get(k, "-")) for k in extra)] for arm, test in tests.items()]
        if measures:
            tables.append(table(results, words + (f" (n = {n})" if n else ""),
                                ["arm", *measures.values(), *extra], rows))
    fewest = results.get("config", {}).get("evaluate", {}).get("min_count")
    words = "Percent, with the 95 % interval over test lesions and seeds in brackets."
    if any("mended" in a for a in arms.values()):
        words += " Mended: wrong with real and right with this arm, by vote; broken: the reverse."
    words += f' "{TOO_SMALL}": fewer than {fewest} lesions.' if fewest else ""
    return [("p", words), *tables] if tables else []


def differences(results):
    """Forest plots and their numbers: the arm after against every other, every arm against real."""
    subsets = {"all": "all test images", "hard": "hard cases, accuracy",
               "worst_group": f"worst {kind_of_group(results)}"}
    # Hard cases are few in the rarest class, too few for a mean over classes.
    metrics = {"all": "balanced_accuracy", "hard": "accuracy", "worst_group": "balanced_accuracy"}
    rows, p_values, drawings = {}, {}, []
    compared = results.get("comparisons") or []
    for c in sorted(compared, key=lambda c: c["arm"] not in chosen(results)[-1:]):
        name = marked(results, f"{c['arm']} minus {c['against']}")
        if "mcnemar_p" in c:  # of one decision per lesion: once for each pair
            p_values[name] = c
        if c["metric"] == metrics.get(c["subset"]):
            rows.setdefault(name, {})[c["subset"]] = {**c, "value": c.get("difference")}
    columns = {words: [interval(row.get(subset, ""), "+") for row in rows.values()]
               for subset, words in subsets.items() if any(subset in row for row in rows.values())}
    for k, words in (("mcnemar_p", "McNemar p"), ("holm_p", "p after Holm")):
        if any(k in c for c in p_values.values()):
            found = [number(p_values.get(name, {}).get(k)) for name in rows]
            columns[words] = ["-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
                              for p in found]
    for subset in ("all", "hard"):
        part = [(name, *triple(row[subset])) for name, row in rows.items() if subset in row]
        title = f"Difference of {spoken(metrics[subset])}, {subsets[subset].split(',')[0]}"
        if part:
            drawing = plots.forest(part, title, "percentage points")
            drawings.append((f"forest_{subset}", title, drawing))
    words = ("Balanced accuracy (on the hard cases accuracy) in percentage points, paired over the "
             "same test lesions and seeds; right of zero the first arm is better. The interval of "
             "a hollow mark holds zero.")
    if p_values:
        words += " McNemar: lesions right and wrong, by the mean probability over images and seeds."
    return [("p", words), ("plots", drawings),
            table(results, "", ["comparison", *columns], [*map(list, zip(rows, *columns.values()))])
            ] + mining(results) if rows else []


def mining(results):
    """Whether looking for what the students get wrong was worth it, in one sentence: guided against
    random, which has as many images of the same cells, from random cases and without hardness."""
    row = next((c for c in results["comparisons"] if (c["arm"], c["against"], c["subset"],
               c["metric"]) == ("guided", "random", "all", "balanced_accuracy")), {})
    c = results.get("config", {}).get("guidance", {})
    what = {"groups": [], "both": ["starting half from hard cases"]}.get(
        c.get("targets"), ["starting from hard cases"])
    if c.get("hardness_scale"):
        what.append("guiding toward hardness" + " (nothing was mined)" * (not what))
    row = row | {"value": row.get("difference")}
    if None in triple(row) or not what:
        return []
    says = ("did harm" if row["high"] < 0 else "earned its place" if row["low"] > 0 else
            "brought no gain that chance does not explain")
    return [("p", f"{' and '.join(what).capitalize()} {says} on this draw of the data: "
             f"{interval(row, '+')} points of balanced accuracy over arm random, which has as many "
             "images of the same classes and groups, from random cases and without hardness "
             "guidance.")]


def by_group(results):
    arms = {arm: results["arms"][arm].get("per_group") or {} for arm in chosen(results)}
    names = list(dict.fromkeys(name for groups in arms.values() for name in groups))
    sizes = [max(groups.get(name, {}).get("n") or 0 for groups in arms.values()) for name in names]
    drawings, columns = [], {"n": [str(n) for n in sizes]}
    for measure in ("sensitivity", "specificity") if names else ():
        title, series = f"{measure.capitalize()} by {kind_of_group(results)}", []
        for arm, groups in arms.items():
            entries = [groups.get(name, {}).get(measure) for name in names]
            series.append((marked(results, arm), [triple(e) for e in entries]))
            columns[f"{measure}, {arm}"] = [interval(e) for e in entries]
        labels = [f"{name} (n {n})" for name, n in zip(names, sizes)]
        drawing = plots.bars_with_intervals(labels, series, title, "percent")
        drawings.append((measure, title, drawing))
    return [("plots", drawings), table(results, "", [kind_of_group(results), *columns], [
        *map(list, zip(names, *columns.values()))])] if names else []


def by_subtype(results):
    arms = {arm: a["per_subtype"] for arm, a in (results.get("arms") or {}).items()
            if a.get("per_subtype")}
    rows = []
    for name in dict.fromkeys(name for found in arms.values() for name in found):
        entries = [found.get(name, {}) for found in arms.values()]
        rows.append([name, str(max(e.get("n") or 0 for e in entries)),
                     *(interval({**e, "value": e.get("recall")}) for e in entries)])
    return [("p", "Recall in percent; no model is told the subtype."),
            table(results, "", ["subtype", "n", *arms], rows)] if rows else []


def by_class(results):
    """One against the rest, before and after."""
    found = {arm: results["arms"][arm].get("per_class") or {} for arm in chosen(results)}
    columns = [(arm, k) for arm in found for k in ("recall", "auroc", "auprc")]
    rows = [[name, str(row.get("n", 0)), *(interval(found[arm].get(name, {}).get(k))
                                           for arm, k in columns)]
            for name, row in next(iter(found.values()), {}).items()]
    return [("p", "Each class against the rest, in percent."),
            table(results, "", ["class", "n", *(f"{k if k == 'recall' else k.upper()}, {arm}"
                                                for arm, k in columns)], rows)] if rows else []


def roc(results, predictions):
    if not {"malignant", "test_labels"} <= predictions.keys():
        return []
    malignant = predictions["malignant"].astype(bool)
    sick = malignant[predictions["test_labels"]]
    grid, curves = np.linspace(0, 1, 201), []
    for arm in chosen(results) if sick.any() and not sick.all() else ():
        if f"test_probs_{arm}" in predictions:
            scores = predictions[f"test_probs_{arm}"][:, :, malignant].sum(-1)
            seeds = [roc_heights(s, sick, grid) for s in scores]
            area = results["arms"][arm].get("test", {}).get("all", {}).get("auroc_malignant")
            name = marked(results, arm + (f": AUROC {interval(area)}" if area else ""))
            heights = [np.mean(seeds, 0), *(seeds if len(seeds) > 1 else [])]
            curves.append((name, [([0.0, *grid], [0.0, *h]) for h in heights]))
    title = "ROC, malignant against benign"
    return [("p", "Thick: the mean over the seeds; thin: each seed."),
            ("plots", [("roc", title, plots.roc(curves, title))])] if curves else []


def roc_heights(scores, sick, grid):
    """Sensitivity at each 1 - specificity of the grid."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores pass the threshold together
    tpr, fpr = (np.cumsum(c[order])[last] / c.sum() for c in (sick, ~sick))
    return np.interp(grid, [0.0, *fpr], [0.0, *tpr])


def events(text):
    """The log's events, and how many lines are none: an interrupted run may leave half a line."""
    found, broken = [], 0
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            broken += 1
    return found, broken


def minutes(log):
    """Minutes of every kind of stage: student_real_0 and student_guided_1 are both "student"."""
    spent = {}
    for event in log:
        if event.get("event") == "stage":
            kind = re.split(r"_|\d", event["stage"])[0]
            spent[kind] = spent.get(kind, 0) + event["seconds"] / 60
    return spent and {**spent, "total": sum(spent.values())}


def cost(log):
    """What a guided image costs beside a plain one; the last such event counts."""
    for event in reversed(log):
        guided, plain = (number(event.get(k)) for k in ("guided", "plain"))
        if event.get("event") == "cost" and guided and plain:
            yield "p", (f"A guided image took {guided:.0f} ms, one from pure noise, unguided and "
                        f"in as many steps, {plain:.0f} ms: {guided / plain:.1f} times as long.")
            return


def losses(results, log, broken):
    """One plot for each kind of stage. A resumed run may repeat a step: the last one counts."""
    curves, kinds, drawings = {}, {}, []
    for event in log:
        if event.get("event") == "loss" and (number(event.get("loss")) or 0) > 0:
            curves.setdefault(event["stage"], {})[event["step"]] = event["loss"]
    for stage, curve in curves.items():
        points = np.array(sorted(curve.items()), float)
        width = math.ceil(len(points) / 100)  # means of so many: 100 points are enough to see
        means = [points[i:i + width].mean(0) for i in range(0, len(points), width)]
        # student_real_0 and student_real_1 are one name with two seeds
        name = re.sub(r"([\W_]*(seed|fold|round)?[\W_]*\d+)+$", "", stage) or stage
        kinds.setdefault(re.split(r"[\W\d_]", stage)[0] or stage, []).append(
            (marked(results, name.replace("_", " ")), *zip(*means)))
    for kind, series in kinds.items():
        title = f"Loss: {series[0][0] if len({s[0] for s in series}) == 1 else kind}"
        drawings.append((f"loss_{slug(kind)}", title, plots.lines(series, title, "step", "loss")))
    note = ("p", f"{broken} unreadable line{'s' * (broken > 1)} of log.jsonl left out.")
    return [("plots", drawings), note if broken else None] if drawings else []


def confusions(results, predictions):
    drawings = []
    for arm in chosen(results):
        matrix = results["arms"][arm].get("confusion") or []
        names = [str(n) for n in predictions.get("class_names", range(len(matrix)))]
        title = marked(results, f"Confusion, {arm}")
        if matrix:
            drawing = plots.confusion(matrix, names, title)
            drawings.append((f"confusion_{slug(arm)}", title, drawing))
    return [("plots", drawings)] if drawings else []


# ------------------------------------------------------------------------------------ small helpers

def section(title, *blocks):
    """A heading and what stands below it; nothing at all if that is empty."""
    blocks = [b for b in blocks if b and b[-1]]
    return [("h2", title), *blocks] if blocks else []


def table(results, caption, head, rows):
    return ("table", caption, [marked(results, h) for h in head],
            [[marked(results, row[0]), *row[1:]] for row in rows])


def explained(results, key):
    """What the numbers below `key` are, and their table; nothing where there are none."""
    if results.get(key):
        yield "p", EXPLAINED[key]
        yield sheet(results, results[key])


def sheet(results, columns, caption=""):
    """A table of dictionaries side by side, inner dictionaries laid out as `outer: inner`; what
    lies deeper is left to results.json."""
    laid = {}
    for column, entries in columns.items():
        for k, v in entries.items():
            inner = v.items() if isinstance(v, dict) and "value" not in v else [("", v)]
            for i, w in inner:
                if not isinstance(w, list) and not (i and isinstance(w, dict)):
                    name = ": ".join(filter(None, (spoken(k), spoken(i))))
                    laid.setdefault(name, {})[column] = shown(i or k, w)
    return table(results, caption, ["", *columns], [
        [name, *(cells.get(c, "-") for c in columns)] for name, cells in laid.items()])


def shown(key, value) -> str:
    if isinstance(value, dict) or (key in PERCENT and isinstance(value, float)):
        return interval(value) + " %" * (triple(value)[0] is not None)
    return TOO_SMALL if value is None else format(value, ".4g" if isinstance(value, float) else "")


def spoken(key: str) -> str:
    return SPOKEN.get(key, key.replace("_", " ").replace("nonfinite", "non-finite"))


def number(x):
    """x if it is a finite number, else None."""
    return x if isinstance(x, (int, float)) and math.isfinite(x) else None


def triple(entry):
    """(value, low, high) in percent, None where undefined."""
    entry = entry if isinstance(entry, dict) else {"value": entry}
    return tuple(None if number(entry.get(k)) is None else 100 * entry[k]
                 for k in ("value", "low", "high"))


def interval(entry, sign="") -> str:
    """81.2 [79.0, 83.4] in percent; "-" for what nobody measured (an empty string)."""
    value, low, high = (None if v is None else format(round(v, 1) + 0.0, f"{sign}.1f")  # no -0.0
                        for v in triple(entry))
    if value is None:
        return "-" if entry == "" else TOO_SMALL
    return value if None in (low, high) else f"{value} [{low}, {high}]"


def chosen(results) -> list[str]:
    """The arms before and after: real and guided where they exist, else the first and the last."""
    arms = list(results.get("arms") or {})
    ends = zip(("real", "guided"), arms[:1] + arms[-1:])
    return list(dict.fromkeys(want if want in arms else end for want, end in ends))


def marked(results, words: str) -> str:
    """The words, and the warning beside them if they name an arm that was mined on the test set."""
    arms, rest, named = results.get("arms") or {}, words, False
    for arm in sorted(arms, key=len, reverse=True):  # guided_leak first, then guided
        rest, found = re.subn(rf"(?<![^\W_]){re.escape(arm)}(?![^\W_])", "", rest)
        named |= bool(found and arms[arm].get("optimistic"))
    return f"{words} ({MARK})" if named and MARK not in words else words


def kind_of_group(results) -> str:
    parts = [*(results.get("splits") or {}).values(), *(results.get("arms") or {}).values()]
    names = {name for part in parts for k in ("groups", "per_group") for name in part.get(k) or ()}
    names -= {"unknown"}
    return ("skin type" if names <= {"I", "II", "III", "IV", "V", "VI"} else
            "skin-tone estimate" if names <= {"very light", "light", "intermediate", "tan", "brown",
                                              "dark"} else "group")


def private(value):
    """Settings without where they lie on this machine: of an absolute path the last part alone."""
    if isinstance(value, dict):
        return {k: private(v) for k, v in value.items()}
    if isinstance(value, list):
        return [private(v) for v in value]
    absolute = isinstance(value, str) and (value.startswith("~") or any(
        kind(value).is_absolute() for kind in (PurePosixPath, PureWindowsPath)))
    return PureWindowsPath(value).name if absolute else value


def as_yaml(value, indent="") -> str:
    if isinstance(value, dict) and value:
        return "\n".join(f"{indent}{k}:" + ("\n" if isinstance(v, dict) and v else " ")
                         + as_yaml(v, indent + "  ") for k, v in value.items())
    if isinstance(value, float):  # PyYAML reads 1e-05 as text and 1.0e-05 as a number
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z.][\w./-]*", value)
    words = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")  # not text to PyYAML
    if plain and value.lower() not in words:
        return value
    return json.dumps(value, ensure_ascii=False) if value != {} or indent else ""


def slug(words: str) -> str:
    return re.sub(r"\W+", "_", words)


def read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def warning(head, rows) -> str:
    said = any(MARK in cell for cell in (*head, *(row[0] for row in rows)))
    return f"{MARK.capitalize()}. Such numbers say nothing about new lesions." if said else ""


# --------------------------------------------------------------------------------- the two writings

def markdown(blocks) -> str:
    def safe(words):
        return words.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")

    out = []
    for block in blocks:
        match block:
            case ("h1" | "h2") as level, words:
                out.append("#" * int(level[1]) + " " + safe(words))
            case ("p" | "verdict"), words:
                out.append(safe(words))
            case "code", words:
                out.append(f"```yaml\n{words}\n```")
            case "picture", stem, caption:
                out.append(f"{safe(caption)}:\n\n![{safe(caption)}](pictures/{stem}.png)")
            case "plots", drawings:
                out += [f"![{safe(title)}](pictures/{stem}.svg)" for stem, title, _ in drawings]
            case "table", caption, head, rows:
                cells = [[safe(cell) for cell in row] for row in (head, *rows)]
                first, *wide = (max(map(len, column)) for column in zip(*cells))
                cells.insert(1, ["-" * first, *("-" * (w - 1) + ":" for w in wide)])
                out += [f"**{safe(caption)}**"] if caption else []
                out.append("\n".join("| " + " | ".join([row[0].ljust(first), *(
                    cell.rjust(w) for cell, w in zip(row[1:], wide))]) + " |" for row in cells))
                out += filter(None, [warning(head, rows)])
    return "\n\n".join(out) + "\n"


def page(blocks, pictures: Path) -> str:
    def figure(caption, inner):
        words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return f"<figure>{words}{inner}</figure>"

    body, links = [], []
    for block in blocks:
        match block:
            case "h2", words:
                links.append(f'<a href="#{slug(words)}">{escape(words)}</a>')
                body.append(f'<h2 id="{slug(words)}">{escape(words)}</h2>')
            case ("p" | "verdict") as kind, words:
                body.append(f'<p class="{kind}">{escape(words)}</p>')
            case "code", words:
                body.append(f'<pre class="scroll" tabindex="0">{escape(words)}</pre>')
            case "picture", stem, caption:
                body.append(figure(caption, inlined(pictures / f"{stem}.png", caption)))
            case "plots", drawings:  # inside a page an svg needs no name space
                parts = [figure(title, re.sub(' xmlns="[^"]*"', "", d)) for _, title, d in drawings]
                body.append(f'<div class="plots">{"".join(parts)}</div>')
            case "table", caption, head, rows:
                body.append(figure(caption, html_table(head, rows)))
                body += [f'<p class="note">{words}</p>' for words in [warning(head, rows)] if words]
    start = 1 + max((i for i, b in enumerate(body[:2]) if b.startswith("<p")), default=-1)
    body.insert(start, f"<nav>{' '.join(links)}</nav>")
    return PAGE.format(title=escape(blocks[0][1]), css=plots.CSS + CSS, body="\n".join(body))


def html_table(head, rows) -> str:
    def entry(words):
        found = re.fullmatch(r"(\S+) (\[.*\])", words)
        inner = f'{found[1]} <span class="soft">{found[2]}</span>' if found else escape(words)
        return f"<td{' class=wide' if found or words == TOO_SMALL else ''}>{inner}</td>"

    heads = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    lines = "\n".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(map(entry, cells))}</tr>'
                      for name, *cells in rows)
    return (f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{heads}</tr></thead>\n'
            f"<tbody>{lines}</tbody></table></div>")


def inlined(path: Path, caption: str) -> str:
    with Image.open(path) as image:
        width, height = image.size
    times = min(3, max(1, 1088 // width))  # a small sheet is shown larger, by whole pixels
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}" '
            f'width="{width * times}" height="{height * times}"{" class=crisp" * (times > 1)}>')


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

CSS = """
:root { --page: #ffffff; --ink: #1c2024; --soft: #5b6570; --line: #d9dee3; --band: #f3f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181c; --ink: #e4e8eb; --soft: #9aa5af; --line: #333b43; --band: #1d2329; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .75rem; }
.verdict { font-size: 1.25rem; line-height: 1.4; margin: 0 0 1rem; padding: .9rem 1.1rem;
  background: var(--band); border-left: 4px solid var(--plot-0); }
.p, .note, .soft, nav { color: var(--soft); }
.note { font-style: italic; margin: -.75rem 0 1.5rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; }
a { color: inherit; }
figure { margin: 0 0 1.75rem; }
figcaption { font-size: .9rem; font-weight: 600; margin: .4rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; min-width: 50%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 500; white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page);
  padding-left: 0; min-width: 7rem; max-width: 17rem; }
thead th { vertical-align: bottom; color: var(--soft); }
.wide { min-width: 9.4rem; }
.plots { display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.plots figure { max-width: 34rem; }
svg { width: 100%; height: auto; display: block; }
img { max-width: 100%; height: auto; }
.crisp { image-rendering: pixelated; }
pre { background: var(--band); padding: 1rem; font-size: .85rem; margin: 0; }
"""
