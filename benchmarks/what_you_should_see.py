"""What should a training of the diffusion model look like, and what does each mistake look like?

    python benchmarks/what_you_should_see.py --config config.yaml
    python benchmarks/what_you_should_see.py --config configs/ham10000_cpu.yaml --set data.root=PATH
    python benchmarks/what_you_should_see.py --checklist

The first two train the model anew to every number of steps of --steps, since the learning rate
anneals over the whole, draw --count images of val's classes and groups by 50 DDIM steps, and give
the loss (mean of the last 100 steps), the share in which a judge sees the class asked for, the
Frechet distance to val and the recall (the share of val that has a generated image nearby) in the
judge's features, and how often one lies nearer to train than a photograph of val does: 50 % says
that nothing is copied. On the phantom the judge is the oracle, who learns from a further, large
draw; else a student of the training images. Then one student and the guide.
The third breaks one line of a small training a time.

Each writes its table into docs/what_you_should_see.md, between its two marks, and its pictures into
docs/tour/. What is finished is kept in runs/what_you_should_see/ and not done again with the same
config; a training goes on from its middle. Remove the folder after a change of the code.
"""
import argparse
import json
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "examples")]
import classifier
import data
import ddpm
import evaluate
import loop
from engine import config as configuration
from engine.augment import random_turn, to_float, to_uint8
from engine.command import one_line
from engine.run import Run, device_name, fingerprint, write_bytes
from engine.training import EMA, Noise, fit
from extras import networks
from extras.measures import frechet_distance, nearest, precision_recall
from extras.outcome import extract_features
from shown import sheet

PAGE = HERE / "docs/what_you_should_see.md"
STEPS = 100, 200, 400, 800, 1400, 8000


# ---- the page --------------------------------------------------------------------------------

def around(page: Path, name: str) -> tuple[str, str]:
    """The page up to its first mark of that name, and from its last; ValueError without them."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(first)
    _, ended, after = rest.partition(last)
    if not (found and ended):
        raise ValueError(f"{page}: wanted a line '{first}' and a line '{last}'; add both")
    return before + first, last + after


def put(page: Path, name: str, lines: list[str]) -> None:
    """The lines between the page's marks of that name, in place of what stood there."""
    before, after = around(page, name)
    write_bytes(page, "\n".join([before, *lines, after]).encode())


def drawn(run: Run, unet, schedule, y, g, steps: int = 50) -> np.ndarray:
    """uint8 (N, 3, S, S), an image of every class and group, each from a noise of its own."""
    c, S, made = run.config.ddpm, run.config.data.size, []
    times = ddpm.even_times(steps, schedule.T - 1)
    for part in torch.arange(len(y), device=run.device).split(128):
        model = ddpm.eps_model(unet, schedule, y[part], g[part], prediction=c.prediction,
                               bf16=run.bf16)
        x_T = Noise(part.tolist(), run.device)(3, S, S)
        made.append(to_uint8(ddpm.sample_ddim(model, schedule, x_T, times)).cpu())
    return torch.cat(made).numpy()


# ---- step by step ----------------------------------------------------------------------------

def logged(run: Run, stage: str) -> tuple[float, float]:
    """Of a finished training: minutes, and the mean loss of its last 100 steps. The minutes are
    those at the pace of its quickest tenth, so that other work on the machine does not count."""
    rows = [json.loads(line) for line in open(run.folder / "log.jsonl")]
    rows = [row for row in rows if row["event"] == "loss" and row["stage"] == stage]
    times = [datetime.fromisoformat(row["time"]).timestamp() for row in rows]
    apart = min(10, len(times) - 1)             # the clock of the log knows whole seconds
    windows = np.subtract(times[apart:], times[:len(times) - apart])
    seconds = np.quantile(windows, 0.1) / apart if apart > 0 else 0.0
    return seconds * len(rows) / 60, float(np.mean([row["loss"] for row in rows[-5:]]))


