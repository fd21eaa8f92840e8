"""What does quality cost? Label fidelity and Frechet distance against seconds of training, beside
diffusers' UNet, and against network evaluations while sampling.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/quality_per_cost.py [--seconds 1200] [--count 600]

Images from pure noise, even over the phantom's classes and skin types. An oracle says how many
carry the class asked for; its features give the Frechet distance to as many real images.

Training, judged by 50 DDIM steps: ours anew to each number of steps, since the learning rate
anneals over the whole; theirs (diffusers_unet.py: same width, multipliers, blocks and attention,
told class and type as one label) after an eighth, a quarter, half and all of `seconds`.
Sampling: every solver, guided (classifier-free and by the small guide) and not, and 50 DDIM steps
with a guide of the UNet's size. Training is timed without sampling, sampling without judging.

Writes runs/quality_per_cost.md and four .svg. What is finished is kept in runs/quality_per_cost and
not done again with the same config: remove it after a change of the code. Under 2 hours on two
cores, a third of it DDPM's 1,000 steps.
"""
import functools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import classifier
import data
import ddpm
import diffusers_unet
import guidance
import loop
from datasets import phantom
from engine import config as configuration
from engine.augment import to_uint8
from engine.command import Parser, one_line
from engine.run import Progress, Run, environment, fingerprint, write_bytes
from engine.training import Noise, seeded
from extras import networks, plots
from extras.children import BATCH
from extras.measures import frechet_distance
from extras.outcome import extract_features

SHARES = (1 / 14, 1 / 7, 2 / 7, 4 / 7, 1)       # of the config's training steps
STEPS = (5, 8, 10, 15, 20, 25, 50)
SOLVERS = {"DDIM": "ddim", "DPM-Solver++(2M)": "dpm", "DDPM": "ddpm"}


# ---- what is asked for, and who judges it ----------------------------------------------------

class Bench(NamedTuple):
    """The training images, and an oracle with as many real images as are drawn."""
    run: Run
    train: data.ImageSet
    schedule: ddpm.Schedule
    oracle: nn.Module
    features: np.ndarray        # the oracle's, of the real images
    y: Tensor                   # class and skin type of every image drawn
    g: Tensor

    def judge(self, images: Tensor) -> dict:
        right = (classifier.predict(self.oracle, images, self.run.bf16).argmax(1)
                 == self.y.cpu().numpy())
        return {"fidelity": 100 * float(right.mean()), "frechet": frechet_distance(
            self.features, extract_features(self.oracle, images))}


def prepared(run: Run, count: int) -> tuple[Bench, dict]:
    """count: images drawn and judged at a time. Also returns how real images are judged."""
    c = run.config
    splits = data.load(c.data)
    run.fingerprint = fingerprint(c, splits)
    source = data.load_phantom(c.data, "oracle", c.evaluate.oracle)
    oracle = loop.student(run, "oracle", source, classifier.balanced_weights(source.labels),
                          run.seed("oracle"), jitter=0.1)
    real, other = (phantom.draw(count, c.data.size, seed, phantom.EVEN, (1, 1, 1, 1))
                   for seed in (7, 8))
    images = run.tensor(real["images"])
    schedule = ddpm.Schedule(c.ddpm.T, c.ddpm.schedule, run.device)
    bench = Bench(run, splits["train"], schedule, oracle, extract_features(oracle, images),
                  run.tensor(real["labels"]), run.tensor(real["groups"]))
    return bench, {**bench.judge(images),
                   "frechet": bench.judge(run.tensor(other["images"]))["frechet"]}


def drawn(bench: Bench, name: str, sample) -> dict:
    """Judge images by sample(part, x_T, noise); "ms": what one of them took. Done once."""
    run, count, S = bench.run, len(bench.y), bench.run.config.data.size

    def compute():
        made, begun, progress = [], time.monotonic(), Progress(name)
        for part in torch.arange(count, device=run.device).split(BATCH):
            noise = Noise(part.tolist(), run.device)
            made.append(to_uint8(sample(part, noise(3, S, S), noise).float()).cpu())
            progress(int(part[-1]) + 1, count)
        progress.end()
        ms = 1e3 * (time.monotonic() - begun) / count
        return {"ms": ms, **bench.judge(torch.cat(made).to(run.device))}
    return run.stage(f"{name}_{count}", compute)


# ---- ours ------------------------------------------------------------------------------------

class Trained(NamedTuple):
    """Our UNet after some steps of training, and the seconds that they took."""
    unet: nn.Module
    steps: int
    seconds: float


