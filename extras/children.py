"""How an arm's images are made of their parents: one function a way, named in loop.ARMS.

It takes (kit, parents, targets, objectives) and returns guidance.Drawn, an image of each parent.
targets: the group to carry each to, (N,), or -1; objectives: name -> scale to steer by."""
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import numpy as np
from torch import nn

from data import ImageSet
from datasets.skin import recolour
from engine.run import Run, derive
from guidance import Drawn, Generator, synthesise

BATCH = 128     # images synthesised together: bounds memory; each has a random stream of its own
REASONS = "kept", "nonfinite", "judge", "copy"      # what rejected a child; 0: nothing


class Candidates(NamedTuple):
    """One arm's children of a round, and what the filter said of each, (N,)."""
    children: ImageSet          # in their parents' folds, of the groups asked for
    parents: np.ndarray         # index into their source
    targets: np.ndarray         # the group asked for, -1 where there are none
    judge: np.ndarray           # the judge's probability of the class
    distance: np.ndarray        # to the nearest image seen, in grey levels
    rejected_by: np.ndarray     # index into REASONS
    nonfinite_gradients: int


def children_used(made: dict[str, list[Candidates]], used: list[dict[str, np.ndarray]]) -> dict:
    """{arm: what it adds} of the rounds in `used`: by round and arm an index into the children."""
    return {arm: reduce(ImageSet.extend, [m.children.subset(u[arm]) for m, u in zip(of, used)])
            for arm, of in made.items()}


def kept(made: list[Candidates] | None, most: int) -> ImageSet | None:
    """The children of all rounds so far that passed the filter, at most so many of a round."""
    sets = [m.children.subset(np.flatnonzero(m.rejected_by == 0)[:most])
            for m in made or []]
    return reduce(ImageSet.extend, sets) if sets else None


class Kit(NamedTuple):
    """What children are made with, in one round."""
    run: Run
    name: str                       # of the arm and the round
    seed: int
    train: ImageSet
    generator: Generator | None
    students: list[nn.Module]
    number: int = 1                 # of the round


def make_kit(run: Run, name: str, number: int, train: ImageSet, generator, students) -> Kit:
    """The kit of arm `name` in round `number`. Image i has the same noise in every arm, and all
    `random` parents are the same: what arms share by chance is in no difference of theirs."""
    return Kit(run, f"{name}_{number}", run.seed("children", number), train, generator, students,
               number)


def copied(kit: Kit, parents: ImageSet, targets: np.ndarray, objectives: dict) -> Drawn:
    """The parents again."""
    return Drawn(parents.images)


def recoloured(kit: Kit, parents: ImageSet, targets: np.ndarray, objectives: dict) -> Drawn:
    """Carried to the target group by one gain per channel."""
    return Drawn(recolour(kit.train, parents, targets, kit.seed))


def from_noise(kit: Kit, parents: ImageSet, targets: np.ndarray, objectives: dict) -> Drawn:
    """Other images of the parents' classes and the target groups."""
    return from_model(kit, parents, targets, objectives, "noise")


def from_model(kit: Kit, parents: ImageSet, targets: np.ndarray, objectives: dict[str, float],
               start: str = "") -> Drawn:
    """The parents' lesions, from `start` or, without it, guidance.start. Each batch is a stage: a
    stopped run loses one. Without groups a counterfactual is the image itself."""
    run, c = kit.run, kit.run.config.guidance
    start = start or c.start
    if start == "recoloured":
        images = recolour(kit.train, parents, targets, kit.seed)
        parents, start = replace(parents, images=images), "parent"
    elif start == "counterfactual" and not parents.group_names:
        start = "parent"
    seeds = np.array([derive(kit.seed, i) for i in range(len(parents))])
    progress = run.progress(kit.name)

    def batch(first):
        part = np.arange(first, min(first + BATCH, len(parents)))
        drawn = run.stage(f"{kit.name}_{first}", synthesise, kit.generator, kit.students,
                          parents.subset(part), targets[part], seeds[part], c, start=start,
                          objectives=objectives)
        progress(first + len(part), len(parents))
        return drawn
    parts = run.shared(batch, range(0, len(parents), BATCH))
    progress.end()
    images, finite, dropped = zip(*parts)
    return Drawn(np.concatenate(images), np.concatenate(finite), sum(dropped))