def trained(run: Run, train, schedule, steps: int):
    """The config's diffusion model after so many steps: run.train resumes it."""
    c = run.config.ddpm
    arrays = map(run.tensor, (train.images, train.labels, train.groups))
    return run.train(f"ddpm_{steps}", networks.new_unet(run, train, run.seed("ddpm")), ddpm.train,
                     schedule, *arrays, steps=steps, batch=c.batch, lr=c.lr, ema_decay=c.ema,
                     drop=c.drop, prediction=c.prediction, seed=run.seed("ddpm"),
                     compiled=run.config.loop.compile)


def resnets(run: Run, splits: dict, schedule) -> list[str]:
    """One sentence a network: the student's and the guide's loss, and balanced accuracy on val."""
    c, train, val = run.config.classifier, splits["train"], splits["val"]
    weights = classifier.balanced_weights(train.labels)
    one = loop.student(run, "student", train, weights, run.seed("student", 0), min(c.jitter))
    found = evaluate.balanced_accuracy(loop.predict(run, one, val.images), val.labels)
    said = [f"A student: loss {logged(run, 'student')[1]:.2f} after {c.steps} steps, balanced "
            f"accuracy on val {100 * found:.0f} %."]
    guide = run.train(
        "guide", networks.new_resnet(run, train, run.seed("guide"), schedule.T), classifier.train,
        *map(run.tensor, (train.images, train.labels, weights)), steps=c.guide_steps,
        batch=c.batch, lr=c.lr, jitter=min(c.jitter), noise=schedule.noised,
        seed=run.seed("guide"))
    x0, scores = to_float(run.tensor(val.images)), []
    eps = Noise(range(len(val)), run.device)(*x0.shape[1:])
    for level in (0, schedule.T // 4, schedule.T // 2, 3 * schedule.T // 4):
        t = torch.full((len(x0),), level, device=run.device)
        with torch.no_grad():
            probs = guide(schedule.q_sample(x0, t, eps), t).softmax(1).cpu().numpy()
        scores.append(f"{100 * evaluate.balanced_accuracy(probs, val.labels):.0f} % at t = {level}")
    return [*said, f"The guide: loss {logged(run, 'guide')[1]:.2f} after {c.guide_steps} steps, "
            f"{', '.join(scores)}."]


def table(run: Run, name: str, steps: list[int], count: int, pictures: Path) -> list[str]:
    """The lines of one config: a row a number of steps, then student and guide."""
    c = run.config
    splits = data.load(c.data, run.cache)
    run.fingerprint = fingerprint(c, splits)
    train, val = splits["train"], splits["val"]
    phantom = c.data.kind == "phantom"
    source = data.load_phantom(c.data, "oracle", c.evaluate.oracle) if phantom else train
    judge = loop.student(run, "judge", source, classifier.balanced_weights(source.labels),
                         run.seed("oracle"), 0.1)
    some = np.random.default_rng(0).permutation(len(val))[:count]
    real, others = (val.subset(part) for part in np.array_split(some, 2))
    features = extract_features(judge, run.tensor(val.images))
    y, g = (run.tensor(a[some]) for a in (val.labels, val.groups))
    schedule = ddpm.Schedule(c.ddpm.T, c.ddpm.schedule, run.device)

    held_out = np.sort(nearest(val.images, train.images)[0])

    def judged(images, labels, features):
        right = loop.predict(run, judge, images).argmax(1) == labels
        own = extract_features(judge, run.tensor(images))
        rank = np.searchsorted(held_out, nearest(images, train.images)[0])
        nearer = 1 - rank.mean() / len(held_out)
        return (100 * float(right.mean()), frechet_distance(features, own),
                100 * precision_recall(features, own)[1], 100 * float(nearer))
    real = judged(real.images, real.labels, extract_features(judge, run.tensor(others.images)))
    rows = [f"{device_name(run.device)}, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}; {len(some)} images a row; of real ones, one half beside the "
            f"other, right {real[0]:.0f} %, Frechet distance {real[1]:.1f}, recall {real[2]:.0f} "
            f"%, nearer {real[3]:.0f} %.", "",
            f"| steps | minutes | loss | {'oracle' if phantom else 'judge'} agrees, % | "
            "Frechet distance | recall, % | nearer to train than val, % | samples |",
            "| --- " * 8 + "|"]
    for number in steps:
        unet = trained(run, train, schedule, number)
        images = run.stage(f"images_{number}_{count}", drawn, run, unet, schedule, y, g)
        agrees, distance, recall, nearer = judged(images, val.labels[some], features)
        minutes, loss = logged(run, f"ddpm_{number}")
        file = pictures / f"seen_{name}_{number}.png"
        chosen = [np.flatnonzero(val.labels[some] == i)[:2] for i in range(len(val.class_names))]
        sheet(file, [images[np.concatenate(chosen)]], side=32)
        rows.append(f"| {number:,} | {minutes:.1f} | {loss:.4f} | {agrees:.0f} | {distance:.1f} | "
                    f"{recall:.0f} | {nearer:.0f} | ![{number} steps](tour/{file.name}) |")
        print(rows[-1], flush=True)
    return [*rows, "", *resnets(run, splits, schedule)]


# ---- one line broken at a time ---------------------------------------------------------------

SMALL = ["data.size=16", "unet.multipliers=[1, 2]", "unet.attention=4", "ddpm.batch=32"]


def small(run: Run, train, schedule, *, steps=600, lr=4e-3, decay=0.98, warm=True,
          prediction="v"):
    """A training as ddpm.train's, but for what is broken. Returns (network, losses)."""
    network = networks.new_unet(run, train, 0)
    images, y, g = map(run.tensor, (train.images, train.labels, train.groups))
    ema = EMA(network, decay)
    ema.updates = 0 if warm else 10 ** 9            # no warm-up: the random start stays in

    def pick(generator):
        return torch.randint(len(images), (32,), generator=generator, device=run.device)

    def loss(i, generator):
        x0 = random_turn(to_float(images[i]), generator)
        return ddpm.loss(network, schedule, x0, y[i], g[i], generator, prediction=prediction)
    losses = fit(network, pick, loss, steps=steps, lr=lr, seed=0, device=run.device, ema=ema,
                 bf16=run.bf16)
    network.load_state_dict(ema.shadow)
    return network, losses


def mistakes(run: Run, train):
    """(name, what was done, how to see it, images, losses) of each line of the checklist."""
    device, S = run.device, run.config.data.size
    right, y = ddpm.Schedule(1000, "cosine", device), torch.arange(8, device=device) % 4
    g = torch.arange(8, device=device) % 3
    short = ddpm.Schedule(1000, "linear", device)   # its first 100 levels: abar ends at 0.90
    short.T, half = 100, train.images // 2 + 128    # black is 0 and not -1

    def images(network, schedule=right, prediction="v", clip=1.0, steps=50, scale=1.0):
        model = ddpm.eps_model(network, schedule, y, g, prediction=prediction, scale=scale)
        times = ddpm.even_times(steps, schedule.T - 1)
        x = ddpm.sample_ddim(model, schedule, Noise(range(8), device)(3, S, S), times, clip=clip)
        return to_uint8(x).cpu().numpy()

    def kept(name, schedule=right, source=train, **changes):
        """The network of one small training, which is done once."""
        def compute():
            network, losses = small(run, source, schedule, **changes)
            return {"losses": losses, "weights": {k: v.cpu().numpy() for k, v in
                                                  network.state_dict().items()}}
        stored = run.stage(f"small_{name}", compute)
        network = networks.new_unet(run, train, 0).eval()
        network.load_state_dict({k: run.tensor(v) for k, v in stored["weights"].items()})
        return network, stored["losses"]
    base, losses = kept("base")
    yield ("right", "nothing: 600 steps", "at 16 pixels after half a minute this is all there is",
           images(base), losses)
    few, lost = kept("few", steps=40)
    yield ("steps", "40 steps", "the loss still falls; go on: colours come first, then shapes",
           images(few), lost)
    found, lost = kept("lr_high", lr=0.3)
    yield ("lr_high", "learning rate 0.3", "the loss jumps, or stands still near its start; lower "
           "it tenfold", images(found), lost)
    found, lost = kept("lr_low", lr=4e-6)
    yield ("lr_low", "learning rate 4e-6", "the loss falls by so little a step that nothing is "
           "learnt; raise it, tenfold a time", images(found), lost)
    found, lost = kept("ema", decay=0.9999, warm=False)
    yield ("ema", "EMA of 10,000 steps without warm-up, in 600", "a good loss and samples of pure "
           "noise: draw with the raw weights to see it", images(found), lost)
    found, lost = kept("range", source=data.replace(train, images=half))
    yield ("range", "images in 0..1, not -1..1", "flat, pale samples: print x0.min() and x0.max()",
           images(found), lost)
    found, lost = kept("T", schedule=short)
    yield ("T", "the first 100 of 1,000 levels: abar ends at 0.90", "training never saw pure noise:"
           " print abar at the last level, it must be below 0.01", images(found, short), lost)
    yield ("prediction", "learnt v, sampled as eps", "a good loss and a picture behind noise: what "
           "is subtracted must be what was learnt", images(base, prediction="eps"), losses)
    yield ("guidance", "classifier-free guidance 12", "glaring colours, hard edges: lower it",
           images(base, scale=12.0), losses)
    found, lost = kept("eps", prediction="eps")
    yield ("eps", "learnt eps, sampled as eps", "better than noise, with colours that are off: the "
           "noisiest levels teach it nothing", images(found, prediction="eps"), lost)
    yield ("clip", "the same, x0_hat not clipped", "a good loss and samples in pure colours: at "
           "the last level an error of eps is divided by sqrt(abar) = 0.00005",
           images(found, prediction="eps", clip=float("inf")), lost)


def checklist(run: Run, pictures: Path) -> list[str]:
    train = data.load(run.config.data)["train"]
    run.fingerprint = fingerprint(run.config, {"train": train})
    rows = ["| broken | first and last loss | samples | how to tell, what to do |",
            "| --- | --- | --- | --- |"]
    for name, done, tell, images, losses in mistakes(run, train):
        sheet(pictures / f"noise_{name}.png", [images], side=32)
        rows.append(f"| {done} | {losses[0]:.2f}, {losses[-1]:.2f} | "
                    f"![{done}](tour/noise_{name}.png) | {tell} |")
        print(rows[-1], flush=True)
    return rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--count", type=int, default=600, help="images a row, at most val's")
    parser.add_argument("--checklist", action="store_true", help="the mistakes, one by one")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the table goes")
    arguments = parser.parse_args(argv)
    with one_line("what_you_should_see.py"):
        if wrong := [n for n in arguments.steps if n < 1]:
            raise ValueError(f"--steps {wrong[0]}: write 1 or more")
        more = SMALL if arguments.checklist else []
        c = configuration.load(arguments.config, [*more, *arguments.set])
        name = "checklist" if arguments.checklist else Path(arguments.config).stem
        around(arguments.page, name)            # before any training: are the marks there?
        folder, pictures = Path("runs/what_you_should_see", name), arguments.page.parent / "tour"
        for path in (folder, pictures):
            path.mkdir(parents=True, exist_ok=True)
        run = Run(folder, c)
        lines = (checklist(run, pictures) if arguments.checklist else
                 table(run, name, sorted(set(arguments.steps)), arguments.count, pictures))
        put(arguments.page, name, lines)
        print(f"wrote {arguments.page}")


if __name__ == "__main__":
    main()
