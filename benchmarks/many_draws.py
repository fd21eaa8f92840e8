"""Is it the draw? One config on several draws of the data: gains of `guided` in each, their mean.

    python benchmarks/many_draws.py --config configs/few_labels.yaml --draws 101 102 103 104
    python benchmarks/many_draws.py --config configs/ham10000_few_labels.yaml --draws 0 1 2 3 4 5 \\
        --set data.root=PATH

A run's own interval knows the test lesions and the seeds of the networks, not that another draw of
the data would have come out otherwise. Here a draw is one observation, data.seed and loop.seed are
both its number, and the interval is Student's t over draws. Of the phantom a draw is new images; of
real data another split of the same ones, and other images with a label: for what those share, the
variance takes 1 / draws + test images / training images in place of 1 / draws (Nadeau & Bengio
2003, "Inference for the generalization error"), a rule of thumb where most images have no label.
Writes runs/draws_NAME.md and .svg. One that was stopped goes on where it was.
"""
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
from engine.command import Parser, one_line
from engine.run import write_bytes
from extras import plots, report
from when_does_it_help import finished

T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]    # for 2 to 10 draws
RARE = 0.05         # a class is rare below this share of the training images


def over_draws(differences: list[float], shared: float) -> tuple[float, float, float]:
    """Mean with its 95 % interval; shared: test images over training images, 0 for new images."""
    n = len(differences)
    half = T_975[n - 2] * np.std(differences, ddof=1) * np.sqrt(1 / n + shared)
    mean = float(np.mean(differences))
    return mean, mean - half, mean + half


def group_accuracy(folder: Path, group: str, min_count: int) -> dict:
    """{arm: balanced accuracy on the group's test images, None where there are too few lesions}."""
    with np.load(folder / "predictions.npz") as stored:
        p = dict(stored)
    of = p["test_groups"] == p["group_names"].tolist().index(group)
    labels, lesions, once = p["test_labels"][of], p["test_lesions"][of], np.ones((of.sum(), 1))
    found = {}
    for arm in p["arms"].tolist():
        table = evaluate.tables(p[f"test_probs_{arm}"][:, of], labels, p["malignant"], once,
                                lesions, min_count)["balanced_accuracy"]
        found[arm] = None if np.isnan(table).any() else float(table.mean())
    return found


def measured(folders: list[Path], found: list[dict]) -> dict[str, list]:
    """{what is measured: by draw {arm: value, or None where a cell is too small}}."""
    def total(kind):
        parts = [r["splits"][name] for r in found for name in ("train", "unlabelled")
                 if name in r["splits"]]
        return sum((Counter(part[kind]) for part in parts), Counter())

    def values(*path):
        def inside(arm):
            for key in path:
                arm = arm[key]
            return arm["value"]
        return [{name: inside(arm) for name, arm in r["arms"].items()} for r in found]
    classes, groups = total("classes"), total("groups")
    images = sum(classes.values())
    measures = {"balanced accuracy": values("test", "all", "balanced_accuracy"),
                "accuracy on the hard cases": values("test", "hard", "accuracy"),
                "sensitivity at 90 % specificity": values("test", "all", "sensitivity_at_90")}
    groups.pop("unknown", None)
    if len(groups) > 1:
        rarest, least = min(groups, key=groups.get), found[0]["config"]["evaluate"]["min_count"]
        measures[f"balanced accuracy on {rarest}"] = [group_accuracy(folder, rarest, least)
                                                      for folder in folders]
    rare = [name for name, n in classes.items() if n < RARE * images]
    if rare:
        each = [values("per_class", name, "recall") for name in rare]
        measures["recall of " + ", ".join(rare)] = [
            {arm: None if None in (known := [of[i][arm] for of in each]) else np.mean(known)
             for arm in r["arms"]} for i, r in enumerate(found)]
    return measures


def gained(measure: list[dict], control: str) -> list[float | None]:
    """By draw what guided has more than the control."""
    return [None if None in (of["guided"], of[control]) else of["guided"] - of[control]
            for of in measure]


def shared(found: list[dict]) -> float:
    """Test images over training images, 0 for new images: see `over_draws`."""
    if found[0]["config"]["data"]["kind"] == "phantom":
        return 0.0
    train = sum(r["splits"][name]["images"] for r in found for name in ("train", "unlabelled")
                if name in r["splits"])
    return sum(r["splits"]["test"]["images"] for r in found) / train


def told(draws: list[int], folders: list[Path], found: list[dict]) -> tuple[str, list]:
    """The tables, and the rows of the forest plot."""
    arms = [arm for arm in found[0]["arms"] if all(arm in r["arms"] for r in found)]
    columns = ["accuracy", "sensitivity", "specificity", "balanced_accuracy"]
    students = ", ".join(f"{draw}: {r['arms']['guided']['seeds']}"
                         for draw, r in zip(draws, found))
    text = [f"Means over {len(found)} draws (students an arm in draw {students}):\n",
            "| arm | " + " | ".join(columns).replace("_", " ") + " |", "| --- " * 5 + "|"]
    for arm in arms:
        values = [[r["arms"][arm]["test"]["all"][c]["value"] for r in found] for c in columns]
        text.append(f"| {arm} | " + " | ".join(
            report.interval(None if None in v else float(np.mean(v))) for v in values) + " |")
    controls, drawn = [arm for arm in arms if arm != "guided"], []
    for title, measure in measured(folders, found).items():
        text += [f"\nGuided over, {title}:\n", "| draw | " + " | ".join(controls) + " |",
                 "| --- " * (len(controls) + 1) + "|"]
        gains, means = {control: gained(measure, control) for control in controls}, {}
        for control in controls:
            known = [gain for gain in gains[control] if gain is not None]
            if len(known) > 1:          # a draw may have too few lesions of it
                means[control] = dict(zip(("value", "low", "high"),
                                          over_draws(known, shared(found))))
        rows = {draw: [gains[control][i] for control in controls] for i, draw in enumerate(draws)}
        rows["mean"] = [means.get(control) for control in controls]
        text += [f"| {name} | " + " | ".join(report.interval(gain, "+") for gain in row) + " |"
                 for name, row in rows.items()]
        if title.startswith(("balanced accuracy", "recall")):
            drawn += [(f"{title}: over {control}", *report.triple(mean))
                      for control, mean in means.items()]
    return "\n".join(text) + "\n", drawn


def main() -> None:
    parser = Parser("many_draws.py", __doc__)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--draws", type=int, nargs="+", required=True)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    draws = arguments.draws
    if not 2 <= len(set(draws)) == len(draws) <= len(T_975) + 1:
        parser.error(f"--draws: {draws}; write 2 to {len(T_975) + 1} different ones")
    path = Path("runs") / f"draws_{Path(arguments.config).stem}"
    folders = [path.with_name(f"{path.name}_{draw}") for draw in draws]
    with one_line("many_draws.py"):
        for folder, draw in zip(folders, draws):
            finished(folder, arguments.config, [
                "loop.arms=[all]", *arguments.set, f"data.seed={draw}", f"loop.seed={draw}"])
        found = [json.loads((folder / "results.json").read_text()) for folder in folders]
        text, drawn = told(draws, folders, found)
        print(text)
        write_bytes(path.with_suffix(".md"), text.encode())
        plot = plots.forest(drawn, f"Gains of guided, means of {len(found)} draws", "points")
        write_bytes(path.with_suffix(".svg"), plots.standalone(plot).encode())
        print(f"wrote {path}.md and {path}.svg")


if __name__ == "__main__":
    main()
