"""A shortcut that nobody labelled: does mining find it, and do children of what it finds help?

    python benchmarks/shortcut.py --draws 100 101 102 103        # 20 minutes a draw on one core
    python benchmarks/shortcut.py --draws 100 101 102 103 --against replay@0.15     # at once, then
    python benchmarks/shortcut.py --draws 100 --photographs PATH        # on HAM10000, 50 minutes
    python benchmarks/shortcut.py --photographs PATH        # its own dark corners, by class

The dark ring of a scope, or --artefact scope (nearer, and less sharp), goes with the melanomas:
--rate of them show it in train and val, and of the other classes the rest; in test half of every
class. So a student may look at the ring instead of the lesion, and fail on the images that speak
against it. Nobody is told which show it. Hard cases are mined out of fold, with --stop by students
that are stopped early; no judge (it learnt the shortcut too) and no class guidance.
--arms: ARM@SHARE, an arm of the table ARMS and its share of a batch; as many images of every class
and group in each. Arms that end in `told` mine all that speaks against the shortcut, as nobody
could: fewer images, as many of a class in each of these. Beside them, without added images:
stronger augmentation (random crops, MixUp), images drawn as often as their out-of-fold loss says
within their class, and `balanced, told`: even over class and ring.
What was asked beforehand and what came out: docs/regimes.md. Writes runs/NAME/draw-K/scores.json
and children.png, and runs/NAME/table.md; a stopped one goes on where it was.
"""
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import classifier
import data
import evaluate
import loop
from datasets import phantom
from engine import config as configuration
from engine.augment import (
    jitter_colour, random_shift, random_turn, to_float, to_uint8)
from engine.command import Parser, keep, one_line
from engine.config import require
from engine.run import Run, fingerprint, locked, save_picture, write_bytes
from engine.training import fit
from extras import measures, networks, outcome
from extras.children import (
    REASONS, Candidates, Kit, children_used, copied, from_model, from_noise, recoloured)
from extras.draws import over_draws
from extras.pictures import grid
from generative_classifier import chosen, errors

SETTINGS = [
    "guidance.classifier_free=1.0", "guidance.objectives={class_evidence: 0.0, hardness: 0.05}",
    "classifier.jitter=[0.3]", "classifier.guide_steps=1", "data.test=3000", "loop.seeds=2",
    "loop.rounds=1", "loop.added=0.3"]
CONTROLS = "real", "crops", "MixUp", "reweighted", "balanced, told"
MEASURES = "balanced accuracy", "auroc", "worst cell"


# ---- the images ------------------------------------------------------------------------------

def planted(c, rate: float, artefact: str = "ring", cache=None) -> tuple[dict, dict]:
    """The splits, and which images of each show the artefact, (N,) bool. c: the section `data`.
    The phantom draws its ring itself; anything else is done to finished images."""
    if c.kind == "phantom" and artefact == "ring":
        tied, splits = shares(phantom.CLASS_NAMES, rate), {}
        for name, share in tied.items():
            arrays, names = phantom.collect(name, getattr(c, name), c.size, c.seed, ring=share)
            splits[name] = data.ImageSet(**arrays, **names, folds=None)
        splits["train"] = data.add_folds(splits["train"], c.folds, c.seed)
        return splits, {name: shows_ring(s.images) for name, s in splits.items()}
    splits, shown = data.load(c, cache), {}
    for i, (name, s) in enumerate(splits.items()):
        rng, images = np.random.default_rng([c.seed, 20 + i]), s.images.copy()
        shown[name] = rng.random(len(s)) < shares(s.class_names, rate)[name][s.labels]
        images[shown[name]] = ARTEFACTS[artefact](images[shown[name]], rng)
        splits[name] = replace(s, images=images)
    return splits, shown


def melanoma(images: data.ImageSet) -> np.ndarray:
    """(N,) bool."""
    return images.labels == images.class_names.index("mel")


def shares(classes, rate: float) -> dict[str, np.ndarray]:
    """By split, which share of each class, (C,), is to show the artefact."""
    tied = np.where(np.array(classes) == "mel", rate, 1 - rate)
    return {"train": tied, "val": tied, "test": np.full(len(classes), 0.5)}


def with_ring(images: np.ndarray, rng) -> np.ndarray:
    """uint8 (N, 3, S, S), each seen through a scope's dark ring as the phantom draws it."""
    at = (np.arange(images.shape[-1]) + .5) * 2 / images.shape[-1] - 1
    tube = rng.uniform(1.08, 1.25, (len(images), 1, 1, 1))
    light = (.5 + .5 * np.tanh((tube - np.hypot(at, at[:, None])) / .04)) * .95 + .05
    return (images * light + .5).astype(np.uint8)


