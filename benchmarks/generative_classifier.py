"""Is the diffusion model itself a classifier, and does its vote help the students?

    python benchmarks/generative_classifier.py runs/converged       # 10 minutes on one core

An image is of the class under whose condition its noise is predicted best (Li et al. 2023, arXiv
2303.16203): each of --levels noise levels is added to it once, the same noise for every class, and
the squared errors are averaged. Val chooses how levels are weighted (by the error in eps, v or x0),
how sure a difference makes (a temperature) and the vote's share beside the students. The skin type
is told, or withheld as it is in a tenth of the training steps. Of a finished run, on val and the
first --images of test; says balanced accuracy, AUROC and the difference from the students' vote.
"""
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "examples")]
import evaluate
from ddpm import eps_model
from engine.augment import to_float
from engine.command import Parser, one_line
from engine.config import require
from engine.run import Progress, Run
from engine.training import Noise
from extras import report
from finished import Finished

BATCH = 250
# of a level's squared error in eps, that in ...
WEIGHTS = {"eps": lambda abar: abar ** 0, "v": lambda abar: 1 / abar,
           "x0": lambda abar: (1 - abar) / abar}


def errors(run: Run, generator, images, levels: int, told: bool, seed: int) -> np.ndarray:
    """(weights, N, C): the mean squared error over the levels of each image told each class."""
    unet, _, schedule, prediction, bf16 = generator
    times = np.linspace(0, 0.95 * schedule.T, levels + 1).round().astype(int)[1:]
    classes, found = len(images.class_names), []
    progress = Progress(f"{'told' if told else 'withheld'}, {len(images)} images")
    for first in range(0, len(images), BATCH):
        part = images.subset(np.arange(first, min(first + BATCH, len(images))))
        x0, groups = to_float(run.tensor(part.images)), run.tensor(part.groups)
        g = groups if told else torch.full_like(groups, -1)
        noise = Noise(run.seed("errors", seed) + first + np.arange(len(part)), x0.device)
        of_part = np.zeros((len(part), classes, levels))
        for k, time in enumerate(times):
            t = torch.full((len(part),), int(time), device=x0.device)
            eps = noise(*x0.shape[1:])
            x_t = schedule.q_sample(x0, t, eps)
            for c in range(classes):
                y = torch.full_like(t, c)
                model = eps_model(unet, schedule, y, g, prediction=prediction, bf16=bf16)
                of_part[:, c, k] = (model(x_t, t) - eps).square().mean((1, 2, 3)).cpu()
        found.append(of_part)
        progress(first + len(part), len(images))
    progress.end()
    abar, square = schedule.alphas_cumprod[times].cpu().numpy(), np.concatenate(found)
    return np.stack([(square * weight(abar)).mean(2) for weight in WEIGHTS.values()])


def softmax(x: np.ndarray) -> np.ndarray:
    return torch.tensor(x).softmax(-1).numpy()


def chosen(val: np.ndarray, labels: np.ndarray):
    """errors -> probabilities (N, C), by the weights and the temperature that val prefers: of
    balanced accuracy, then of the loss. val: (weights, N, C)."""
    best = int(np.argmax([evaluate.balanced_accuracy(-e, labels) for e in val]))

    def loss(k):
        p = softmax(-k * val[best])[np.arange(len(labels)), labels]
        return -np.log(p.clip(1e-9)).mean()
    scale = min(np.geomspace(1, 1e5, 101), key=loss)
    return list(WEIGHTS)[best], lambda e: softmax(-scale * e[best])


def main(argv: list[str] | None = None) -> None:
    parser = Parser("generative_classifier.py", __doc__)
    parser.add_argument("run", type=Path, help="a finished run with the arm real, runs/NAME")
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--levels", type=int, default=16)
    arguments = parser.parse_args(argv)
    with one_line("generative_classifier.py"):
        require(arguments.images > 0 and arguments.levels > 0, "--images, --levels: at least 1")
        of = Finished(arguments.run)
        require("real" in of.arms, f"{arguments.run}: it has no arm real")
        splits, p = of.splits(), dict(of.predictions)
        some = np.arange(min(arguments.images, len(splits["test"])))
        p |= {k: a[..., some, :] if a.ndim > 1 else a[some] for k, a in p.items()
              if k.startswith("test_")}
        generator, labels = of.generator(splits["train"]), p["val_labels"]
        votes = {s: p[f"{s}_probs_real"].mean(0) for s in ("val", "test")}
        arms = {"students": votes["test"]}
        for told in (True, False) if splits["val"].group_names else (False,):
            name = f"diffusion model, group {'told' if told else 'withheld'}"
            val, test = (errors(of.run, generator, images, arguments.levels, told, seed)
                         for seed, images in enumerate((splits["val"],
                                                        splits["test"].subset(some))))
            weight, probs = chosen(val, labels)
            mine = probs(val)
            shares = np.linspace(0, 1, 11)
            scores = [evaluate.balanced_accuracy(w * mine + (1 - w) * votes["val"], labels)
                      for w in shares]
            share = shares[int(np.argmax(scores))]
            print(f"{name}: levels by the error in {weight}; share of the vote {share:.1f}")
            arms[name] = probs(test)
            arms[f"{name}, with the students"] = share * probs(test) + (1 - share) * votes["test"]
        p |= {f"test_probs_{name}": probs[None] for name, probs in arms.items()}
        p["optimistic"], c = np.zeros(2, bool), of.run.config.evaluate
        for name in arms:       # each against the students, by itself
            p["arms"] = np.array([*dict.fromkeys(["students", name])])
            found = evaluate.score(p, min_count=c.min_count, draws=c.draws, margin=c.margin)
            whole = found["arms"][name]["test"]["all"]
            cells = [report.interval(whole[m]) for m in (
                "accuracy", "sensitivity", "specificity", "balanced_accuracy", "auroc")]
            cells += [f"{report.interval(e, '+')} {e['outcome']}" for e in found["comparisons"]
                      if (e["subset"], e["metric"]) == ("all", "balanced_accuracy")]
            print("| " + " | ".join([name, *cells]) + " |")


if __name__ == "__main__":
    main()
