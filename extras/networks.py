"""The config's networks: which are built, how the generator is trained, what val chooses."""
import numpy as np
import torch
from torch import nn

import classifier
import ddpm
import evaluate
from data import ImageSet
from engine.config import ConfigError
from engine.run import Run
from engine.training import seeded
from extras import class_n_diff
from guidance import Generator
from unet import UNet


def new_unet(run: Run, train: ImageSet, seed: int) -> UNet:
    """An untrained diffusion model for the classes and groups of `train`."""
    c, u = run.config, run.config.unet
    kind = class_n_diff.JointUNet if c.ddpm.joint_head else UNet
    return seeded(seed, kind, c.data.size, len(train.class_names), len(train.group_names), u.width,
                  tuple(u.multipliers), u.blocks, u.attention, u.patch).to(run.device)


def new_resnet(run: Run, train: ImageSet, seed: int, noise_levels: int = 0) -> classifier.ResNet:
    """An untrained student, or with noise_levels a guide; with the config's published weights."""
    k = run.config.classifier
    network = seeded(seed, classifier.build, k.network, run.config.data.size,
                     len(train.class_names), noise_levels, bool(k.weights))
    if k.weights:
        load_published(network, k.weights)
    return network.to(run.device)


def load_published(network: classifier.ResNet, path: str) -> None:
    """Published ImageNet weights, a state dict under the well-known names; the last layer and what
    knows the noise level stay the network's own. Raises ConfigError for a wrong file."""
    def shapes(state):              # the counters of BatchNorm, absent from older files, do nothing
        return {name: tuple(value.shape) for name, value in state.items() if "time." not in name
                and not name.startswith("fc.") and not name.endswith("num_batches_tracked")}
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
        found = shapes(given)
    except Exception as error:      # torch raises its own mixture for foreign and damaged files
        raise ConfigError(f"classifier.weights: {path} is no state dict "
                          f"({(str(error).splitlines() or [type(error).__name__])[0]})") from None
    wanted = shapes(network.state_dict())
    if wrong := [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]:
        raise ConfigError(f"classifier.weights: {path}: {len(wrong)} keys differ from the network's"
                          f": {wrong[0]} is {found.get(wrong[0], 'absent')}, wanted "
                          f"{wanted.get(wrong[0], 'none')}; is classifier.network the right one?")
    network.load_state_dict({name: given[name] for name in wanted}, strict=False)


def train_generator(run: Run, train: ImageSet, seen: ImageSet, weights: np.ndarray) -> Generator:
    """The diffusion model and the guide, on train; the model also on what is `seen` beyond train,
    without a class. weights: (len(train),), how often the guide sees each image."""
    c, k = run.config.ddpm, run.config.classifier
    more = (0, len(seen) - len(train))
    labels = np.pad(train.labels, more, constant_values=-1)
    x, y, g, weights = map(run.tensor, (seen.images, labels, seen.groups, np.pad(weights, more)))
    schedule = ddpm.Schedule(c.T, c.schedule, run.device)
    unet = new_unet(run, train, run.seed("ddpm"))
    guide = (class_n_diff.Head(unet) if c.joint_head else
             new_resnet(run, train, run.seed("guide"), noise_levels=c.T))
    settings = dict(steps=c.steps, batch=c.batch, lr=c.lr, ema_decay=c.ema, drop=c.drop,
                    prediction=c.prediction, seed=run.seed("ddpm"), names=seen.sources)
    if c.classifier_weight:
        networks = nn.ModuleDict({"unet": unet} if c.joint_head else
                                 {"unet": unet, "guide": guide})
        run.train("ddpm", networks, class_n_diff.train, schedule, x, y, g, weights,
                  jitter=min(k.jitter), classifier_weight=c.classifier_weight,
                  classifier_probability=c.classifier_probability, **settings)
        guide.eval()            # a head is no part of `networks`
    else:
        run.train("ddpm", unet, ddpm.train, schedule, x, y, g, compiled=run.config.loop.compile,
                  together=True, **settings)
        run.train("guide", guide, classifier.train, x, y, weights, steps=k.guide_steps,
                  batch=k.batch, lr=k.lr, jitter=min(k.jitter), noise=schedule.noised,
                  seed=run.seed("guide"), names=seen.sources)
    return Generator(unet, guide, schedule, c.prediction, run.bf16)


def choose_jitter(run: Run, splits: dict, student, predict) -> tuple[float, dict]:
    """The strength of colour jitter that serves `real` best on val, and all strengths' scores."""
    strengths, train, val = run.config.classifier.jitter, splits["train"], splits["val"]
    if len(strengths) == 1:
        return strengths[0], {}
    weights = classifier.balanced_weights(train.labels)
    students = run.shared(lambda s: student(run, f"jitter_{s:g}", train, weights,
                                            run.seed("jitter"), s), strengths)
    scores = run.stage("jitter", lambda: {
        f"{s:g}": evaluate.balanced_accuracy(predict(run, one, val.images), val.labels)
        for s, one in zip(strengths, students)})
    chosen = strengths[int(np.argmax(list(scores.values())))]
    print("colour jitter by balanced accuracy on val:", ", ".join(
        f"{s}: {v:.3f}" for s, v in scores.items()), "- chosen", chosen)
    return chosen, scores
