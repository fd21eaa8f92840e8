"""What a finished run's students say of your own photographs: a csv, a line an image.

    python examples/predict.py runs/NAME DIR --out probabilities.csv

The mean over the students of arm `guided`, or of `real` where there is none. It is no diagnosis.
"""
import argparse
import csv
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finished import Finished

from datasets import images as files
from datasets.layouts import DataError, Listing, Row
from engine.command import one_line
from engine.run import Progress, write_bytes
from extras.external import photos


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run, runs/NAME")
    parser.add_argument("folder", type=Path, help="images at any depth below it")
    parser.add_argument("--out", type=Path, default=Path("probabilities.csv"))
    arguments = parser.parse_args(argv)
    with one_line("predict.py"):
        root, finished = arguments.folder, Finished(arguments.run)
        rows = [Row(file.relative_to(root).as_posix(), "", path=file)
                for file in photos(root, "folder")]
        images, unreadable = files.decode_all(
            Listing(rows, (), ()), finished.run.config.data.size, progress=Progress("images"))
        if unreadable:
            raise DataError("{} cannot be decoded ({})".format(*unreadable[0]))
        arm = "guided" if "guided" in finished.arms else "real"
        probs = finished.predict(finished.students(arm), images).mean(0)       # (N, C)
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["image", *finished.class_names])
        table.writerows([row.image, *(f"{value:.6f}" for value in prob)]
                        for row, prob in zip(rows, probs))
        write_bytes(arguments.out, text.getvalue().encode())
        print(f"wrote {arguments.out}: {len(rows)} images, the students of arm '{arm}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
