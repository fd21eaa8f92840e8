"""What a run tells: its data at the start, each round, and at the end predictions.npz,
results.json, synthetic/, pictures/ and the report."""
import csv
import hashlib
import io
import json
from functools import reduce

import numpy as np
import torch

import classifier
import data
from data import ImageSet
from engine.augment import to_float
from engine.run import Run, derive, environment, save_picture
from evaluate import balanced_accuracy
from extras import measures, pictures, report

REASONS = "kept", "nonfinite", "judge", "copy"      # what rejected a child; 0: nothing


def counts(s: ImageSet) -> dict:
    """{"images": n, "lesions": n, "groups": {name: images}, "classes": {name: images}}; of groups
    one is "unknown" where some image has none."""
    groups = [*enumerate(s.group_names)] + [(-1, "unknown")] * bool((s.groups == -1).any())
    return {"images": len(s), "lesions": len(np.unique(s.lesions)),
            "groups": {name: int((s.groups == i).sum()) for i, name in groups},
            "classes": {name: int((s.labels == i).sum()) for i, name in enumerate(s.class_names)}}


def described(splits: dict[str, ImageSet]) -> str:
    """What each set holds, a line a set, as text for the terminal."""
    lines = []
    for name, s in splits.items():
        c = counts(s)
        parts = {**c["classes"], **{f"group {group}": n for group, n in c["groups"].items()}}
        lines.append(f"{name}: {c['images']} images of {c['lesions']} lesions: "
                     + ", ".join(f"{part} {n}" for part, n in parts.items()))
    sick = [name for name, malignant in zip(s.class_names, s.malignant) if malignant]
    return "\n".join([*lines, f"malignant: {', '.join(sick)}"])


def leaked_share(splits: dict[str, ImageSet]) -> dict[str, float]:
    """The share of test images whose lesion also stands in train: over "all", and by class."""
    test = splits["test"]
    seen = np.isin(test.lesions, splits["train"].lesions)
    return {"all": float(seen.mean())} | {test.class_names[c]: float(seen[test.labels == c].mean())
                                          for c in np.unique(test.labels)}


def begin(run: Run, splits: dict, table: dict) -> dict:
    """Say and show what there is. Returns the arms of `table` that the config names, in the table's
    order; "all" stands for every one that can be run, but for `leaked`."""
    c, train, leak = run.config, splits["train"], leaked_share(splits)
    print(f"device {run.device}{', bf16' * run.bf16}; run folder {run.folder}")
    print(described(splits), *train.notes, sep="\n")
    run.log("data", **{name: counts(s) for name, s in splits.items()})
    if leak["all"]:
        print("every number below is optimistic (data.split_by: image): the share of test images "
              "whose lesion is also in train is "
              + ", ".join(f"{name} {share:.0%}" for name, share in leak.items()))
    pictures.draw(run, "data", pictures.by_class_and_group, train)
    possible = {"external": bool(c.guidance.external), "pseudo": c.data.labelled < 1,
                "leaked": False}
    arms = {name: arm for name, arm in table.items() if name in c.loop.arms
            or "all" in c.loop.arms and possible.get(name, True)}
    if not train.group_names:
        if c.guidance.start == "counterfactual":
            print("no groups: a counterfactual would be the image itself, so guidance.start is "
                  "'parent'")
        if arms.pop("balanced", None):
            print("arm 'balanced' left out: without groups it is 'real', even over classes")
    return arms


def kept(made: list, most: int) -> ImageSet | None:
    """What has passed the filter so far, at most so many of a round; made: loop.Candidates."""
    sets = [m.children.subset(np.flatnonzero(m.rejected_by == 0)[:most]) for m in made]
    return reduce(ImageSet.extend, sets) if sets else None


def tally(rejected_by: np.ndarray) -> dict[str, int]:
    return {reason: int((rejected_by == i).sum()) for i, reason in enumerate(REASONS)}


