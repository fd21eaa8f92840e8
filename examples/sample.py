"""Images from pure noise by a finished run's diffusion model: of any class and group.

    python examples/sample.py runs/NAME --class mel --group VI --sampler dpm --steps 10 --guidance 2
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finished import Finished, index, parser
from shown import sheet

from ddpm import SAMPLERS, eps_model, even_times
from engine.augment import to_uint8
from engine.command import one_line
from engine.training import Noise


def main(argv=None):
    p = parser(__doc__, "sample.png")
    p.add_argument("--class", dest="label", help="without it, the model is not told one")
    p.add_argument("--group", help="likewise")
    p.add_argument("--sampler", choices=SAMPLERS, default="ddim")
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--guidance", type=float, default=1.0, help="classifier-free; 1 is none")
    p.add_argument("--count", type=int, default=16)
    arguments = p.parse_args(argv)
    with one_line("sample.py"):
        finished, count = Finished(arguments.run), arguments.count
        if count < 1:
            raise ValueError(f"--count {count}: write 1 or more")
        val = finished.splits()["val"]
        asked = ((val.class_names, arguments.label, "class"),
                 (val.group_names, arguments.group, "group"))
        y, g = (index(names, name, what) if name else -1 for names, name, what in asked)
        unet, _, schedule, prediction, bf16 = finished.generator(val)

        # A random stream an image: --count changes none of them.
        noise = Noise(range(count), schedule.betas.device)
        x_T = noise(*val.images.shape[1:])
        y, g = (torch.full((count,), told, device=x_T.device) for told in (y, g))
        model = eps_model(unet, schedule, y, g, prediction=prediction, bf16=bf16,
                          scale=arguments.guidance)
        times = even_times(arguments.steps, schedule.T - 1)
        x = to_uint8(SAMPLERS[arguments.sampler](model, schedule, x_T, times, noise)).cpu().numpy()
        sheet(arguments.out, [x[i:i + 8] for i in range(0, count, 8)])

        # What a student says of them; it is no oracle.
        said = finished.predict(finished.students("real")[:1], x)[0].argmax(1)
        print("a student sees", ", ".join(f"{name} {(said == i).sum()}"
                                          for i, name in enumerate(val.class_names)))
        print(f"wrote {arguments.out}: {count} of {arguments.label or 'any class'} on "
              f"{arguments.group or 'any group'}, {arguments.sampler} in {arguments.steps} steps")


if __name__ == "__main__":
    main()
