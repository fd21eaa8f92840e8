"""The one training loop, shared by ddpm.py and classifier.py, and what both do to a batch.

A step draws all its randomness from `step_generator(seed, step)`, so a run that is stopped and
resumed equals one that is not, without any random state in the checkpoint.
Sources: Loshchilov & Hutter 2019 (AdamW, arXiv 1711.05101); 2017 (cosine, arXiv 1608.03983).
"""
import ctypes
import math
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def step_seed(seed: int, step: int) -> int:
    """The seed of one training step; SeedSequence mixes, so neighbours are unrelated."""
    mixed = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
    return mixed >> 1                                           # manual_seed takes 63 bits


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random stream of one training step."""
    return torch.Generator(device).manual_seed(step_seed(seed, step))


def keep_freed_memory() -> None:
    """Have the C library keep up to 1 GiB of what was freed, tensors of up to 32 MiB included.

    As shipped it gives every large tensor back at once, and the system clears the pages anew for
    the next one: 5 to 10 % of a diffusion step on two cores. Elsewhere than on glibc a no-op.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 32 << 20)           # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)            # M_TRIM_THRESHOLD


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A network with the initial weights of `seed`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Channels last: what the convolution kernels of CPUs and of GPUs in bf16 work on.
        return build().to(memory_format=torch.channels_last)


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) in 0..255 to float32 in [-1, 1], the range every network here expects."""
    return images.float().div(127.5).sub(1)


def to_uint8(x: Tensor) -> Tensor:
    """float (B, 3, H, W) in [-1, 1] to uint8 in 0..255, rounded; what lies outside is clipped."""
    return x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


class Recorded:
    """update(), from its fourth call on a CUDA graph: a step of a small network is a thousand small
    kernels, and a GPU is done with them sooner than Python can ask for them one by one.

    update() -> Tensor, on the GPU alone, reads and writes the same tensors in every call; numbers
    of Python's are recorded as they are. What it draws from `generator` is drawn anew from the seed
    that this has by then: the same as without recording.
    """

    def __init__(self, update: Callable[[], Tensor], generator: torch.Generator):
        self.update, self.generator, self.calls, self.graph = update, generator, 0, None
        self.stream = torch.cuda.Stream()

    def __call__(self) -> Tensor:
        if self.graph is None and self.calls < 3:       # choose kernels, make the optimizer's state
            self.calls += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.update()
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, stream=self.stream):
                self.result = self.update()
            self.graph = graph
        self.graph.replay()
        return self.result.clone()


class Streamed:
    """uint8 images (N, 3, H, W) on a CPU that are read when a batch is asked for, from a
    data.FileImages: as much of a tensor as training and prediction need."""
    device = torch.device("cpu")

    def __init__(self, images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return torch.from_numpy(self.images[index])

    def split(self, size: int):
        """As of a tensor: none at all is still one part, empty."""
        return (self[i:i + size] for i in range(0, max(1, len(self)), size))


def random_turn(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image under one of the 8 symmetries of the square: dermoscopy has no up or left.

    x: (B, C, S, S). Returns the same shape.
    """
    coin = torch.rand(3, len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    x = torch.where(coin[0], x.flip(-1), x)
    x = torch.where(coin[1], x.flip(-2), x)
    return torch.where(coin[2], x.transpose(-1, -2), x)


def learning_rate(step: int, steps: int, lr: float, warmup: float = 0.1) -> float:
    """One cycle: linear warm-up over the first `warmup` of the steps, then half a cosine to 0."""
    start = max(1, round(warmup * steps))
    if step < start:
        return lr * (step + 1) / start
    return lr * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def fit(network: nn.Module, pick: Callable[[torch.Generator], Tensor],
        loss_fn: Callable[[Tensor, torch.Generator, slice], Tensor], *, steps: int, lr: float,
        seed: int, device: torch.device | str = "cpu", bf16: bool = False,
        weight_decay: float = 0.01, ema=None, names: np.ndarray | None = None,
        state: dict | None = None, save: Callable[[dict], None] | None = None,
        save_every: int = 200, record: bool = True,
        on_step: Callable[[int, int, float], None] | None = None) -> list[float]:
    """Train `network` in place by AdamW for `steps` steps.

    network: an nn.ModuleDict holds several that learn in the same steps; each gradient is cut to
    length 1 by itself, so that none changes another's path.
    pick(generator) draws a batch, (B,) or (B, n) int64; loss_fn(batch, generator, part) draws
    whatever else the batch needs and returns the mean loss of its rows `part`. Where the GPU's
    memory does not hold all rows at once, parts follow each other and their gradients are added:
    the same images, noise and steps, and the same gradient to rounding, unless the network has
    BatchNorm, whose statistics are then those of a part.
    names: (N,) what to call the images that `pick` draws from.
    ema: object with update(network), state_dict(), load_state_dict(), told after every step.
    state: what `save` was last given; training goes on from there. save(state) is called every
    `save_every` steps, a multiple of 20, and has to copy or write what it is given: training goes
    on in the same tensors. on_step(step, steps, mean loss since the last call) every 20 steps.
    record: a GPU's steps are recorded (`Recorded`); False where loss_fn decides things on the CPU.
    Returns the mean loss of every block of 20 steps.
    Raises FloatingPointError naming the step at which the loss was not finite, and its images.
    """
    keep_freed_memory()
    generator = torch.Generator(device)
    cuda = generator.device.type == "cuda"
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay,
                                  betas=(0.9, 0.99), fused=True)
    first, history, recent, parts = 0, [], [], 1
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        first, history = state["step"], list(state["history"])
    [group] = optimizer.param_groups        # a recorded step reads the rate from the GPU's memory
    group |= {"lr": torch.zeros((), device=device) if cuda else 0.0, "capturable": cuda}

    def update():
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for k in range(parts):
            if k:                           # every part draws for all rows
                generator.manual_seed(generator.initial_seed())
            loss = loss + backward(pick, loss_fn, generator, bf16, slice(k, None, parts))
        norm = sum(nn.utils.clip_grad_norm_(one.parameters(), 1.0, foreach=True) for one in (
            network.values() if isinstance(network, nn.ModuleDict) else [network]))
        optimizer.step()
        return loss + 0 * norm              # not finite if the gradient was not, else the loss

    call = Recorded(update, generator) if cuda and record else update
    network.train()
    for step in range(first, steps):
        rate = learning_rate(step, steps, lr)
        if cuda:
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        loss = None
        while loss is None:
            generator.manual_seed(step_seed(seed, step))
            try:
                loss = call()
            except torch.OutOfMemoryError:
                size = len(pick(step_generator(seed, step, device)))
                if parts == size:
                    raise
                call, parts = update, min(2 * parts, size)
                print(f"out of memory in step {step}: from here on {-(-size // parts)} images at a "
                      f"time, {parts} times a step", file=sys.stderr)
        if ema is not None:
            ema.update(network)
        recent.append(loss)
        if (step + 1) % 20 == 0 or step + 1 == steps:        # one wait for the GPU in 20 steps
            losses = torch.stack(recent).float().cpu()
            if not losses.isfinite().all():
                at = step + 1 - len(recent) + int((~losses.isfinite()).nonzero()[0])
                batch = pick(step_generator(seed, at, device)).flatten().cpu().numpy()
                images = ", ".join(map(str, batch if names is None else names[batch]))
                raise FloatingPointError("the loss or its gradient was not finite at step "
                                         f"{at} of {steps}, on the images {images}")
            history.append(losses.mean().item())
            recent = []
            if on_step is not None:
                on_step(step + 1, steps, history[-1])
            if save is not None and (step + 1) % save_every == 0 and step + 1 < steps:
                save({"step": step + 1, "network": network.state_dict(),
                      "optimizer": optimizer.state_dict(), "history": history,
                      "ema": None if ema is None else ema.state_dict()})
    network.eval()
    return history


def backward(pick, loss_fn, generator: torch.Generator, bf16: bool, part: slice) -> Tensor:
    """Add the gradient of one part of a batch, weighted by its size. Returns its share of the loss.
    """
    with torch.autocast(generator.device.type, dtype=torch.bfloat16, enabled=bf16):
        batch = pick(generator)
        loss = len(batch[part]) / len(batch) * loss_fn(batch, generator, part)
    loss.backward()
    return loss.detach()
