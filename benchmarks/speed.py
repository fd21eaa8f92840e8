"""How fast is a training step, and a sampling step with and without guidance, beside a well-known
library's and beside what the machine can do?

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/speed.py

The same UNet (32 x 32 pixels, width 64, multipliers 1, 2, 2, two blocks a level, attention at 8 x
8; on a GPU the larger one of SHAPES) here and in diffusers: forward, loss, backward, clipping,
AdamW, EMA on one batch. Its training loop is run as its documentation has it (fp32, channels
first) and with bf16 autocast on; ours as the program runs it, on a GPU recorded and compiled. All
take turns, each side in a process of its own, since what our training asks of the C library
(training.keep_freed_memory) would serve the other as well; medians over the rounds. `folded` is our
default input, 2 x 2 pixels to a channel, which does a quarter of the work: no fair comparison, so
it has a line of its own. Guided sampling: one small guide beside a guide of the UNet's own width,
as in guided-diffusion.
"""
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import classifier
import ddpm
import diffusers_unet
import guidance
from engine.command import Parser, one_line
from engine.training import EMA, Recorded, keep_freed_memory, seeded
from unet import UNet

SHAPES = {"cpu": (32, 64, 64, (1, 2, 2)), "cuda": (64, 128, 96, (1, 2, 2, 3))}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE, BATCH, WIDTH, MULTIPLIERS = SHAPES[DEVICE]
BLOCKS, T = 2, 1000


