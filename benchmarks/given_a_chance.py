"""Was the generator given a chance? A finished run's diffusion model under other guidance.

    python loop.py --config config.yaml --set ddpm.steps=8000 --name converged     # an hour
    python benchmarks/given_a_chance.py runs/converged                             # 6 minutes a row

Scale 2 of classifier-free guidance, class guidance and a judge draw what is typical. Each row draws
the children of the run's first round anew, of its hard parents and of random ones, with

    as it ran       the run's own settings
    scale 1.3, 1    guidance.classifier_free
    interval        guidance of either kind at the middle noise levels alone (--interval): where
                    noise is all it harms, at the end it does nothing (Kynkaanniemi et al. 2024,
                    arXiv 2404.07724), here with scale 2
    no judge        at scale 1: whatever was drawn, but copies, is added

and trains students on them, --students an arm, from the starts of the run's own. All images are of
one round, and as many of every class and group in both arms; `real` and `replay` are the run's.
Says of the hard parents' children how many the judge accepts and how many out-of-fold students get
wrong (of the parents: nearly all), recall and Frechet distance (on the phantom the oracle's share
of right ones too), and of the students the gain in balanced accuracy on test over the run's `real`,
its `replay` and the row's own `random`, all three at once. Explored on one draw: a row that looks
good here is to be confirmed on others. Writes runs/NAME_chance/table.md; a stopped one goes on.
"""
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "examples")]
import evaluate
import loop
from finished import Finished
from engine.augment import to_float, to_uint8
from engine.command import Parser, one_line
from engine.run import Run, RunError, write_bytes
from engine.training import Noise
from extras import outcome, report
from extras.children import REASONS, Kit, children_used, from_model
from ddpm import SAMPLERS, eps_model
from guidance import (OBJECTIVES, Drawn, Generator, Tally, counterfactual,
                      guided_eps, variation)

# classifier-free scale (None: the run's), only in the interval, with the judge
ROWS = {"as it ran": (None, False, True), "scale 1.3": (1.3, False, True),
        "scale 1": (1.0, False, True), "interval": (2.0, True, True),
        "no judge, scale 1": (1.0, False, False)}


def limited(low: float, high: float):
    """A way to make children, as extras.children.from_model: guided at the noise levels from low to
    high, shares of all, and at the others only told what to draw."""
    def child(kit, parents, targets, objectives):
        c, (unet, guide, schedule, prediction, bf16) = kit.run.config.guidance, kit.generator
        y, own, target = map(kit.run.tensor, (parents.labels, parents.groups, targets))
        x0, tally = to_float(kit.run.tensor(parents.images)), Tally()
        noise = Noise(kit.run.seed("chance", kit.seed) + np.arange(len(parents)), x0.device)
        terms = [(scale, OBJECTIVES[name](guide, kit.students, y))
                 for name, scale in objectives.items() if scale]

        def told(group, scale=1.0):
            return eps_model(unet, schedule, y, group, scale=scale, prediction=prediction,
                             bf16=bf16)
        plain = told(target)
        full = guided_eps(told(target, c.classifier_free), schedule, terms, tally)

        def wanted(x_t, t):
            inside = low * schedule.T <= int(t[0]) < high * schedule.T
            return (full if inside else plain)(x_t, t)
        sample = SAMPLERS[c.sampler]
        if c.start == "counterfactual" and parents.group_names:
            x = counterfactual(told(own), wanted, schedule, x0, c.depth, c.steps, sample, noise)
        else:
            x = variation(wanted, schedule, x0, noise, c.strength, c.steps, sample)
        x = x.float().cpu()
        finite = x.flatten(1).isfinite().all(1).numpy()
        return Drawn(to_uint8(x.nan_to_num()).numpy(), finite, tally.nonfinite)
    return child


class Base(NamedTuple):
    """What all rows share, of the finished run."""
    of: Finished
    splits: dict
    generator: Generator
    students: list              # out of fold
    probs: np.ndarray           # (N, C), of train, theirs
    keep: loop.Filter
    mined: tuple                # parents and targets, for all that the run adds
    count: int
    jitter: float


def base_of(folder: Path) -> Base:
    of = Finished(folder)
    c, run = of.run.config, of.run
    if c.data.labelled < 1 or not {"random", "guided", "replay"} <= {*of.arms}:
        raise RunError(f"{folder}: wanted a run with every label told and with the arms replay, "
                       "random and guided")
    splits = of.splits()
    train, students = splits["train"], [of.resnet(f"crossfit_1_{k}") for k in range(c.data.folds)]
    probs = np.zeros((len(train), len(train.class_names)), np.float32)
    for k, one in enumerate(students):
        unseen = train.folds == k
        probs[unseen] = loop.predict(run, one, train.images[unseen])
    count = round(c.loop.added * len(train))
    mined = loop.mine(run, train, probs, round(count * c.loop.surplus), None, 1)
    return Base(of, splits, of.generator(train), students, probs,
                loop.Filter(run, of.resnet("judge"), train, splits), mined, count,
                of.results["jitter"]["chosen"])


