"""A residual network, used twice: the `student` that diagnoses clean images, and the `guide` that
recognises a class in a noisy image x_t, knowing its noise level t, so that its gradient can steer.

Sources: He et al. 2016 (arXiv 1512.03385), blocks and bottlenecks, attribute names as in the
well-known implementations; Dhariwal & Nichol 2021 (arXiv 2105.05233), section 4: a classifier of
noisy images.

    python classifier.py --config config.yaml   train one student on the config's data and score it
    python classifier.py --predict DIR --checkpoint runs/NAME    a run's students on your own images
"""
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.training import fit, random_turn, to_float

# mean and spread of the published networks' inputs in 0..1, by channel
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PUBLISHED = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a noise level, if given, shifts the features between.

    bottleneck: 1x1, 3x3 and 1x1 instead, the last four times as wide: He et al. 2016, figure 5.
    """

    def __init__(self, channels: int, width: int, stride: int, condition: int, bottleneck: bool):
        super().__init__()
        plan = [(1, width), (3, width), (1, 4 * width)] if bottleneck else [(3, width)] * 2
        self.count, before = len(plan), channels
        for i, (kernel, out) in enumerate(plan, start=1):
            # the stride is in the last convolution but one, where the published weights have it
            self.add_module(f"conv{i}", nn.Conv2d(
                before, out, kernel, stride=stride if i == self.count - 1 else 1,
                padding=kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(out))
            before = out
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False),
                                            nn.BatchNorm2d(out))
        self.time = nn.Linear(condition, width) if condition else None

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        h = self.bn1(self.conv1(x))                              # (B, width, H/stride, W/stride)
        if self.time is not None:
            h = h + self.time(c)[:, :, None, None]
        h = self.bn2(self.conv2(F.relu(h)))
        if self.count == 3:
            h = self.bn3(self.conv3(F.relu(h)))                           # (B, 4 width, ...)
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Logits of `classes` from images (B, 3, S, S) in [-1, 1].

    blocks: blocks in each layer, (2, 2, 2, 2) is ResNet-18; width doubles from layer to layer.
    stem: "large" is the published 7x7 stride-2 convolution, without its max-pooling below 128
    pixels, where too little would be left; "published" has it always, and ImageNet's normalisation
    before it, as published weights need; "small" is a 3x3 stride-2 convolution for 32 pixels:
    stride 1 would cost four times the work.
    noise_levels: 0 for a student; T for a guide, which is then called with t.
    """

    def __init__(self, classes: int, blocks: tuple[int, ...] = (2, 2, 2, 2), width: int = 64,
                 stem: str = "large", noise_levels: int = 0, bottleneck: bool = False):
        super().__init__()
        self.noise_levels, condition = noise_levels, 4 * width if noise_levels else 0
        self.published, kernel = stem == "published", 3 if stem == "small" else 7
        if self.published:
            self.register_buffer("imagenet", torch.tensor(IMAGENET)[:, :, None, None], False)
        self.conv1 = nn.Conv2d(3, width, kernel, stride=2, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.time = nn.Sequential(nn.Linear(width, condition), nn.SiLU()) if noise_levels else None
        channels, self.layers = width, []
        for i, count in enumerate(blocks):
            out = width * 2 ** i
            layer = nn.ModuleList()
            for j in range(count):
                layer.append(Block(channels, out, 2 if i and j == 0 else 1, condition, bottleneck))
                channels = 4 * out if bottleneck else out
            self.add_module(f"layer{i + 1}", layer)
            self.layers.append(f"layer{i + 1}")
        self.fc = nn.Linear(channels, classes)

    def features(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """The pooled features before the last layer: (B, channels of the last layer).

        t: (B,) int64 noise levels, for a guide and for none but a guide (ValueError).
        """
        if (t is not None) != bool(self.noise_levels):
            raise ValueError("a guide needs t and a student takes none")
        c = None
        if t is not None:
            # The level as an angle from 0 to pi/2, seen at frequencies 1, 2, 3, ...
            angle = (t.float() / self.noise_levels * math.pi / 2)[:, None]
            waves = angle * torch.arange(1, self.conv1.out_channels + 1, device=x.device)
            c = self.time(waves.cos())                                       # (B, 4 width)
        if self.published:
            mean, spread = self.imagenet
            x = ((x + 1) / 2 - mean) / spread
        h = F.relu(self.bn1(self.conv1(x)))                                  # (B, width, S/2, S/2)
        if self.published or x.shape[-1] >= 128:
            h = F.max_pool2d(h, 3, stride=2, padding=1)
        for name in self.layers:
            for block in getattr(self, name):
                h = block(h, c)                                              # half the side a layer
        return h.mean((2, 3))

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.fc(self.features(x, t))                                  # (B, classes)


def build(network: str, size: int, classes: int, noise_levels: int = 0,
          published: bool = False) -> ResNet:
    """network: "resnet18", "resnet34", "resnet50", "small" (three layers of one block, from 32
    channels) or "auto", which is resnet18 at 64 pixels and above, where the small one has too
    little depth to see far. published: with the stem that published weights need."""
    if network == "small" or network == "auto" and size < 64:
        return ResNet(classes, (1, 1, 1), 32, "small", noise_levels)
    network = "resnet18" if network == "auto" else network
    return ResNet(classes, PUBLISHED[network], 64, "published" if published else "large",
                  noise_levels, network == "resnet50")


def load_weights(network: ResNet, path: str) -> None:
    """Published ImageNet weights, a state dict under the well-known names, into a network of the
    "published" stem. Its last layer stays its own, and so does what knows the noise level.

    Raises ValueError, one line, for a file that is none or whose names or shapes differ.
    """
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: tuple(value.shape) for name, value in given.items()}
    except Exception as error:      # torch raises its own mixture for foreign and damaged files
        raise ValueError(f"{path} is no state dict "
                         f"({(str(error).splitlines() or [type(error).__name__])[0]})") from None

    def compared(shapes):           # the counters of BatchNorm, absent from older files, do nothing
        return {name: shape for name, shape in shapes.items() if not name.startswith("fc.")
                and "time." not in name and not name.endswith("num_batches_tracked")}
    own = network.state_dict()
    wanted = compared({name: tuple(value.shape) for name, value in own.items()})
    found = compared(found)
    wrong = [f"{name} is {found.get(name, 'absent')}, wanted {wanted.get(name, 'none')}"
             for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} keys differ from the network's: "
                         + "; ".join(wrong[:5]) + "; ..." * (len(wrong) > 5))
    network.load_state_dict({**own, **{name: given[name] for name in wanted}})


