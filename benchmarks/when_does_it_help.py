"""When does it help? Every arm at a growing number of real images, the generator trained on the
same ones, and on the phantom what perfect generators would gain.

    python benchmarks/when_does_it_help.py                                  # about 70 minutes
    python benchmarks/when_does_it_help.py --config configs/ham10000_cpu.yaml --set data.root=PATH

Writes runs/survey_NAME.md and .svg; one that was stopped goes on where it was. Perfect generators,
held to the same count, weight, classes and skin types as arm `guided`:

    true_random, true_guided    the phantom's own picture of the parent on the other skin, for the
                                parents of `random` and of `guided`
    fresh                       lesions nobody has seen: more data
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import config as configuration
import data
import loop
import plots
from runfolder import RunFolder, new_folder, write_bytes

PERFECT = ("true_random", "true_guided", "fresh")
CHEAP = ("real", "replay", "recolour")


class Survey(loop.Experiment):
    """A run on `size` training images, with the perfect generators as arms of their own."""

    size = 0

    def prepare(self):
        super().prepare()
        if self.config.data.kind == "phantom":
            return                  # there data.train is the size
        # Whole lesions: twice as many of each class as there are folds, the others as they come.
        lesions, first = np.unique(self.train.lesions, return_index=True)
        order = np.random.default_rng(self.config.data.seed).permutation(len(lesions))
        labels = self.train.labels[first][order]
        rank = np.array([(labels[:i] == labels[i]).sum() for i in range(len(labels))])
        order = order[np.argsort(rank >= 2 * self.config.data.folds, kind="stable")]
        images = np.bincount(np.unique(self.train.lesions, return_inverse=True)[1])
        chosen = lesions[order[:np.searchsorted(images[order].cumsum(), self.size) + 1]]
        few = self.train.subset(np.flatnonzero(np.isin(self.train.lesions, chosen)))
        self.train = data.add_folds(few, self.config.data.folds, self.config.data.seed)
        self.splits["train"], self.tensors["train"] = self.train, self.tensor(self.train.images)

    def added_sets(self, rounds):
        added, c = super().added_sets(rounds), self.config.data
        if c.kind != "phantom":
            return added
        row = {source: i for i, source in enumerate(self.train.sources)}
        for arm in ("random", "guided"):
            parents = np.array([row[source] for source in added[arm].sources])
            added[f"true_{arm}"] = replace(added[arm], images=data.load_counterfactuals(
                c.size, c.seed, c.train, parents, added[arm].groups))
        pool = data.load_oracle(c.size, self.seed("fresh"), 40 * len(added["guided"]))
        cells, wanted = self.cells(pool), self.cells(added["guided"])
        taken = np.concatenate([np.flatnonzero(cells == cell)[:(wanted == cell).sum()]
                                for cell in np.unique(wanted)])
        # the folds are not asked for any more: rounds of mining are over
        added["fresh"] = pool.subset(taken)
        self.arms = [*self.arms, *PERFECT]
        return added


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 200, 400, 800, 1600])
    arguments = parser.parse_args()
    name, found = Path(arguments.config).stem, {}
    for size in arguments.sizes:
        folder = Path("runs") / f"survey_{name}_{size}"
        if not (folder / "results.json").exists():
            c = configuration.load(arguments.config,
                                   ["loop.arms=[all]", f"data.train={size}", *arguments.set])
            if not folder.exists():
                new_folder(folder.parent, folder.name)
            survey = Survey(c, RunFolder(folder))
            survey.size = size
            survey.go()
        found[size] = json.loads((folder / "results.json").read_text())
    sizes, metric = list(found), "balanced_accuracy"
    rows = {(r["arm"], r["against"], size): [100 * r[k] for k in ("difference", "low", "high")]
            for size, results in found.items() for r in results["comparisons"]
            if (r["subset"], r["metric"]) == ("all", metric) and r["difference"] is not None}

    def value(size, arm):
        return 100 * found[size]["arms"][arm]["test"]["all"][metric]["value"]
    table = ["| images | " + " | ".join(arms := list(found[sizes[-1]]["arms"])) + " |",
             "| --- " * (len(arms) + 1) + "|"]
    for size in sizes:
        cells = [f"{value(size, arm):.1f}" + "" if arm == "real" else
                 "{:+.1f} [{:+.1f}, {:+.1f}]".format(*rows[arm, "real", size]) for arm in arms]
        table.append(f"| {size} | " + " | ".join(cells) + " |")
    table.append("\nGuided over the best cheap control (real, replay, recolour) and over random:\n")
    best = {size: max(CHEAP, key=lambda arm: value(size, arm)) for size in sizes}
    for size in sizes:
        table.append("- {}: over {} {:+.1f} [{:+.1f}, {:+.1f}]; over random {:+.1f} [{:+.1f}, "
                     "{:+.1f}]".format(size, best[size], *rows["guided", best[size], size],
                                       *rows["guided", "random", size]))
    text = "\n".join(table) + "\n"
    print(text)
    write_bytes(Path("runs") / f"survey_{name}.md", text.encode())
    drawn = plots.gains([(arm, [(size, *rows[arm, "real", size]) for size in sizes])
                         for arm in arms if arm in ("replay", "recolour", "random", "guided",
                                                    "true_guided", "fresh")],
                        "Gain over real", "real training images", "points of balanced accuracy")
    write_bytes(Path("runs") / f"survey_{name}.svg", plots.standalone(drawn).encode())


if __name__ == "__main__":
    main()
