"""When does it help? Every arm at a growing number of real images, or of labels among as many
images as ever; the generator is trained on the same ones.

    python benchmarks/when_does_it_help.py                                  # about 70 minutes
    python benchmarks/when_does_it_help.py --config configs/few_labels.yaml --labels 50 100 200 400
    python benchmarks/when_does_it_help.py --config configs/ham10000_cpu.yaml \\
        --set data.root=PATH --set loop.added=0.5 --set loop.seeds=5

Writes runs/survey_NAME.md and .svg (survey_NAME_labels): gains over the best cheap control, the one
with the highest balanced accuracy on val. One that was stopped goes on where it was. Its runs hold
predictions.npz and no report of their own.
Perfect generators, held to the same count, weight, classes and skin types as arm `guided`:

    true_random, true_guided    the phantom's own picture of the parent on the other skin, for the
                                parents of `random` and of `guided`
    fresh                       lesions nobody has seen: more data

With few labels (of 1,600 images) `all_labels` is `real` with every label: what there is to gain.
"""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import classifier
import data
import evaluate
import loop
from datasets import phantom
from engine import config as configuration
from engine.command import Parser, one_line
from engine.run import Progress, Run, fingerprint, write_bytes
from extras import few_labels, measures, networks, outcome, plots, report
from extras.children import make_kit
from gains import gains
from truth import carry

PERFECT = ("true_random", "true_guided", "fresh")
METRICS = {("all", "balanced_accuracy"): "balanced accuracy",
           ("all", "sensitivity_at_90"): "sensitivity at 90 % specificity",
           ("worst_group", "balanced_accuracy"): "balanced accuracy, worst group",
           # a mean over classes would ask for more hard cases of the rarest class than there are
           ("hard", "accuracy"): "accuracy, hard cases"}
CHEAP = ("real", "balanced", "pseudo", "replay", "recolour")
MADE = ("noise", "random", "guided", *PERFECT, "all_labels")
THRESHOLD = ("The threshold is fixed on val, and the intervals leave out its own error: about 90 % "
             "of those below hold the truth, not 95.\n")
FEW = 1600          # images, of which some have a label


# ---- the runs --------------------------------------------------------------------------------

def finished(folder: Path, config: str, changes: list[str], walk=loop.experiment) -> None:
    """Have walk(run) write folder/predictions.npz, unless it is there; a stopped one goes on."""
    if not (folder / "predictions.npz").exists() or (
            walk is loop.experiment and not (folder / "results.json").exists()):
        c = configuration.load(config, changes)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "config.yaml",
                    yaml.safe_dump(c.as_dict(), sort_keys=False).encode())
        walk(Run(folder, c))


def survey(run: Run, few: bool = False) -> None:
    """loop.experiment with fewer images and further arms; it writes predictions.npz alone.

    few: with few labels; arm all_labels knows all.
    """
    c = run.config
    splits = data.load(c.data, run.cache, Progress("data"))
    if not few:
        splits["train"] = fewer(c.data, splits["train"])
    splits |= few_labels.hide(c.data, splits)
    run.fingerprint = fingerprint(c, splits)
    arms = outcome.begin(run, splits, loop.ARMS)
    jitter, _ = networks.choose_jitter(run, splits, loop.student, loop.predict)
    labelled = splits["train"]
    train, seen, _ = few_labels.guess(run, splits, jitter, loop.student, loop.predict, loop.mixed)
    splits["train"] = train
    first, added = walked(run, splits, arms, seen, jitter)

    learnt = {name: loop.mixed(run, train, added.get(name), arm.real)
              for name, arm in arms.items()}
    if few:
        known = labelled.extend(splits["unlabelled"])
        learnt["all_labels"] = known, classifier.balanced_weights(known.labels)
    elif c.data.kind == "phantom":
        learnt |= {name: loop.mixed(run, train, images)
                   for name, images in perfect(run, added).items()}
    finals = {name: [loop.student(run, f"student_{name}_{s}", images, weights,
                                  run.seed("student", s), jitter) for s in range(c.loop.seeds)]
              for name, (images, weights) in learnt.items()}
    np.savez_compressed(run.folder / "writing.npz",
                        **outcome.predict(run, splits, finals, first, loop.predict))
    (run.folder / "writing.npz").rename(run.folder / "predictions.npz")


