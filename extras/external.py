"""Images from elsewhere: made by another generator, as an arm of a run; and others' photographs,
scored by the students of a finished run.

    python evaluate.py runs/NAME --on configs/other.yaml
    python classifier.py --predict DIR --checkpoint runs/NAME
"""
import csv
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import classifier
from engine import config as configuration
import data
from datasets import layouts as datasets
import evaluate
from extras import report
from engine.config import Config
from data import DataError, ImageSet
from datasets.layouts import Listing, Row
from engine.run import Progress, RunError, RunFolder, write_bytes
from engine.training import seeded


def photos(root: Path, key: str) -> list[Path]:
    """Every image file at any depth below `root`. Raises DataError that names the key."""
    if not root.is_dir():
        raise DataError(f"{key}: {root} is no folder; write one that holds images")
    found = [path for path in datasets.files_below(root)
             if path.suffix.lower() in datasets.SUFFIXES]
    if not found:
        raise DataError(f"{key}: {root} holds no {', '.join(datasets.SUFFIXES)}")
    return found


def load_made(path: str, like: ImageSet, size: int) -> ImageSet:
    """Labelled images made elsewhere, with the classes and groups of `like`, (N, 3, size, size).

    path: a folder root/<class>/*, root/<class>/<group>/*, or a csv of image (a path below the
    csv's folder), class and group (may be empty). Raises one DataError that lists every problem.
    """
    root, key = Path(path), "guidance.external"
    if root.is_file():
        columns = ("image", "class", "group")
        rows = [tuple(row[k] for k in columns) for row in datasets.read_csv(root, columns)]
        root = root.parent
    else:
        parts = [file.relative_to(root).parts for file in photos(root, key)]
        rows = [("/".join(part), *(*part[:-1], "", "")[:2]) for part in parts]
    problems, chosen, seen = [], [], set()
    for image, name, group in sorted(rows):
        file = root / image
        if image in seen:
            problems.append(f"{image} stands twice: keep one row")
        elif not file.is_file() or not file.resolve().is_relative_to(root.resolve()):
            problems.append(f"{image} is no file below {root.name}")
        elif name not in like.class_names:
            problems.append(f"{image} has class {name!r}: write one of "
                            f"{', '.join(like.class_names)}")
        elif group and group not in like.group_names:
            problems.append(f"{image} has group {group!r}: write one of "
                            f"{', '.join(like.group_names) or 'none, the data set has none'}")
        else:
            chosen.append(Row(image, name, group=group, path=file))
        seen.add(image)
    images, unreadable = data.decode_all(Listing(chosen, like.class_names, ()), size)
    problems += [f"{image} cannot be decoded ({reason})" for image, reason in unreadable]
    if problems:
        raise DataError(f"{key}: {path}: {len(problems)} problem(s): "
                        + datasets.first_ten(problems))
    labels = np.array([like.class_names.index(row.label) for row in chosen])
    groups = np.array([like.group_names.index(row.group) if row.group else -1 for row in chosen])
    names = np.array([f"external/{row.image}" for row in chosen])
    return ImageSet(images, labels, groups, names, np.full(len(names), -1), names, like.class_names,
                    like.group_names, like.malignant, subtype_names=like.subtype_names)


class Finished:
    """A finished run: its config, what it predicted, and its students on new images."""

    def __init__(self, folder: Path):
        for name in ("config.yaml", "results.json", "predictions.npz"):
            if not (folder / name).is_file():
                raise RunError(f"{folder}: no finished run, it has no {name}")
        self.config, self.run = configuration.load(folder / "config.yaml"), RunFolder(folder)
        with np.load(folder / "predictions.npz", allow_pickle=False) as stored:
            self.predictions = dict(stored)
        self.class_names = self.predictions["class_names"].tolist()
        self.arms = self.predictions["arms"].tolist()
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        if "owner" not in results:
            raise RunError(f"{folder}: its results.json is not one of this version; run it again")
        self.run.owner = results["owner"]
        self.bf16 = results["environment"]["precision"] == "bf16"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def predict(self, names: list[str], images: np.ndarray) -> np.ndarray:
        """Class probabilities by the students of these checkpoints: (students, N, C) float32."""
        c, found, x = self.config, [], torch.tensor(np.asarray(images), device=self.device)
        for name in names:
            stored = self.run.load(name, self.device)
            if stored is None:
                raise RunError(f"{self.run.checkpoints / name}.pt is missing: go on with "
                               f"python loop.py --resume {self.run.folder}")
            # seeded: the memory layout of the training, so the same digits
            student = seeded(0, lambda: classifier.build(
                c.classifier.network, c.data.size, len(self.class_names),
                published=bool(c.classifier.weights))).to(self.device)
            student.load_state_dict(stored["network"])
            found.append(classifier.predict(student, x, self.bf16))
        return np.stack(found)

    def students(self, arm: str) -> list[str]:
        """The names of an arm's checkpoints, one a seed."""
        return [f"student_{arm}_{seed}" for seed in self.predictions["seeds"]]


