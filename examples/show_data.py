"""Show a data set: how many images of each class and group, what was left out, a contact sheet.

    python examples/show_data.py --config config.yaml                        into runs/data.png
    python examples/show_data.py --config config.yaml --out sheet.png
    python examples/show_data.py --config configs/ham10000.yaml --set data.root=PATH
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from arguments import output, parser
from datasets.layouts import NO_LESIONS
from engine import config as configuration
from engine.command import one_line
from engine.run import Progress, save_picture
from extras.estimate import doubts
from extras.outcome import described, leaked_share
from extras.pictures import by_class_and_group


@one_line("show_data.py")
def main(argv=None):
    asked = parser("show_data.py", __doc__)
    asked.add_argument("--out", type=output(".png"), default="runs/data.png")
    arguments = asked.parse_args(argv)
    c, out = configuration.load(arguments.config, arguments.set), arguments.out

    # Split by lesion; decoded images are kept beside the picture.
    splits = data.load(c.data, cache=out.with_suffix(""), progress=Progress("data"))
    splits |= doubts(c, splits)
    save_picture(out, by_class_and_group(splits["train"]))

    print(described(splits), *splits["train"].notes, sep="\n")
    leaked = [f"{name} {share:.0%}" for name, share in leaked_share(splits).items()]
    if NO_LESIONS in splits["train"].notes:
        leaked = ["unknown: every image counts as a lesion of its own"]
    print("share of test images whose lesion is also in train:", ", ".join(leaked))
    print(f"wrote {out}: training images, a row a class, columns by group")


if __name__ == "__main__":
    main()
