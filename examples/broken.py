"""What breaks if a line is wrong: the same noise, one line of the sampling changed a row.

    python examples/broken.py runs/NAME [--out broken.png]
"""
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finished import Finished, parser
from shown import sheet

from ddpm import eps_model, even_times, sample_ddim
from engine.augment import to_uint8
from engine.command import one_line
from engine.training import Noise
from guidance import gradient


def main(argv=None):
    arguments = parser(__doc__, "broken.png").parse_args(argv)
    with one_line("broken.py"):
        finished = Finished(arguments.run)
        val = finished.splits()["val"]
        unet, guide, schedule, prediction, bf16 = finished.generator(val)
        y = torch.arange(8, device=schedule.betas.device) % len(val.class_names)
        times, told = even_times(20, schedule.T - 1), {"prediction": prediction, "bf16": bf16}
        model = eps_model(unet, schedule, y, torch.full_like(y, -1), **told)
        strong = eps_model(unet, schedule, y, torch.full_like(y, -1), scale=8.0, **told)
        other = {"v": "eps", "eps": "v"}[prediction]
        mixed_up = eps_model(unet, schedule, y, torch.full_like(y, -1), prediction=other)

        def late(x, t):         # the level of the step before: one too many
            return model(x, torch.tensor(times, device=t.device)[[
                max(0, times.index(int(level)) - 1) for level in t]])

        def draw(model, sample=sample_ddim, clip=1.0):
            noise = Noise(range(8), y.device)
            return sample(model, schedule, noise(*val.images.shape[1:]), times, noise, clip)
        right = draw(model)
        rows = {"as it is": right, "wrong sign": draw(lambda x, t: -model(x, t)),
                "t one step off": draw(late),
                "t off by 1": draw(lambda x, t: model(x, (t - 1).clamp(min=0))),
                "eps for v": draw(mixed_up), "guidance 8": draw(strong),
                "8, no clip": draw(strong, clip=math.inf)}
        for name, x in rows.items():
            apart = 127.5 * (x.clamp(-1, 1) - right).abs().mean()
            print(f"{name:14}: {apart:5.1f} grey levels from the first row")

        # BatchNorm in train mode: who else is in the batch changes image 0's gradient.
        t = torch.full_like(y, schedule.T // 4)
        for mode in (False, True):
            guide.train(mode)
            one, two = (gradient(lambda x_t, t, _: guide(x_t, t).log_softmax(1)[:, 0], schedule,
                                 right[i], t[i], torch.zeros_like(right[i]))[0]
                        for i in ([0, 1], [0, 5]))
            print(f"guide in {'train' if mode else 'eval'} mode: another neighbour changes image "
                  f"0's gradient by {(one - two).norm() / one.norm():.0%}")
        sheet(arguments.out, [to_uint8(x).cpu().numpy() for x in rows.values()], list(rows))
        print(f"wrote {arguments.out}: a row a mistake")


if __name__ == "__main__":
    main()
