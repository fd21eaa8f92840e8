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
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import classifier
from engine import config as configuration
import data
import ddpm
import diffusers_unet
import evaluate
import guidance
import loop
from datasets import phantom
from extras import plots
from engine.run import RunFolder, one_line, write_bytes
from engine.training import seeded, to_uint8

SHARES = (1 / 14, 1 / 7, 2 / 7, 4 / 7, 1)       # of the config's training steps
STEPS = (5, 8, 10, 15, 20, 25, 50)
SOLVERS = {"DDIM": ddpm.sample_ddim, "DPM-Solver++(2M)": ddpm.sample_dpm}


class Costs(loop.Experiment):
    """A run in which only the generator is trained, judged by an oracle."""

    def prepare(self, count: int) -> None:
        """count: images drawn and judged at a time."""
        super().prepare()
        c, self.x = self.config, self.tensor(self.train.images)
        source = data.load_oracle(c.data.size, c.data.seed, c.evaluate.oracle)
        self.oracle = self.student("oracle", source, classifier.balanced_weights(source.labels),
                                   self.seed("oracle"), jitter=0.1)
        real, other = (phantom.draw(count, c.data.size, seed, phantom.EVEN, (1, 1, 1, 1))
                       for seed in (7, 8))
        self.y, self.g = self.tensor(real["labels"]), self.tensor(real["groups"])
        self.real = classifier.extract_features(self.oracle, self.tensor(real["images"]))
        self.best = {**self.judge(self.tensor(real["images"])),
                     "frechet": self.judge(self.tensor(other["images"]))["frechet"]}

    def judge(self, images) -> dict:
        right = self.predict(self.oracle, images).argmax(1) == self.y.cpu().numpy()
        return {"fidelity": 100 * float(right.mean()), "frechet": evaluate.frechet_distance(
            self.real, classifier.extract_features(self.oracle, images))}

    def drawn(self, name: str, sample) -> dict:
        """Judge images by sample(part, x_T, noise); "ms": what one of them took. Done once."""
        def compute(progress):
            made, begun, count = [], time.monotonic(), len(self.y)
            for part in torch.arange(count, device=self.device).split(loop.CHUNK):
                noise = ddpm.Noise(part.tolist(), self.device)
                x = sample(part, noise(3, *[self.config.data.size] * 2), noise)
                made.append(to_uint8(x.float()).cpu())
                progress(int(part[-1]) + 1, count)
            ms = 1e3 * (time.monotonic() - begun) / count
            return {"ms": ms, **self.judge(torch.cat(made).to(self.device))}
        return self.run.stage(f"{name}_{len(self.y)}", compute)

    def train_ours(self, steps: int) -> float:
        """Leaves the trained network in self.unet. Returns the seconds that its training took."""
        c, seed = self.config.ddpm, self.seed("ddpm")
        self.unet, self.steps = self.new_unet(seed), steps

        def compute(progress):
            begun = time.monotonic()
            ddpm.train(self.unet, self.schedule, self.x,
                       self.tensor(self.train.labels), self.tensor(self.train.groups), steps=steps,
                       batch=c.batch, lr=c.lr, ema_decay=c.ema, prediction=c.prediction,
                       drop=c.drop, seed=seed, bf16=self.bf16,
                       on_step=lambda step, total, loss: progress(step, total))
            return {"seconds": time.monotonic() - begun, "network": self.unet.state_dict()}
        stored = self.run.stage(f"ours_{steps}", compute)
        self.unet.load_state_dict(stored["network"])
        self.unet.eval()
        return stored["seconds"]

    def ours(self, solver: str, steps: int, guide=None, name: str = "unguided") -> dict:
        """Judge images of self.unet; with a guide, called `name`, classifier-free guidance too."""
        c = self.config

        def sample(part, x_T, noise):
            y = self.y[part]
            terms = [(c.guidance.class_scale, guidance.class_evidence(guide, y))] if guide else []
            model = guidance.guided_eps(ddpm.eps_model(
                self.unet, self.schedule, y, self.g[part], prediction=c.ddpm.prediction,
                scale=c.guidance.classifier_free if guide else 1.0, bf16=self.bf16),
                self.schedule, terms)
            if solver == "DDPM":
                return ddpm.sample_ddpm(model, self.schedule, x_T, noise)
            return SOLVERS[solver](model, self.schedule, x_T, steps)
        return self.drawn(f"ours_{self.steps}_{solver}_{steps}_{name}", sample)

    def train_guide(self, name: str, guide: classifier.ResNet) -> classifier.ResNet:
        """As loop.train_generator does."""
        k, labels = self.config.classifier, self.tensor(self.train.labels)
        weights = self.tensor(classifier.balanced_weights(self.train.labels))
        self.run.train(name, guide.to(self.device), k.guide_steps, lambda **progress:
                       classifier.train(guide, self.x, labels, weights,
                                        steps=k.guide_steps, batch=k.batch, lr=k.lr,
                                        jitter=min(k.jitter), seed=self.seed("guide"),
                                        bf16=self.bf16, noise=self.schedule.noised, **progress))
        return guide

    def theirs(self, budget: float) -> list[dict]:
        """Rows of diffusers' UNet after parts of `budget` seconds of training."""
        c, u, types = self.config, self.config.unet, len(self.train.group_names)
        torch.manual_seed(c.loop.seed)
        network = diffusers_unet.build(
            c.data.size, u.width, u.multipliers, u.blocks, u.attention,
            labels=len(self.train.class_names) * types + 1).to(self.device)
        cells = self.tensor(self.train.labels * types + self.train.groups)
        stored = self.run.stage(f"diffusers_{budget:g}", lambda progress: diffusers_unet.train(
            network, self.x, cells, budget=budget, batch=c.ddpm.batch,
            drop=c.ddpm.drop, seed=c.loop.seed, progress=progress))
        rows = []
        for seconds, steps, weights in zip(*stored.values()):
            network.load_state_dict(weights)
            network.eval()
            rows.append({"name": "diffusers", "steps": steps, "at": seconds, **self.drawn(
                f"diffusers_{budget:g}_{steps}_eta", lambda part, x_T, noise: diffusers_unet.sample(
                    network, (self.y * types + self.g)[part], x_T, 50, seed=int(part[0])))})
        return rows


