"""Train the diffusion model alone; draw every class on every group from pure noise.

    python examples/train_ddpm.py --config config.yaml [--sampler dpm] [--steps 20]
    python examples/train_ddpm.py --config config.yaml --overfit-one-batch

The second is the first test of any training: one batch, 200 steps, and the loss must fall below a
tenth of where it began.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import ddpm
from engine import config as configuration
from engine.augment import to_uint8
from engine.command import one_line
from engine.run import Progress, pick_bf16, pick_device, save_picture
from engine.training import Noise, seeded
from extras.pictures import by_class_and_group
from unet import UNet


def samples(c, real, sampler, steps):
    """An image of every class x group by a model trained on `real`, an ImageSet. Returns one."""
    device, T, S = pick_device(c.loop.device), c.ddpm.T, c.data.size
    times, schedule = ddpm.even_times(steps, T - 1), ddpm.Schedule(T, c.ddpm.schedule, device)
    network = seeded(c.loop.seed, UNet, S, len(real.class_names), len(real.group_names),
                     c.unet.width, tuple(c.unet.multipliers), c.unet.blocks,
                     c.unet.attention, c.unet.patch).to(device)
    arrays = (torch.tensor(a, device=device) for a in (real.images, real.labels, real.groups))
    progress = Progress("ddpm")
    losses = ddpm.train(network, schedule, *arrays, steps=c.ddpm.steps, batch=c.ddpm.batch,
                        lr=c.ddpm.lr, ema_decay=c.ddpm.ema, prediction=c.ddpm.prediction,
                        drop=c.ddpm.drop, seed=c.loop.seed, bf16=pick_bf16(c.loop.bf16, device),
                        on_step=lambda step, last, loss: progress(step, last))
    print(f"loss of the first 20 steps {losses[0]:.3f}, of the last {losses[-1]:.3f}")

    groups = range(len(real.group_names)) if real.group_names else [-1]
    asked = np.array([(y, g) for y in range(len(real.class_names)) for g in groups])
    y, g = torch.tensor(asked.T, device=device)
    noise = Noise(range(len(asked)), device)           # a stream an image
    model = ddpm.eps_model(network, schedule, y, g, prediction=c.ddpm.prediction)
    x = ddpm.SAMPLERS[sampler](model, schedule, noise(3, S, S), times, noise)
    blank = real.subset(np.zeros(len(asked), int))          # to be filled in
    return replace(blank, images=to_uint8(x).cpu().numpy(), labels=asked[:, 0], groups=asked[:, 1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--sampler", choices=ddpm.SAMPLERS, default="ddim")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--overfit-one-batch", action="store_true", help="200 steps on one batch")
    parser.add_argument("--out", type=Path, default=Path("ddpm.png"), help="the picture to write")
    arguments = parser.parse_args(argv)
    with one_line("train_ddpm.py"):
        c = configuration.load(arguments.config, arguments.set)
        train = data.load(c.data)["train"]
        if arguments.overfit_one_batch:
            train = train.subset(range(min(len(train), c.ddpm.batch)))
            c = c.replace("ddpm", steps=200)
        made = samples(c, train, arguments.sampler, arguments.steps)
        save_picture(arguments.out, by_class_and_group(train, made, each=1,
                                                       words=("real", "made")))
        print(f"wrote {arguments.out}: a row a class, a pair a group, real and from pure noise by "
              f"{arguments.sampler} in {arguments.steps} steps")


if __name__ == "__main__":
    main()
