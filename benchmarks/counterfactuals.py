"""How true are counterfactuals? Ways to carry a lesion to another skin, against the phantom's own
picture of that lesion there.

    python loop.py --config config.yaml && python benchmarks/counterfactuals.py runs/config

Takes the diffusion model and the critic of a finished run on the phantom. For 64 parents of each
class: the distance to the truth (root mean square in grey levels, median; its floor is a second
picture by the phantom), how often the critic, an oracle of the labels, finds the parent's class,
and the mean difference of neighbouring pixels, which a student notices. Two minutes on two cores.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine import config as configuration
import data
import ddpm
import guidance
import loop
import mining
from engine.run import RunFolder
from engine.training import to_float, to_uint8


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run on the phantom")
    run = parser.parse_args().run
    e = loop.Experiment(configuration.load(run / "config.yaml"), RunFolder(run))
    e.prepare()
    e.train_generator()                     # read, not trained again
    critic = e.new_resnet(0)
    critic.load_state_dict(e.run.load("critic")["network"])
    train, c, rng = e.train, e.config.data, np.random.default_rng(0)
    index = np.concatenate([rng.choice(np.flatnonzero(train.labels == label), 64)
                            for label in range(len(train.class_names))])
    parents = train.subset(index)
    targets = mining.other_groups(parents, 0)
    truth = data.load_counterfactuals(c.size, c.seed, c.train, index, targets)
    again = data.load_counterfactuals(c.size, c.seed, c.train, index, targets, shot=1)
    gained = loop.recoloured(train, parents, targets, 0)
    y, own, target = (e.tensor(a) for a in (parents.labels, parents.groups, targets))
    x0, x0_gained = to_float(e.tensor(parents.images)), to_float(e.tensor(gained))
    noise = ddpm.Noise(list(range(len(y))), e.device)(*x0.shape[1:])

    def model(group, scale=1.0):
        return ddpm.eps_model(e.unet, e.schedule, y, group, scale=scale,
                              prediction=e.config.ddpm.prediction, bf16=e.bf16)

    def told(name, make):
        begun = time.monotonic()
        made = make()
        made = made if isinstance(made, np.ndarray) else to_uint8(made).cpu().numpy()
        seconds, made = time.monotonic() - begun, np.ascontiguousarray(made)
        off = np.sqrt(np.square(made.astype(np.float32) - truth).mean((1, 2, 3)))
        agrees = (e.predict(critic, made).argmax(1) == parents.labels).mean()
        texture = np.abs(np.diff(made.astype(np.float32), axis=3)).mean()
        print(f"| {name} | {np.median(off):.1f} | {agrees:.1%} | {texture:.1f} | {seconds:.1f} |",
              flush=True)
    print("| way | off the truth | critic agrees | texture | seconds |\n| --- | --- | --- | --- "
          "| --- |")
    told("the truth", lambda: truth)
    told("the truth again: floor", lambda: again)
    told("the parent itself", lambda: parents.images)
    told("recoloured", lambda: gained)
    for depth in (0.5, 0.7, 0.85, 0.95, 1.0):
        for scale in (1.0, 2.0):
            told(f"inverted to {depth:g}, scale {scale:g}", lambda: guidance.counterfactual(
                model(own), model(target, scale), e.schedule, x0, depth, 16))
    for depth in (0.3, 0.85):
        told(f"recoloured, inverted as the target to {depth:g}", lambda: guidance.counterfactual(
            model(target), model(target), e.schedule, x0_gained, depth, 16))
    for strength in (0.1, 0.3, 0.5, 0.7):
        told(f"recoloured, noised to {strength:g}, scale 2", lambda: guidance.variation(
            model(target, 2.0), e.schedule, x0_gained, noise, strength, 16))


if __name__ == "__main__":
    main()
