"""What a finished run's students say of your own photographs: a csv, a line an image.

    python examples/predict.py runs/NAME DIR                              images at any depth below
    python examples/predict.py runs/NAME PHOTO.jpg --out answer.csv       a single one

The mean over the students of arm `guided`, or of `real` where there is none. It is no diagnosis.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arguments import output
from finished import Finished

from datasets import images as files
from datasets.layouts import DataError, Listing, Row
from engine.command import Parser, one_line
from engine.run import Progress, csv_bytes, write_bytes
from extras.external import photos


@one_line("predict.py")
def main(argv: list[str] | None = None) -> int:
    parser = Parser("predict.py", __doc__)
    parser.add_argument("run", type=Path, help="a finished run, runs/NAME")
    parser.add_argument("images", type=Path, help="a photograph, or a folder of them")
    parser.add_argument("--out", type=output(".csv"), default="probabilities.csv")
    arguments = parser.parse_args(argv)
    root, out, finished = arguments.images, arguments.out, Finished(arguments.run)
    header = ["image", *finished.class_names]
    if out.exists() and not out.read_bytes().startswith(csv_bytes([header])):
        raise DataError(f"--out {out}: a file that this did not write; choose another name")

    found = [root] if root.is_file() else photos(root, "images")
    base = root.parent if root.is_file() else root
    rows = [Row(file.relative_to(base).as_posix(), "", path=file) for file in found]
    images, unreadable = files.decode_all(
        Listing(rows, (), ()), finished.run.config.data.size, progress=Progress("images"))
    if unreadable:
        raise DataError("{} cannot be decoded ({})".format(*unreadable[0]))
    arm = "guided" if "guided" in finished.arms else "real"
    probs = finished.predict(finished.students(arm), images).mean(0)       # (N, C)

    answers = [[row.image, *(f"{value:.6f}" for value in prob)] for row, prob in zip(rows, probs)]
    write_bytes(out, csv_bytes([header, *answers]))
    print(f"wrote {out}: {len(rows)} images, the students of arm '{arm}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
