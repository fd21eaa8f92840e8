"""The whole experiment: train, find what fails, generate images like it, retrain, compare.

    python loop.py --config config.yaml                 a new run in runs/config
    python loop.py --resume runs/config                 go on with one that was stopped
    python loop.py --config config.yaml --set loop.seeds=5

The only file that knows all others: it owns the config, the device, the seeds, the order and the
files. Stages: data; diffusion model and guide (once, on the train split alone); colour jitter,
chosen on val; judge; rounds of cross-fitting, mining, synthesis and filtering; arms; report.
"""
import argparse
import csv
import functools
import hashlib
import importlib.util
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from extras import class_n_diff
import classifier
from engine import config as configuration
import data
import ddpm
import evaluate
from extras import external
import guidance
import mining
from extras import pictures
from extras import report
from engine.config import ARMS, Config, ConfigError
from data import DataError, ImageSet
from engine.run import (Progress, RunError, RunFolder, clock, held, new_folder, save_picture,
                       write_bytes)
from engine.training import Streamed, seeded, to_float, to_uint8
from unet import UNet

TEACHERS, SURE = 4, 0.8     # students that vote on an unlabelled image's class; least probability
GUESSED = 0.6       # weight of the images whose class is such a guess, beside those with a label
CHUNK = 128         # images synthesised together: bounds memory; streams are per image (ddpm.Noise)


def derive(*parts) -> int:
    """A seed for every purpose: unrelated streams from (seed, name, number, ...)."""
    words = [zlib.crc32(p.encode()) if isinstance(p, str) else int(p) for p in parts]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


@dataclass
class Candidates:
    """Synthetic images of one arm before the filter: (N, ...), in the order they were asked for."""
    images: np.ndarray          # uint8 (N, 3, H, W)
    parents: np.ndarray         # int64, index into the set of parents
    targets: np.ndarray         # int64, the group asked for, -1 where there are none
    seeds: np.ndarray           # int64, of the image's own random stream
    judge: np.ndarray           # float32, the judge's probability of the asked class
    distance: np.ndarray        # float64, to the nearest training image, in grey levels
    fate: np.ndarray            # int64, index into FATES
    nonfinite_gradients: int = 0


FATES = ("kept", "nonfinite", "judge", "copy")