def train_ours(bench: Bench, steps: int) -> Trained:
    run, c, train = bench.run, bench.run.config.ddpm, bench.train
    seed = run.seed("ddpm")
    unet = networks.new_unet(run, train, seed)

    def compute():
        begun, progress = time.monotonic(), Progress(f"ours, {steps} steps")
        arrays = map(run.tensor, (train.images, train.labels, train.groups))
        ddpm.train(unet, bench.schedule, *arrays, steps=steps, batch=c.batch, lr=c.lr,
                   ema_decay=c.ema, prediction=c.prediction, drop=c.drop, seed=seed, bf16=run.bf16,
                   compiled=run.config.loop.compile,
                   on_step=lambda step, total, loss: progress(step, total))
        progress.end()
        return {"seconds": time.monotonic() - begun,
                "network": {k: v.cpu().numpy() for k, v in unet.state_dict().items()}}
    stored = run.stage(f"ours_{steps}", compute)
    unet.load_state_dict({k: run.tensor(v) for k, v in stored["network"].items()})
    return Trained(unet.eval(), steps, stored["seconds"])


def ours(bench: Bench, trained: Trained, solver: str, steps: int, guide=None,
         name: str = "unguided") -> dict:
    """Judge images of our UNet; with a guide, called `name`, classifier-free guidance too."""
    c, schedule = bench.run.config, bench.schedule
    times = ddpm.even_times(steps, c.ddpm.T - 1)

    def sample(part, x_T, noise):
        y = bench.y[part]
        terms = [(c.guidance.objectives["class_evidence"],
                  guidance.class_evidence(guide, y))] if guide else []
        model = ddpm.eps_model(trained.unet, schedule, y, bench.g[part],
                               prediction=c.ddpm.prediction, bf16=bench.run.bf16,
                               scale=c.guidance.classifier_free if guide else 1.0)
        model = guidance.guided_eps(model, schedule, terms)
        return ddpm.SAMPLERS[SOLVERS[solver]](model, schedule, x_T, times, noise)
    return drawn(bench, f"ours_{trained.steps}_{SOLVERS[solver]}_{steps}_{name}", sample)


def train_guide(bench: Bench, name: str, guide: nn.Module) -> nn.Module:
    """As networks.train_generator does."""
    run, k, train = bench.run, bench.run.config.classifier, bench.train
    arrays = train.images, train.labels, classifier.balanced_weights(train.labels)
    return run.train(name, guide.to(run.device), classifier.train, *map(run.tensor, arrays),
                     steps=k.guide_steps, batch=k.batch, lr=k.lr, jitter=min(k.jitter),
                     noise=bench.schedule.noised, seed=run.seed("guide"))


def sampled(bench: Bench, trained: Trained) -> tuple[list[dict], dict]:
    """Rows of every solver, guided by the small guide and not; and with the large guide."""
    run, T, seed = bench.run, bench.run.config.ddpm.T, bench.run.seed("guide")
    small = train_guide(bench, "guide", networks.new_resnet(run, bench.train, seed, T))
    large = train_guide(bench, "large_guide", seeded(
        seed, classifier.ResNet, len(bench.train.class_names), (2, 2, 2),
        2 * run.config.unet.width, "small", T))         # a UNet's GFLOP
    rows = []
    for solver, steps in [(s, n) for s in list(SOLVERS)[:2] for n in STEPS] + [("DDPM", T)]:
        rows += [{"name": solver, "at": steps, **ours(bench, trained, solver, steps)},
                 {"name": f"{solver}, guided", "at": 2 * steps,
                  **ours(bench, trained, solver, steps, small, "guided")}]
    base = ours(bench, trained, "DDIM", 50, large, "large")
    return rows, {"name": "DDIM, large guide", "at": 100, **base}


# ---- theirs ----------------------------------------------------------------------------------

def theirs(bench: Bench, budget: float) -> list[dict]:
    """Rows of diffusers' UNet after parts of `budget` seconds of training."""
    run, c, u, train = bench.run, bench.run.config, bench.run.config.unet, bench.train
    types, progress = len(train.group_names), Progress("diffusers")
    torch.manual_seed(c.loop.seed)
    network = diffusers_unet.build(c.data.size, u.width, u.multipliers, u.blocks, u.attention,
                                   labels=len(train.class_names) * types + 1).to(run.device)

    def compute():
        found = diffusers_unet.train(
            network, run.tensor(train.images), run.tensor(train.labels * types + train.groups),
            budget=budget, batch=c.ddpm.batch, drop=c.ddpm.drop, seed=c.loop.seed,
            progress=progress)
        found["networks"] = [{k: v.cpu().numpy() for k, v in weights.items()}
                             for weights in found["networks"]]
        return found
    stored = run.stage(f"diffusers_{budget:g}", compute)
    rows = []
    for seconds, steps, weights in zip(*stored.values()):
        network.load_state_dict({k: run.tensor(v) for k, v in weights.items()})
        network.eval()
        sample = functools.partial(sample_theirs, network, bench.y * types + bench.g)
        rows.append({"name": "diffusers", "steps": steps, "at": seconds,
                     **drawn(bench, f"diffusers_{budget:g}_{steps}_eta", sample)})
    return rows


