"""How an arm's images are made of their parents: one function a way, named in loop.ARMS.

It takes (kit, parents, targets, objectives) and returns guidance.Drawn, an image of each parent.
targets: the group to carry each to, (N,), or -1; objectives: name -> scale to steer by."""
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import nn

from data import ImageSet
from datasets.skin import recolour
from engine.run import Run, derive
from guidance import Drawn, Generator, synthesise

BATCH = 128     # images synthesised together: bounds memory; each has a random stream of its own


class Kit(NamedTuple):
    """What children are made with, in one round."""
    run: Run
    name: str                       # of the arm and the round
    seed: int
    train: ImageSet
    generator: Generator | None
    students: list[nn.Module]


def make_kit(run: Run, name: str, number: int, train: ImageSet, generator, students) -> Kit:
    """The kit of arm `name` in round `number`. Its seed's words: as in all published figures."""
    words = ("synthesis", number) if name in ("guided", "leaked") else (name, number - 1)
    return Kit(run, f"{name}_{number}", run.seed(*words), train, generator, students)


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
    run, c, parts = kit.run, kit.run.config.guidance, []
    start = start or c.start
    if start == "recoloured":
        images = recolour(kit.train, parents, targets, run.seed("recoloured"))
        parents, start = replace(parents, images=images), "parent"
    elif start == "counterfactual" and not parents.group_names:
        start = "parent"
    seeds = np.array([derive(kit.seed, i) for i in range(len(parents))])
    progress = run.progress(kit.name)
    for first in range(0, len(parents), BATCH):
        part = np.arange(first, min(first + BATCH, len(parents)))
        parts.append(run.stage(f"{kit.name}_{first}", synthesise, kit.generator, kit.students,
                               parents.subset(part), targets[part], seeds[part], c, start=start,
                               objectives=objectives))
        progress(first + len(part), len(parents))
    progress.end()
    images, finite, dropped = zip(*parts)
    return Drawn(np.concatenate(images), np.concatenate(finite), sum(dropped))
