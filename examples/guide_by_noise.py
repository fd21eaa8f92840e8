"""How much of the class a guide can still tell at every noise level.

    python examples/guide_by_noise.py runs/NAME [--out guide_by_noise.png]
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finished import Finished, parser
from shown import sheet

from engine.augment import to_float, to_uint8
from engine.command import one_line
from engine.training import Noise
from evaluate import balanced_accuracy


def main(argv=None):
    arguments = parser(__doc__, "guide_by_noise.png").parse_args(argv)
    with one_line("guide_by_noise.py"):
        finished = Finished(arguments.run)
        val = finished.splits()["val"]
        _, guide, schedule, _, _ = finished.generator(val)
        device = schedule.betas.device
        x0 = to_float(torch.tensor(val.images, device=device))
        eps = Noise(range(len(val)), device)(*x0.shape[1:])
        levels, strip, captions = torch.linspace(0, schedule.T - 1, 10).long().tolist(), [], []
        print(f"balanced accuracy of the guide on {len(val)} images of val, "
              f"chance {1 / len(val.class_names):.2f}")
        for level in levels:
            t = torch.full((len(x0),), level, device=device)
            x_t = schedule.q_sample(x0, t, eps)
            with torch.no_grad():
                parts = zip(x_t.split(500), t.split(500))
                probs = torch.cat([guide(*part).softmax(1) for part in parts]).cpu().numpy()
            found = balanced_accuracy(probs, val.labels)
            print(f"  t = {level:3d}: {found:.3f}")
            strip.append(to_uint8(x_t[:4]).cpu().numpy())
            captions.append(f"{level}: {found:.2f}")
        rows = [torch.stack([torch.tensor(s[i]) for s in strip]).numpy() for i in range(4)]
        sheet(arguments.out, rows, captions=[[], [], [], captions])
        print(f"wrote {arguments.out}: four images, below them t and the guide's accuracy there")


if __name__ == "__main__":
    main()
