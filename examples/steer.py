"""The same noise under classifier-free guidance 0, 1 and 3, and what the guide would change.

    python examples/steer.py runs/NAME [--scales 0 1 3] [--out steer.png]
"""
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
from guidance import class_evidence, gradient, normalise


def main(argv=None):
    p = parser(__doc__, "steer.png")
    p.add_argument("--scales", type=float, nargs="+", default=[0, 1, 3])
    arguments = p.parse_args(argv)
    with one_line("steer.py"):
        finished = Finished(arguments.run)
        val = finished.splits()["val"]
        unet, guide, schedule, prediction, bf16 = finished.generator(val)
        names, device = val.class_names, schedule.betas.device
        y = torch.arange(2 * len(names), device=device) // 2            # two of each class
        x_T = Noise(range(len(y)), device)(*val.images.shape[1:])
        times, rows = even_times(16, schedule.T - 1), []
        for scale in arguments.scales:
            model = eps_model(unet, schedule, y, torch.full_like(y, -1), prediction=prediction,
                              bf16=bf16, scale=scale)
            x = to_uint8(sample_ddim(model, schedule, x_T, times))
            rows.append(x.cpu().numpy())
            probs = finished.predict(finished.students("real")[:1], rows[-1])[0]
            right = (probs.argmax(1) == y.cpu().numpy()).mean()
            print(f"guidance {scale:g}: a student sees the class asked for in {right:.0%}")

        # The guide's gradient of log p(y | x_t) half way, a grey level for a sixteenth of its size.
        model = eps_model(unet, schedule, y, torch.full_like(y, -1), prediction=prediction,
                          bf16=bf16)
        x_t = sample_ddim(model, schedule, x_T, times[:9])
        t = torch.full_like(y, times[8])
        grad = gradient(class_evidence(guide, y), schedule, x_t, t, model(x_t, t))
        rows += [to_uint8(normalise(grad) / 4).cpu().numpy()]
        words = [f"scale {scale:g}" for scale in arguments.scales] + ["gradient"]
        sheet(arguments.out, rows, words, [[names[i] for i in y]] * len(rows))
        print(f"wrote {arguments.out}: a row a scale, then the guide's gradient at t = {times[8]}")


if __name__ == "__main__":
    main()