def sample_theirs(network, cells: Tensor, part: Tensor, x_T: Tensor, noise) -> Tensor:
    return diffusers_unet.sample(network, cells[part], x_T, 50, seed=int(part[0]))


# ---- what came out ---------------------------------------------------------------------------

def as_good(row: dict, other: dict) -> bool:
    return row["fidelity"] >= other["fidelity"] and row["frechet"] <= other["frechet"]


def told(bench: Bench, best: dict, trained: list[dict], rows: list[dict], base: dict) -> str:
    """Both tables. trained: the rows of ours, then of diffusers."""
    last = trained[-1]
    first = next((row for row in trained if row["name"] == "ours" and as_good(row, last)), None)
    reached = "no training of ours" if first is None else (
        f"ours in {first['at']:.0f} s, {last['at'] / first['at']:.1f} times fewer")
    fast = min((row for row in rows if "guided" in row["name"] and as_good(row, base)),
               key=lambda row: row["ms"], default=None)
    faster = "no line" if fast is None else (
        f"{fast['name']}, {fast['at']} evaluations, {base['ms'] / fast['ms']:.1f} times as fast")
    line = "| {name} | {at:.0f} | {fidelity:.1f} | {frechet:.2f} |"
    head, rule = "oracle agrees, % | Frechet distance |", "\n| --- | --- | --- | --- |"
    return "\n".join([
        ", ".join(f"{k} {v}" for k, v in environment(bench.run).items()),
        f"\n{len(bench.y)} images a line; real ones: {best['fidelity']:.1f} % and, to as "
        f"many others, {best['frechet']:.2f}.\n",
        f"| trained | seconds | {head} steps |{rule} --- |",
        *((line + " {steps} |").format(**row) for row in trained),
        f"\nAs good as the last line in both figures: {reached}.\n",
        f"| sampled | evaluations | {head} ms an image |{rule} --- |",
        *((line + " {ms:.1f} |").format(**row) for row in [*rows, base]),
        f"\nAs good as the last line in both figures: {faster}.\n"])


def plot(folder: Path, what: str, rows: list[dict], axis: str) -> None:
    for key, height in (("fidelity", "oracle agrees, %"), ("frechet", "Frechet distance")):
        series = [(name, *zip(*((row["at"], row[key]) for row in rows if row["name"] == name)))
                  for name in dict.fromkeys(row["name"] for row in rows)]
        drawing = plots.curves(series, f"{height} by {axis}", axis, height)
        write_bytes(folder.with_name(f"{folder.name}_{what}_{key}.svg"),
                    plots.standalone(drawing).encode())


def main() -> None:
    parser = Parser("quality_per_cost.py", __doc__)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--seconds", type=float, default=1200, help="of diffusers' training")
    parser.add_argument("--count", type=int, default=600, help="images for every figure")
    arguments = parser.parse_args()
    with one_line("quality_per_cost.py"):
        c = configuration.load(arguments.config, arguments.set)
        if c.data.kind != "phantom":
            parser.error(f"data.kind is {c.data.kind}: only the phantom has an oracle, write "
                         "phantom")
        folder = Path("runs", "quality_per_cost")
        folder.mkdir(parents=True, exist_ok=True)
        bench, best = prepared(Run(folder, c), arguments.count)

        trained = []
        for steps in sorted({max(1, round(share * c.ddpm.steps)) for share in SHARES}):
            whole = train_ours(bench, steps)
            trained.append({"name": "ours", "steps": steps, "at": whole.seconds,
                            **ours(bench, whole, "DDIM", 50)})
        trained += theirs(bench, arguments.seconds)
        rows, base = sampled(bench, whole)

        text = told(bench, best, trained, rows, base)
        print(text)
        write_bytes(folder.with_suffix(".md"), text.encode())
        few = [row for row in rows if not row["name"].startswith("DDPM")]
        plot(folder, "training", trained, "seconds of training")
        plot(folder, "sampling", [row for row in few if "guided" not in row["name"]] +
             [row for row in few if "guided" in row["name"]], "evaluations of the UNet")
        print(f"wrote {folder}.md and two plots in {folder}")


if __name__ == "__main__":
    main()