def other_scope(images: np.ndarray, rng) -> np.ndarray:
    """Taken from nearer, by a lens that resolves half as much: no arithmetic on a pixel does it."""
    x = to_float(torch.tensor(images))
    side, edge = x.shape[-1], x.shape[-1] // 8
    x = F.interpolate(x[..., edge:-edge, edge:-edge], side // 2, mode="bilinear", antialias=True)
    return to_uint8(F.interpolate(x, side, mode="bilinear")).numpy()


ARTEFACTS = {"ring": with_ring, "scope": other_scope}


def shows_ring(images: np.ndarray) -> np.ndarray:
    """(N,) bool, of uint8 (N, 3, S, S): corners less than half as bright as the middle. Of the
    phantom's own pictures it is right in every case; for generated ones there is no other truth."""
    size = images.shape[-1]
    x = (np.arange(size) + .5) * 2 / size - 1
    r, grey = np.hypot(x, x[:, None]), images.mean(1)
    return grey[:, r > 1.3].mean(1) < .45 * grey[:, (r > .6) & (r < .95)].mean(1)


def detector(run: Run, splits: dict, shown: dict):
    """Which of images (N, 3, S, S) show the artefact, (N,) bool, by a network that learnt it from
    test, where it goes with no class; that of val which it gets right is printed."""
    test = replace(splits["test"], labels=shown["test"].astype(int), class_names=("no", "yes"),
                   malignant=(False, True))
    network = loop.student(run, "detector", test, classifier.balanced_weights(test.labels),
                           run.seed("detector"), 0.3)

    def shows(images):
        return loop.predict(run, network, images).argmax(1) == 1
    right = (shows(splits["val"].images) == shown["val"]).mean()
    print(f"the artefact is recognised in {right:.1%} of val")
    return shows


def corners(root: str) -> str:
    """How many of HAM10000's photographs have dark corners, percent, by class and source."""
    c = configuration.load(configuration.DEFAULTS.parent / "configs/ham10000_cpu.yaml",
                           [f"data.root={root}", "data.group=dataset"])
    whole, _ = data.load_files(c.data)
    dark, lines = shows_ring(whole.images), []
    for y, name in enumerate(whole.class_names):
        of = whole.labels == y
        cells = [("all", of)] + [(source, of & (whole.groups == g))
                                 for g, source in enumerate(whole.group_names)]
        lines.append(f"{name}: " + ", ".join(f"{source} {100 * dark[of].mean():.1f} of {of.sum()}"
                                             for source, of in cells if of.any()))
    return "\n".join(lines)


# ---- stronger augmentation -------------------------------------------------------------------

def crop(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of each image (B, 3, S, S) a square of half to all of its side, resized to all of it."""
    on = {"generator": generator, "device": x.device}
    side = .5 + .5 * torch.rand(len(x), 1, **on)                # (B, 1)
    centre = (2 * torch.rand(len(x), 2, **on) - 1) * (1 - side)
    theta = torch.cat([side, 0 * side, centre[:, :1], 0 * side, side, centre[:, 1:]], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def augmented(kind: str, network, images, labels, jitter, index, generator):
    """classifier.loss with random crops that have a hole of up to half a side, or with MixUp
    (Zhang et al. 2018, arXiv 1710.09412)."""
    x = jitter_colour(random_turn(to_float(images[index]), generator), jitter, generator)
    y, on = labels[index], {"generator": generator, "device": x.device}
    if kind == "mixup":
        x = random_shift(x, generator, max(1, x.shape[-1] // 16))
        share = torch.rand(len(x), 1, 1, 1, **on)
        logits = network(share * x + (1 - share) * x.flip(0))
        losses = [F.cross_entropy(logits, of, reduction="none") for of in (y, y.flip(0))]
        return torch.lerp(losses[1], losses[0], share.view(-1)).mean()
    x = crop(x, generator)
    at, half = 2 * torch.rand(len(x), 2, 1, **on) - 1, torch.rand(len(x), 1, 1, **on) / 2
    inside = (torch.linspace(-1, 1, x.shape[-1], device=x.device) - at).abs() < half    # (B, 2, S)
    hole = inside[:, 0, :, None] & inside[:, 1, None]                                   # (B, S, S)
    return F.cross_entropy(network(torch.where(hole[:, None], 0.0, x)), y)


def train_augmented(network, images, labels, weights, *, kind: str, steps: int, batch: int,
                    lr: float, jitter: float, seed: int, **progress) -> list[float]:
    """classifier.train with that loss."""
    drawn = partial(classifier.pick, classifier.cumulative(weights), batch)
    lost = partial(augmented, kind, network, images, labels, jitter)
    return fit(network, drawn, lost, steps=steps, lr=lr, seed=seed, device=images.device,
               weight_decay=0.05, **progress)


ARMS = {
    "replay": loop.Arm(copied, filtered=False),
    "recolour": loop.Arm(recoloured, filtered=False),
    "noise": loop.Arm(from_noise),
    "random": loop.Arm(from_model, parents="random"),
    "varied": loop.Arm(from_model),                     # guided, but for hardness guidance
    "guided": loop.Arm(from_model, hardness=True)}
ARMS |= {f"{name}_told": ARMS[name] for name in ("replay", "varied", "guided")}
DEFAULT = [f"{arm}@{share}" for share, arms in (
    (0.15, ("replay", "recolour", "noise", "random", "varied", "guided")),
    (0.3, ("replay", "random", "guided", "replay_told", "varied_told", "guided_told")))
    for arm in arms]


# ---- one draw --------------------------------------------------------------------------------

class Trial(NamedTuple):
    run: Run
    splits: dict
    shown: dict         # by split, which images show the artefact, (N,) bool
    shows: Callable     # which generated images do

    @property
    def against(self) -> np.ndarray:
        """(N,) bool: the training images that speak against the shortcut."""
        return self.shown["train"] != melanoma(self.splits["train"])


def scores(trial: Trial, probs: dict) -> dict:
    """MEASURES on val and test, of probabilities (N, C) by split. AUROC: the mean over the classes,
    each against the others; the worst cell: the least recall of a class with or without a ring."""
    found = {}
    for name in ("val", "test"):
        s, ring = trial.splits[name], trial.shown[name]
        p, one, classes = probs[name], np.ones((len(s), 1)), range(len(s.class_names))
        right = p.argmax(1) == s.labels
        areas = [evaluate.auroc(p[:, c], s.labels == c, one)[0] for c in classes]
        cells = [right[(s.labels == c) & (ring == r)] for c in classes for r in (False, True)]
        found[name] = dict(zip(MEASURES, (
            evaluate.balanced_accuracy(p, s.labels), float(np.mean(areas)),
            float(min(cell.mean() for cell in cells if len(cell))))))
    return found


def trained(trial: Trial, name: str, images, weights, loss: str = "") -> list[dict]:
    """The scores of students on these images, one a seed."""
    run, k = trial.run, trial.run.config.classifier

    def fresh(s):
        key, seed = f"student_{name}_{s}", run.seed("student", s)
        if not loss:
            return loop.student(run, key, images, weights, seed, min(k.jitter))
        arrays = map(run.tensor, (images.images, images.labels, weights))
        return run.train(key, networks.new_resnet(run, images, seed), train_augmented, *arrays,
                         kind=loss, steps=k.steps, batch=k.batch, lr=k.lr, jitter=min(k.jitter),
                         seed=seed)

    def scored(s):
        network = fresh(s)
        return scores(trial, {split: loop.predict(run, network, trial.splits[split].images)
                              for split in ("val", "test")})
    return [run.stage(f"scores_{name}_{s}", scored, s) for s in range(run.config.loop.seeds)]


def generative(trial: Trial, generator) -> list[dict]:
    """The scores of the diffusion model as a classifier (generative_classifier.py)."""
    splits = [trial.splits[split] for split in ("val", "test")]
    found = [trial.run.stage(f"errors_{seed}", errors, trial.run, generator, images, 16, False,
                             seed) for seed, images in enumerate(splits)]
    _, probs = chosen(found[0], splits[0].labels)
    return [scores(trial, {"val": probs(found[0]), "test": probs(found[1])})]


def controls(trial: Trial, probs: np.ndarray) -> dict:
    """The scores of students that nothing is added for. probs: (N, C) of train, out of fold."""
    train = trial.splits["train"]
    plain, weights = loop.mixed(trial.run, train)
    loss = -np.log(np.clip(probs[np.arange(len(train)), train.labels], 1e-3, 1))
    of_class = np.bincount(train.labels, loss)[train.labels]
    even = classifier.balanced_weights(train.labels, trial.shown["train"].astype(int))
    how = (("real", weights), ("crop", weights, "crop"), ("mixup", weights, "mixup"),
           ("reweighted", loss / of_class), ("balanced", even))
    return {name: trained(trial, stage, plain, *given)
            for name, (stage, *given) in zip(CONTROLS, how)}


def candidates(kit: Kit, arm: loop.Arm, mined, too_near: float) -> Candidates:
    """loop.make, without a judge."""
    def judged(arm, children, finite):
        distance, _ = measures.nearest(children.images, kit.train.images)
        why = np.where((distance <= too_near) & arm.filtered, REASONS.index("copy"), 0)
        why[~np.broadcast_to(finite, why.shape)] = REASONS.index("nonfinite")
        return np.ones(len(why)), distance, why
    return loop.make(kit, arm, judged, *loop.parents_for(kit, arm, mined, {}, []))


def say(trial: Trial, name: str, m: Candidates, said: dict) -> None:
    """Print what became of an arm's parents. said: of outcome.of_round."""
    ring, sick = trial.shows(m.children.images), melanoma(m.children)
    print(f"  {name}: against the shortcut {trial.against[m.parents].mean():.0%} of the parents, "
          f"{(ring != sick).mean():.0%} of the children; wrong out of fold "
          f"{(said['margin'][m.parents] < 0).mean():.0%} and "
          f"{(said['children'][name] < 0).mean():.0%}; near-copies "
          f"{(m.rejected_by > 0).mean():.0%}", flush=True)


def picture(run: Run, made: dict[str, list[Candidates]]) -> None:
    """RUN/children.png: the last round's children, a row an arm, of the first twelve parents."""
    last = {name: of[-1] for name, of in made.items() if not name.endswith("_told")}
    if not last:
        return
    _, first = np.unique(next(iter(last.values())).parents, return_index=True)
    some = np.sort(first)[:12]
    cells = [(s.images, [s.class_names[y] for y in s.labels], len(s))
             for s in (m.children.subset(some) for m in last.values())]
    save_picture(run.folder / "children.png", grid(cells, len(some), [*last]))


def added_by(trial: Trial, generator, arms: list[str], stop: int) -> tuple[dict, np.ndarray]:
    """What each arm adds, of all rounds; and the first round's probabilities of train, (N, C)."""
    run, c, splits, train = trial.run, trial.run.config, trial.splits, trial.splits["train"]
    against, count = np.flatnonzero(trial.against), round(
        c.loop.added * len(train) / c.loop.rounds)
    makers = [{a: ARMS[a] for a in arms if a.endswith("_told") == told} for told in (False, True)]
    too_near, first = measures.copy_distance(splits["val"], train), None
    mining = Run(run.folder, c.replace("classifier", steps=stop), run.fingerprint)
    made, used = {name: [] for name in arms}, []
    for number in range(1, c.loop.rounds + 1):
        synthetic, candidate = loop.kept(made.get("guided"), count), round(count * c.loop.surplus)
        students, probs = loop.cross_fit(mining, number, train, synthetic, min(c.classifier.jitter))
        first = probs if first is None else first
        mined = run.stage(f"mined_{number}", loop.mine, run, train, probs, candidate, synthetic,
                          number)
        told = data.hard_parents(against, train, candidate, run.seed("told", number))
        told = told, data.other_groups(train.subset(told), run.seed("told", number))
        for name in arms:
            kit = Kit(run, f"{name}_{number}", run.seed("children", number), train, generator,
                      students, number)
            parents = told if name.endswith("_told") else mined
            made[name].append(candidates(kit, ARMS[name], parents, too_near))
        said = outcome.of_round(run, train, probs, students, made)
        wrong = said["margin"] < 0
        print(f"round {number}: {wrong.mean():.1%} wrong out of fold; against the shortcut: "
              f"{trial.against.mean():.1%} of train, {trial.against[wrong].mean():.0%} of these")
        for name in arms:
            say(trial, name, made[name][-1], said)
        used.append({})
        for some in filter(None, makers):
            used[-1] |= loop.as_many_each(some, {a: made[a] for a in some}, count)
    picture(run, made)
    return children_used(made, used), first


def experiment(run: Run, rate: float, artefact: str, stop: int, arms: list[tuple[str, float]],
               also: bool) -> dict:
    """One draw: {what was done: scores of its students}. also: the diffusion model's own."""
    c, (splits, shown) = run.config, planted(run.config.data, rate, artefact, run.cache)
    run.fingerprint = fingerprint(c, splits)
    shows = shows_ring if artefact == "ring" else detector(run, splits, shown)
    trial, train = Trial(run, splits, shown, shows), splits["train"]
    require({*melanoma(train)[trial.against]} == {True, False}, f"--rate {rate:g}: no melanoma, or "
            "no other image, speaks against the shortcut; lower it")
    generator = networks.train_generator(run, train, train, loop.mixed(run, train)[1])
    run.fingerprint += f"-{stop}"
    added, probs = added_by(trial, generator, [*dict(arms)], stop)
    found = controls(trial, probs)
    for name, share in arms:
        other = Run(run.folder, c.replace("loop", share=share), run.fingerprint)
        found[f"{name}@{share:g}"] = trained(trial, f"{name}@{share:g}",
                                             *loop.mixed(other, train, added[name]))
    return found | ({"diffusion model": generative(trial, generator)} if also else {})


def table(draws: list[dict], against: str) -> str:
    """Means over draws, and of the gain over `against` with Student's t, each by itself."""
    head = ["val: balanced accuracy", *(f"test: {of}" for of in MEASURES)]
    head += [f"{of} over {against}" for of in MEASURES[:2]]
    lines = ["| " + " | ".join(["", *head]) + " |", "| --- " * (1 + len(head)) + "|"]

    def means(name, split, of):
        return np.array([100 * np.mean([one[split][of] for one in d[name]]) for d in draws])
    for name in draws[0]:
        columns = [("val", MEASURES[0]), *(("test", of) for of in MEASURES)]
        cells = [f"{means(name, *column).mean():.1f}" for column in columns]
        for of in MEASURES[:2]:
            gains = means(name, "test", of) - means(against, "test", of)
            t = over_draws(list(gains), limits=(-100, 100)) if len(gains) > 1 else None
            cells.append(f"{gains.mean():+.1f}" + (
                f" [{t['low']:+.1f}, {t['high']:+.1f}]" if t else ""))
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def arm_of(text: str) -> tuple[str, float]:
    name, _, share = text.partition("@")
    require(name in ARMS and re.fullmatch(r"0\.\d+", share), f"--arms: found {text!r}, write "
            f"ARM@SHARE such as guided@0.3, with an arm of {', '.join(ARMS)}")
    return name, float(share)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("shortcut.py", __doc__)
    parser.add_argument("--draws", type=int, nargs="+", default=[])
    parser.add_argument("--photographs", metavar="PATH", help="of HAM10000; without --draws, only "
                        "how many have dark corners by themselves")
    parser.add_argument("--artefact", choices=[*ARTEFACTS], default="ring")
    parser.add_argument("--rate", type=float, default=0.95)
    parser.add_argument("--stop", type=int, default=0, metavar="STEPS", help="stop the students "
                        "that mine after so many steps")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--name", default="shortcut")
    parser.add_argument("--against", default="real", help="what the table's gains are over")
    parser.add_argument("--generative", action="store_true", help="the diffusion model, too: 6 "
                        "minutes a draw")
    parser.add_argument("--arms", nargs="+", metavar="ARM@SHARE", default=DEFAULT)
    arguments = parser.parse_args(argv)
    with one_line("shortcut.py"):
        photographs = arguments.photographs
        require(arguments.draws or photographs, "write --draws K ..., or --photographs PATH")
        if not arguments.draws:
            print(corners(photographs))
            return
        arms, found = [*map(arm_of, arguments.arms)], []
        require(0 <= arguments.rate <= 1, f"--rate: wanted 0 to 1, found {arguments.rate}")
        require(arguments.stop >= 0, f"--stop: wanted 1 step or more, found {arguments.stop}")
        require(arguments.against in (*CONTROLS, *(f"{a}@{share:g}" for a, share in arms)),
                f"--against {arguments.against}: it is not in the table")
        # The arms decide what each adds: stored students are of the same ones.
        names = ", ".join(["real", *sorted({name for name, _ in arms})])
        config, more = configuration.DEFAULTS, []
        if photographs:
            config = config.parent / "configs/ham10000_cpu.yaml"
            more = [f"data.root={photographs}", "classifier.jitter=[0]"]
        for draw in dict.fromkeys(arguments.draws):
            c = configuration.load(config, [
                *SETTINGS, *more, f"data.seed={draw}", f"loop.seed={draw}", *arguments.set,
                f"loop.arms=[{names}]"])
            folder = Path("runs") / arguments.name / f"draw-{draw}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            keep(c, folder)
            with locked(folder):
                found.append(experiment(Run(folder, c), arguments.rate, arguments.artefact,
                                        arguments.stop or c.classifier.steps, arms,
                                        arguments.generative))
            write_bytes(folder / "scores.json", (json.dumps(found[-1], indent=1) + "\n").encode())
            text = table(found, arguments.against)
            write_bytes(folder.parent / "table.md", text.encode())
            print(text, flush=True)


if __name__ == "__main__":
    main()