def drawn(base: Base, run: Run, name: str, interval) -> tuple[dict, dict]:
    """The candidates of `random` and `guided` under a row's guidance, and which are used."""
    _, inside, judged = ROWS[name]
    made, hows = {}, {}
    for arm in ("random", "guided"):
        hows[arm] = how = loop.ARMS[arm]._replace(
            child=limited(*interval) if inside else from_model, filtered=judged)
        kit = Kit(run, f"{plain(name)}_{arm}", run.seed("children", 1), base.splits["train"],
                  base.generator, base.students)
        some = loop.parents_for(kit, how, base.mined, base.splits, base.students)
        m = loop.make(kit, how, base.keep, *some)
        if not judged:
            copies = m.distance <= base.keep.too_near
            m = m._replace(rejected_by=np.where(copies, REASONS.index("copy"), 0))
        made[arm] = [m]
    return made, loop.as_many_each(hows, made, base.count)


def plain(name: str) -> str:
    return "".join(filter(str.isalnum, name))


def scored(base: Base, run: Run, name: str, added: dict, students: int) -> dict:
    """evaluate.score of the run's `real` and `replay` and of new students of both arms."""
    e, p, train = run.config.evaluate, base.of.predictions, base.splits["train"]
    own = {"arms": np.array(["real", "replay", *added]), "seeds": p["seeds"][:students],
           "optimistic": np.zeros(2 + len(added), bool)}
    for arm in ("real", "replay"):
        own[f"test_probs_{arm}"] = p[f"test_probs_{arm}"][:students]
    for arm, more in added.items():
        images, weights = loop.mixed(run, train, more)
        own[f"test_probs_{arm}"] = np.stack([loop.predict(run, loop.student(
            run, f"student_{plain(name)}_{arm}_{s}", images, weights, run.seed("student", s),
            base.jitter), base.splits["test"].images) for s in range(students)])
    return evaluate.score(p | own, min_count=e.min_count, draws=e.draws, margin=e.margin)


def row(base: Base, run: Run, name: str, students: int, interval) -> str:
    train = base.splits["train"]
    made, used = drawn(base, run, name, interval)
    added = children_used(made, [used])
    said = outcome.of_round(run, train, base.probs, base.students, made)
    m, mine = made["guided"][0], used["guided"]
    votes = loop.predict(run, base.keep.judge, m.children.images).argmax(1)
    shares = [votes == m.children.labels, said["margin"][m.parents[mine]] < 0,
              said["children"]["guided"][mine] < 0]
    entry = outcome.quality(run, base.splits, added, base.keep, loop.student, base.jitter)["guided"]
    shares += [entry.get("label_fidelity_oracle"), entry["recall"]]
    distance = "" if entry["frechet"] is None else f"{entry['frechet']:.1f}"

    r = scored(base, run, name, added, students)
    gains = {c["against"]: f"{report.interval(c, '+')} {c['outcome'] or ''}"
             for c in r["comparisons"] if (c["arm"], c["subset"], c["metric"]) == (
                 "guided", "all", "balanced_accuracy")}
    return " | ".join([
        f"| {name}", *("" if share is None else f"{100 * np.mean(share):.0f}" for share in shares),
        distance, report.interval(r["arms"]["guided"]["test"]["all"]["balanced_accuracy"]),
        *(gains[arm] for arm in ("real", "replay", "random"))]) + " |"


def main() -> None:
    parser = Parser("given_a_chance.py", __doc__)
    parser.add_argument("run", type=Path, help="a finished run, runs/NAME")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--students", type=int, default=3)
    parser.add_argument("--interval", type=float, nargs=2, default=(0.2, 0.8))
    arguments = parser.parse_args()
    lines = ["| guidance | judge accepts, % | parents wrong, % | children wrong, % | oracle agrees,"
             " % | recall, % | Frechet distance | balanced accuracy | over real | over replay | "
             "over random |", "| --- " * 11 + "|"]
    with one_line("given_a_chance.py"):
        base = base_of(arguments.run)
        beside = arguments.run.parent / f"{arguments.run.name}_chance"
        beside.mkdir(exist_ok=True)
        for name in arguments.rows:
            c, scale = base.of.run.config, ROWS[name][0]
            own = c if scale is None else c.replace("guidance", classifier_free=scale)
            run = Run(beside, own, base.of.run.fingerprint)
            lines.append(row(base, run, name, arguments.students, arguments.interval))
            print(lines[-1], flush=True)
            write_bytes(beside / "table.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
