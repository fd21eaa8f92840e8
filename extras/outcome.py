"""What a run tells: its data at the start, each round, and at the end predictions.npz,
results.json, synthetic/, pictures/ and the report."""
import hashlib
import io
import json

import numpy as np
import torch

import classifier
import data
from data import ImageSet
from engine.augment import to_float
from engine.run import Run, csv_bytes, derive, environment, save_picture
from evaluate import balanced_accuracy
from extras import measures, pictures, report
from extras.children import REASONS, children_used


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
    run.begin(splits)
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


def tally(rejected_by: np.ndarray) -> dict[str, int]:
    return {reason: int((rejected_by == i).sum()) for i, reason in enumerate(REASONS)}


def of_round(run: Run, train: ImageSet, probs: np.ndarray, students: list, made: dict) -> dict:
    """What the round's students say of images whose lesion they never saw: the margins (N,) of
    train, and of each arm's children. probs: (N, C) out of fold; made: Candidates by arm."""
    margin, children = data.margins(probs, train), {}
    for arm, of in made.items():
        s = of[-1].children
        if not np.isin(s.sources, train.sources).all():
            continue                    # of others' images: no fold knows them
        votes = np.zeros((len(s), len(train.class_names)), np.float32)
        for k, one in enumerate(students):
            unseen = s.folds == k
            images = run.tensor(s.images[unseen])
            votes[unseen] = classifier.predict(one, images, run.bf16)
        children[arm] = data.margins(votes, s)
    hard = float((margin < run.config.loop.margin).mean())
    print(f"{hard:.1%} of train is hard", flush=True)
    return {"hard out of fold": hard, "wrong out of fold": float((margin < 0).mean()),
            "margin": margin, "children": children}


def by_round(run: Run, splits: dict, rounds: list, made: dict, used: dict, predictions: dict,
             student, mixed, jitter: float) -> list[dict]:
    """The rounds of results.json: how hard the parents and children are that an arm used, and how
    its first student does on val with the images so far. rounds: of `of_round`."""
    val, entries = splits["val"], []

    def after(when):
        number, arm = when
        so_far = children_used({arm: made[arm]}, used[:number + 1])[arm]
        return student(run, f"round_{number + 1}_{arm}", *mixed(run, splits["train"], so_far),
                       run.seed("student", 0), jitter)
    times = [(number, arm) for number in range(len(rounds) - 1) for arm in made]
    early = dict(zip(times, run.shared(after, times)))
    for number, e in enumerate(rounds):
        entry = {key: e[key] for key in ("hard out of fold", "wrong out of fold")}
        parents, children, scores = {}, {}, {}
        for arm, of in made.items():
            here = used[number][arm]
            if arm in e["children"] and len(here):
                parents[arm] = float((e["margin"][of[number].parents[here]] < 0).mean())
                children[arm] = float((e["children"][arm][here] < 0).mean())
            if number + 1 < len(rounds):
                probs = classifier.predict(early[number, arm], run.tensor(val.images), run.bf16)
            else:
                probs = predictions[f"val_probs_{arm}"][0]
            scores[arm] = balanced_accuracy(probs, val.labels)
        entries.append(entry | {"parents wrong": parents, "children wrong": children,
                                "balanced accuracy on val": scores})
    return entries


def write_synthetic(run: Run, train: ImageSet, made: list, used: list[np.ndarray]) -> None:
    """synthetic/<class>/*.png, a folder data set, and synthetic.csv: the guided images that the arm
    added, and their origin; about.json: what they are. used: index into the children, by round."""
    folder = run.folder / "synthetic"
    for name in train.class_names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = [("image", "parent", "class", "group", "fold", "judge", "distance", "seed")]
    for number, m in enumerate(made, start=1):
        for i in used[number - 1]:
            name = train.class_names[m.children.labels[i]]
            file = f"{name}/{number}_{i:05d}.png"
            save_picture(folder / file, pictures.one(m.children.images[i]))
            rows.append((file, m.children.sources[i], name, pictures.group_of(train, m.targets[i]),
                         m.children.folds[i], f"{m.judge[i]:.4f}", f"{m.distance[i]:.2f}",
                         derive(run.seed("children", number), i)))
    for path in {*folder.glob("*/*.png")} - {folder / file for file, *_ in rows}:
        path.unlink()                   # of an earlier attempt with other settings
    listed = csv_bytes(rows)
    run.write("synthetic/synthetic.csv", listed)
    content = [(folder / file).read_bytes() for file, *_ in rows[1:]] + [listed]
    about = {"what": "drawn by a diffusion model, all that arm guided added: not selected by hand",
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


def end(run: Run, splits: dict, predictions: dict, made: dict, used: list, added: dict, keep,
        generator, students: list, first_probs: np.ndarray, student, mixed, jitter: float, *,
        rounds: list, jitter_scores: dict, pseudo: dict) -> None:
    """Write all files of a finished run, and say the verdict."""
    c, buffer = run.config, io.BytesIO()
    rounds = by_round(run, splits, rounds, made, used, predictions, student, mixed, jitter)
    run.alone()
    np.savez_compressed(buffer, **predictions)
    run.write("predictions.npz", buffer.getvalue())
    if "guided" in made:
        write_synthetic(run, splits["train"], made["guided"], [u["guided"] for u in used])
    rejected = {arm: np.concatenate([m.rejected_by for m in of]) for arm, of in made.items()}
    dropped = {arm: sum(m.nonfinite_gradients for m in of) for arm, of in made.items()}
    results = {
        "format": report.FORMAT, "name": run.folder.name, "fingerprint": run.fingerprint,
        "config": report.private(c.as_dict()), "environment": environment(run),
        "splits": {name: counts(s) for name, s in splits.items()},
        "notes": list(splits["train"].notes), "leak": leaked_share(splits), "pseudo": pseudo,
        "jitter": {"chosen": jitter, "val_balanced_accuracy": jitter_scores}, "rounds": rounds,
        "filter": {arm: {"candidates": len(of)} | tally(of) | {
            "used": len(added[arm]), "nonfinite_gradients": dropped[arm]}
            for arm, of in rejected.items()},
        "generator": quality(run, splits, added, keep, student, jitter),
        **measures.everything(predictions, min_count=c.evaluate.min_count, draws=c.evaluate.draws,
                              margin=c.evaluate.margin)}
    for arm, entry in results["arms"].items():
        entry["added"] = len(added.get(arm, ()))
    pictures.draw_all(run, splits["train"], made, generator, students, first_probs, REASONS)
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
    sets = {arm: s for arm, s in added.items() if arm in (
        "guided", "random", "noise", "noise_hard", "external")}
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
