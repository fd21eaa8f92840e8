"""Does a classifier inside the diffusion model's training help? The claims of Class-N-Diff (arXiv
2510.16887): better control over the class, and a better classifier.

    python benchmarks/class_n_diff.py                             # about 45 minutes on two cores
    python benchmarks/class_n_diff.py --config configs/ham10000_cpu.yaml --set data.root=PATH

For every seed the plain model and both forms of class_n_diff.py, with the same steps; of each,
images from pure noise, even over classes and groups: do they show the class asked for (an oracle
on the phantom, and a judge trained on real images), how far are they from as many test images
(Frechet distance in the critic's features), how much of these do they cover (recall)? And how well
does each classifier do on test, and a student on real and generated images?
Writes runs/class_n_diff_NAME.json, .md and .png; one that was stopped goes on where it was.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import classifier
from engine import config as configuration
import data
import evaluate
import loop
from extras import pictures
from extras import report
from engine.run import RunFolder, one_line, save_picture, write_bytes

COUNT = 600         # images of each kind
# what is sampled: by which model, and is it guided by its guide, or its head
SAMPLED = {"plain": ("plain", False), "class-n-diff": ("class-n-diff", False),
           "joint head": ("joint head", False), "plain, guided by its guide": ("plain", True),
           "joint head, guided by itself": ("joint head", True)}
METRICS = ("accuracy", "sensitivity", "specificity", "balanced_accuracy")


class Clean(nn.Module):
    """A guide asked about clean images, as a student is: at level 0, all but clean."""

    def __init__(self, guide: nn.Module):
        super().__init__()
        self.guide = guide

    def forward(self, x):
        return self.guide(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))


def experiments(path: str, overrides: list[str], seed: int) -> dict[str, loop.Experiment]:
    """The plain model and both forms, trained; what was trained before is read."""
    given = configuration.load(path, overrides).ddpm
    weight = given.classifier_weight or 0.2
    trained = {}
    for kind, own, head in (("plain", 0, "false"), ("class-n-diff", weight, "false"),
                            ("joint head", weight, "true")):
        c = configuration.load(path, [*overrides, f"loop.seed={seed}", f"unet.joint_head={head}",
                                      f"ddpm.classifier_weight={own}",
                                      # a guide trained apart takes no fewer steps
                                      f"classifier.guide_steps={given.steps}"])
        folder = Path("runs") / f"class_n_diff_{Path(path).stem}_{seed}" / kind.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        e = trained[kind] = loop.Experiment(c, RunFolder(folder))
        e.prepare()
        e.train_generator()
        e.students = []         # none guides: images are to show their class, not to be hard
        # one strength for all: the middle one, not chosen anew
        e.jitter = c.classifier.jitter[len(c.classifier.jitter) // 2]
    return trained


def even(train: data.ImageSet) -> data.ImageSet:
    """What is asked for, even over the class x group cells; the images, training images of the
    class, are to be replaced."""
    labels = np.arange(COUNT) % len(train.class_names)
    groups = (np.arange(COUNT) // len(train.class_names) % len(train.group_names)
              if train.group_names else np.full(COUNT, -1))
    first = np.array([np.flatnonzero(train.labels == y)[0] for y in range(len(train.class_names))])
    return replace(train.subset(first[labels]), groups=groups)


def generate(trained: dict[str, loop.Experiment]) -> dict[str, data.ImageSet]:
    """COUNT images each of what is SAMPLED, from the same noise."""
    c, asked, made = trained["plain"].config, even(trained["plain"].train), {}
    seeds = np.array([loop.derive(c.loop.seed, "class_n_diff", i) for i in range(COUNT)])
    for name, (kind, guided) in SAMPLED.items():
        images, _, _ = trained[kind].synthesise(
            asked, asked.groups, seeds, start="noise",
            scales=(c.guidance.class_scale * guided, 0.0))
        made[name] = replace(asked, images=images)
    return made


def cells(of: data.ImageSet) -> dict[str, np.ndarray]:
    """Which images are of all, of each class and of each group."""
    return ({"all": np.ones(len(of), bool)}
            | {name: of.labels == y for y, name in enumerate(of.class_names)}
            | {name: of.groups == g for g, name in enumerate(of.group_names)})


def quality(plain: loop.Experiment, made: dict[str, data.ImageSet]) -> dict:
    """Agreement with the class asked for, Frechet distance and recall against as many real images
    of test, of the same cells. Of the real ones themselves the agreement alone."""
    c, train, test = plain.config, plain.train, plain.splits["test"]

    def learnt(name, images):
        return plain.student(name, images, classifier.balanced_weights(images.labels),
                             plain.seed(name), plain.jitter)
    judges = {"judge": learnt("judge", train)}
    if c.data.kind == "phantom":
        judges["oracle"] = learnt("critic", data.load_oracle(c.data.size, c.data.seed,
                                                             c.evaluate.oracle))
    critic = judges.get("oracle") or learnt("critic", train)

    def features(of):
        return classifier.extract_features(critic, plain.tensor(of.images))
    *chosen, index = loop.same_mixture([*made.values(), test], c.loop.seed)
    real = test.subset(index)
    known, found = features(real), {}
    for name, images in {"real": real, **made}.items():
        found[name] = {}
        for judge, network in judges.items():
            right = plain.predict(network, images.images).argmax(1) == images.labels
            found[name][judge] = {cell: float(right[rows].mean())
                                  for cell, rows in cells(images).items() if rows.any()}
    for (name, images), index in zip(made.items(), chosen):
        own = features(some := images.subset(index))
        found[name]["frechet"] = (evaluate.frechet_distance(known, own)
                                  if len(own) > own.shape[1] else None)
        found[name]["recall"] = {
            cell: evaluate.precision_recall(known[cells(real)[cell]], own[rows])[1]
            for cell, rows in cells(some).items() if rows.sum() > 3}
    return found


def diagnosis(trained: dict[str, loop.Experiment], made: dict[str, data.ImageSet]) -> dict:
    """What each classifier is worth on test: students from the same start, guides, the head."""
    plain, test = trained["plain"], trained["plain"].splits["test"]

    def student(e, name, added):        # in the model's own folder: no other's is mistaken for it
        images, weights = e.mixed(e.train, added)
        return e.student(name, images, weights, e.seed("student"), e.jitter)
    networks = {"student on real images": student(plain, "student_real", None)}
    for name, (kind, guided) in SAMPLED.items():
        networks[f"student on real and {name}"] = student(
            trained[kind], f"student_{'guided' if guided else 'added'}", made[name])
    networks[f"guide trained apart, {plain.config.classifier.guide_steps} steps"] = Clean(
        plain.guide)
    networks["guide of class-n-diff"] = Clean(trained["class-n-diff"].guide)
    networks["joint head"] = Clean(trained["joint head"].guide)
    return {name: evaluate.short_metrics(
        plain.predict(network, plain.tensors["test"]), test.labels, np.array(test.malignant),
        test.lesions, plain.config.evaluate.min_count) for name, network in networks.items()}


def spread(values: list, factor: float = 100) -> str:
    """Mean and range over the seeds, in percent where factor is 100."""
    values = [factor * v for v in values if v is not None]
    if not values:
        return ""
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.1f}, {max(values):.1f}]"


def table(first: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    return [f"| {' | '.join([first, *columns])} |", "| --- " * (len(columns) + 1) + "|",
            *(f"| {' | '.join([name, *row])} |" for name, row in rows.items()), ""]


def told(found: list[dict]) -> str:
    """The tables: mean over the seeds and, in brackets, the range."""
    first, rows = found[0]["quality"], list(found[0]["quality"])
    judges = [name for name in ("oracle", "judge") if name in first["real"]]
    parts = list(first["plain"]["recall"])[1:]

    def cell(name, measure, part="all"):
        of = [one["quality"][name].get(measure, {}) for one in found]
        return spread([values.get(part) for values in of])
    return "\n".join([
        *table("images", [*(f"{judge} agrees" for judge in judges), "recall", "Frechet distance"], {
            name: [*(cell(name, measure) for measure in (*judges, "recall")),
                   spread([one["quality"][name].get("frechet") for one in found], 1)]
            for name in rows}),
        *(line for measure in (judges[0], "recall")
          for line in table(f"{measure} by cell", parts, {
              name: [cell(name, measure, part) for part in parts] for name in rows
              if measure in first[name]})),
        *table("on test", [metric.replace("_", " ") for metric in METRICS], {
            name: [spread([one["diagnosis"][name][metric] for one in found]) for metric in METRICS]
            for name in found[0]["diagnosis"]})])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    overrides = ["guidance.steps=25", *arguments.set]
    with one_line("class_n_diff.py"):
        c = configuration.load(arguments.config, overrides)
        path = Path("runs") / f"class_n_diff_{Path(arguments.config).stem}"
        store = path.with_suffix(".json")
        settings = report.private(c.as_dict())
        stored = json.loads(store.read_text()) if store.exists() else {}
        found = stored["seeds"] if stored.get("config") == settings else {}
        for seed in range(arguments.seeds):
            if str(seed) in found:
                continue
            trained = experiments(arguments.config, overrides, seed)
            plain, made = trained["plain"], generate(trained)
            found[str(seed)] = {"quality": quality(plain, made),
                                "diagnosis": diagnosis(trained, made)}
            write_bytes(store, (json.dumps(
                {"config": settings, "environment": loop.environment(plain.device, plain.bf16),
                 "seeds": found}, indent=1) + "\n").encode())
            if seed == 0:
                save_picture(path.with_suffix(".png"), pictures.rows(
                    [images.images[:24] for images in made.values()], list(made)))
        text = told([found[str(seed)] for seed in range(arguments.seeds)])
        print(text)
        write_bytes(path.with_suffix(".md"), text.encode())


if __name__ == "__main__":
    main()
