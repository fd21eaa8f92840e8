"""How long a run will take on this machine, from a few timed steps of each kind."""
import time

import torch

import classifier
import ddpm
from data import ImageSet
from engine.run import Run, clock
from extras import networks
from extras.few_labels import TEACHERS


def tell(run: Run, train: ImageSet, arms: int, drawing: int) -> None:
    """Print it. arms: how many the run has; drawing: how many of them want the diffusion model."""
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
        return (spent[2] - spent[1]) / (100 if cuda else 4)
    diffusion = timed(ddpm.train, unet, schedule, x, labels, none, batch=c.ddpm.batch, drop=0.0,
                      ema_decay=0.9, prediction="v", compiled=c.loop.compile)
    learning = timed(classifier.train, resnet, x, labels, torch.ones(len(x), device=run.device),
                     batch=c.classifier.batch, jitter=0.1)

    students = (len(c.classifier.jitter) * (len(c.classifier.jitter) > 1) + 2
                + c.data.folds * c.loop.rounds + arms * (c.loop.seeds + c.loop.rounds - 1)
                + TEACHERS * (c.data.labelled < 1))
    images = drawing * c.loop.added * c.loop.surplus * len(train)
    guide = c.ddpm.steps if c.ddpm.classifier_weight else c.classifier.guide_steps
    # evaluations a step: inverting, decoding, about two more for guidance's gradients; each is a
    # third of a training step, which goes back as well
    evaluations = 3 + (c.guidance.start == "counterfactual") + (c.guidance.classifier_free != 1)
    seconds = 30 + c.classifier.steps * students * learning + (drawing > 0) * (
        c.ddpm.steps * diffusion + guide * learning * 1.3
        + images * c.guidance.steps * evaluations * diffusion / c.ddpm.batch / 3)
    print(f"this will take about {clock(seconds)} on this machine", flush=True)
