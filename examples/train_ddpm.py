"""Train the diffusion model alone; draw every class on every group from pure noise.

    python examples/train_ddpm.py --config config.yaml                       into ddpm.png
    python examples/train_ddpm.py --config config.yaml --sampler dpm --steps 20 --out dpm.png
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
from engine.augment import to_uint8
from engine.command import one_line
from engine.run import Progress, pick_device, save_picture
from engine.training import Noise, seeded
from extras.pictures import by_class_and_group
from unet import UNet


def samples(c, real, sampler, steps):
    """An image of every class x group by a model trained on `real`, an ImageSet; an ImageSet."""
    device, T, S = pick_device(c.loop.device), c.ddpm.T, c.data.size
    times, schedule = ddpm.even_times(steps, T - 1), ddpm.Schedule(T, c.ddpm.schedule, device)
    network = seeded(c.loop.seed, UNet, S, len(real.class_names), len(real.group_names),
                     c.unet.width, tuple(c.unet.multipliers), c.unet.blocks,
                     c.unet.attention, c.unet.patch).to(device)
    arrays = (torch.tensor(a, device=device) for a in (real.images, real.labels, real.groups))
    progress = Progress("ddpm")
    ddpm.train(network, schedule, *arrays, steps=c.ddpm.steps, batch=c.ddpm.batch, lr=c.ddpm.lr,
               ema_decay=c.ddpm.ema, prediction=c.ddpm.prediction, drop=c.ddpm.drop,
               seed=c.loop.seed, on_step=lambda step, last, loss: progress(step, last))

    groups = range(len(real.group_names)) if real.group_names else [-1]
    asked = np.array([(y, g) for y in range(len(real.class_names)) for g in groups])
    y, g = torch.tensor(asked.T, device=device)
    noise = Noise(range(len(asked)), device)           # a stream an image
    model = ddpm.eps_model(network, schedule, y, g, prediction=c.ddpm.prediction)
    x = ddpm.SAMPLERS[sampler](model, schedule, noise(3, S, S), times, noise)
    blank = real.subset(np.zeros(len(asked), int))          # to be filled in
    return replace(blank, images=to_uint8(x).cpu().numpy(), labels=asked[:, 0], groups=asked[:, 1])


@one_line("train_ddpm.py")
def main(argv=None):
    asked = parser("train_ddpm.py", __doc__)
    asked.add_argument("--sampler", choices=ddpm.SAMPLERS, default="ddim")
    asked.add_argument("--steps", type=int, default=50, help="of the sampler")
    asked.add_argument("--out", type=output(".png"), default="ddpm.png", help="the picture")
    arguments = asked.parse_args(argv)
    c = configuration.load(arguments.config, arguments.set)
    if not 1 <= arguments.steps <= c.ddpm.T:
        asked.error(f"--steps: found {arguments.steps}, write 1 to ddpm.T, {c.ddpm.T}")
    train = data.load(c.data)["train"]
    made = samples(c, train, arguments.sampler, arguments.steps)
    save_picture(arguments.out, by_class_and_group(train, made, each=1, words=("real", "made")))
    print(f"wrote {arguments.out}: a row a class, a pair a group, real and from pure noise by "
          f"{arguments.sampler} in {arguments.steps} steps")


if __name__ == "__main__":
    main()