def of_round(run: Run, number: int, splits: dict, probs: np.ndarray, most: int, students: list,
             made: dict, student, mixed, jitter: float) -> dict:
    """The round's entry in results.json. probs: (N, C) out of fold; most: images it is to add;
    made: loop.Candidates by arm and round; student, mixed: the functions of loop.py."""
    train, val = splits["train"], splits["val"]
    margin = data.margins(probs, train)
    entry = {"round": number, "hard": int((margin < run.config.loop.margin).sum()),
             "wrong": int((margin < 0).sum())}
    if made.get("guided"):
        m = made["guided"][-1]
        votes = np.zeros((len(m.children), len(train.class_names)), np.float32)
        for k, own in enumerate(students):      # by the one that never saw the parent
            of = m.children.folds == k
            votes[of] = classifier.predict(own, run.tensor(m.children.images[of]), run.bf16)
        rejected, answers = tally(m.rejected_by), data.margins(votes, m.children)
        entry |= {"parents": len(np.unique(m.parents)), "candidates": len(m.children),
                  "kept": rejected.pop("kept"), "rejected": rejected,
                  "nonfinite_gradients": m.nonfinite_gradients,
                  "hardness": {"parents_wrong": float((margin[m.parents] < 0).mean()),
                               "children_wrong": float((answers < 0).mean())},
                  "judge_agrees": float((m.rejected_by != REASONS.index("judge")).mean())}
        write_synthetic(run, train, made["guided"], most)
        if number < run.config.loop.rounds:     # the last round's students are the arms
            one = student(run, f"round_{number}", *mixed(run, train, kept(made["guided"], most)),
                          run.seed("student", 0), jitter)
            found = classifier.predict(one, run.tensor(val.images), run.bf16)
            entry["val_balanced_accuracy"] = balanced_accuracy(found, val.labels)
    print(json.dumps(entry), flush=True)
    return entry


def write_synthetic(run: Run, train: ImageSet, made: list, most: int) -> None:
    """synthetic/<class>/*.png, a folder data set, and synthetic.csv: the guided images of every
    round so far that passed the filter, and their origin; about.json says what they are."""
    folder = run.folder / "synthetic"
    for name in train.class_names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = [("image", "parent", "class", "group", "fold", "judge", "distance", "seed")]
    for number, m in enumerate(made, start=1):
        for i in np.flatnonzero(m.rejected_by == 0)[:most]:
            name = train.class_names[m.children.labels[i]]
            file = f"{name}/{number}_{i:05d}.png"
            if not (folder / file).exists():
                save_picture(folder / file, pictures.one(m.children.images[i]))
            rows.append((file, m.children.sources[i], name, pictures.group_of(train, m.targets[i]),
                         m.children.folds[i], f"{m.judge[i]:.4f}", f"{m.distance[i]:.2f}",
                         derive(run.seed("synthesis", number), i)))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    run.write("synthetic/synthetic.csv", text.getvalue())
    content = [(folder / file).read_bytes() for file, *_ in rows[1:]] + [text.getvalue().encode()]
    about = {"what": "drawn by a diffusion model: all that the filter passed, not selected by hand",
             "images": len(rows) - 1, "config_and_data": run.fingerprint,
             "content_sha256": hashlib.sha256(b"".join(content)).hexdigest()}
    run.write("synthetic/about.json", json.dumps(about, indent=1) + "\n")


def predict(run: Run, splits: dict, finals: dict, reference: list, predict) -> dict:
    """The arrays of predictions.npz: every arm's students (finals), and the `reference` students,
    which belong to none, on val and test."""
    train = splits["train"]
    arrays = {f"{split}_probs_{arm}": np.stack([predict(run, one, splits[split].images)
                                                for one in students])
              for arm, students in finals.items() for split in ("val", "test")}
    for split in ("val", "test"):
        s = splits[split]
        arrays[f"{split}_reference"] = np.stack([predict(run, one, s.images) for one in reference])
        arrays |= {f"{split}_{key}": getattr(s, key)
                   for key in ("labels", "groups", "subtypes", "lesions", "sources")}
    return arrays | {
        "class_names": np.array(train.class_names), "malignant": np.array(train.malignant),
        "group_names": np.array(train.group_names, dtype=str),
        "subtype_names": np.array(train.subtype_names, dtype=str), "arms": np.array(list(finals)),
        "seeds": np.arange(run.config.loop.seeds), "optimistic": np.array(list(finals)) == "leaked"}


