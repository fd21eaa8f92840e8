"""One lesion on every skin type: inverted under its own, decoded under each other.

    python examples/skins.py runs/NAME [--image 0] [--out skins.png]
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finished import Finished, parser
from shown import sheet

from datasets.skin import border_colour
from engine.command import one_line
from guidance import synthesise


def main(argv=None):
    p = parser(__doc__, "skins.png")
    p.add_argument("--image", type=int, default=0, help="which one of val")
    arguments = p.parse_args(argv)
    with one_line("skins.py"):
        finished = Finished(arguments.run)
        val, c = finished.splits()["val"], finished.run.config.guidance
        groups = len(val.group_names)
        if groups < 2:
            raise ValueError(f"{arguments.run}: its images have no groups; wanted two or more")
        if not 0 <= arguments.image < len(val):
            raise ValueError(f"--image {arguments.image}: write 0 to {len(val) - 1}")
        parent = val.subset([arguments.image] * groups)
        steer = {"class_evidence": c.objectives["class_evidence"]}
        drawn = synthesise(finished.generator(val), [], parent, np.arange(groups),
                           np.arange(groups), c, start="counterfactual", objectives=steer)

        # How light the skin at the border became: from I, the lightest, it should fall.
        light = border_colour(drawn.images).mean(1)
        meant = [border_colour(val.images[val.groups == g]).mean() for g in range(groups)]
        own = val.group_names[parent.groups[0]]
        print(f"a {val.class_names[parent.labels[0]]} of type {own}; the skin's mean grey level:")
        for name, found, real in zip(val.group_names, light, meant):
            print(f"  carried to {name:>3}: {found:5.0f}   real images of that type: {real:5.0f}")
        change = drawn.images.astype(int) - parent.images
        sheet(arguments.out, [np.concatenate([parent.images[:1], drawn.images]),
                              np.concatenate([parent.images[:1] * 0 + 128,
                                              (128 + change / 2).astype(np.uint8)])],
              ("image", "change"), [[f"real, {own}", *val.group_names]] * 2)
        print(f"wrote {arguments.out}: the photograph, then the lesion on every type")


if __name__ == "__main__":
    main()
