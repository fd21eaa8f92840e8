"""Score a finished run's students on another data set: an external test.

    python benchmarks/score_on.py runs/NAME --on configs/ham10000.yaml --set data.root=PATH

Seconds to minutes: the images are decoded and scored, nothing is trained.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

for folder in ("", "examples"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
import data
from finished import Finished

from data import DataError, ImageSet
from datasets import layouts
from engine import config as configuration
from engine.command import Parser, one_line
from engine.config import Config
from engine.run import Progress, RunError, digests, mapping, write_bytes
from extras import measures, outcome, report


def score_on(folder: Path, name: str, other: Config) -> dict:
    """Score a finished run's students on all images of another data set, as an external test.

    Classes and groups are matched by name, in any case; images of other classes are left out, and
    so are those that the run learnt or chose from, by its seen.json: the same pixels in any split
    but its test, whatever its folder holds today, and where that very folder is scored other
    photographs of those lesions too. Thresholds are the run's own. Writes
    folder/external_<name>.json and returns what stands in it.
    """
    finished, progress = Finished(folder), Progress("images")
    c, p, cache = finished.run.config, finished.predictions, folder.parent / "cache"
    other = other.replace("data", size=c.data.size)
    images = whole(other.data, cache / f"on_{name}_{c.data.size}", progress)
    progress.end()

    pixels, lesions = known(finished)
    learnt = np.isin(digests(images.images), pixels)
    same = other.data.root and Path(other.data.root).resolve() == Path(c.data.root).resolve()
    sisters = ~learnt & np.isin(images.lesions, lesions if same else [])
    labels = matched(images.class_names, finished.class_names)[images.labels]
    keep = ~learnt & ~sisters & (labels >= 0)
    if not keep.any():
        raise DataError(f"--on {name}: nothing is left to score; its classes are "
                        f"{', '.join(images.class_names)}, the run's "
                        f"{', '.join(finished.class_names)}")
    test = replace(images.subset(keep), labels=labels[keep], class_names=finished.class_names,
                   malignant=p["malignant"].tolist())
    groups = p["group_names"].tolist()
    groups += [g for g in images.group_names if matched([g], groups)[0] < 0]
    p |= {"group_names": np.array(groups, str),
          "subtype_names": np.array([], str), "test_subtypes": np.full(len(test), -1),
          "test_labels": test.labels, "test_lesions": test.lesions,
          "test_groups": np.append(matched(images.group_names, groups), -1)[test.groups],
          "test_reference": finished.predict([f"crossfit_1_{k}" for k in range(c.data.folds)],
                                             test.images)}
    p |= {f"test_probs_{arm}": finished.predict(finished.students(arm), test.images)
          for arm in finished.arms}
    settings = {key: getattr(c.evaluate, key) for key in ("min_count", "draws", "margin")}
    absent = np.bincount(test.labels, minlength=len(finished.class_names)) == 0
    scored = measures.everything(p, **settings)
    for arm, entry in scored["arms"].items():
        entry["added"] = finished.results["arms"][arm]["added"]
    found = {"run": folder.name, "on": name, "learnt_from": int(learnt.sum()),
             "other_photographs": int(sisters.sum()),
             "unmapped": {n: int((images.labels[labels < 0] == i).sum()) for i, n in
                          enumerate(images.class_names) if (images.labels[labels < 0] == i).any()},
             "absent": [n for n, none in zip(finished.class_names, absent) if none],
             "config": {"evaluate": settings}, "splits": {"test": outcome.counts(test)}, **scored}
    write_bytes(folder / f"external_{name}.json", (json.dumps(found, indent=1) + "\n").encode())
    return found


def known(finished: Finished) -> tuple[list[str], list[str]]:
    """Digests of the images that the run learnt or chose from, and their lesions: all but test."""
    path = finished.run.folder / "seen.json"
    seen = mapping(path)
    try:
        if seen["fingerprint"] != finished.run.fingerprint:
            raise LookupError("it is another run's")
        parts = [seen[name] for name in seen if name not in ("fingerprint", "test")]
        if any(len(seen[name]["pixels"]) != finished.results["splits"][name]["images"]
               for name in ("val", "test")):
            raise LookupError("it holds other splits")
        return (sum((part["pixels"] for part in parts), []),
                sum((part["lesions"] for part in parts), []))
    except (LookupError, TypeError) as error:
        raise RunError(f"{path}: cannot tell which images the run learnt from ({error}); run it "
                       "again") from None


def whole(c, cache: Path, progress: Progress) -> ImageSet:
    """All images of one data set, not split. c: the config's section data."""
    if c.kind == "phantom":
        parts = [data.load_phantom(c, name, getattr(c, name)) for name in layouts.SPLITS]
        return parts[0].extend(parts[1]).extend(parts[2])
    return data.load_files(c, cache, progress)[0]


def matched(names, wanted: list[str]) -> np.ndarray:
    """Where each name stands among the wanted ones, in any case, -1 if nowhere: (len(names),)."""
    lower = [w.lower() for w in wanted]
    return np.array([lower.index(n.lower()) if n.lower() in lower else -1 for n in names], np.int64)


ALL = {report.said(metric): ("all", metric) for metric in report.FULL}


def told(found: dict) -> str:
    """What `score_on` found, as text: who was left out, then the tables with their intervals."""
    unmapped = ", ".join(f"{name} {count}" for name, count in found["unmapped"].items())
    return (f"{found['splits']['test']['images']} images of {found['on']}, scored by the students "
            f"of {found['run']}; left out: {found['learnt_from']} that the run learnt or chose "
            f"from (the same pixels), {found['other_photographs']} of the same lesions, and the "
            f"classes that it does not know: {unmapped or 'none'}; its classes "
            f"without an image there: {', '.join(found['absent']) or 'none'}\n\n"
            + report.markdown([*report.arm_table(found, "All of them", ALL),
                               *report.first_table(found)]))


def main(argv: list[str] | None = None) -> int:
    """The command line; whatever is wrong ends in one line and status 2."""
    parser = Parser("score_on.py", __doc__)
    parser.add_argument("run", type=Path, help="a finished run, runs/NAME")
    parser.add_argument("--on", type=Path, required=True, help="the config of another data set")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    arguments = parser.parse_args(argv)
    with one_line("score_on.py"):
        other = configuration.load(arguments.on, arguments.set)
        try:
            print(told(score_on(arguments.run, arguments.on.stem, other)))
        except (LookupError, TypeError, AttributeError) as error:
            raise RunError(f"{arguments.run}: results.json or predictions.npz is damaged "
                           f"({type(error).__name__}: {error}); run it again") from error
        print(f"wrote {arguments.run}/external_{arguments.on.stem}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
