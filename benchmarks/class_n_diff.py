"""Does a classifier inside the diffusion model's training help? The claims of Class-N-Diff (arXiv
2510.16887): better control over the class, and a better classifier.

    python benchmarks/class_n_diff.py                             # about 45 minutes on two cores
    python benchmarks/class_n_diff.py --config configs/ham10000_cpu.yaml --set data.root=PATH

For every seed both forms of extras/class_n_diff.py and the plain model, with the same steps;
"plain" is the first form with its gate shut: its guide learns from real images alone, half of them
clean, and neither from the other. Of each, images from pure noise, even over classes and groups: do
they show the class asked for (an oracle on the phantom, and a judge trained on real images), how
far are they from as many test images (Frechet distance in the critic's features), how much of these
do they cover (recall)? And how well does each classifier do on test, on every group of it (is it
"fair"?), and a student on real and generated images?
Writes runs/class_n_diff_NAME.json, .md and .png; one that was stopped goes on where it was.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import classifier
import data
import evaluate
import loop
from engine import config as configuration
from engine.command import Parser, one_line
from engine.run import Progress, Run, environment, fingerprint, save_picture, write_bytes
from extras import measures, networks, pictures, report
from extras.children import Kit, from_noise
from extras.outcome import extract_features
from guidance import Generator

COUNT = 600         # images of each kind
# what is sampled: by which model, and is it guided by its guide, or its head
SAMPLED = {"plain": ("plain", False), "class-n-diff": ("class-n-diff", False),
           "joint head": ("joint head", False), "plain, guided by its guide": ("plain", True),
           "joint head, guided by itself": ("joint head", True)}
METRICS = ("accuracy", "sensitivity", "specificity", "balanced_accuracy")


class Model(NamedTuple):
    """One of the three, trained, in a run of its own."""
    run: Run
    splits: dict
    generator: Generator
    jitter: float

    def student(self, name: str, images, weights, *words) -> nn.Module:
        seed = self.run.seed(*(words or [name]))
        return loop.student(self.run, name, images, weights, seed, self.jitter)


class Clean(nn.Module):
    """A guide asked about clean images, as a student is: at level 0, all but clean."""

    def __init__(self, guide: nn.Module):
        super().__init__()
        self.guide = guide

    def forward(self, x):
        return self.guide(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))


def models(path: str, overrides: list[str], seed: int) -> dict[str, Model]:
    """The plain model and both forms, trained; what was trained before is read."""
    given = configuration.load(path, overrides).ddpm
    weight = given.classifier_weight or 0.2
    trained = {}
    for kind, share, head in (("plain", 0, "false"), ("joint head", 0, "true"),
                              ("class-n-diff", given.classifier_probability or 0.25, "false")):
        c = configuration.load(path, [*overrides, f"loop.seed={seed}", f"ddpm.joint_head={head}",
                                      f"ddpm.classifier_weight={weight}",
                                      f"ddpm.classifier_probability={share}"])
        folder = Path("runs") / f"class_n_diff_{Path(path).stem}_{seed}" / kind.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder, c)
        splits = data.load(c.data, run.cache, Progress("data"))
        run.fingerprint = fingerprint(c, splits)
        train = splits["train"]
        generator = networks.train_generator(run, train, train, loop.mixed(run, train)[1])
        # one strength for all: the middle one, not chosen anew
        jitter = c.classifier.jitter[len(c.classifier.jitter) // 2]
        trained[kind] = Model(run, splits, generator, jitter)
    return trained


def even(train: data.ImageSet) -> data.ImageSet:
    """What is asked for, even over the class x group cells; the images, training images of the
    class, are to be replaced."""
    labels = np.arange(COUNT) % len(train.class_names)
    groups = (np.arange(COUNT) // len(train.class_names) % len(train.group_names)
              if train.group_names else np.full(COUNT, -1))
    first = np.array([np.flatnonzero(train.labels == y)[0] for y in range(len(train.class_names))])
    return replace(train.subset(first[labels]), groups=groups)


def generate(trained: dict[str, Model]) -> dict[str, data.ImageSet]:
    """COUNT images each of what is SAMPLED, from the same noise."""
    asked, made = even(trained["plain"].splits["train"]), {}
    for name, (kind, guided) in SAMPLED.items():
        run, splits, generator, _ = trained[kind]
        # no student guides: images are to show their class, not to be hard
        scale = run.config.guidance.objectives["class_evidence"] * guided
        kit = Kit(run, f"noise_{'guided' if guided else 'unguided'}", run.seed("class_n_diff"),
                  splits["train"], generator, [])
        drawn = from_noise(kit, asked, asked.groups, {"class_evidence": scale})
        made[name] = replace(asked, images=drawn.images)
    return made


def cells(of: data.ImageSet) -> dict[str, np.ndarray]:
    """Which images are of all, of each class and of each group."""
    return ({"all": np.ones(len(of), bool)}
            | {name: of.labels == y for y, name in enumerate(of.class_names)}
            | {name: of.groups == g for g, name in enumerate(of.group_names)})


def quality(plain: Model, made: dict[str, data.ImageSet]) -> dict:
    """Agreement with the class asked for, Frechet distance and recall against as many real images
    of test, of the same cells. Of the real ones themselves the agreement alone."""
    run, c, test = plain.run, plain.run.config, plain.splits["test"]

    def learnt(name, images):
        return plain.student(name, images, classifier.balanced_weights(images.labels))
    judges = {"judge": learnt("judge", plain.splits["train"])}
    if c.data.kind == "phantom":
        judges["oracle"] = learnt("critic", data.load_phantom(c.data, "oracle", c.evaluate.oracle))
    critic = judges.get("oracle") or learnt("critic", plain.splits["train"])

    def features(of):
        return extract_features(critic, run.tensor(of.images))
    *chosen, index = measures.same_mixture([*made.values(), test], c.loop.seed)
    real = test.subset(index)
    known, found = features(real), {}
    for name, images in {"real": real, **made}.items():
        found[name] = {}
        for judge, network in judges.items():
            right = loop.predict(run, network, images.images).argmax(1) == images.labels
            found[name][judge] = {cell: float(right[rows].mean())
                                  for cell, rows in cells(images).items() if rows.any()}
    for (name, images), index in zip(made.items(), chosen):
        own = features(some := images.subset(index))
        found[name]["frechet"] = (measures.frechet_distance(known, own)
                                  if len(own) > own.shape[1] else None)
        found[name]["recall"] = {
            cell: measures.precision_recall(known[cells(real)[cell]], own[rows])[1]
            for cell, rows in cells(some).items() if rows.sum() > 3}
    return found


def diagnosis(trained: dict[str, Model], made: dict[str, data.ImageSet]) -> dict:
    """What each classifier is worth on test: students from the same start, guides, the head."""
    plain = trained["plain"]
    run, test, least = plain.run, plain.splits["test"], plain.run.config.evaluate.min_count

    def student(model, name, added):    # in the model's own folder: no other's is mistaken for it
        images, weights = loop.mixed(model.run, model.splits["train"], added)
        return model.student(name, images, weights, "student")
    students = {"student on real images": student(plain, "student_real", None)}
    for name, (kind, guided) in SAMPLED.items():
        students[f"student on real and {name}"] = student(
            trained[kind], f"student_{'guided' if guided else 'added'}", made[name])
    for name, kind in (("guide of plain", "plain"), ("guide of class-n-diff", "class-n-diff"),
                       ("joint head", "joint head")):
        students[name] = Clean(trained[kind].generator.guide)

    def scored(probs, rows):
        of, malignant = test.subset(np.flatnonzero(rows)), np.array(test.malignant)
        tables = evaluate.tables(probs[None, rows], of.labels, malignant, np.ones((len(of), 1)),
                                 of.lesions, least)
        values = {metric: tables[metric].item() for metric in METRICS}
        return {m: None if np.isnan(value) else value for m, value in values.items()}
    parts = {name: rows for name, rows in cells(test).items() if name not in test.class_names}
    found = {}
    for name, network in students.items():
        probs = loop.predict(run, network, test.images)
        found[name] = {part: scored(probs, rows) for part, rows in parts.items()}
    return found


def gap(by_part: dict, metric: str) -> float | None:
    """From the group with the least to the one with the most."""
    values = [of[metric] for part, of in by_part.items() if part != "all"]
    return None if not values or None in values else max(values) - min(values)


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
    parts, networks = list(first["plain"]["recall"])[1:], list(found[0]["diagnosis"])
    groups = list(found[0]["diagnosis"][networks[0]])[1:]

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
            name: [spread([one["diagnosis"][name]["all"][metric] for one in found])
                   for metric in METRICS] for name in networks}),
        *(table("balanced accuracy on test", [*groups, "gap", "gap of sensitivity"], {
            name: [*(spread([one["diagnosis"][name][g]["balanced_accuracy"] for one in found])
                     for g in groups),
                   *(spread([gap(one["diagnosis"][name], metric) for one in found])
                     for metric in ("balanced_accuracy", "sensitivity"))]
            for name in networks}) if groups else [])])


def main() -> None:
    parser = Parser("class_n_diff.py", __doc__)
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
            trained = models(arguments.config, overrides, seed)
            plain, made = trained["plain"], generate(trained)
            found[str(seed)] = {"quality": quality(plain, made),
                                "diagnosis": diagnosis(trained, made)}
            write_bytes(store, (json.dumps(
                {"config": settings, "environment": environment(plain.run),
                 "seeds": found}, indent=1) + "\n").encode())
            if seed == 0:
                save_picture(path.with_suffix(".png"), pictures.grid(
                    [(images.images[:24], [], 24) for images in made.values()], 24, list(made)))
        text = told([found[str(seed)] for seed in range(arguments.seeds)])
        print(text)
        write_bytes(path.with_suffix(".md"), text.encode())
        print(f"wrote {path}.md, .json and .png")


if __name__ == "__main__":
    main()