def end(run: Run, splits: dict, predictions: dict, made: dict, added: dict, keep, generator,
        students: list, first_probs: np.ndarray, student, jitter: float, *,
        rounds: list, jitter_scores: dict, pseudo: dict) -> None:
    """Write all files of a finished run, and say the verdict."""
    c, buffer = run.config, io.BytesIO()
    np.savez_compressed(buffer, **predictions)
    run.write("predictions.npz", buffer.getvalue())
    if rounds:
        last = predictions["val_probs_guided" if "guided" in made else "val_probs_real"]
        rounds[-1]["val_balanced_accuracy"] = float(np.mean(
            [balanced_accuracy(p, splits["val"].labels) for p in last]))
    rejected = {arm: np.concatenate([m.rejected_by for m in of]) for arm, of in made.items()}
    results = {
        "format": report.FORMAT, "name": run.folder.name, "fingerprint": run.fingerprint,
        "config": report.private(c.as_dict()), "environment": environment(run),
        "splits": {name: counts(s) for name, s in splits.items()},
        "notes": list(splits["train"].notes), "leak": leaked_share(splits), "pseudo": pseudo,
        "jitter": {"chosen": jitter, "val_balanced_accuracy": jitter_scores}, "rounds": rounds,
        "filter": {arm: {"candidates": len(of)} | tally(of) for arm, of in rejected.items()},
        "generator": quality(run, splits, added, keep, student, jitter),
        **measures.everything(predictions, min_count=c.evaluate.min_count, draws=c.evaluate.draws)}
    for arm, entry in results["arms"].items():
        entry["added"] = len(added.get(arm, ()))
    pictures.draw_all(run, splits["train"], made, keep.seen, generator, students, first_probs,
                      REASONS)
    run.write("results.json", json.dumps(measures.rounded(results), indent=1) + "\n")
    report.write(run.folder)
    print(results["verdict"])
    if "leaked" in added and "guided" in added:
        naive, clean = (results["arms"][a]["test"]["all"]["accuracy"]["value"]
                        for a in ("leaked", "guided"))
        print(f"optimistic: mined on the test set, the naive protocol reports {naive:.1%} accuracy "
              f"where the clean one has {clean:.1%}, {100 * (naive - clean):+.1f} points")
    print(f"report: {run.folder / 'report.md'} and {run.folder / 'report.html'}")


def quality(run: Run, splits: dict, added: dict, keep, student, jitter: float) -> dict:
    """The generated images in the features of a critic that no arm uses, with val as the floor; on
    the phantom it learns from a further, large draw and is the oracle of the labels."""
    if not added:
        return {}
    c, oracle = run.config, run.config.data.kind == "phantom"
    source = (data.load_phantom(c.data, "oracle", c.evaluate.oracle) if oracle else
              splits["train"].subset(~splits["train"].guessed))
    critic = student(run, "critic", source, classifier.balanced_weights(source.labels),
                     run.seed("critic"), jitter)
    sets = {arm: s for arm, s in added.items() if arm in ("guided", "random", "noise", "external")}
    return measures.generator_quality(
        lambda x: extract_features(critic, run.tensor(x)),
        lambda x: classifier.predict(critic, run.tensor(x), run.bf16).argmax(1),
        {**sets, "real (val)": splits["val"]}, splits["test"], keep.seen.images,
        run.seed("quality"), oracle=oracle)


@torch.no_grad()
def extract_features(network: classifier.ResNet, images: torch.Tensor) -> np.ndarray:
    """The pooled features of clean uint8 images (N, 3, H, W): (N, D) float32."""
    return torch.cat([network.features(to_float(part)).float().cpu()
                      for part in images.split(500)]).numpy()