def walked(run: Run, splits: dict, arms: dict, seen, jitter: float):
    """Paragraphs 4 and 5 of loop.experiment: the students of the first cross-fitting, and what
    every arm adds."""
    c, train = run.config.loop, splits["train"]
    makers = {name: arm for name, arm in arms.items() if arm.child}
    made, count = {name: [] for name in makers}, round(c.added * len(train) / c.rounds) or 1
    weights = loop.mixed(run, train)[1]
    generator = networks.train_generator(run, train, seen, weights)
    judge = loop.student(run, "judge", train, weights, run.seed("judge"), jitter)
    keep, first, used = loop.Filter(run, judge, seen, splits), None, []
    for number in range(1, c.rounds + 1):
        synthetic = loop.kept(made.get("guided"), count)
        students, probs = loop.cross_fit(run, number, train, synthetic, jitter)
        first = first or students
        mined = run.stage(f"mined_{number}", loop.mine, run, train, probs,
                          round(count * c.surplus), synthetic, number)
        for name, arm in makers.items():
            kit = make_kit(run, name, number, train, generator, students)
            parents = loop.parents_for(kit, arm, mined, splits, first)
            made[name].append(loop.make(kit, arm, keep, *parents))
        used.append(loop.as_many_each(makers, made, count))
    return first, loop.children_used(made, used)


def fewer(c, train: data.ImageSet) -> data.ImageSet:
    """c.train images of real data, whole lesions: of each class first twice as many as there are
    folds, then as they come. The phantom has drawn as many."""
    if c.kind == "phantom":
        return train
    lesions, first, lesion = np.unique(train.lesions, return_index=True, return_inverse=True)
    order = np.random.default_rng(c.seed).permutation(len(lesions))
    labels = train.labels[first][order]
    rank = np.array([(labels[:i] == labels[i]).sum() for i in range(len(labels))])
    order = order[np.argsort(rank >= 2 * c.folds, kind="stable")]
    taken = np.searchsorted(np.bincount(lesion)[order].cumsum(), c.train) + 1
    few = train.subset(np.isin(lesion, order[:taken]))
    return data.add_folds(few, c.folds, c.seed)


def perfect(run: Run, added: dict) -> dict[str, data.ImageSet]:
    """What perfect generators would add in the place of `random` and `guided`."""
    c, found = run.config.data, {}
    for arm in ("random", "guided"):
        drawn = np.array([int(source.rsplit("-", 1)[-1]) for source in added[arm].sources])
        found[f"true_{arm}"] = replace(added[arm], images=carry(
            c.train, c.size, phantom.stream_seed(c.seed, "train"), drawn, added[arm].groups))
    other = run.config.replace("data", seed=run.seed("fresh")).data
    pool = data.load_phantom(other, "oracle", 40 * len(added["guided"]))
    cells, wanted = data.cells(pool), data.cells(added["guided"])
    # the folds are not asked for any more: rounds of mining are over
    return found | {"fresh": pool.subset(np.concatenate(
        [np.flatnonzero(cells == cell)[:(wanted == cell).sum()] for cell in np.unique(wanted)]))}


# ---- what came out ---------------------------------------------------------------------------

def tables(p: dict, arm: str, masks: dict, weights: np.ndarray, min_count: int) -> dict:
    """{(subset, metric): (R, D)} for METRICS, of those subsets that there are."""
    found, probs, lesions = {}, p[f"test_probs_{arm}"], p["test_lesions"]
    for subset, of in masks.items():
        of_subset = evaluate.tables(probs[:, of], p["test_labels"][of], p["malignant"],
                                    weights[of], lesions[of], min_count)
        found |= {(subset, metric): table for metric, table in of_subset.items()
                  if (subset, metric) in METRICS}
    # at the threshold that spares 90 % of the benign images of val, each seed's own
    sick, on_val = p["malignant"][p["test_labels"]], p["malignant"][p["val_labels"]]
    cut = [measures.threshold_at_specificity(q[:, p["malignant"]].sum(-1), on_val, 0.9)
           for q in p[f"val_probs_{arm}"]]
    told = probs[..., p["malignant"]].sum(-1) > np.array(cut)[:, None]
    table = evaluate.share(told, sick, weights)
    few = len(set(lesions[sick])) < min_count
    return found | {("all", "sensitivity_at_90"): table * np.nan if few else table}