def score_on(folder: Path, name: str, other: Config) -> dict:
    """Score a finished run's students on all images of another data set, as an external test.

    Classes and groups are matched by name, in any case; images of other classes are left out, and
    so are those that the run learnt or chose from (the same pixels in any split but its test).
    Thresholds are the run's own. Writes folder/external_<name>.json and returns what stands in it.
    """
    finished, progress = Finished(folder), Progress("images")
    c, p, cache = finished.config, finished.predictions, folder.parent / "cache"
    own = data.load(**vars(c.data), cache=cache / f"{c.data.kind}_{c.data.size}", progress=progress)
    images = data.load_whole(**{**vars(other.data), "size": c.data.size}, progress=progress,
                             cache=cache / f"on_{name}_{c.data.size}")
    progress.end()

    def digests(some):
        return [hashlib.sha256(image.tobytes()).digest() for image in some.images]
    known = {digest for split in own if split != "test" for digest in digests(own[split])}
    learnt = np.array([digest in known for digest in digests(images)])
    labels = matched(images.class_names, finished.class_names)[images.labels]
    keep = ~learnt & (labels >= 0)
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
    settings = {"min_count": c.evaluate.min_count, "draws": c.evaluate.draws}
    absent = np.bincount(test.labels, minlength=len(finished.class_names)) == 0
    found = {"run": folder.name, "on": name, "learnt_from": int(learnt.sum()),
             "unmapped": {n: int((images.labels[labels < 0] == i).sum()) for i, n in
                          enumerate(images.class_names) if (images.labels[labels < 0] == i).any()},
             "absent": [n for n, none in zip(finished.class_names, absent) if none],
             "config": {"evaluate": settings}, "splits": {"test": data.counts(test)},
             **evaluate.score(p, **settings)}
    write_bytes(folder / f"external_{name}.json", (json.dumps(found, indent=1) + "\n").encode())
    return found


def matched(names, wanted: list[str]) -> np.ndarray:
    """Where each name stands among the wanted ones, in any case, -1 if nowhere: (len(names),)."""
    lower = [w.lower() for w in wanted]
    return np.array([lower.index(n.lower()) if n.lower() in lower else -1 for n in names], np.int64)


def told(found: dict) -> str:
    """What `score_on` found, as text: who was left out, then the tables with their intervals."""
    unmapped = ", ".join(f"{name} {count}" for name, count in found["unmapped"].items())
    return (f"{found['splits']['test']['images']} images of {found['on']}, scored by the students "
            f"of {found['run']}; left out: {found['learnt_from']} that the run learnt or chose "
            f"from, and the classes that it does not know: {unmapped or 'none'}; its classes "
            f"without an image there: {', '.join(found['absent']) or 'none'}\n\n"
            + report.markdown(report.before_and_after(found)))


def predict_folder(folder: str, run: Path, out: Path) -> None:
    """Write a csv of class probabilities, a line an image below `folder`: the mean over the
    students of arm `guided`, or of `real` where there is none. Raises DataError and RunError."""
    root, finished, progress = Path(folder), Finished(run), Progress("images")
    files = photos(root, "--predict")
    rows = [Row(file.relative_to(root).as_posix(), "", path=file) for file in files]
    images, unreadable = data.decode_all(Listing(rows, (), ()), finished.config.data.size,
                                         progress=progress)
    progress.end()
    if unreadable:
        raise DataError("--predict {}: {} cannot be decoded ({})".format(folder, *unreadable[0]))
    arm = "guided" if "guided" in finished.arms else "real"
    probs = finished.predict(finished.students(arm), images).mean(0)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [["image", *finished.class_names],
         *([row.image, *(f"{value:.6f}" for value in prob)] for row, prob in zip(rows, probs))])
    write_bytes(out, text.getvalue().encode())
    print(f"wrote {out}: {len(rows)} images, the mean over the students of arm '{arm}'")