def jitter_colour(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Light, pigment and camera change: a random gain for each image, and a small one per channel.

    Beer-Lambert: more melanin takes a factor off the light, so the log-gain is what is drawn:
    common to the channels uniform in [-strength, min(strength, 0.15)] (light skin is close to white
    already: there is little room upward), plus a tenth of strength per channel.
    x: (B, 3, H, W) in [-1, 1]. Returns the same, clipped; strength 0 returns x itself.
    """
    if strength == 0:
        return x
    u = torch.rand(len(x), 4, 1, 1, generator=generator, device=x.device)
    up = min(strength, 0.15)
    log_gain = u[:, :1] * (strength + up) - strength + 0.1 * strength * (2 * u[:, 1:] - 1)
    return ((x + 1) * log_gain.exp() - 1).clamp(-1, 1)


def random_shift(x: Tensor, generator: torch.Generator, pixels: int) -> Tensor:
    """Each image moved by up to `pixels` either way, its edge mirrored into the gap."""
    B, C, H, W = x.shape
    padded = F.pad(x, [pixels] * 4, mode="reflect")
    dy, dx = torch.randint(2 * pixels + 1, (2, B, 1), generator=generator, device=x.device)
    rows = dy + torch.arange(H, device=x.device)                             # (B, H)
    columns = dx + torch.arange(W, device=x.device)                          # (B, W)
    image = torch.arange(B, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def drawer(weights: Tensor, batch: int) -> Callable[[torch.Generator], Tensor]:
    """pick(generator) -> (batch,) int64, each index drawn as often as its weight (N,) says."""
    # By search in the cumulative sum: exact, and fast for any N. Summed on the CPU: a GPU has no
    # deterministic cumulative sum.
    table = (weights.double() / weights.double().sum()).cpu().cumsum(0).to(weights.device)

    def pick(generator):
        u = torch.rand(batch, generator=generator, device=table.device, dtype=torch.float64)
        return torch.searchsorted(table, u).clamp(max=len(table) - 1)
    return pick


def loss(network: ResNet, images: Tensor, labels: Tensor, index: Tensor,
         generator: torch.Generator, part: slice, *, jitter: float, noise=None) -> Tensor:
    """Cross-entropy on the images at `index` (B,), turned, jittered, and noised or shifted; the
    other arguments as in `train`. part: the rows that count; what is drawn is drawn for all."""
    x = random_turn(to_float(images[index]), generator)
    x = jitter_colour(x, jitter, generator)
    seen = (noise(x, generator) if noise is not None else
            [random_shift(x, generator, max(1, x.shape[-1] // 16))])
    return F.cross_entropy(network(*(a[part] for a in seen)), labels[index[part]])


def train(network: ResNet, images: Tensor, labels: Tensor, weights: Tensor, *, steps: int,
          batch: int, lr: float, jitter: float, seed: int, bf16: bool = False,
          noise: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None,
          **progress) -> list[float]:
    """Train on uint8 images (N, 3, H, W), labels (N,) int64; weights (N,) >= 0 say how often each
    image is drawn (see `balanced_weights`).

    noise(x0, generator) -> (x_t, t) makes a guide of it: Dhariwal & Nichol 2021, section 4.
    jitter: strength of `jitter_colour`. `progress` goes to training.fit. Returns the loss history.
    """
    def loss_fn(index, generator, part):
        return loss(network, images, labels, index, generator, part, jitter=jitter, noise=noise)

    return fit(network, drawer(weights, batch), loss_fn, steps=steps, lr=lr, seed=seed,
               device=images.device, bf16=bf16, weight_decay=0.05, **progress)


def balanced_weights(labels: np.ndarray, cells: np.ndarray | None = None) -> np.ndarray:
    """Draw every class as often as any other; within a class, every cell (say, skin type) likewise
    if `cells` (N,) is given. Returns (N,) float64 that sum to 1."""
    weights = np.zeros(len(labels))
    for label in np.unique(labels):
        of_class = labels == label
        kinds = np.unique(cells[of_class]) if cells is not None else [None]
        for kind in kinds:
            members = of_class if kind is None else of_class & (cells == kind)
            weights[members] = 1 / members.sum() / len(kinds)
    return weights / weights.sum()


@torch.no_grad()
def predict(network: ResNet, images: Tensor, bf16: bool = False, batch: int = 500) -> np.ndarray:
    """Class probabilities of clean uint8 images (N, 3, H, W): (N, classes) float32."""
    network.eval()
    found = []
    for part in images.split(batch):
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = network(to_float(part))
        found.append(logits.float().softmax(1).cpu())
    return torch.cat(found).numpy()


@torch.no_grad()
def extract_features(network: ResNet, images: Tensor, batch: int = 500) -> np.ndarray:
    """The pooled features of clean uint8 images (N, 3, H, W): (N, D) float32."""
    network.eval()
    return torch.cat([network.features(to_float(part)).float().cpu()
                      for part in images.split(batch)]).numpy()


def main() -> None:
    """Train one student on a config's train split and score it on val; or let a run's students
    say what the images of a folder show."""
    import argparse             # this and all below: for this command alone
    from pathlib import Path

    from engine import config
    import data
    import evaluate
    from extras import external
    from engine.run import Progress, one_line
    from engine.training import seeded
    parser = argparse.ArgumentParser(description="Train one student and score it, or predict.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config")
    which.add_argument("--predict", metavar="DIR", help="a folder of images; needs --checkpoint")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--checkpoint", type=Path, metavar="runs/NAME", help="a finished run")
    parser.add_argument("--out", type=Path, default="probabilities.csv", help="the csv to write")
    arguments = parser.parse_args()
    if bool(arguments.predict) != bool(arguments.checkpoint):
        parser.error("--predict DIR and --checkpoint runs/NAME go together")
    with one_line("classifier.py"):
        if arguments.predict:
            return external.predict_folder(arguments.predict, arguments.checkpoint, arguments.out)
        c = config.load(arguments.config, arguments.set)
        splits = data.load(**vars(c.data))
        train_set, k = splits["train"], c.classifier
        network = seeded(c.loop.seed, lambda: build(
            k.network, c.data.size, len(train_set.class_names), published=bool(k.weights)))
        if k.weights:
            load_weights(network, k.weights)
        progress = Progress("student")
        train(network, torch.tensor(train_set.images), torch.tensor(train_set.labels),
              torch.tensor(balanced_weights(train_set.labels)), steps=k.steps, batch=k.batch,
              lr=k.lr, jitter=k.jitter[0], seed=c.loop.seed,
              on_step=lambda step, steps, value: progress(step, steps, f"loss {value:.4f}"))
        s = splits["val"]           # test is scored once, by the loop
        found = evaluate.metrics(
            predict(network, torch.tensor(s.images)), s.labels, malignant=np.array(s.malignant),
            class_names=s.class_names, groups=s.groups, group_names=s.group_names,
            lesions=s.lesions, min_count=c.evaluate.min_count)
        print("val:", ", ".join(f"{key} {found[key]:.3f}" for key in (
            "accuracy", "sensitivity", "specificity", "balanced_accuracy", "auroc", "ece")
            if found[key] is not None))


if __name__ == "__main__":
    main()
