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
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import config as configuration
import loop
import plots
from runfolder import RunFolder, write_bytes

T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]    # for 2 to 10 draws
RARE = 0.05         # a class is rare below this share of the training images


def run(config: str, draw: int, changes: list[str]) -> dict:
    """The results of one draw, from its folder if it is there."""
    folder = Path("runs") / f"draws_{Path(config).stem}_{draw}"
    if not (folder / "results.json").exists():
        c = configuration.load(config, ["loop.arms=[all]", *changes, f"data.seed={draw}",
                                        f"loop.seed={draw}"])
        folder.mkdir(parents=True, exist_ok=True)
        loop.Experiment(c, RunFolder(folder)).go()
    return json.loads((folder / "results.json").read_text())


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
    found = [run(arguments.config, draw, arguments.set) for draw in arguments.draws]
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
    for title, parts in measures.items():
        gains = {}
        for results in found:
            rows = {(r["against"], r["subset"], r["metric"]): r["difference"]
                    for r in results["comparisons"] if r["arm"] == "guided"}
            for control in controls:
                of = [rows[control, *part] for part in parts]
                gains.setdefault(control, []).append(
                    None if None in of else 100 * float(np.mean(of)))
        text += [f"\nGuided over, {title}:\n", "| draw | " + " | ".join(controls) + " |",
                 "| --- " * (len(controls) + 1) + "|"]
        for i, draw in enumerate(arguments.draws):
            cells = [gains[control][i] for control in controls]
            text.append(f"| {draw} | " + " | ".join(
                "n too small" if v is None else plots.signed(v) for v in cells) + " |")
        known = {control: [v for v in gains[control] if v is not None] for control in controls}
        means = {control: over_draws(values, shared) for control, values in known.items()
                 if len(values) > 1}
        text.append("| mean | " + " | ".join(
            "{} [{}, {}]".format(*map(plots.signed, means[control])) if control in means else ""
            for control in controls) + " |")
        if title.startswith(("balanced", "recall")):
            drawn += [(f"{title}: over {control}", *mean) for control, mean in means.items()]
    print("\n".join(text))
    name = f"draws_{Path(arguments.config).stem}"
    write_bytes(Path("runs") / f"{name}.md", ("\n".join(text) + "\n").encode())
    write_bytes(Path("runs") / f"{name}.svg", plots.standalone(plots.forest(
        drawn, f"Gains of guided, means of {len(found)} draws", "points")).encode())


if __name__ == "__main__":
    main()
