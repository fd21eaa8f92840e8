"""The forward process: one image at ten noise levels, and what a trained model sees in each.

    python examples/forward.py runs/NAME [--image 0] [--out forward.png]
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finished import Finished, parser
from shown import sheet

from ddpm import eps_model
from engine.augment import to_float, to_uint8
from engine.command import one_line
from engine.training import Noise


def main(argv=None):
    p = parser(__doc__, "forward.png")
    p.add_argument("--image", type=int, default=0, help="which one of val")
    arguments = p.parse_args(argv)
    with one_line("forward.py"):
        finished = Finished(arguments.run)
        val = finished.splits()["val"]
        unet, _, schedule, prediction, bf16 = finished.generator(val)
        if not 0 <= arguments.image < len(val):
            raise ValueError(f"--image {arguments.image}: write 0 to {len(val) - 1}")

        # The same noise at ten levels, all in one batch.
        ten, device = [arguments.image] * 10, schedule.betas.device
        t = torch.linspace(0, schedule.T - 1, 10, device=device).long()
        x0, y, g = (torch.tensor(a[ten], device=device) for a in (val.images, val.labels,
                                                                  val.groups))
        x0, eps = to_float(x0), Noise([0] * 10, device)(*x0.shape[1:])
        x_t = schedule.q_sample(x0, t, eps)
        model = eps_model(unet, schedule, y, g, prediction=prediction, bf16=bf16)
        x0_hat = schedule.predict_x0(x_t, t, model(x_t, t)).clamp(-1, 1)

        print("  t   sqrt(abar)   x0_hat is off by (grey levels)")
        off = 127.5 * (x0_hat - x0).abs().mean((1, 2, 3))
        for level, left, levels in zip(t, schedule.abar(t, x0).sqrt().flatten(), off):
            print(f"{level:4d}     {left:.3f}     {levels:6.1f}")
        sheet(arguments.out, [to_uint8(a).cpu().numpy() for a in (x_t, x0_hat)],
              ("x_t", "x0_hat"), [[f"t = {level}" for level in t]] * 2)
        print(f"wrote {arguments.out}: above x_t, below x0_hat clipped")


if __name__ == "__main__":
    main()
