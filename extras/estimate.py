"""What is said before anything is trained: how long it will take, and doubts about the data."""
import time
from dataclasses import replace

import numpy as np
import torch

import classifier
import ddpm
from data import ImageSet
from datasets.layouts import NO_LESIONS, first_ten
from engine.run import Run, clock
from extras import measures, networks
from extras.few_labels import TEACHERS


def tell(run: Run, train: ImageSet, arms: dict, drawing: list[str]) -> None:
    """Print it, and what is done already; run.plan: the seconds of every stage, in their order.
    drawing: the names of the arms that want the diffusion model."""
    run.plan = plan = {}
    c, cuda = run.config, run.device.type == "cuda"
    x, labels = run.tensor(train.images[:c.ddpm.batch]), run.tensor(train.labels[:c.ddpm.batch])
    unet, resnet = networks.new_unet(run, train, 0), networks.new_resnet(run, train, 0)
    schedule, none = ddpm.Schedule(c.ddpm.T, c.ddpm.schedule, run.device), labels * 0 - 1

    def timed(train, *args, **settings):    # one more: a GPU's first steps compile and record
        spent = []
        for steps in (1, 10, 110) if cuda else (1, 1, 5):
            begun = time.monotonic()
            train(*args, **settings, steps=steps, lr=0.0, seed=0, bf16=run.bf16)
            spent.append(time.monotonic() - begun)
        return max(0.0, spent[2] - spent[1]) / (100 if cuda else 4)
    diffusion = timed(ddpm.train, unet, schedule, x, labels, none, batch=c.ddpm.batch, drop=0.0,
                      ema_decay=0.9, prediction="v", compiled=c.loop.compile)
    learning = timed(classifier.train, resnet, x, labels, torch.ones(len(x), device=run.device),
                     batch=c.classifier.batch, jitter=0.1)

    # inverting, decoding, two more for guidance; each a third of a training step, which goes back
    evaluations = 3 + (c.guidance.start == "counterfactual") + (c.guidance.classifier_free != 1)
    synthesis = (c.loop.added * c.loop.surplus * len(train) * c.guidance.steps * evaluations
                 * diffusion / c.ddpm.batch / 3)
    student, strengths = c.classifier.steps * learning, c.classifier.jitter
    plan |= {f"jitter_{s:g}": student for s in strengths if len(strengths) > 1}
    plan |= {f"teacher_{s}": student for s in range(TEACHERS) if c.data.labelled < 1}
    if drawing and c.ddpm.classifier_weight:      # the guide learns with it
        plan["ddpm"] = c.ddpm.steps * (diffusion + learning * 1.3)
    elif drawing:
        plan |= {"ddpm": c.ddpm.steps * diffusion, "guide": c.classifier.guide_steps * learning}
    plan["judge"] = student
    for number in range(1, c.loop.rounds + 1):
        plan |= {f"crossfit_{number}_{k}": student for k in range(c.data.folds)}
        plan |= {f"{name}_{number}": synthesis / c.loop.rounds for name in drawing}
    plan |= {f"student_{name}_{s}": student for name in arms for s in range(c.loop.seeds)}
    plan |= {f"round_{number}_{name}": student for number in range(1, c.loop.rounds)
             for name in arms if arms[name].child}
    plan |= {"critic": student} if any(arm.child for arm in arms.values()) else {}
    plan["report"] = 30.0

    # One after another: what stands before a stored one is done too.
    done = max((i for i, name in enumerate(plan, 1) if run.path(name).exists()), default=0)
    print(f"this will take about {clock(sum(plan.values()))} on this machine, {len(plan)} stages"
          + f"; {done} are done, about {clock(sum([*plan.values()][done:]))} left" * bool(done))


def doubts(c, splits: dict) -> dict:
    """{"train": the same, with notes}: of classes too rare for a verdict and, where no lesion is
    known, of images in two splits that are the same but for a turn, a mirror or their storing."""
    test, most = splits["test"], c.evaluate.min_count
    counts = {name: len(np.unique(test.lesions[test.labels == y]))
              for y, name in enumerate(test.class_names)}
    notes = [f"test has {n} lesions of {name} where {most} are wanted (evaluate.min_count): no "
             "verdict possible" for name, n in counts.items() if n < most]
    pairs = [("val", "train"), ("test", "train"), ("test", "val")]
    for a, b in pairs if NO_LESIONS in splits["train"].notes else ():
        distance, index = measures.nearest(splits[a].images, splits[b].images)
        twins = [f"{splits[a].sources[i]} = {splits[b].sources[index[i]]}"
                 for i in np.flatnonzero(distance <= measures.SAME)]
        notes += [f"images of {a} that are one of {b}, turned, mirrored or stored anew: "
                  f"{len(twins)}: {first_ten(twins)}"] * bool(twins)
    return {"train": replace(splits["train"], notes=(*splits["train"].notes, *notes))}
