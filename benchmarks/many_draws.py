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
import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from extras import plots
from extras import report
from engine.run import write_bytes
from when_does_it_help import finished

T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]    # for 2 to 10 draws
RARE = 0.05         # a class is rare below this share of the training images


def over_draws(differences: list[float], shared: float) -> tuple[float, float, float]:
    """Mean with its 95 % interval; shared: test images over training images, 0 for new images."""
    n = len(differences)
    half = T_975[n - 2] * np.std(differences, ddof=1) * np.sqrt(1 / n + shared)
    mean = float(np.mean(differences))
    return mean, mean - half, mean + half


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--draws", type=int, nargs="+", required=True)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    if not 2 <= len(set(arguments.draws)) == len(arguments.draws) <= len(T_975) + 1:
        parser.error(f"--draws: {arguments.draws}; write 2 to {len(T_975) + 1} different ones")
    name = f"draws_{Path(arguments.config).stem}"
    found = [finished(Path("runs") / f"{name}_{draw}", arguments.config, [
        "loop.arms=[all]", *arguments.set, f"data.seed={draw}", f"loop.seed={draw}"])
        for draw in arguments.draws]
    train = [results["splits"][name] for results in found for name in ("train", "unlabelled")
             if name in results["splits"]]
    test = sum(results["splits"]["test"]["images"] for results in found)
    images = sum(part["images"] for part in train)
    classes, groups = (sum((Counter(part[kind]) for part in train), Counter())
                       for kind in ("classes", "groups"))
    phantom = found[0]["config"]["data"]["kind"] == "phantom"
    shared = 0.0 if phantom else test / images
    measures = {"balanced accuracy": [("all", "balanced_accuracy")],
                "accuracy on the hard cases": [("hard", "accuracy")],
                "sensitivity at 90 % specificity": [("all", "sensitivity_at_90")]}
    if len(groups) > 1:
        rarest = min(groups, key=groups.get)
        measures[f"balanced accuracy on {rarest}"] = [(f"group:{rarest}", "balanced_accuracy")]
    rare = [name for name, n in classes.items() if n < RARE * images]
    if rare:
        measures["recall of " + ", ".join(rare)] = [(f"class:{name}", "recall") for name in rare]

    arms = [arm for arm in found[0]["arms"] if all(arm in results["arms"] for results in found)]
    text, drawn = [], []
    columns = ["accuracy", "sensitivity", "specificity", "balanced_accuracy"]
    students = ", ".join(f"{draw}: {len(results['arms']['guided']['seeds'])}"
                         for draw, results in zip(arguments.draws, found))
    text += [f"Means over {len(found)} draws (students an arm in draw {students}):\n",
             "| arm | " + " | ".join(columns).replace("_", " ") + " |", "| --- " * 5 + "|"]
    for arm in arms:
        values = [100 * np.mean([r["arms"][arm]["test"]["all"][c]["value"] for r in found])
                  for c in columns]
        text.append(f"| {arm} | " + " | ".join(f"{v:.1f}" for v in values) + " |")
    controls = [arm for arm in arms if arm != "guided"]
    differences = [{(r["against"], r["subset"], r["metric"]): r["difference"]
                    for r in results["comparisons"] if r["arm"] == "guided"} for results in found]
    for title, parts in measures.items():
        text += [f"\nGuided over, {title}:\n", "| draw | " + " | ".join(controls) + " |",
                 "| --- " * (len(controls) + 1) + "|"]
        gains, means = {}, {}           # None where a draw has too few lesions of it
        for control in controls:
            known = [[of[control, *part] for part in parts] for of in differences]
            gains[control] = [None if None in of else float(np.mean(of)) for of in known]
            known = [gain for gain in gains[control] if gain is not None]
            if len(known) > 1:
                means[control] = dict(zip(("value", "low", "high"), over_draws(known, shared)))
        for i, draw in enumerate(arguments.draws):
            text.append(f"| {draw} | " + " | ".join(
                report.interval(gains[control][i], "+") for control in controls) + " |")
        text.append("| mean | " + " | ".join(
            report.interval(means.get(control), "+") for control in controls) + " |")
        if parts[0][1] in ("balanced_accuracy", "recall"):
            drawn += [(f"{title}: over {control}", *report.triple(mean))
                      for control, mean in means.items()]
    print("\n".join(text))
    write_bytes(Path("runs") / f"{name}.md", ("\n".join(text) + "\n").encode())
    write_bytes(Path("runs") / f"{name}.svg", plots.standalone(plots.forest(
        drawn, f"Gains of guided, means of {len(found)} draws", "points")).encode())


if __name__ == "__main__":
    main()
