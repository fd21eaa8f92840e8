"""The whole experiment: train, find what fails, generate images like it, retrain, compare.

    python loop.py --config config.yaml                                  a run in runs/config
    python loop.py --config config.yaml --set loop.seeds=5 --name five   another, in runs/five
    python loop.py --config config.yaml --draws 5    of five draws of the data, pooled in one report
    python loop.py --resume runs/config                                  go on with a stopped one

A resumed run walks the same lines: run.stage and run.train hand back what is finished.
"""
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import nn

import classifier
import data
import ddpm
from classifier import balanced_weights
from data import DataError, ImageSet
from engine.command import launch
from engine.run import Progress, Run
from extras import (draws, estimate, external, few_labels,
                    measures, networks, outcome)
from extras.children import (
    REASONS, Candidates, Kit, children_used, copied,
    from_model, from_noise, kept, make_kit, recoloured)
from guidance import OBJECTIVES


class Arm(NamedTuple):
    """What an arm's students learn from: real images, and children of somebody's images."""
    child: Callable | None = None   # how they are made (extras/children.py); None: none are
    parents: str = "hard"           # hard, random (of the same cells), external, test
    hardness: bool = False          # steered toward what the students find hard, too
    real: str = "all"               # labels: no pseudo-labels; cells: these, even over groups
    filtered: bool = True           # False: photographs, whose label is true by construction


ARMS = {
    "real":     Arm(real="labels"),                     # before
    "balanced": Arm(real="cells"),
    "pseudo":   Arm(),                                  # needs data.labelled below 1
    "replay":   Arm(copied, filtered=False),            # the hard cases again
    "recolour": Arm(recoloured, filtered=False),        # the sceptic's arm
    "recolour_random": Arm(recoloured, parents="random", filtered=False),
    "noise":    Arm(from_noise),
    "noise_hard": Arm(from_noise, hardness=True),       # arXiv 2310.00158
    "external": Arm(copied, parents="external"),        # made elsewhere
    "random":   Arm(from_model, parents="random"),      # no mining, no hardness
    "guided":   Arm(from_model, hardness=True),         # after
    "leaked":   Arm(from_model, parents="test", hardness=True),     # for show
}
PLAIN = {None, copied, recoloured}     # all others want the diffusion model
OURS = "hard", "random"                 # parents of train itself


# ---- the experiment --------------------------------------------------------------------------

def experiment(run: Run) -> None:
    """One run, from the images to the report."""
    c = run.config
    # 1. Split by lesion. Val chooses; test is scored once, at the end, and chooses nothing.
    splits = data.load(c.data, run.cache, Progress("data"))
    splits |= few_labels.hide(c.data, splits)
    splits |= external.load_made(c, splits["train"])
    splits |= estimate.doubts(c, splits)
    arms = outcome.begin(run, splits, ARMS)
    makers = {a: arm for a, arm in arms.items() if arm.child}
    drawing = [a for a in makers if makers[a].child not in PLAIN]
    estimate.tell(run, splits["train"], arms, drawing)

    # 2. Val chooses the strength of colour jitter, for all students.
    jitter, scores = networks.choose_jitter(run, splits, student, predict)

    # 3. Few labels: images whose class teachers are sure of join train.
    train, seen, guesses = few_labels.guess(
        run, splits, jitter, student, predict, mixed)
    splits["train"] = train

    # 4. On train alone: the diffusion model, its guide, the filter's judge.
    weights = mixed(run, train)[1]
    generator = (networks.train_generator(run, train, seen, weights)
                 if drawing else None)
    judge = student(run, "judge", train, weights, run.seed("judge"), jitter)
    keep = Filter(run, judge, seen, splits)

    # 5. A round: mine what fails for students that never saw it, make children, filter them.
    count = round(c.loop.added * len(train) / c.loop.rounds) or 1
    made = {name: [] for name in makers}
    used, rounds, first = [], [], None
    for number in range(1, c.loop.rounds + 1):
        synthetic = kept(made.get("guided"), count)
        students, probs = cross_fit(run, number, train, synthetic, jitter)
        first = first or (students, probs)
        if not makers:
            break
        mined = run.stage(f"mined_{number}", mine, run, train, probs,
                          round(count * c.loop.surplus), synthetic, number)
        for name, arm in makers.items():
            kit = make_kit(run, name, number, train, generator, students)
            parents = parents_for(kit, arm, mined, splits, first[0])
            made[name].append(make(kit, arm, keep, *parents))
        used.append(as_many_each(makers, made, count))
        rounds.append(outcome.of_round(run, train, probs, students, made))
    added = children_used(made, used)

    # 6. Retrain: each arm from the same starts, as long, with as many added images. Then test.
    def students_of(a):
        images, weights = mixed(run, train, added.get(a), arms[a].real)
        return [student(run, f"student_{a}_{s}", images, weights,
                        run.seed("student", s), jitter)
                for s in range(c.loop.seeds)]
    retrained = run.shared(students_of, arms)
    finals = dict(zip(arms, retrained))
    arrays = outcome.predict(run, splits, finals, first[0], predict)
    outcome.end(run, splits, arrays, made, used, added, keep,
                generator, students, first[1], student, mixed, jitter,
                rounds=rounds, jitter_scores=scores, pseudo=guesses)


