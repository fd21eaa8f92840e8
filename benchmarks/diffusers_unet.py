"""diffusers' UNet2DModel as its train_unconditional.py trains it and its DDIMScheduler samples it,
told a label: the peer of speed.py and quality_per_cost.py.

    pip install -r requirements.txt -r benchmarks/requirements.txt
"""
import time

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor

from engine.augment import random_turn, to_float


def build(size: int, width: int, multipliers, blocks: int, attention: int,
          labels: int) -> UNet2DModel:
    """The arguments of our UNet, unfolded; labels: how many there are to be told."""
    down = ["AttnDownBlock2D" if size >> i <= attention else "DownBlock2D"
            for i in range(len(multipliers))]
    return UNet2DModel(sample_size=size, layers_per_block=blocks, num_class_embeds=labels,
                       block_out_channels=tuple(width * m for m in multipliers),
                       down_block_types=tuple(down), attention_head_dim=32,
                       up_block_types=tuple(n.replace("Down", "Up") for n in reversed(down)))


def train(network: UNet2DModel, images: Tensor, labels: Tensor, *, budget: float, batch: int,
          drop: float, seed: int, progress) -> dict[str, list]:
    """Train for `budget` seconds on uint8 images (N, 3, H, W); labels (N,), of which the network's
    last is "untold".

    The example's defaults: fp32, eps, linear schedule, AdamW, 500 steps of warm-up, cosine, EMA.
    Ours: the batch, turns and mirrorings, images in memory instead of its data loader.
    Returns seconds, steps and averaged weights after an eighth, a quarter, half and all of it.
    """
    torch.manual_seed(seed)
    device, noiser, steps = images.device, DDPMScheduler(), 25
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999),
                                  weight_decay=1e-6)
    annealing = get_cosine_schedule_with_warmup(optimizer, 500, steps)
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    generator = torch.Generator(device).manual_seed(seed)
    untold, step, spent = network.class_embedding.num_embeddings - 1, 0, 0.0
    found = {"seconds": [], "steps": [], "networks": []}
    network.train()
    while step < steps:
        begun = time.monotonic()
        index = torch.randint(len(images), (batch,), device=device)
        x0 = random_turn(to_float(images[index]), generator)
        t = torch.randint(noiser.config.num_train_timesteps, (batch,), device=device)
        eps, told = torch.randn_like(x0), torch.rand(batch, device=device) >= drop
        label = torch.where(told, labels[index], untold)
        loss = F.mse_loss(network(noiser.add_noise(x0, eps, t), t, label).sample, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        annealing.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        step, value = step + 1, loss.item()                      # waits for the GPU
        spent += time.monotonic() - begun
        if step == 25:      # how many steps the budget holds; until here the rate only warmed up
            steps = max(25, round(25 * budget / spent))
            annealing = get_cosine_schedule_with_warmup(optimizer, 500, steps, last_epoch=step - 1)
        parts = len(found["steps"])
        if step == steps or parts < 3 and spent >= budget / 2 ** (3 - parts):
            found["seconds"].append(spent)
            found["steps"].append(step)
            found["networks"].append({name: weight.clone() for name, weight in
                                      zip(network.state_dict(), ema.shadow_params, strict=True)})
        progress(step, steps, f"loss {value:.4f}")
    return found


@torch.no_grad()
def sample(network: UNet2DModel, labels: Tensor, x: Tensor, steps: int, seed: int) -> Tensor:
    """From pure noise x (B, 3, H, W) to images in [-1, 1] by their DDIM. With eta 1: after minutes
    of training eta 0 leaves mostly noise, eta 1 lesions in false colours."""
    scheduler, generator = DDIMScheduler(), torch.Generator(x.device).manual_seed(seed)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t, labels).sample, t, x, eta=1.0,
                           generator=generator).prev_sample
    return x
