"""How true are counterfactuals? Ways to carry a lesion to another skin, against the phantom's own
picture of that lesion there.

    python loop.py --config config.yaml && python benchmarks/counterfactuals.py runs/config

Takes the diffusion model and the critic of a finished run on the phantom. For 64 parents of each
class: the distance to the truth (root mean square in grey levels, median; its floor is a second
picture by the phantom), how often the critic, an oracle of the labels, finds the parent's class,
and the mean difference of neighbouring pixels, which a student notices. Two minutes on two cores.
"""
import functools
import sys
import time
from pathlib import Path

import numpy as np

for folder in ("", "examples"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
import classifier
import data
import ddpm
import guidance
from finished import Finished
from truth import carry

from datasets import phantom
from datasets.skin import recolour
from engine.augment import to_float, to_uint8
from engine.command import Parser, one_line
from engine.run import Run
from engine.training import Noise
from extras import few_labels, networks


def trained(run: Run):
    """train, model(y, group, scale) -> an eps_model of the diffusion model, schedule, critic."""
    c, splits = run.config, data.load(run.config.data)
    train = (splits | few_labels.hide(c.data, splits))["train"]
    if c.data.kind != "phantom":
        raise ValueError(f"data.kind is {c.data.kind}: only the phantom knows the truth")
    unet, critic = networks.new_unet(run, train, 0), networks.new_resnet(run, train, 0)
    for name, network, inside in (("ddpm", unet, "unet."), ("critic", critic, "")):
        stored = run.load(name, run.device)
        if stored is None:
            raise ValueError(f"{run.path(name)} is missing: python loop.py --resume {run.folder}")
        weights = stored["network"]
        if any(key.startswith("unet.") for key in weights):     # Class-N-Diff: beside its guide
            weights = {key.removeprefix(inside): value for key, value in weights.items()
                       if key.startswith(inside)}
        network.load_state_dict(weights)
        network.eval()
    schedule = ddpm.Schedule(c.ddpm.T, c.ddpm.schedule, run.device)

    def model(y, group, scale=1.0):
        return ddpm.eps_model(unet, schedule, y, group, scale=scale,
                              prediction=c.ddpm.prediction, bf16=run.bf16)
    return train, model, schedule, critic


def told(run: Run, critic, labels, truth, name: str, make) -> None:
    """Print the row of what make() returns: uint8 (N, 3, H, W), or a tensor in [-1, 1]."""
    begun = time.monotonic()
    made = make()
    made = made if isinstance(made, np.ndarray) else to_uint8(made.float()).cpu().numpy()
    seconds, made = time.monotonic() - begun, np.ascontiguousarray(made)
    off = np.sqrt(np.square(made.astype(np.float32) - truth).mean((1, 2, 3)))
    answers = classifier.predict(critic, run.tensor(made), run.bf16).argmax(1)
    texture = np.abs(np.diff(made.astype(np.float32), axis=3)).mean()
    print(f"| {name} | {np.median(off):.1f} | {(answers == labels).mean():.1%} | {texture:.1f} | "
          f"{seconds:.1f} |", flush=True)


def compare(run: Run) -> None:
    """The table, a row a way."""
    train, model, schedule, critic = trained(run)
    c, rng = run.config.data, np.random.default_rng(0)
    index = np.concatenate([rng.choice(np.flatnonzero(train.labels == label), 64)
                            for label in range(len(train.class_names))])
    parents = train.subset(index)
    targets = data.other_groups(parents, 0)
    drawn = np.array([int(source.rsplit("-", 1)[-1]) for source in parents.sources])
    seed = phantom.stream_seed(c.seed, "train")
    truth = carry(c.train, c.size, seed, drawn, targets)
    again = carry(c.train, c.size, seed, drawn, targets, shot=1)
    gained = recolour(train, parents, targets, 0)
    y, own, target = (run.tensor(a) for a in (parents.labels, parents.groups, targets))
    x0, x0_gained = to_float(run.tensor(parents.images)), to_float(run.tensor(gained))
    row = functools.partial(told, run, critic, parents.labels, truth)

    print("| way | off the truth | critic agrees | texture | seconds |\n| --- | --- | --- | --- "
          "| --- |")
    row("the truth", lambda: truth)
    row("the truth again: floor", lambda: again)
    row("the parent itself", lambda: parents.images)
    row("recoloured", lambda: gained)
    for depth in (0.5, 0.7, 0.85, 0.95, 1.0):
        for scale in (1.0, 2.0):
            row(f"inverted to {depth:g}, scale {scale:g}", lambda: guidance.counterfactual(
                model(y, own), model(y, target, scale), schedule, x0, depth, 16))
    for depth in (0.3, 0.85):
        row(f"recoloured, inverted as the target to {depth:g}", lambda: guidance.counterfactual(
            model(y, target), model(y, target), schedule, x0_gained, depth, 16))
    for strength in (0.1, 0.3, 0.5, 0.7):
        row(f"recoloured, noised to {strength:g}, scale 2", lambda: guidance.variation(
            model(y, target, 2.0), schedule, x0_gained,
            Noise(range(len(y)), run.device), strength, 16))


def main() -> None:
    parser = Parser("counterfactuals.py", __doc__)
    parser.add_argument("run", type=Path, help="a finished run on the phantom")
    with one_line("counterfactuals.py"):
        compare(Finished(parser.parse_args().run).run)


if __name__ == "__main__":
    main()