def as_good(row: dict, other: dict) -> bool:
    return row["fidelity"] >= other["fidelity"] and row["frechet"] <= other["frechet"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--seconds", type=float, default=1200, help="of diffusers' training")
    parser.add_argument("--count", type=int, default=600, help="images for every figure")
    arguments = parser.parse_args()
    c = configuration.load(arguments.config, arguments.set)
    if c.data.kind != "phantom":
        parser.error(f"data.kind is {c.data.kind}: only the phantom has an oracle, write phantom")
    folder = Path("runs", "quality_per_cost")
    folder.mkdir(parents=True, exist_ok=True)
    costs = Costs(c, RunFolder(folder))
    costs.prepare(arguments.count)

    trained = []
    for steps in sorted({max(1, round(share * c.ddpm.steps)) for share in SHARES}):
        trained.append({"name": "ours", "steps": steps, "at": costs.train_ours(steps),
                        **costs.ours("DDIM", 50)})
    theirs = costs.theirs(arguments.seconds)
    ours = next((row for row in trained if as_good(row, theirs[-1])), None)
    reached = "no training of ours" if ours is None else (
        f"ours in {ours['at']:.0f} s, {theirs[-1]['at'] / ours['at']:.1f} times fewer")
    trained += theirs

    seed, T = costs.seed("guide"), c.ddpm.T
    small = costs.train_guide("guide", costs.new_resnet(seed, T))
    large = costs.train_guide("large_guide", seeded(seed, lambda: classifier.ResNet(
        len(costs.train.class_names), (2, 2, 2), 2 * c.unet.width, "small", T)))  # a UNet's GFLOP
    sampled = []
    for solver, steps in [(s, n) for s in SOLVERS for n in STEPS] + [("DDPM", T)]:
        sampled += [{"name": solver, "at": steps, **costs.ours(solver, steps)},
                    {"name": f"{solver}, guided", "at": 2 * steps,
                     **costs.ours(solver, steps, small, "guided")}]
    base = {"name": "DDIM, large guide", "at": 100, **costs.ours("DDIM", 50, large, "large")}
    fast = min((row for row in sampled if "guided" in row["name"] and as_good(row, base)),
               key=lambda row: row["ms"], default=None)
    faster = "no line" if fast is None else (
        f"{fast['name']}, {fast['at']} evaluations, {base['ms'] / fast['ms']:.1f} times as fast")

    line = "| {name} | {at:.0f} | {fidelity:.1f} | {frechet:.2f} |"
    head, rule = "oracle agrees, % | Frechet distance |", "\n| --- | --- | --- | --- |"
    text = "\n".join([
        ", ".join(f"{k} {v}" for k, v in loop.environment(costs.device, costs.bf16).items()),
        f"\n{arguments.count} images a line; real ones: {costs.best['fidelity']:.1f} % and, to as "
        f"many others, {costs.best['frechet']:.2f}.\n",
        f"| trained | seconds | {head} steps |{rule} --- |",
        *((line + " {steps} |").format(**row) for row in trained),
        f"\nAs good as the last line in both figures: {reached}.\n",
        f"| sampled | evaluations | {head} ms an image |{rule} --- |",
        *((line + " {ms:.1f} |").format(**row) for row in [*sampled, base]),
        f"\nAs good as the last line in both figures: {faster}.\n"])
    print(text)
    write_bytes(folder.with_suffix(".md"), text.encode())
    few = [row for row in sampled if row["name"].partition(",")[0] in SOLVERS]
    for what, rows, axis in (("training", trained, "seconds of training"),
                             ("sampling", few, "evaluations of the UNet")):
        for key, height in (("fidelity", "oracle agrees, %"), ("frechet", "Frechet distance")):
            curves = [(name, *zip(*((row["at"], row[key]) for row in rows if row["name"] == name)))
                      for name in dict.fromkeys(row["name"] for row in rows)]
            drawn = plots.lines(curves, f"{height} by {axis}", axis, height)
            write_bytes(folder.with_name(f"{folder.name}_{what}_{key}.svg"),
                        plots.standalone(drawn).encode())


if __name__ == "__main__":
    with one_line("quality_per_cost.py"):
        main()