# ---- students --------------------------------------------------------------------------------

def student(run: Run, name: str, images: ImageSet, weights: np.ndarray,
            seed: int, jitter: float) -> nn.Module:
    """A student trained to the end of its schedule; a seed is the same start in every arm."""
    k = run.config.classifier
    network = networks.new_resnet(run, images, seed)
    arrays = images.images, images.labels, weights
    return run.train(name, network, classifier.train, *map(run.tensor, arrays),
                     steps=k.steps, batch=k.batch, lr=k.lr,
                     jitter=jitter, seed=seed, names=images.sources)


def predict(run: Run, network: nn.Module, images: np.ndarray) -> np.ndarray:
    """Class probabilities, (N, C), of uint8 images (N, 3, H, W)."""
    return classifier.predict(network, run.tensor(images), run.bf16)


def mixed(run: Run, train: ImageSet, added: ImageSet | None = None,
          real: str = "all") -> tuple[ImageSet, np.ndarray]:
    """What an arm learns from, and how often each image is drawn: `loop.share` of a batch is
    added images, the rest real; classes even in each, with real = "cells" groups too."""
    if real != "all":
        train = train.subset(~train.guessed)
    cells = train.groups if real == "cells" else None
    weights = balanced_weights(train.labels, cells)
    if train.guessed.any():
        weights = few_labels.weights(train)
    if not added:
        return train, weights
    share = run.config.loop.share
    of_added = share * balanced_weights(added.labels)
    weights = np.append((1 - share) * weights, of_added)
    return train.extend(added), weights


def cross_fit(run: Run, number: int, train: ImageSet,
              synthetic: ImageSet | None, jitter: float):
    """Student k learns from all folds but k, synthetic images too: a child has its parent's
    fold, so both are on one side. Returns the students, and (N, C) every training image's
    probabilities by the one that never saw its lesion."""
    def without(k):
        others = train.subset(train.folds != k)
        added = synthetic and synthetic.subset(synthetic.folds != k)
        images, weights = mixed(run, others, added, "labels")
        return student(run, f"crossfit_{number}_{k}", images, weights,
                       run.seed("crossfit", number, k), jitter)
    folds = range(run.config.data.folds)
    students = run.shared(without, folds)
    shape = len(train), len(train.class_names)
    probs = np.zeros(shape, np.float32)
    for k, one in enumerate(students):
        unseen = train.folds == k
        probs[unseen] = predict(run, one, train.images[unseen])
    return students, probs


# ---- mining and making -----------------------------------------------------------------------

def mine(run: Run, images: ImageSet, probs: np.ndarray, count: int,
         synthetic: ImageSet | None, *words):
    """`count` parents among `images` and the group to carry each to, (count,) each: the wrong and
    the unsure, or, by guidance.targets, any, to fill the rarest cells."""
    c = run.config
    if c.guidance.targets == "groups":
        seed = run.seed("even", *words)
        return few_labels.even_parents(images, synthetic, count, seed)
    margin = data.margins(probs, images)
    pool = np.flatnonzero(margin < c.loop.margin)
    if len(pool) == 0:
        raise DataError("no hard case: the students are right about every "
                        "image; raise loop.margin")
    seed = run.seed("mine", *words)
    parents = data.hard_parents(pool, images, count, seed)
    seed = run.seed("targets", *words)
    return parents, data.other_groups(images.subset(parents), seed)