def ours(patch: int) -> UNet:
    return seeded(0, UNet, SIZE, 4, 6, WIDTH, MULTIPLIERS, BLOCKS, 8 // patch, patch)


def trainer(network, call, bf16: bool, device, recorded: bool, compiled: bool):
    """A function that does one training step."""
    schedule, ema = ddpm.Schedule(T, device=device), EMA(network, 0.995)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True, capturable=recorded)
    predict = torch.compile(network, dynamic=False) if compiled else network
    generator = torch.Generator(device).manual_seed(0)
    x0 = torch.rand(BATCH, 3, SIZE, SIZE, device=device) * 2 - 1
    y = torch.randint(4, (BATCH,), device=device)

    def step():
        t = torch.randint(T, (BATCH,), generator=generator, device=device)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = F.mse_loss(call(predict, schedule.q_sample(x0, t, eps), t, y).float(), eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return loss.detach()
    step = Recorded(step, generator) if recorded else step

    def whole():
        step()
        ema.update(network)
    return whole


def sampler(network, bf16: bool, device, guide=None):
    """A function that does one DDIM step for a batch, guided where there is a guide."""
    schedule = ddpm.Schedule(T, device=device)
    y = torch.randint(4, (BATCH,), device=device)
    x_t, t = (torch.randn(BATCH, 3, SIZE, SIZE, device=device),
              torch.full((BATCH,), T // 2, device=device))
    model = ddpm.eps_model(network.eval(), schedule, y, y, bf16=bf16)
    if guide is not None:
        model = guidance.guided_eps(model, schedule, [(0.1, guidance.class_evidence(guide, y))])
    return lambda: ddpm.ddim_step(schedule, x_t, t, t - 20, model(x_t, t))


def ceilings(device) -> dict:
    """{name: (a function, GFLOP of a call)}: a 3x3 convolution with its gradients, and a GEMM."""
    found, (channels, side, gemm) = {}, (128, 16, 2048) if DEVICE == "cpu" else (256, 32, 8192)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device,
                               dtype=dtype).to(memory_format=torch.channels_last)
        x = torch.randn(BATCH, channels, side, side, device=device, dtype=dtype, requires_grad=True)
        x.data = x.data.to(memory_format=torch.channels_last)
        ones = torch.randn_like(conv(x))
        a, b = torch.randn(2, gemm, gemm, device=device).to(dtype)
        found[f"3x3 convolution, {name}"] = (
            lambda conv=conv, x=x, ones=ones: torch.autograd.grad(conv(x), (x, conv.weight), ones),
            3 * 2 * 9 * channels ** 2 * side ** 2 * BATCH / 1e9)
        found[f"GEMM {gemm}, {name}"] = (lambda a=a, b=b: a @ b, 2 * gemm ** 3 / 1e9)
    return found


def described(name: str, network, call, device) -> float:
    """Say how large it is. Returns the GFLOP of a training step: the forward pass three times."""
    x, t = torch.zeros(1, 3, SIZE, SIZE, device=device), torch.zeros(1, device=device).long()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(network, x, t, t)
    gflop = counter.get_total_flops() / 1e9
    print(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, "
          f"{gflop:.3f} GFLOP forward an image", flush=True)
    return 3 * BATCH * gflop


def our_work(device) -> dict:
    """{name: (a function that does it once, its GFLOP or None)}"""
    keep_freed_memory()                                     # as training.fit does

    def call(network, x, t, y):
        return network(x, t, y, y)
    plain, folded = ours(1).to(device), ours(2).to(device)
    gflop = {net: described(name, net, call, device)
             for name, net in (("ours", plain), ("ours, folded", folded))}
    program = device.type == "cuda"                         # recorded and compiled

    def training(network, bf16, recorded=program, compiled=program):
        return trainer(network, call, bf16, device, recorded, compiled), gflop[network]
    work = ceilings(device) | {"training: ours, bf16": training(plain, True),
                               "training: ours, fp32": training(plain, False),
                               "training: ours, folded, bf16": training(folded, True)}
    if program:
        work |= {"training: ours, folded, bf16, recorded": training(folded, True, True, False),
                 "training: ours, folded, bf16, neither": training(folded, True, False, False)}
    plain, folded = ours(1).to(device), ours(2).to(device)
    small = seeded(0, classifier.build, "small", SIZE, 4, T).to(device).eval()
    large = seeded(0, classifier.ResNet, 4, (2, 2, 2), WIDTH, "small", T).to(device).eval()
    return work | {
        "sampling: ours, folded": (sampler(folded, True, device), None),
        "sampling: ours, folded, small guide": (sampler(folded, True, device, small), None),
        "sampling: ours, guide of the UNet's width": (sampler(plain, True, device, large), None)}


def their_work(device) -> dict:
    def call(network, x, t, y):
        return network(x, t, y).sample
    network = diffusers_unet.build(SIZE, WIDTH, MULTIPLIERS, BLOCKS, attention=8, labels=4)
    gflop = described("diffusers", network.to(device), call, device)
    return {f"training: diffusers, {name}": (trainer(network, call, bf16, device, False, False),
                                             gflop)
            for name, bf16 in (("fp32, as shipped", False), ("bf16", True))}


work = {}           # of this process; a side has a process of its own


def start(side) -> dict:
    """Build a side's work. Returns {name: GFLOP or None}."""
    torch.backends.cudnn.benchmark = True
    work.update(side(torch.device(DEVICE)))
    return {name: gflop for name, (_, gflop) in work.items()}


def timed(name: str) -> float:
    begun = time.perf_counter()
    work[name][0]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def machine() -> str:
    if DEVICE == "cuda":
        return (f"{torch.cuda.get_device_name()}, at most "
                f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB of it by our work")
    return f"{torch.get_num_threads()} CPU threads"


def shares(name: str) -> list[tuple[str, float]]:
    """Every operator's own share of the time that `name` takes, the largest first."""
    with torch.profiler.profile() as profile:
        work[name][0]()
    own = {row.key: row.self_device_time_total or row.self_cpu_time_total
           for row in profile.key_averages()}
    return sorted(((key, time / sum(own.values())) for key, time in own.items()),
                  key=lambda row: -row[1])


@one_line("speed.py")
def main():
    parser = Parser("speed.py", __doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    gflop, where = {}, {}
    with (ProcessPoolExecutor(1, get_context("spawn")) as one,
          ProcessPoolExecutor(1, get_context("spawn")) as other):
        for pool, side in ((one, our_work), (other, their_work)):
            found = pool.submit(start, side).result()
            gflop, where = gflop | found, where | dict.fromkeys(found, pool)
        seconds = {name: [] for name in where}
        warm = 5 if DEVICE == "cuda" else 2         # the fourth step is recorded
        for number in range(rounds + warm):
            for name, pool in where.items():
                spent = pool.submit(timed, name).result()
                seconds[name] += [spent] if number >= warm else []
            print(f"\rround {number + 1} of {rounds + warm}", end="", file=sys.stderr, flush=True)
        here = one.submit(machine).result()
        parts = one.submit(shares, "training: ours, folded, bf16").result()
    median = {name: statistics.median(of) for name, of in seconds.items()}
    best = gflop["3x3 convolution, bf16"] / median["3x3 convolution, bf16"]
    print(f"\ntorch {torch.__version__}, {here}\n\n| | ms | images/s | GFLOP/s | of the bf16 "
          "convolution |\n| --- | --- | --- | --- | --- |")
    for name, total in gflop.items():
        rate = total and total / median[name]
        images = f"{BATCH / median[name]:.1f}" if name.partition(":")[1] else ""
        print(f"| {name} | {1e3 * median[name]:.1f} | {images} | "
              + (f"{rate:.0f} | {rate / best:.0%} |" if rate else " | |"))
    for name in ("diffusers, fp32, as shipped", "diffusers, bf16"):
        ratios = [a / b for a, b in zip(seconds[f"training: {name}"],
                                        seconds["training: ours, bf16"])]
        print(f"{name} / ours, bf16: {statistics.median(ratios):.2f}x")
    print("ours, folded, bf16, where a step's time goes:",
          ", ".join(f"{name} {share:.0%}" for name, share in parts[:8]))


if __name__ == "__main__":
    main()