class Experiment:
    """One run: what every stage needs, and the stages as methods."""

    def __init__(self, config: Config, run: RunFolder):
        self.config, self.run = config, run
        self.device = pick_device(config.loop.device)
        self.bf16 = pick_bf16(config.loop.bf16, self.device)
        self.compiled = pick_compile(config, self.device)
        # where the same bytes are not asked for, the fastest kernel of a few tried
        torch.backends.cudnn.benchmark = not config.loop.deterministic
        if config.loop.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # wanted by the next line
            torch.use_deterministic_algorithms(True)
        self.arms = [a for a in ARMS if a in config.loop.arms or "all" in config.loop.arms
                     and (a != "external" or config.guidance.external)
                     and (a != "pseudo" or config.data.labelled < 1)]
        # replay and recolour too: they hold the parents of what was generated
        self.generates = bool(set(self.arms) - {"real", "balanced", "pseudo", "external"})

    # ---- data ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Load and split the data; say what there is."""
        c = self.config.data
        self.inception = inception_features(self.config.evaluate.inception, self.device)
        progress = Progress("data")
        cache = self.run.folder.parent / "cache" / f"{c.kind}_{c.size}"
        self.splits = data.load(**vars(c), cache=cache, progress=progress)
        progress.end()
        self.train = self.labelled = self.splits["train"]
        self.seen = self.train          # whatever anything learns from
        self.unsure, self.pseudo = None, {}     # see label_the_rest
        if "unlabelled" in self.splits:
            self.seen = self.train.extend(self.splits["unlabelled"])
        used = dict(self.splits)
        if "external" in self.arms:
            self.external = external.load_made(self.config.guidance.external, self.train, c.size)
            used["external"] = self.external
        self.run.owner = owner(self.config, used)
        print(data.counts_table(self.splits), *self.train.notes, sep="\n")
        self.run.log("data", **{name: data.counts(s) for name, s in self.splits.items()})
        if not self.train.group_names and self.config.guidance.start == "counterfactual":
            print("no groups: a counterfactual would be the image itself, so guidance.start is "
                  "'parent'")
        if not self.train.group_names and "balanced" in self.arms:
            self.arms.remove("balanced")
            print("arm 'balanced' left out: without groups it is 'real', even over classes")
        self.leak = data.leaked_share(self.splits)
        if self.leak["all"]:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in self.leak.items())
            print("every number below is optimistic (data.split_by: image): the share of test "
                  f"images whose lesion is also in train is {shares}")
        self.tensors = {name: self.tensor(self.splits[name].images) for name in ("val", "test")}
        self.schedule = ddpm.Schedule(self.config.ddpm.T, self.config.ddpm.schedule, self.device)

    def tensor(self, array) -> Tensor | Streamed:
        """On the device; for a CPU, images in a file stay there."""
        if isinstance(array, data.FileImages) and self.device.type == "cpu":
            return Streamed(array)
        return torch.tensor(np.asarray(array), device=self.device)

    def seed(self, *parts) -> int:
        return derive(self.config.loop.seed, *parts)

    # ---- networks --------------------------------------------------------------------------------

    def new_unet(self, seed: int) -> UNet:
        c, train = self.config, self.train
        return seeded(seed, lambda: UNet(
            c.data.size, len(train.class_names), len(train.group_names), c.unet.width,
            tuple(c.unet.multipliers), c.unet.blocks, c.unet.attention,
            c.unet.patch, c.unet.joint_head)).to(self.device)

    def new_resnet(self, seed: int, noise_levels: int = 0) -> classifier.ResNet:
        c = self.config
        network = seeded(seed, lambda: classifier.build(
            c.classifier.network, c.data.size, len(self.train.class_names), noise_levels,
            bool(c.classifier.weights)))
        if c.classifier.weights:
            try:
                classifier.load_weights(network, c.classifier.weights)
            except ValueError as error:
                raise ConfigError(f"classifier.weights: {error}") from None
        return network.to(self.device)

    def train_generator(self) -> None:
        """The diffusion model and the guide, once, on the train split alone; the model also on the
        images whose class nobody is sure of, without a class."""
        c, k, images = self.config.ddpm, self.config.classifier, self.train
        labels, weights = images.labels, self.mixed(images, None)[1]
        if self.unsure is not None:
            images, more = images.extend(self.unsure), (0, len(self.unsure))
            labels, weights = np.pad(labels, more, constant_values=-1), np.pad(weights, more)
        x, labels, groups, weights = (self.tensor(a) for a in (images.images, labels,
                                                               images.groups, weights))
        self.unet, joint = self.new_unet(self.seed("ddpm")), self.config.unet.joint_head
        self.guide = (class_n_diff.Head(self.unet) if joint else
                      self.new_resnet(self.seed("guide"), noise_levels=c.T))
        given = dict(steps=c.steps, batch=c.batch, lr=c.lr, ema_decay=c.ema, drop=c.drop,
                     prediction=c.prediction, seed=self.seed("ddpm"))
        common = dict(bf16=self.bf16, names=images.sources)
        if c.classifier_weight:
            networks = nn.ModuleDict({"unet": self.unet} if joint else
                                     {"unet": self.unet, "guide": self.guide})
            self.run.train("ddpm", networks, c.steps, lambda **progress: class_n_diff.train(
                networks, self.schedule, x, labels, groups, weights, jitter=min(k.jitter),
                classifier_weight=c.classifier_weight,
                classifier_probability=c.classifier_probability, **given, **common, **progress))
            self.guide.eval()           # a head is no part of `networks`
            return
        self.run.train("ddpm", self.unet, c.steps, lambda **progress: ddpm.train(
            self.unet, self.schedule, x, labels, groups, compiled=self.compiled, **given, **common,
            **progress))
        self.run.train("guide", self.guide, k.guide_steps, lambda **progress: classifier.train(
            self.guide, x, labels, weights, steps=k.guide_steps, batch=k.batch, lr=k.lr,
            jitter=min(k.jitter), seed=self.seed("guide"), noise=self.schedule.noised, **common,
            **progress))

    def student(self, name: str, images: ImageSet, weights: np.ndarray, seed: int,
                jitter: float) -> classifier.ResNet:
        """A student trained to the end of its schedule; a seed is the same start in every arm."""
        k = self.config.classifier
        network = self.new_resnet(seed)
        x, labels = self.tensor(images.images), self.tensor(images.labels)
        self.run.train(name, network, k.steps, lambda **progress: classifier.train(
            network, x, labels, self.tensor(weights), steps=k.steps, batch=k.batch, lr=k.lr,
            jitter=jitter, seed=seed, bf16=self.bf16, names=images.sources, **progress))
        return network

    def predict(self, network: classifier.ResNet, images) -> np.ndarray:
        x = images if isinstance(images, Tensor | Streamed) else self.tensor(images)
        return classifier.predict(network, x, self.bf16)

    def choose_jitter(self) -> None:
        """The strength of colour jitter for every student: whichever serves `real` best on val."""
        candidates = self.config.classifier.jitter
        self.jitter, self.jitter_scores = candidates[0], {}
        if len(candidates) == 1:
            return
        weights = classifier.balanced_weights(self.train.labels)
        students = [self.student(f"jitter_{strength:g}", self.train, weights, self.seed("jitter"),
                                 strength) for strength in candidates]
        scores = self.run.stage("jitter", lambda progress: {
            "scores": [self.score_val(student) for student in students]})["scores"]
        self.jitter = candidates[int(np.argmax(scores))]
        self.jitter_scores = dict(zip(candidates, scores))
        print("colour jitter by balanced accuracy on val:", ", ".join(
            f"{s:g}: {v:.3f}" for s, v in self.jitter_scores.items()), "- chosen", self.jitter)

    def score_val(self, student: classifier.ResNet) -> float:
        """Balanced accuracy on val, the one figure by which things are chosen."""
        return balanced_accuracy(self.predict(student, self.tensors["val"]),
                                 self.splits["val"].labels)

    def label_the_rest(self) -> None:
        """Pseudo-labels: students of the labels vote on the lesions without one. Those that they
        are sure of join the train set (`mixed` knows them), the others stay `unsure`."""
        rest = self.splits["unlabelled"]
        teachers = [self.student(f"teacher_{s}", *self.mixed(self.train, None),
                                 self.seed("teacher", s), self.jitter) for s in range(TEACHERS)]
        votes = np.mean([self.predict(teacher, rest.images) for teacher in teachers], axis=0)
        lesion = np.unique(rest.lesions, return_inverse=True)[1]
        votes = np.stack([np.bincount(lesion, of) / np.bincount(lesion) for of in votes.T],
                         axis=1)[lesion]                # every lesion has one class
        guessed = replace(rest, labels=votes.argmax(1), folds=lesion % self.config.data.folds)
        sure, right = votes.max(1) > SURE, guessed.labels == rest.labels
        self.pseudo = {"labels": len(self.train), "pseudo_labels": int(sure.sum()),
                       "right": float(right[sure].mean()) if sure.any() else None,
                       "unsure": int((~sure).sum())}
        print(json.dumps(self.pseudo), flush=True)
        self.train, self.unsure = self.train.extend(guessed.subset(sure)), guessed.subset(~sure)

    def train_judge(self) -> None:
        """The filter's judge: its own seed, and it never guides, mines or is scored."""
        self.judge = self.student("judge", *self.mixed(self.train, None), self.seed("judge"),
                                  self.jitter)
        # A near-copy lies closer to a training image than nearly every unseen real image does.
        self.copy_distance = float(np.quantile(self.nearest(self.splits["val"].images)[0], 0.01))

    def nearest(self, images: np.ndarray,
                among: ImageSet | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Each image's distance to the nearest one `among` (what anything learns from), in any of
        the 8 ways to turn or mirror it (the generator learns from all of them), in grey levels; and
        which that is."""
        small, found, among = thumbnails(images), [], self.seen if among is None else among
        for first in range(0, len(among), 10_000):                  # a block at a time: memory
            known = thumbnails(among.images[first:first + 10_000])
            for turned in (small, small.transpose(0, 1, 3, 2)):
                for rows in (1, -1):
                    for columns in (1, -1):
                        distance, index = evaluate.nearest_distance(
                            turned[:, :, ::rows, ::columns], known)
                        found.append((distance, first + index))
        distance, index = (np.stack(part) for part in zip(*found))
        best = distance.argmin(0)[None]
        return (np.take_along_axis(distance, best, 0)[0], np.take_along_axis(index, best, 0)[0])

    # ---- a round ---------------------------------------------------------------------------------

    def cross_fit(self, number: int, synthetic: ImageSet | None) -> list[classifier.ResNet]:
        """Student k learns from all folds but k, synthetic images included: a child has its
        parent's fold, so `folds != k` keeps parent and child on the same side."""
        students = []
        for k in range(self.config.data.folds):
            real = self.labelled.subset(self.labelled.folds != k)
            added = None if synthetic is None else synthetic.subset(synthetic.folds != k)
            images, weights = self.mixed(real, added)
            students.append(self.student(f"crossfit_{number}_{k}", images, weights,
                                         self.seed("crossfit", number, k), self.jitter))
        return students

    def mixed(self, real: ImageSet, added: ImageSet | None,
              cells: np.ndarray | None = None) -> tuple[ImageSet, np.ndarray]:
        """Real images with `added` ones and how often each is drawn: `loop.share` of a batch is
        added images, the rest real, GUESSED of it those without a label; classes even in each."""
        weights, guessed = classifier.balanced_weights(real.labels, cells), self.guessed(real)
        for part, share in ((guessed, GUESSED), (~guessed, 1 - GUESSED)) if guessed.any() else ():
            weights[part] = share * classifier.balanced_weights(real.labels[part])
        if added is None or len(added) == 0:
            return real, weights
        share = self.config.loop.share
        return real.extend(added), np.concatenate(
            [(1 - share) * weights, share * classifier.balanced_weights(added.labels)])

    def guessed(self, images: ImageSet) -> np.ndarray:
        """Which images carry no label but a guess: (N,) bool."""
        return np.isin(images.sources, self.splits["unlabelled"].sources
                       if "unlabelled" in self.splits else [])

    def margins(self, probs: np.ndarray, images: ImageSet) -> np.ndarray:
        """As `mining.margins`; but a guess is never hard: what contradicts it may be right."""
        return np.where(self.guessed(images), 1.0, mining.margins(probs, images.labels))

    def out_of_fold(self, students: list[classifier.ResNet], images: np.ndarray,
                    folds: np.ndarray) -> np.ndarray:
        """Every image's class probabilities by the student that never saw its lesion. folds: (N,)
        the fold of the image, or of a child's parent."""
        probs = np.zeros((len(images), len(self.train.class_names)), np.float32)
        for k, student in enumerate(students):
            probs[folds == k] = self.predict(student, data.pick(images, folds == k))
        return probs

    def mine(self, images: ImageSet, probs: np.ndarray, count: int, seed: int) -> np.ndarray:
        """Indices of up to `count` parents among the wrong and the low-margin images."""
        pool = np.flatnonzero(self.margins(probs, images) < self.config.loop.margin)
        if len(pool) == 0:
            raise DataError("no hard case was found: the students are right about every image; "
                            "raise loop.margin or give them less to learn from")
        return mining.from_each_cell(pool, images, count, seed)

    def choose(self, number: int, probs: np.ndarray, synthetic: ImageSet | None,
               count: int) -> tuple[np.ndarray, np.ndarray]:
        """The parents of a round and their targets, by guidance.targets. probs: (N, C) out-of-fold;
        synthetic: all images that earlier rounds kept."""
        aim, parts = self.config.guidance.targets, []
        count = (count + 1) // 2 if aim == "both" else count
        if aim != "groups":
            chosen = self.mine(self.train, probs, count, self.seed("mine", number))
            parts.append((chosen, mining.other_groups(self.train.subset(chosen),
                                                      self.seed("targets", number))))
        if aim != "hard":
            parts.append(mining.even_out(self.train, synthetic, count, self.seed("even", number)))
        parents, targets = zip(*parts)
        order = mining.by_turns(parents)    # the round keeps the first that pass: half of each way
        return np.concatenate(parents)[order], np.concatenate(targets)[order]

    def strangers(self, chosen: np.ndarray, seed: int) -> np.ndarray:
        """Random parents in place of `chosen`, of the same cells; guesses for guesses."""
        return mining.strangers(2 * mining.cells(self.train) + self.guessed(self.train), chosen,
                                seed)

    def synthesise(self, parents: ImageSet, targets: np.ndarray, seeds: np.ndarray, *,
                   start: str | None = None, scales: tuple[float, float] | None = None,
                   progress=lambda done, total: None) -> tuple[np.ndarray, np.ndarray, int]:
        """One image per parent: uint8 (N, 3, H, W), which of them came out finite, and how many
        gradients did not.

        start: "counterfactual" (invert, decode under the target group), "recoloured" (what arm
        recolour makes of it, noised), "parent" (its noised image) or "noise"; without groups a
        counterfactual is the image itself, so it becomes "parent".
        scales: of class evidence and hardness; None: the config's.
        """
        c = self.config.guidance
        start = start or c.start
        if start == "counterfactual" and not self.train.group_names:
            start = "parent"
        scales = scales or (c.class_scale, c.hardness_scale)
        if start == "recoloured":       # colour by arithmetic, the rest by the model
            parents = replace(parents, images=recoloured(self.train, parents, targets,
                                                         self.seed("recoloured")))
        tally, made = guidance.Tally(), []
        for first in range(0, len(parents), CHUNK):
            part = slice(first, first + CHUNK)
            x0 = to_float(self.tensor(parents.images[part]))
            y, own, target = (self.tensor(a[part])
                              for a in (parents.labels, parents.groups, targets))
            noise = ddpm.Noise(list(seeds[part]), self.device)
            terms = [(scales[0], guidance.class_evidence(self.guide, y)),
                     (scales[1], guidance.hardness(self.students, y))]

            def model(group, scale=1.0):
                return ddpm.eps_model(self.unet, self.schedule, y, group, scale=scale,
                                      prediction=self.config.ddpm.prediction, bf16=self.bf16)
            wanted = guidance.guided_eps(model(target, c.classifier_free), self.schedule, terms,
                                         tally)
            if start == "counterfactual":
                x = guidance.counterfactual(model(own), wanted, self.schedule, x0, c.depth, c.steps)
            elif start in ("recoloured", "parent"):
                x = guidance.variation(wanted, self.schedule, x0, noise(*x0.shape[1:]), c.strength,
                                       c.steps)
            else:
                x = ddpm.sample_ddim(wanted, self.schedule, noise(*x0.shape[1:]), c.steps)
            made.append(x.float().cpu())
            progress(min(first + CHUNK, len(parents)), len(parents))
        x = torch.cat(made)
        finite = x.flatten(1).isfinite().all(1).numpy()
        return to_uint8(x.nan_to_num()).numpy(), finite, tally.nonfinite

    def cost(self, made: Candidates) -> None:
        """Log the milliseconds an image takes, and one from pure noise, unguided, in as many steps.
        """
        some, spent = slice(CHUNK), {}
        parents = self.train.subset(made.parents[some])
        for way, how in (("plain", {"start": "noise", "scales": (0, 0)}), ("guided", {})):
            begun = time.monotonic()
            self.synthesise(parents, made.targets[some], made.seeds[some], **how)
            spent[way] = 1000 * (time.monotonic() - begun) / len(parents)
        self.run.log("cost", **spent)

    def candidates(self, name: str, arm: str, source: ImageSet, seed: int,
                   choose) -> Candidates:
        """The images an arm would add, and what the filter, the same for all, says of each.

        choose() -> (parents, targets); what it chose is stored with the images, so that a resumed
        run cannot pair them anew. Near-copies are looked for where something was generated:
        replay and recolour copy by intention.
        """
        def compute(progress):
            chosen, targets = choose()
            parents, g = source.subset(chosen), self.config.guidance
            seeds = np.array([derive(seed, i) for i in range(len(chosen))])
            dropped, finite = 0, np.ones(len(parents), bool)
            if arm in ("replay", "external"):
                images = np.asarray(parents.images)
            elif arm == "recolour":
                images = recoloured(self.train, parents, targets, seed)
            else:
                images, finite, dropped = self.synthesise(
                    parents, targets, seeds, start="noise" if arm == "noise" else None,
                    # hardness guidance is mining too
                    scales=(g.class_scale, g.hardness_scale if arm == "guided" else 0.0),
                    progress=progress)
            probs = self.predict(self.judge, images)
            distance = self.nearest(images)[0]
            if arm == "external":       # who made these may have seen our val and test images
                distance = np.min([distance, *(self.nearest(images, self.splits[split])[0]
                                               for split in ("val", "test"))], axis=0)
            fate = np.zeros(len(parents), np.int64)
            if arm not in ("replay", "recolour"):
                fate[distance < self.copy_distance] = FATES.index("copy")
            fate[probs.argmax(1) != parents.labels] = FATES.index("judge")
            fate[~finite] = FATES.index("nonfinite")
            judge = probs[np.arange(len(parents)), parents.labels]
            return {"dropped": dropped} | {key: torch.tensor(value) for key, value in dict(
                images=images, parents=chosen, targets=targets, seeds=seeds, judge=judge,
                distance=distance, fate=fate).items()}
        stored = self.run.stage(name, compute)
        dropped = stored.pop("dropped")
        return Candidates(**{key: value.numpy() for key, value in stored.items()},
                          nonfinite_gradients=dropped)

    def children(self, source: ImageSet, made: Candidates, index: np.ndarray) -> ImageSet:
        """The candidates at `index` as a set, in their parents' folds, of the groups asked for."""
        parents = source.subset(made.parents[index])
        groups = np.where(made.targets[index] < 0, parents.groups, made.targets[index])
        return replace(parents, images=made.images[index], groups=groups)

    def wanted(self) -> int:
        """How many synthetic images a round is to add."""
        return max(1, round(self.config.loop.added * len(self.train)))

    def judge_train(self, number: int, synthetic: ImageSet | None) -> np.ndarray:
        """Cross-fit the students of a round; their out-of-fold probabilities of the train split."""
        self.students = self.cross_fit(number, synthetic)
        probs = self.out_of_fold(self.students, self.train.images, self.train.folds)
        if number == 1:
            self.first_students, self.first_probs = self.students, probs
        return probs

    def round(self, number: int, synthetic: ImageSet | None) -> dict:
        """Cross-fit, mine, synthesise, filter. Returns the candidates and the ledger's entry."""
        probs, wanted = self.judge_train(number, synthetic), self.wanted()
        made = self.candidates(
            f"guided_{number}", "guided", self.train, self.seed("synthesis", number),
            lambda: self.choose(number, probs, synthetic, round(wanted * self.config.loop.surplus)))
        index = np.flatnonzero(made.fate == 0)[:wanted]
        margin = self.margins(probs, self.train)
        votes = self.out_of_fold(self.students, made.images, self.train.folds[made.parents])
        wrong = mining.margins(votes, self.train.labels[made.parents]) < 0
        entry = {"round": number, "hard": int((margin < self.config.loop.margin).sum()),
                 "wrong": int((margin < 0).sum()), "parents": len(np.unique(made.parents)),
                 "candidates": len(made.images), "kept": len(index),
                 "dropped": {f: int((made.fate == i).sum()) for i, f in enumerate(FATES) if i},
                 "nonfinite_gradients": made.nonfinite_gradients,
                 "hardness": {"parents_wrong": float((margin[made.parents] < 0).mean()),
                              "children_wrong": float(wrong.mean())},
                 "judge_agrees": float((made.fate != FATES.index("judge")).mean())}
        return {"made": made, "kept": index, "entry": entry,
                "children": self.children(self.train, made, index)}

    def write_synthetic(self, rounds: list[dict]) -> None:
        """synthetic/<class>/*.png, a folder data set, and synthetic.csv: what was kept of every
        round so far, and its origin."""
        folder = self.run.folder / "synthetic"
        for name in self.train.class_names:
            (folder / name).mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        ledger = csv.writer(text, lineterminator="\n")
        ledger.writerow(["image", "parent", "class", "group", "fold", "judge", "distance", "seed"])
        for number, r in enumerate(rounds, start=1):
            made = r["made"]
            for i in r["kept"]:
                parent, target = made.parents[i], made.targets[i]
                name = self.train.class_names[self.train.labels[parent]]
                group = self.train.group_names[target] if target >= 0 else ""
                file = f"{name}/{number}_{i:05d}.png"
                if not (folder / file).exists():
                    save_picture(folder / file, pictures.one(made.images[i]))
                ledger.writerow([file, self.train.sources[parent], name, group,
                                 self.train.folds[parent], f"{made.judge[i]:.4f}",
                                 f"{made.distance[i]:.2f}", made.seeds[i]])
        write_bytes(folder / "synthetic.csv", text.getvalue().encode())

    # ---- the arms --------------------------------------------------------------------------------

    def added_sets(self, rounds: list[dict]) -> dict[str, ImageSet]:
        """What each arm adds to the real images: as many of each, by the same filter.

        guided, replay and recolour hold the same parents for the same groups: those whose image
        passed the filter in all three.
        """
        self.made, wanted = {}, self.wanted() * self.config.loop.rounds
        if rounds:
            parts = [vars(r["made"]) for r in rounds]
            self.made["guided"] = Candidates(**{
                key: np.concatenate([p[key] for p in parts])
                for key in parts[0] if key != "nonfinite_gradients"})
            chosen, targets = self.made["guided"].parents, self.made["guided"].targets
        for arm in self.arms:
            if arm in ("replay", "recolour", "noise", "random"):
                parents = self.strangers(chosen, self.seed(arm)) if arm == "random" else chosen
                self.made[arm] = self.candidates(arm, arm, self.train, self.seed(arm),
                                                 lambda: (parents, targets))
        if "external" in self.arms:
            some = np.random.default_rng(self.seed("external")).permutation(len(self.external))
            some = some[:round(wanted * self.config.loop.surplus)]
            self.made["external"] = self.candidates(
                "external", "external", self.external, self.seed("external"),
                lambda: (some, np.full(len(some), -1)))
        if not self.made:
            return {}
        matched = [arm for arm in ("guided", "replay", "recolour") if arm in self.made]
        together = np.all([self.made[arm].fate == 0 for arm in matched], axis=0)
        passed = {arm: together if arm in matched else made.fate == 0
                  for arm, made in self.made.items()}
        count = min(wanted, *(int(of.sum()) for of in passed.values()))
        if count == 0:
            empty = [arm for arm, of in passed.items() if not of.any()]
            raise DataError(f"the filter left no image for {', '.join(empty)}: train the diffusion "
                            "model longer (ddpm.steps), lower the guidance scales or give external "
                            "images that show their class")
        if count < wanted:
            print(f"every arm adds {count} images where {wanted} were wanted: the filter passed no "
                  "more (loop.surplus)")
        added = {arm: self.children(self.source(arm), self.made[arm], np.flatnonzero(of)[:count])
                 for arm, of in passed.items()}
        if self.config.loop.mine_from == "test":
            added["leaked"] = self.leaked(len(chosen), count)
        return added

    def source(self, arm: str) -> ImageSet:
        """What the parents of an arm's candidates are indices into."""
        return self.external if arm == "external" else self.train

    def leaked(self, candidates: int, count: int) -> ImageSet:
        """The naive protocol, for show: hard cases mined on the test set itself."""
        test = self.splits["test"]

        def choose():
            probs = np.mean([self.predict(s, self.tensors["test"]) for s in self.first_students], 0)
            chosen = self.mine(test, probs, candidates, self.seed("leak"))
            return chosen, mining.other_groups(test.subset(chosen), self.seed("leak", "targets"))
        made = self.candidates("leaked", "guided", test, self.seed("leak", "synthesis"), choose)
        return self.children(test, made, np.flatnonzero(made.fate == 0)[:count])

    def run_arms(self, added: dict[str, ImageSet]) -> dict[str, np.ndarray]:
        """Train every arm's students from the same starts; their probabilities on val and test."""
        arms = self.arms + (["leaked"] if "leaked" in added else [])
        cells = self.labelled.groups if self.train.group_names else None
        found = {f"{split}_probs_{arm}": [] for arm in arms for split in ("val", "test")}
        for arm in arms:
            plain = arm in ("real", "balanced")         # the labels alone
            images, weights = self.mixed(self.labelled if plain else self.train, added.get(arm),
                                         cells if arm == "balanced" else None)
            for s in range(self.config.loop.seeds):
                student = self.student(f"student_{arm}_{s}", images, weights,
                                       self.seed("student", s), self.jitter)
                for split in ("val", "test"):
                    found[f"{split}_probs_{arm}"].append(self.predict(student, self.tensors[split]))
        store = {key: np.stack(value) for key, value in found.items()}
        for split in ("val", "test"):
            s = self.splits[split]
            store[f"{split}_reference"] = np.stack([self.predict(k, self.tensors[split])
                                                    for k in self.first_students])
            store |= {f"{split}_{key}": getattr(s, key)
                      for key in ("labels", "groups", "subtypes", "lesions", "sources")}
        names = self.train
        store |= {"class_names": np.array(names.class_names),
                  "malignant": np.array(names.malignant),
                  "group_names": np.array(names.group_names, dtype=str),
                  "subtype_names": np.array(names.subtype_names, dtype=str),
                  "arms": np.array(arms), "seeds": np.arange(self.config.loop.seeds),
                  "optimistic": np.array([arm == "leaked" for arm in arms])}
        return store

    # ---- the whole -------------------------------------------------------------------------------

    def go(self) -> None:
        """All stages in order; those that an earlier attempt finished are read, not done again."""
        print(f"device {self.device}{', bf16' if self.bf16 else ''}, "
              f"{torch.get_num_threads()} threads; run folder {self.run.folder}")
        self.prepare()
        print(f"this will take about {clock(self.estimate())} on this machine", flush=True)
        self.picture("data", lambda: pictures.by_class_and_group(self.train))
        self.choose_jitter()
        if "unlabelled" in self.splits:
            self.label_the_rest()
        if self.generates:
            self.train_generator()
        self.train_judge()
        rounds, synthetic = [], None
        if not self.generates:
            self.judge_train(1, None)           # for the hard cases of test alone
        for number in range(1, self.config.loop.rounds + 1) if self.generates else ():
            rounds.append(self.round(number, synthetic))
            self.write_synthetic(rounds)
            new = rounds[-1]["children"]
            synthetic = new if synthetic is None else synthetic.extend(new)
            print(json.dumps(rounds[-1]["entry"]), flush=True)
            if number < self.config.loop.rounds:       # the last round's students are the arms
                images, weights = self.mixed(self.train, synthetic)
                student = self.student(f"round_{number}", images, weights, self.seed("student", 0),
                                       self.jitter)
                rounds[-1]["entry"]["val_balanced_accuracy"] = self.score_val(student)
        if rounds:
            self.cost(rounds[-1]["made"])
        added = self.added_sets(rounds)
        predictions = self.run_arms(added)
        self.finish(rounds, added, predictions, self.quality(added) if added else {})

    def quality(self, added: dict[str, ImageSet]) -> dict:
        """The generated images themselves, in the features of a classifier that no arm uses.

        The critic learns from a second, large draw of the phantom, where it is also the oracle of
        the labels, and elsewhere from the train split under its own seed. Each arm's images, and
        val as the floor, are compared with as many test images of the same classes and groups.
        """
        c, phantom_data = self.config, self.config.data.kind == "phantom"
        source = data.load_oracle(c.data.size, c.data.seed, c.evaluate.oracle) if phantom_data \
            else self.labelled
        critic = self.student("critic", source, classifier.balanced_weights(source.labels),
                              self.seed("critic"), self.jitter)
        sets = {arm: s for arm, s in added.items()
                if arm in ("guided", "random", "noise", "external")}
        sets["real (val)"] = self.splits["val"]
        chosen = same_mixture([*sets.values(), self.splits["test"]], self.seed("quality"))
        real = self.splits["test"].subset(chosen.pop()).images
        features = classifier.extract_features(critic, self.tensor(real))
        found = {}
        for (arm, images), index in zip(sets.items(), chosen):
            some = images.subset(index)
            own = classifier.extract_features(critic, self.tensor(some.images))
            row = {"n": len(index)}
            if phantom_data and len(index):
                votes = self.predict(critic, some.images).argmax(1)
                row["label_fidelity_oracle"] = float((votes == some.labels).mean())
            if phantom_data and arm in self.made:
                made = self.made[arm]
                votes = self.predict(critic, made.images).argmax(1)
                row["label_fidelity_unfiltered"] = float(
                    (votes == self.source(arm).labels[made.parents]).mean())
            if self.inception is not None and len(index) > 2048:
                row["fid"] = evaluate.frechet_distance(self.inception(real),
                                                       self.inception(some.images))
            distance = self.nearest(images.images)[0]
            row["nearest_train"] = {"all": float(np.median(distance))} | {
                name: float(np.median(distance[images.labels == y]))
                for y, name in enumerate(images.class_names) if (images.labels == y).any()}
            enough = len(index) > features.shape[1]
            row["frechet"] = evaluate.frechet_distance(features, own) if enough else None
            row["kid"] = evaluate.kernel_distance(features, own) if enough else None
            row["precision"], row["recall"] = (evaluate.precision_recall(features, own) if enough
                                               else (None, None))
            found[arm] = row
        return found

    def beside_the_truth(self) -> dict:
        """How far each arm's counterfactuals lie from the phantom's own picture of the same lesion
        on the other skin, in grey levels: medians of the root mean square, the filtered included.

        The floor is a second picture by the phantom: new skin of that type, new sensor noise.
        """
        c, made = self.config.data, self.made.get("guided")
        if c.kind != "phantom" or made is None or self.config.guidance.start == "parent":
            return {}

        def off(images, truth):
            apart = np.square(images.astype(np.float32) - truth).mean((1, 2, 3))
            return {"n": len(images), "grey_levels": float(np.median(np.sqrt(apart)))}

        def truth(of, shot=0):
            drawn = [int(source.rsplit("-", 1)[-1]) for source in self.train.sources[of.parents]]
            return data.load_counterfactuals(c.size, c.seed, c.train, np.array(drawn), of.targets,
                                             shot=shot)
        found = {arm: off(of.images, truth(of)) for arm, of in self.made.items()
                 if arm in ("guided", "random", "recolour")}
        return found | {"the parent itself": off(self.train.images[made.parents], truth(made)),
                        "floor": off(truth(made, shot=1), truth(made))}

    def finish(self, rounds: list[dict], added: dict, predictions: dict, quality: dict) -> None:
        """Predictions, results, pictures and report."""
        folder, c = self.run.folder, self.config
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **predictions)
        write_bytes(folder / "predictions.npz", buffer.getvalue())
        results = {"format": 1, "name": folder.name, "owner": self.run.owner,
                   "config": report.private(c.as_dict()),
                   "environment": environment(self.device, self.bf16),
                   "splits": {name: data.counts(s) for name, s in self.splits.items()},
                   "notes": list(self.train.notes),
                   "jitter": {"chosen": self.jitter, "val_balanced_accuracy":
                              {f"{k:g}": v for k, v in self.jitter_scores.items()}},
                   **evaluate.score(predictions, min_count=c.evaluate.min_count,
                                    draws=c.evaluate.draws),
                   "rounds": [r["entry"] for r in rounds], "generator": quality,
                   "pseudo": self.pseudo,
                   "counterfactuals": self.beside_the_truth(),
                   "filter": {arm: {"candidates": len(made.fate)} | {
                       fate: int((made.fate == i).sum()) for i, fate in enumerate(FATES)}
                       for arm, made in self.made.items()},
                   "leak": self.leak}
        for arm in results["arms"]:
            results["arms"][arm]["added"] = len(added[arm]) if arm in added else 0
        last = "guided" if "guided" in self.arms else "real"
        if rounds:
            rounds[-1]["entry"]["val_balanced_accuracy"] = float(np.mean(
                [balanced_accuracy(p, self.splits["val"].labels)
                 for p in predictions[f"val_probs_{last}"]]))
        self.draw(rounds, predictions)
        write_bytes(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        report.write(folder)
        print(results["verdict"])
        if "leaked" in results["arms"]:
            naive, clean = (results["arms"][a]["test"]["all"]["accuracy"]["value"]
                            for a in ("leaked", "guided"))
            print(f"optimistic: mined on the test set, the naive protocol reports {naive:.1%} "
                  f"accuracy where the clean one has {clean:.1%}, "
                  f"{100 * (naive - clean):+.1f} points")
        print(f"report: {folder / 'report.md'} and {folder / 'report.html'}")

    def picture(self, name: str, draw) -> None:
        """Draw pictures/name.png unless it is there; a picture that has nothing to show is None."""
        path = self.run.folder / "pictures" / f"{name}.png"
        if not path.exists():
            drawn = draw()
            if drawn is not None:
                save_picture(path, drawn)

    def draw(self, rounds: list[dict], predictions: dict) -> None:
        """The pictures of the report, apart from data.png."""
        train = self.train
        margin = self.margins(self.first_probs, train)
        self.picture("hard", lambda: pictures.hard_cases(train, self.first_probs, margin))
        if not rounds:
            return
        made, children = rounds[-1]["made"], [r["children"] for r in rounds]
        self.picture("children", lambda: pictures.children(
            train, made.parents, made.images, made.targets, made.judge,
            [FATES[f] for f in made.fate]))
        self.picture("types", lambda: self.every_type(margin))
        self.picture("guided", lambda: self.unguided_beside_guided(made))
        self.picture("composition", lambda: pictures.composition(
            train, functools.reduce(ImageSet.extend, children)))
        closest = made.images[np.argsort(made.distance, kind="stable")[:16]]
        self.picture("neighbours", lambda: pictures.neighbours(self.seen, closest,
                                                               *self.nearest(closest)))
        if "guided" in self.arms:
            real, guided = (evaluate.vote(predictions[f"test_probs_{a}"])
                            for a in ("real", "guided"))
            mean = predictions["test_probs_real"].mean(0)
            self.picture("mended", lambda: pictures.mended(
                self.splits["test"], real, guided,
                mining.margins(mean, self.splits["test"].labels)))

    def every_type(self, margin: np.ndarray):
        """The two hardest lesions of each malignant class, carried to every group."""
        train, groups = self.train, len(self.train.group_names)
        if groups < 2:
            return None
        by_hardness = np.argsort(margin, kind="stable")
        chosen = np.concatenate([by_hardness[train.labels[by_hardness] == c][:2]
                                 for c in np.flatnonzero(train.malignant)[::-1]])
        parents = train.subset(np.repeat(chosen, groups))
        way = "counterfactual" if self.config.guidance.start == "parent" else None
        images, _, _ = self.synthesise(parents, np.tile(np.arange(groups), len(chosen)),
                                       np.repeat(np.arange(len(chosen)), groups), start=way)
        return pictures.every_group(train, chosen, images)

    def unguided_beside_guided(self, made: Candidates):
        """The same eight parents and streams without guidance, with it, and with three times it."""
        c, few = self.config.guidance, slice(8)
        scales = np.array([c.class_scale, c.hardness_scale])
        parents = self.train.subset(made.parents[few])
        versions = [self.synthesise(parents, made.targets[few], made.seeds[few],
                                    scales=tuple(k * scales))[0] for k in (0, 1, 3)]
        return pictures.rows([parents.images, *versions],
                             ["parent", "unguided", "guided", "guided, 3 x"])

    def estimate(self) -> float:
        """Seconds that the run will take, from a few timed steps of each kind."""
        c, students = self.config, self.config.classifier.steps
        x, labels = self.tensor(self.train.images[:c.ddpm.batch]), self.tensor(self.train.labels)
        unet, resnet = self.new_unet(0), self.new_resnet(0)
        some = torch.arange(c.ddpm.batch, device=self.device) % len(x)
        few, many = (10, 110) if self.device.type == "cuda" else (1, 5)

        def seconds(step):      # of one more: a GPU's first ones compile and record
            spent = []
            for times in (1, few, many):
                begun = time.monotonic()
                step(times)
                spent.append(time.monotonic() - begun)
            return (spent[2] - spent[1]) / (many - few)
        diffusion = seconds(lambda n: ddpm.train(
            unet, self.schedule, x, labels[:len(x)], labels[:len(x)] * 0 - 1, steps=n,
            batch=c.ddpm.batch, lr=0.0, ema_decay=0.9, prediction="v", drop=0.0, seed=0,
            bf16=self.bf16, compiled=self.compiled))
        learning = seconds(lambda n: classifier.train(
            resnet, x, labels[:len(x)], torch.ones(len(x), device=self.device), steps=n,
            batch=c.classifier.batch, lr=0.0, jitter=0.1, seed=0, bf16=self.bf16))
        model = ddpm.eps_model(unet, self.schedule, some * 0, some * 0 - 1, bf16=self.bf16)
        looking = seconds(lambda n: [model(to_float(x[some]), some)
                                     for _ in range(n)][-1].cpu()) / len(some)
        trained = (len(c.classifier.jitter) * (len(c.classifier.jitter) > 1) + 2
                   + c.data.folds * c.loop.rounds + len(self.arms) * c.loop.seeds
                   + TEACHERS * (c.data.labelled < 1))
        generating = sum(a in ("noise", "random") for a in self.arms) + c.loop.rounds
        images = generating * c.loop.added * c.loop.surplus * len(self.train)
        guided = c.ddpm.steps if c.ddpm.classifier_weight else c.classifier.guide_steps
        # evaluations a step: inverting, decoding, and about two more for guidance's gradients
        evaluations = (c.guidance.start == "counterfactual") + 1 + (c.guidance.classifier_free != 1)
        return students * trained * learning + 30 + self.generates * (
            c.ddpm.steps * diffusion + guided * learning * 1.3
            + images * c.guidance.steps * (evaluations + 2) * looking)


def balanced_accuracy(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean recall over the classes that occur. probs: (N, C); labels: (N,)."""
    votes = probs.argmax(1)
    return float(np.mean([(votes[labels == c] == c).mean() for c in np.unique(labels)]))


def same_mixture(sets: list[ImageSet], seed: int) -> list[np.ndarray]:
    """Indices into each set so that all have as many images of every class x group cell; of every
    class alone if one knows no groups, as images made elsewhere may."""
    rng, grouped = np.random.default_rng(seed), all((s.groups >= 0).any() for s in sets)
    cells = [mining.cells(s) if grouped else s.labels for s in sets]
    fewest = {cell: min((of == cell).sum() for of in cells) for cell in np.unique(cells[0])}
    return [np.concatenate([rng.permutation(np.flatnonzero(of == cell))[:n]
                            for cell, n in fewest.items()]).astype(int) for of in cells]


def thumbnails(images: np.ndarray, side: int = 16) -> np.ndarray:
    """uint8 (N, 3, S, S) averaged down to float32 (N, 3, side, side): near-copies differ in noise,
    not here. Scaled so that distances are root mean square grey levels."""
    x = torch.cat([torch.nn.functional.adaptive_avg_pool2d(
        torch.tensor(images[i:i + 1000]).float(), side)
        for i in range(0, max(1, len(images)), 1000)])
    return x.numpy() / (3 * side * side) ** 0.5


def inception_features(path: str, device: torch.device):
    """images -> (N, 2048) features by the usual Inception network, or None without a path.

    The TorchScript file takes uint8 (N, 3, H, W) and resizes by itself, as FID was defined by.
    """
    if not path:
        return None
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"evaluate.inception: {path} is no TorchScript file "
                          f"({str(error).splitlines()[0]})") from None

    @torch.no_grad()
    def features(images):
        return torch.cat([network(part.to(device), return_features=True).float().cpu()
                          for part in torch.tensor(np.asarray(images)).split(64)]).numpy()
    return features


def recoloured(train: ImageSet, parents: ImageSet, targets: np.ndarray, seed: int) -> np.ndarray:
    """The sceptic's control: parents carried to their target group by one gain per channel.

    The gain is the ratio of the groups' mean border colours; without groups, that of another image
    of the same class to the parent's own, within a factor of 2.
    """
    border = data.border_colour(train.images)
    if train.group_names:
        mean = np.stack([border[train.groups == g].mean(0) if (train.groups == g).any()
                         else border.mean(0) for g in range(len(train.group_names))]
                        + [border.mean(0)])             # the last, -1: a parent of no known group
        gain = mean[targets] / mean[parents.groups]
    else:
        rng = np.random.default_rng(seed)
        other = np.array([rng.choice(np.flatnonzero(train.labels == y)) for y in parents.labels])
        gain = border[other] / np.maximum(data.border_colour(parents.images), 1)
        gain = gain.clip(0.5, 2)
    bright = np.asarray(parents.images) * gain[:, :, None, None]
    return bright.round().clip(0, 255).astype(np.uint8)


def owner(config: Config, splits: dict[str, ImageSet]) -> str:
    """A word for all that a checkpoint depends on: the config but for how it is scored and where
    files lie, and what these hold."""
    matters = config.as_dict()
    for section, key in (("data", "root"), ("loop", "device"), ("guidance", "external"),
                         ("classifier", "weights")):
        del matters[section][key]
    matters["evaluate"] = config.evaluate.oracle
    if config.classifier.weights:
        matters["weights"] = hashlib.sha256(
            Path(config.classifier.weights).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode())
    for s in splits.values():
        for array in (s.images, s.labels, s.groups, s.folds, s.sources):
            for i in range(0, len(s), 1000):
                digest.update(np.ascontiguousarray(array[i:i + 1000]))
    return digest.hexdigest()[:16]


def pick_device(name: str) -> torch.device:
    """auto: CUDA if there, else the CPU."""
    if name not in ("auto", "cpu") and not name.startswith("cuda"):
        raise ConfigError(f"loop.device: '{name}' is unknown; write auto, cpu, cuda or cuda:1")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.index is not None:
            torch.cuda.set_device(device)
        return device
    except Exception:       # torch raises its own mixture here: RuntimeError, AssertionError, ...
        raise ConfigError(f"loop.device: '{name}' is not to be had; write auto or cpu") from None


def spoken(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


def pick_bf16(choice: str, device: torch.device) -> bool:
    """auto: where the hardware multiplies bfloat16; emulated, it would be slower than float32."""
    if choice != "auto":
        return choice == "true"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def pick_compile(config: Config, device: torch.device) -> bool:
    """auto: where the training is long enough for the minute to come back, and Triton and the C
    compiler that it calls are at hand."""
    if config.loop.compile != "auto":
        return config.loop.compile == "true"
    return (device.type == "cuda" and config.ddpm.steps >= 10_000
            and importlib.util.find_spec("triton") is not None
            and any(map(shutil.which, ("cc", "gcc", "clang"))))


def environment(device: torch.device, bf16: bool) -> dict:
    """What else the numbers depend on. No host or user names."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, text=True,
                                capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "device": spoken(device),
            "threads": torch.get_num_threads(), "precision": "bf16" if bf16 else "fp32",
            "commit": commit}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Guide a diffusion model to a classifier's "
                                                 "failures, retrain, compare.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="a yaml file; the run goes to runs/<its name>")
    which.add_argument("--resume", metavar="runs/NAME", help="go on with a run that was stopped")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    arguments = parser.parse_args(argv)
    folder = device = None
    try:
        if arguments.resume:
            folder = Path(arguments.resume)
            if arguments.set:
                raise ConfigError("--set: a resumed run keeps its own config; start a new run")
            if not (folder / "config.yaml").is_file():
                raise ConfigError(f"--resume {folder}: no run there, it has no config.yaml")
            config = configuration.load(folder / "config.yaml")
        else:
            config = configuration.load(arguments.config, arguments.set)
        device = spoken(pick_device(config.loop.device))
        if not arguments.resume:
            folder = new_folder(Path("runs"), Path(arguments.config).stem)
            write_bytes(folder / "config.yaml",
                        yaml.safe_dump(config.as_dict(), sort_keys=False).encode())
        with held(folder):
            Experiment(config, RunFolder(folder)).go()
        return 0
    except (ConfigError, DataError, RunError, FloatingPointError) as error:
        problem, goes_on = str(error), False
    except OSError as error:        # the disk is full, the folder is gone or may not be written to
        problem, goes_on = f"{error.filename or folder}: {error.strerror or error}", True
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
        problem, goes_on = f"{device}: {str(error).strip() or 'out of memory'}".split("\n")[0], True
    if folder and not arguments.resume and not any((folder / "checkpoints").glob("*")):
        shutil.rmtree(folder, ignore_errors=True)       # made a moment ago, and nothing in it yet
    elif goes_on and folder and folder.exists():
        problem += f"; what was finished is kept, go on with: python loop.py --resume {folder}"
    print("loop.py:", " ".join(problem.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