def compared(folder: Path) -> tuple[dict, dict, str]:
    """({(subset, metric): {arm: value}}, {(subset, metric): {(arm, against): entry}}, the cheap
    control that is best on val), entries as in results.json; against `real`, that one, `random`."""
    c = configuration.load(folder / "config.yaml").evaluate
    with np.load(folder / "predictions.npz") as stored:
        p = dict(stored)
    rng = np.random.default_rng(0)
    weights = evaluate.lesion_weights(p["test_lesions"], c.draws, rng)
    masks, arms = evaluate.subsets(p, c.min_count)[0], p["arms"].tolist()
    drawn = {arm: tables(p, arm, masks, weights, c.min_count) for arm in arms}
    values = {key: {arm: evaluate.interval(drawn[arm][key])["value"] for arm in arms}
              for key in drawn["real"]}
    noise = {key: evaluate.seed_noise(np.stack([of[key][:, 0] for of in drawn.values()]))
             for key in values}
    best = max((arm for arm in CHEAP if arm in arms), key=lambda arm: np.mean(
        [evaluate.balanced_accuracy(q, p["val_labels"]) for q in p[f"val_probs_{arm}"]]))
    pairs = {(a, b) for a in arms for b in ("real", best)} | {("guided", "random")}
    return values, {key: {(a, b): evaluate.interval(drawn[a][key] - drawn[b][key], noise[key], 1,
                                                    (-1, 1))
                          for a, b in pairs} for key in values}, best


def told(found: dict, what: str) -> str:
    """The tables of all sizes. found: {size: what `compared` says}."""
    values, _, _ = next(reversed(found.values()))
    text = []
    for key, title in METRICS.items():
        if key not in values:
            continue                    # no groups
        if key[1] == "sensitivity_at_90":
            text.append(THRESHOLD)
        arms = list(values[key])
        made = [arm for arm in MADE if arm in arms]
        text += [f"`real` and gains over it, {title}:\n",
                 f"| {what} | " + " | ".join(arms) + " |", "| --- " * (len(arms) + 1) + "|"]
        for size, (value, gain, _) in found.items():
            cells = [report.interval(value[key]["real"]) if arm == "real" else
                     report.interval(gain[key][arm, "real"], "+") for arm in arms]
            text.append(f"| {size} | " + " | ".join(cells) + " |")
        text += [f"\nGains over the best cheap control, {title}:\n",
                 f"| {what} | best cheap control | " + " | ".join(made)
                 + " | guided over random |", "| --- " * (len(made) + 3) + "|"]
        for size, (value, gain, best) in found.items():
            pairs = [*((arm, best) for arm in made), ("guided", "random")]
            cells = [report.interval(gain[key][pair], "+") for pair in pairs]
            text.append(f"| {size} | {best} {report.interval(value[key][best])} | "
                        + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def main() -> None:
    parser = Parser("when_does_it_help.py", __doc__)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 200, 400, 800, 1600])
    parser.add_argument("--labels", type=int, nargs="+", help="in place of sizes")
    arguments = parser.parse_args()
    few = bool(arguments.labels)
    path, found = Path("runs") / f"survey_{Path(arguments.config).stem}{'_labels' * few}", {}
    with one_line("when_does_it_help.py"):
        for size in arguments.labels or arguments.sizes:
            folder = path.with_name(f"{path.name}_{size}")
            finished(folder, arguments.config, [
                "loop.arms=[all]", f"data.train={FEW if few else size}",
                *([f"data.labelled={size / FEW}"] if few else []), *arguments.set],
                lambda run: survey(run, few))
            found[size] = compared(folder)
        text = told(found, "labels" if few else "images")
        print(text)
        write_bytes(path.with_suffix(".md"), text.encode())
        key = "all", "balanced_accuracy"
        made = [arm for arm in MADE if arm in found[size][0][key]]
        rows = [(arm, [(size, *report.triple(gain[key][arm, best]))
                       for size, (_, gain, best) in found.items()
                       if gain[key][arm, best]["value"] is not None]) for arm in made]
        drawn = gains([row for row in rows if row[1]], "Gain over the best cheap control",
                      "labels" if few else "real training images", "points of balanced accuracy")
        write_bytes(path.with_suffix(".svg"), plots.standalone(drawn).encode())
        print(f"wrote {path}.md and {path}.svg")


if __name__ == "__main__":
    main()
