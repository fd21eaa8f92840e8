"""Should the network predict eps or v? Same data, seed and steps, both tried on the phantom.

    python benchmarks/eps_or_v.py --config config.yaml [--set ddpm.steps=1000] [--only v]

An oracle (a ResNet trained on a second, large draw) says of images from pure noise how many carry
the class that was asked for; its features give the Frechet distance to as many real images of the
same classes and skin types, and two real draws its floor. Under 20 minutes on two cores.
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import classifier
import ddpm
from datasets import phantom
from engine import config as configuration
from engine.command import Parser, one_line
from engine.augment import to_float, to_uint8
from engine.training import Noise, seeded
from extras.measures import frechet_distance
from extras.outcome import extract_features
from unet import UNet


def train_oracle(size: int, bf16: bool, count: int = 8000, steps: int = 1500) -> classifier.ResNet:
    drawn = phantom.draw(count, size, 99, phantom.EVEN, (1, 1, 1, 1))
    network = seeded(99, classifier.build, "auto", size, 4)
    classifier.train(network, torch.tensor(drawn["images"]), torch.tensor(drawn["labels"]),
                     torch.ones(count), steps=steps, batch=64, lr=2e-3, jitter=0.1, seed=99,
                     bf16=bf16)
    return network


@one_line("eps_or_v.py")
def main() -> None:
    parser = Parser("eps_or_v.py", __doc__)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--only", choices=("eps", "v"))
    parser.add_argument("--count", type=int, default=1200)
    arguments = parser.parse_args()
    c = configuration.load(arguments.config, arguments.set)
    bf16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    size, count = c.data.size, arguments.count
    oracle = train_oracle(size, bf16)
    real, other = (phantom.draw(count, size, seed, phantom.EVEN, (1, 1, 1, 1)) for seed in (7, 8))
    y, g = (torch.tensor(real[key]) for key in ("labels", "groups"))

    known = extract_features(oracle, torch.tensor(real["images"]))

    def judged(images):
        probs = classifier.predict(oracle, images)
        fidelity = float((probs.argmax(1) == real["labels"]).mean())
        return fidelity, frechet_distance(known, extract_features(oracle, images))
    fidelity = judged(torch.tensor(real["images"]))[0]
    floor = judged(torch.tensor(other["images"]))[1]
    print(f"real images: oracle agrees with {fidelity:.1%}; real to real Frechet {floor:.2f}")

    train = phantom.draw(c.data.train, size, c.data.seed)
    x, labels, groups = (torch.tensor(train[key]) for key in ("images", "labels", "groups"))
    schedule = ddpm.Schedule(c.ddpm.T, c.ddpm.schedule)
    for prediction in (arguments.only,) if arguments.only else ("eps", "v"):
        network = seeded(0, UNet, size, 4, 6, c.unet.width, tuple(c.unet.multipliers),
                         c.unet.blocks, c.unet.attention, c.unet.patch)
        begun = time.monotonic()
        ddpm.train(network, schedule, x, labels, groups, steps=c.ddpm.steps, batch=c.ddpm.batch,
                   lr=c.ddpm.lr, ema_decay=c.ddpm.ema, prediction=prediction, drop=c.ddpm.drop,
                   seed=0, bf16=bf16)
        seconds = time.monotonic() - begun
        for steps in (10, 20, 50):
            made = []
            for part in torch.arange(count).split(200):
                model = ddpm.eps_model(network, schedule, y[part], g[part], prediction=prediction,
                                       bf16=bf16)
                x_T = Noise(part.tolist())(3, size, size)
                times = ddpm.even_times(steps, c.ddpm.T - 1)
                made.append(to_uint8(ddpm.sample_ddim(model, schedule, x_T, times)))
            fidelity, distance = judged(torch.cat(made))
            print(f"{prediction:4} {c.ddpm.steps} steps, {seconds:.0f} s: {steps} DDIM steps, "
                  f"oracle agrees with {fidelity:.1%}, Frechet distance {distance:.2f}", flush=True)
        # Inversion and back under the same condition: what the counterfactual's parent loses.
        few = torch.arange(min(200, len(x)))
        model = ddpm.eps_model(network, schedule, labels[few], groups[few], prediction=prediction,
                               bf16=bf16)
        x0, times = to_float(x[few]), ddpm.even_times(20, round(0.85 * c.ddpm.T) - 1)
        latent = ddpm.invert_ddim(model, schedule, x0, times)
        back = ddpm.sample_ddim(model, schedule, latent, times)
        print(f"{prediction:4} inverted and decoded in 20 steps: root mean square error "
              f"{(back - x0).square().mean().sqrt() * 127.5:.2f} grey levels", flush=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, numpy {np.__version__}")


if __name__ == "__main__":
    main()
