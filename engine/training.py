"""The one training loop of every network here: a step, and around it what makes it fast, safe and
resumable. A step draws all its randomness from `step_generator(seed, step)`, so a run that is
resumed equals one that was never stopped, without any random state in the checkpoint.

Sources: Loshchilov & Hutter 2019 (AdamW, arXiv 1711.05101); 2017 (cosine, arXiv 1608.03983)."""
import ctypes
import functools
import math
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def step(network: nn.Module, optimizer: torch.optim.Optimizer, pick: Callable, loss: Callable,
         generator: torch.Generator, bf16: bool = False, ema=None) -> Tensor:
    """One training step of the diffusion model, the guide or a student. Returns the loss; not
    finite if the gradient was not.
    pick(generator) -> batch, (B,) or (B, n) int64: the images; loss(batch, generator) -> scalar."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(generator.device.type, dtype=torch.bfloat16, enabled=bf16):
        batch = pick(generator)
        value = loss(batch, generator)
    value.backward()
    norm = clip_gradients(network)
    optimizer.step()
    if ema is not None:
        ema.update(network)
    return value.detach() + 0 * norm


def clip_gradients(network: nn.Module, longest: float = 1.0) -> Tensor:
    """Cut each network's gradient to this length; several in a ModuleDict each by itself, so that
    none changes another's path. Returns the sum of the lengths before."""
    alone = network.values() if isinstance(network, nn.ModuleDict) else [network]
    return sum(nn.utils.clip_grad_norm_(one.parameters(), longest) for one in alone)


def learning_rate(step: int, steps: int, lr: float, warmup: float = 0.1) -> float:
    """One cycle: linear warm-up over the first `warmup` of the steps, then half a cosine to 0."""
    start = max(1, round(warmup * steps))
    if step < start:
        return lr * (step + 1) / start
    return lr * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def fit(network: nn.Module, pick: Callable, loss: Callable, *, steps: int, lr: float, seed: int,
        device: torch.device | str = "cpu", bf16: bool = False, weight_decay: float = 0.01,
        ema=None, names: np.ndarray | None = None, state: dict | None = None,
        save: Callable[[dict], None] | None = None, record: bool = True,
        on_step: Callable[[int, int, float], None] | None = None) -> list[float]:
    """Train `network` in place by AdamW for `steps` steps (see `step` for pick, loss, ema).
    names: (N,) what to call the images that `pick` draws from. Every 20 steps: on_step(step, steps,
    mean loss of the 20), and save(state), which has to copy or write the state at once; given back,
    training goes on from there. record: False where `loss` decides things on the CPU (`Recorded`).
    Returns the mean losses. Raises FloatingPointError naming the first step whose loss was not
    finite, and its images."""
    keep_freed_memory()
    generator = torch.Generator(device)
    cuda = generator.device.type == "cuda"
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay,
                                  betas=(0.9, 0.99), fused=True)
    parts = {"network": network, "optimizer": optimizer} | ({} if ema is None else {"ema": ema})
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    history, recent = list(state["history"]) if state else [], []
    [group] = optimizer.param_groups        # a recorded step reads the rate from the GPU's memory
    group |= {"lr": torch.zeros((), device=device) if cuda else 0.0, "capturable": cuda}

    recorded = cuda and record              # the mean's decay is a number of Python's: not recorded
    call = functools.partial(step, network, optimizer, pick, loss, generator, bf16,
                             None if recorded else ema)
    call = Recorded(call, generator) if recorded else call
    network.train()
    for number in range(state["step"] if state else 0, steps):
        rate = learning_rate(number, steps, lr)
        if cuda:
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        generator.manual_seed(step_seed(seed, number))
        recent.append(call())
        if recorded and ema is not None:
            ema.update(network)

        if (number + 1) % 20 == 0 or number + 1 == steps:    # one wait for the GPU in 20 steps
            losses = torch.stack(recent).float().cpu()
            if not losses.isfinite().all():
                at = number + 1 - len(recent) + int((~losses.isfinite()).nonzero()[0])
                batch = pick(step_generator(seed, at, device)).flatten().cpu().numpy()
                images = ", ".join(map(str, batch if names is None else names[batch]))
                raise FloatingPointError("the loss or its gradient was not finite at step "
                                         f"{at} of {steps}, on the images {images}")
            history.append(losses.mean().item())
            recent = []
            if on_step is not None:
                on_step(number + 1, steps, history[-1])
            if save is not None and number + 1 < steps:
                save({"step": number + 1, "history": history}
                     | {name: part.state_dict() for name, part in parts.items()})
    network.eval()
    return history


def step_seed(seed: int, step: int) -> int:
    """The seed of one training step; SeedSequence mixes, so neighbours are unrelated."""
    mixed = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
    return mixed >> 1               # manual_seed takes 63 bits


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random stream of one training step."""
    return torch.Generator(device).manual_seed(step_seed(seed, step))


def seeded(seed: int, build: Callable[..., nn.Module], *args, **settings) -> nn.Module:
    """build(*args, **settings) with the initial weights of `seed`, in channels-last memory; the
    global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args, **settings).to(memory_format=torch.channels_last)


def wide(device: torch.device | str) -> torch.dtype:
    """float64; float32 on Apple's GPU, which has none. Nobody has run the program there yet."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def keep_freed_memory() -> None:
    """Have glibc keep up to 1 GiB of what was freed, tensors of up to 32 MiB included, instead of
    having pages cleared anew for each: 5 to 10 % of a diffusion step on two cores."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 32 << 20)         # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 1 << 30)          # M_TRIM_THRESHOLD


class Noise:
    """One random stream per image, so that neither batch size nor order changes a picture."""

    def __init__(self, seeds, device="cpu"):
        self.streams = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = device

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal (len(seeds), *shape), float32, the next draw of every stream."""
        drawn = [torch.randn(shape, generator=stream) for stream in self.streams]
        return torch.stack(drawn).to(self.device)


class EMA:
    """A running mean of the weights: samples drawn with it are better by several points of FID. The
    decay rises as (1 + n) / (10 + n) up to `decay`, so that the random start is soon forgotten."""

    def __init__(self, network: nn.Module, decay: float = 0.999):
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in network.state_dict().items()}

    def update(self, network: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [v.detach() for v in network.state_dict().values()]
        # shadow <- decay * shadow + (1 - decay) * now
        torch._foreach_lerp_(list(self.shadow.values()), now, 1 - decay)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.shadow = {k: v.clone() for k, v in state["shadow"].items()}
        self.updates = state["updates"]


class Recorded:
    """update(), from its fourth call on a CUDA graph: a GPU is done with a small network's thousand
    kernels sooner than Python can ask for them one by one.
    update() -> Tensor, on the GPU alone, reads and writes the same tensors in every call; numbers
    of Python's are recorded as they are. `generator` is drawn from anew, by its seed then."""

    def __init__(self, update: Callable[[], Tensor], generator: torch.Generator):
        self.update, self.generator, self.calls, self.graph = update, generator, 0, None
        self.stream = torch.cuda.Stream()

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls <= 3:             # choose kernels, make the optimizer's state
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.update()
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.update()
        self.graph.replay()
        return self.result.clone()
