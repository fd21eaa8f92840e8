"""When does it help? Every arm at a growing number of real images, or of labels among as many
images as ever; the generator is trained on the same ones.

    python benchmarks/when_does_it_help.py                                  # about 70 minutes
    python benchmarks/when_does_it_help.py --config configs/few_labels.yaml --labels 50 100 200 400
    python benchmarks/when_does_it_help.py --config configs/ham10000_cpu.yaml \\
        --set data.root=PATH --set loop.added=0.5 --set loop.seeds=5

Writes runs/survey_NAME.md and .svg (survey_NAME_labels): gains over the best cheap control, the one
with the highest balanced accuracy on test. One that was stopped goes on where it was.
Perfect generators, held to the same count, weight, classes and skin types as arm `guided`:

    true_random, true_guided    the phantom's own picture of the parent on the other skin, for the
                                parents of `random` and of `guided`
    fresh                       lesions nobody has seen: more data

With few labels (of 1,600 images) `all_labels` is `real` with every label: what there is to gain.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import classifier
from engine import config as configuration
import data
import evaluate
import loop
import mining
from extras import plots
from extras import report
from engine.run import RunFolder, write_bytes

PERFECT = ("true_random", "true_guided", "fresh")
METRICS = {("all", "balanced_accuracy"): "balanced accuracy",
           ("all", "sensitivity_at_90"): "sensitivity at 90 % specificity",
           ("worst_group", "balanced_accuracy"): "balanced accuracy, worst group",
           # a mean over classes would ask for more hard cases of the rarest class than there are
           ("hard", "accuracy"): "accuracy, hard cases"}
CHEAP = ("real", "balanced", "pseudo", "replay", "recolour")
MADE = ("noise", "random", "guided", *PERFECT, "all_labels")
FEW = 1600          # images, of which some have a label


class Survey(loop.Experiment):
    """A run on data.train images, with the perfect generators as arms of their own."""

    def prepare(self):
        super().prepare()
        if self.config.data.kind == "phantom":
            return                  # it has drawn as many
        # Whole lesions: twice as many of each class as there are folds, the others as they come.
        lesions, first = np.unique(self.train.lesions, return_index=True)
        order = np.random.default_rng(self.config.data.seed).permutation(len(lesions))
        labels = self.train.labels[first][order]
        rank = np.array([(labels[:i] == labels[i]).sum() for i in range(len(labels))])
        order = order[np.argsort(rank >= 2 * self.config.data.folds, kind="stable")]
        images = np.bincount(np.unique(self.train.lesions, return_inverse=True)[1])
        taken = np.searchsorted(images[order].cumsum(), self.config.data.train) + 1
        chosen = lesions[order[:taken]]
        few = self.train.subset(np.flatnonzero(np.isin(self.train.lesions, chosen)))
        few = data.add_folds(few, self.config.data.folds, self.config.data.seed)
        self.train = self.labelled = self.seen = self.splits["train"] = few

    def added_sets(self, rounds):
        added, c = super().added_sets(rounds), self.config.data
        if c.kind != "phantom":
            return added
        row = {source: i for i, source in enumerate(self.splits["train"].sources)}
        for arm in ("random", "guided"):
            parents = np.array([row[source] for source in added[arm].sources])
            added[f"true_{arm}"] = replace(added[arm], images=data.load_counterfactuals(
                c.size, c.seed, c.train, parents, added[arm].groups))
        pool = data.load_oracle(c.size, self.seed("fresh"), 40 * len(added["guided"]))
        cells, wanted = mining.cells(pool), mining.cells(added["guided"])
        taken = np.concatenate([np.flatnonzero(cells == cell)[:(wanted == cell).sum()]
                                for cell in np.unique(wanted)])
        # the folds are not asked for any more: rounds of mining are over
        added["fresh"] = pool.subset(taken)
        self.arms = [*self.arms, *PERFECT]
        return added


class FewLabels(loop.Experiment):
    """A run with few labels, and arm all_labels beside it."""

    def added_sets(self, rounds):
        self.arms = [*self.arms, "all_labels"]
        return super().added_sets(rounds) | {"all_labels": self.splits["unlabelled"]}

    def mixed(self, real, added, cells=None):
        if added is self.splits["unlabelled"]:
            known = self.labelled.extend(added)
            return known, classifier.balanced_weights(known.labels)
        return super().mixed(real, added, cells)


def finished(folder: Path, config: str, changes: list[str], kind=loop.Experiment) -> dict:
    """The results of a run, from its folder if they are there; one that was stopped goes on."""
    if not (folder / "results.json").exists():
        c = configuration.load(config, changes)
        folder.mkdir(parents=True, exist_ok=True)
        kind(c, RunFolder(folder)).go()
    return json.loads((folder / "results.json").read_text())


def over_cheap(folder: Path, results: dict) -> tuple[str, list[dict]]:
    """The best cheap control, and every other arm's rows of comparison with it."""
    arms = results["arms"]
    best = max((arm for arm in CHEAP if arm in arms),
               key=lambda arm: arms[arm]["test"]["all"]["balanced_accuracy"]["value"])
    with np.load(folder / "predictions.npz") as stored:
        p = dict(stored)
    # a run compares all arms with `real`, so that is what the best one is called here
    p |= {f"{split}_probs_real": p[f"{split}_probs_{best}"] for split in ("val", "test")}
    p["arms"] = np.array(["real", *(arm for arm in MADE if arm in arms)])
    p["optimistic"] = np.zeros(len(p["arms"]), bool)
    c = results["config"]["evaluate"]
    scored = evaluate.score(p, min_count=c["min_count"], draws=c["draws"])
    return best, [row | {"against": "the best"} for row in scored["comparisons"]
                  if row["against"] == "real"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 200, 400, 800, 1600])
    parser.add_argument("--labels", type=int, nargs="+", help="in place of sizes")
    arguments = parser.parse_args()
    name, found, best, few = Path(arguments.config).stem, {}, {}, bool(arguments.labels)
    name += "_labels" * few
    for size in arguments.labels or arguments.sizes:
        folder = Path("runs") / f"survey_{name}_{size}"
        found[size] = finished(folder, arguments.config, [
            "loop.arms=[all]", f"data.train={FEW if few else size}",
            *([f"data.labelled={size / FEW}"] if few else []), *arguments.set],
            FewLabels if few else Survey)
        best[size], more = over_cheap(folder, found[size])
        found[size]["comparisons"] += more
    sizes, arms = list(found), list(found[size]["arms"])
    made = [arm for arm in MADE if arm in arms]

    def values(subset, metric):
        return {(arm, size): 100 * (found[size]["arms"][arm]["test"][subset][metric]["value"] or 0)
                for size in sizes for arm in arms}

    def rows(subset, metric):
        return {(r["arm"], r["against"], size): r | {"value": r["difference"]}
                for size, results in found.items() for r in results["comparisons"]
                if (r["subset"], r["metric"]) == (subset, metric)}

    def told(row):
        return report.interval(row, "+")
    what = "labels" if few else "images"
    text = []
    for (subset, metric), title in METRICS.items():
        if subset not in found[size]["arms"]["real"]["test"]:
            continue                    # no groups
        value, difference = values(subset, metric), rows(subset, metric)
        text += [f"`real` and gains over it, {title}:\n",
                 f"| {what} | " + " | ".join(arms) + " |", "| --- " * (len(arms) + 1) + "|"]
        for size in sizes:
            cells = [f"{value[arm, size]:.1f}" if arm == "real" else
                     told(difference.get((arm, "real", size))) for arm in arms]
            text.append(f"| {size} | " + " | ".join(cells) + " |")
        text += [f"\nGains over the best cheap control, {title}:\n",
                 f"| {what} | best cheap control | " + " | ".join(made)
                 + " | guided over random |", "| --- " * (len(made) + 3) + "|"]
        for size in sizes:
            cells = [told(difference.get((arm, "the best", size))) for arm in made]
            cells.append(told(difference.get(("guided", "random", size))))
            text.append(f"| {size} | {best[size]} {value[best[size], size]:.1f} | "
                        + " | ".join(cells) + " |")
        text.append("")
    print("\n".join(text))
    write_bytes(Path("runs") / f"survey_{name}.md", "\n".join(text).encode())
    difference = rows("all", "balanced_accuracy")
    drawn = plots.gains([(arm, [(size, *report.triple(difference[arm, "the best", size]))
                                for size in sizes]) for arm in made],
                        "Gain over the best cheap control",
                        "labels" if few else "real training images", "points of balanced accuracy")
    write_bytes(Path("runs") / f"survey_{name}.svg", plots.standalone(drawn).encode())


if __name__ == "__main__":
    main()