def parents_for(kit: Kit, arm: Arm, mined, splits: dict, students):
    """(source, parents, targets): whose images an arm has children of, and for which group."""
    hard, targets = mined
    if arm.parents == "hard":
        return kit.train, hard, targets
    if arm.parents == "random":     # of the same class x group; guesses for guesses
        kinds = 2 * data.cells(kit.train) + kit.train.guessed
        return kit.train, data.matched(kinds, hard, kit.seed), targets
    source = splits[arm.parents]
    if arm.parents == "external":
        some = external.in_round(kit, source)
        return source, some, np.full(len(some), -1)
    # Naive, for show: hard cases mined on the test set itself.
    votes = [predict(kit.run, one, source.images) for one in students]
    probs = np.mean(votes, axis=0)
    return source, *mine(kit.run, source, probs, len(hard), None, "leak", kit.number)


def make(kit: Kit, arm: Arm, keep: "Filter", source: ImageSet,
         chosen: np.ndarray, targets: np.ndarray) -> Candidates:
    """A child of each of source[chosen], and what the filter says of it: every arm's images."""
    objectives = dict(kit.run.config.guidance.objectives)
    if not arm.hardness:
        objectives["hardness"] = 0.0
    parents = source.subset(chosen)
    drawn = arm.child(kit, parents, targets, objectives)
    groups = np.where(targets < 0, parents.groups, targets)
    children = replace(parents, images=drawn.images, groups=groups)
    said = keep(arm, children, drawn.finite)
    return Candidates(children, chosen, targets, *said, drawn.nonfinite_gradients)


class Filter:
    """For what was generated: the judge must agree with the label, near-copies are dropped."""

    def __init__(self, run: Run, judge: nn.Module,
                 seen: ImageSet, splits: dict):
        self.run, self.judge, self.seen = run, judge, seen
        self.too_near = measures.copy_distance(splits["val"], seen)
        self.held_out = partial(external.held_out, self, splits)

    def __call__(self, arm: Arm, children: ImageSet, finite):
        """(judge, distance, rejected_by), (N,) each: see Candidates."""
        probs = predict(self.run, self.judge, children.images)
        distance, _ = measures.nearest(children.images, self.seen.images)
        why = np.zeros(len(children), np.int64)
        if arm.filtered:
            if arm.parents == "external":       # may know val and test
                distance[self.held_out(children.images)] = 0
            why[distance <= self.too_near] = REASONS.index("copy")
            why[probs.argmax(1) != children.labels] = REASONS.index("judge")
            finite = np.broadcast_to(finite, why.shape)
            why[~finite] = REASONS.index("nonfinite")
        image = np.arange(len(why))
        return probs[image, children.labels], distance, why


def as_many_each(makers: dict, made: dict, most: int) -> dict:
    """Which children of the last round each arm adds, {name: index into them}: of every class x
    group cell as many in all arms, the first that passed. Of others' images as many of a class."""
    last = {name: made[name][-1] for name in makers}
    passed, cells, used = {}, {}, {}
    for name, m in last.items():
        if m.rejected_by.all():
            raise DataError(f"arm {name}: no image passed the filter: "
                            f"{outcome.tally(m.rejected_by)}")
        passed[name] = np.flatnonzero(m.rejected_by == 0)
        cells[name] = data.cells(m.children)[passed[name]]
    groups = 1 + len(m.children.group_names)
    size = len(m.children.class_names) * groups
    ours = [a for a in makers if makers[a].parents in OURS]
    kinds = [cells[a] for a in ours or makers]
    quota = data.least_of_each(kinds, size, most)
    if not quota.any():
        raise DataError("no cell is in all arms: raise loop.surplus")

    for name, index in passed.items():
        kinds, wanted = cells[name], quota
        if name not in ours:            # of a class, whatever the group
            kinds = kinds // groups
            wanted = quota.reshape(-1, groups).sum(1)
        some = [index[kinds == k][:n] for k, n in enumerate(wanted)]
        used[name] = np.sort(np.concatenate(some))
    print(f"added, of {most}:", {a: len(i) for a, i in used.items()})
    return used


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    known = {"loop.arms": (*ARMS, "all"), "guidance.objectives": OBJECTIVES,
             "guidance.sampler": ddpm.SAMPLERS}     # names that the config may hold
    return launch(experiment, known, argv, draws.pool)


if __name__ == "__main__":
    sys.exit(main())
