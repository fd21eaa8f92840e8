"""Train the diffusion model alone; draw every class on every group from pure noise.

    python examples/train_ddpm.py --config config.yaml                       into ddpm.png
    python examples/train_ddpm.py --config config.yaml --sampler dpm --steps 20 --out dpm.png
    python examples/train_ddpm.py --config config.yaml --overfit-one-batch

The last is the first test of any training: the same batch 200 times, and the loss must fall to a
tenth.
"""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import ddpm
from arguments import output, parser
from engine import config as configuration
from engine.augment import to_float, to_uint8
from engine.command import one_line
from engine.run import Progress, pick_bf16, pick_device, save_picture
from engine.training import Noise, fit, seeded
from extras.pictures import by_class_and_group
from unet import UNet


def prepared(c, real):
    """An untrained network for `real`, an ImageSet, its schedule, and the arrays to learn from."""
    device = pick_device(c.loop.device)
    network = seeded(c.loop.seed, UNet, c.data.size, len(real.class_names), len(real.group_names),
                     c.unet.width, tuple(c.unet.multipliers), c.unet.blocks,
                     c.unet.attention, c.unet.patch).to(device)
    arrays = [torch.tensor(a, device=device) for a in (real.images, real.labels, real.groups)]
    return network, ddpm.Schedule(c.ddpm.T, c.ddpm.schedule, device), arrays


def samples(c, real, sampler, steps):
    """An image of every class x group by a model trained on `real`, an ImageSet. Returns one."""
    times = ddpm.even_times(steps, c.ddpm.T - 1)
    (network, schedule, arrays), progress = prepared(c, real), Progress("ddpm")
    device, S = schedule.betas.device, c.data.size
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


def overfit(c, real, steps=200):
    """The losses on one batch, always the same, noise and levels too: the first test of a training.
    32 images are enough to see it."""
    network, schedule, (images, y, g) = prepared(c, real.subset(range(min(32, c.ddpm.batch))))
    device, progress = schedule.betas.device, Progress("one batch")

    def loss(batch, generator):
        generator.manual_seed(0)                # in every step the same
        return ddpm.loss(network, schedule, to_float(images), y, g, generator,
                         prediction=c.ddpm.prediction)
    return fit(network, lambda generator: torch.arange(len(images), device=device), loss,
               steps=steps, lr=c.ddpm.lr, seed=0, device=device, record=False,
               bf16=pick_bf16(c.loop.bf16, device),
               on_step=lambda step, last, loss: progress(step, last))


@one_line("train_ddpm.py")
def main(argv=None):
    asked = parser("train_ddpm.py", __doc__)
    asked.add_argument("--sampler", choices=ddpm.SAMPLERS, default="ddim")
    asked.add_argument("--steps", type=int, default=50, help="of the sampler")
    asked.add_argument("--overfit-one-batch", action="store_true", help="200 steps on one batch")
    asked.add_argument("--out", type=output(".png"), default="ddpm.png", help="the picture")
    arguments = asked.parse_args(argv)
    c = configuration.load(arguments.config, arguments.set)
    if not 1 <= arguments.steps <= c.ddpm.T:
        asked.error(f"--steps: found {arguments.steps}, write 1 to ddpm.T, {c.ddpm.T}")
    train = data.load(c.data)["train"]
    if arguments.overfit_one_batch:
        losses = overfit(c, train)
        print("loss of every 20 steps on one batch:", *(f"{loss:.3f}" for loss in losses))
        return
    made = samples(c, train, arguments.sampler, arguments.steps)
    save_picture(arguments.out, by_class_and_group(train, made, each=1, words=("real", "made")))
    print(f"wrote {arguments.out}: a row a class, a pair a group, real and from pure noise by "
          f"{arguments.sampler} in {arguments.steps} steps")


if __name__ == "__main__":
    main()
