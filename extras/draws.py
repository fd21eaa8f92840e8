"""Several draws of the data, each a run of its own, pooled: a draw is one observation."""
import json
import math
from pathlib import Path

import numpy as np

from engine.run import write_bytes
from evaluate import outcome, t_quantile
from extras import plots, report
from extras.verdict import verdict


def over_draws(values: list, at_once: int = 1, overlap: float = 0.0, limits=(-1, 1)) -> dict:
    """Mean with its 95 % interval, Student's t; at_once: of so many together. overlap: test images
    over training images where draws are splits of the same images, so alike: the variance takes
    1 / n + overlap in place of 1 / n (Nadeau & Bengio 2003). None where a draw has none."""
    if None in values:
        return {"value": None, "low": None, "high": None}
    n, mean = len(values), float(np.mean(values))
    t = t_quantile(1 - 0.05 / at_once, n - 1)
    half = float(t * np.std(values, ddof=1) * math.sqrt(1 / n + overlap))
    low, high = np.clip([mean - half, mean + half], *limits).tolist()
    return {"value": mean, "low": low, "high": high}


def pooled(found: list[dict]) -> dict:
    """One results.json from those of all draws: every number their mean, with its interval."""
    first = found[0]
    images = {part: s["images"] for part, s in first["splits"].items()}
    labelled = first["pseudo"].get("labels", images["train"])       # without the guessed ones
    overlap = 0.0 if first["config"]["data"]["kind"] == "phantom" else images["test"] / (
        labelled + images.get("unlabelled", 0))

    def mean(values, at_once=1, limits=(0, 1)):
        if isinstance(values[0], dict):
            keys = [key for key in values[0] if all(key in of for of in values)]
            if "value" in keys:
                return over_draws([of["value"] for of in values], at_once, overlap, limits)
            return {key: mean([of[key] for of in values]) for key in keys}
        return float(np.mean(values))
    arms = {arm: {"optimistic": a["optimistic"], "seeds": a["seeds"] * len(found),
                  "added": round(np.mean([r["arms"][arm]["added"] for r in found])),
                  "test": mean([r["arms"][arm]["test"] for r in found])}
            for arm, a in first["arms"].items()}

    rows, controls = [], sum(not a["optimistic"] for a in arms.values()) - 1
    margin = first["config"]["evaluate"]["margin"] / 100
    for row in first["comparisons"]:
        key = {k: row[k] for k in ("arm", "against", "subset", "metric", "optimistic")}
        each = [c for r in found for c in r["comparisons"] if key.items() <= c.items()]
        if len(each) < len(found):
            continue                    # a draw without a worst group
        at_once = controls if row["arm"] == first["comparisons"][0]["arm"] else 1
        whole, plain = mean(each, at_once, (-1, 1)), over_draws([c["value"] for c in each], at_once)
        rows.append(key | whole | {
            "outcome": outcome(whole["low"], whole["high"], margin), "uncorrected": plain,
            "draws": [{k: c[k] for k in ("value", "low", "high")} for c in each]})
    names = {r["worst_group"] for r in found}
    worst = None if None in names else " or ".join(sorted(names))
    together = {"arms": arms, "comparisons": rows, "worst_group": worst, "overlap": overlap,
                "rounds": [mean(list(of)) for of in zip(*(r["rounds"] for r in found))],
                "config": first["config"], "splits": first["splits"], "draws": len(found)}
    return together | {"verdict": f"mean of {len(found)} draws: {verdict(together)}"}


def pool(folder: Path, runs: list[Path]) -> None:
    """Write results.json and the report of a folder of draws, and say the verdict."""
    r = pooled([report.stored(run)[0] for run in runs])
    names, sections = [run.name for run in runs], []
    for subset, metric in dict.fromkeys((c["subset"], c["metric"]) for c in r["comparisons"]):
        rows, cells = [], []
        for name, c in report.compared(r, subset, metric).items():
            rows += [(f"{name}, {of}", *report.triple(e)) for of, e in zip(names, c["draws"])]
            rows.append((f"{name}, mean", *report.triple(c)))
            cells.append([name, *(report.interval(e, "+") for e in (*c["draws"], c)),
                          c["outcome"] or ""]
                         + [report.interval(c["uncorrected"], "+")] * bool(r["overlap"]))
        title = f"Difference of {report.said(metric)}, {report.said(subset)}"
        head = ["comparison", *names, "mean", "outcome"] + ["uncorrected"] * bool(r["overlap"])
        sections.append(("section", title, [
            ("svg", title, f"draws_{subset}_{metric}", plots.forest(rows, title, "points")),
            ("table", "", head, cells)]))
    shared = (f" Splits of the same images are alike: the variance takes 1 / {len(runs)} + "
              f"{r['overlap']:.2f} in place of 1 / {len(runs)} (Nadeau & Bengio 2003)."
              ) * bool(r["overlap"])
    write_bytes(folder / "results.json", (json.dumps(r, indent=1) + "\n").encode())
    report.publish(folder, [
        ("title", f"Report: {folder.name}"), ("verdict", r["verdict"]),
        ("p", f"{len(runs)} draws, each with a report of its own. Of a mean the interval is "
              f"Student's t over draws; of a draw, as its report has it.{shared}"),
        *report.forest(r, "all", "balanced_accuracy"), *report.first_table(r), *sections,
        ("section", "Rounds", report.rounds(r))])
    print(f"{r['verdict']}\nreport: {folder / 'report.md'} and {folder / 'report.html'}")
