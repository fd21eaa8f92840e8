"""One run by several processes: torchrun --nproc_per_node=2 loop.py --config config.yaml

All walk the same lines. Of what is many (students, batches of images) each does its share; at the
diffusion model all work together, each on its part of a batch; the rest the first does. What one
has done the others read from the run folder."""
import atexit
import datetime
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # torchrun's


class Team(NamedTuple):
    """Who works at a run: which of how many this process is."""
    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """For all to be here."""
        if self.size > 1:
            add_up(torch.zeros(1))


def join() -> Team:
    """The team that torchrun began, or this process alone. Only the first prints."""
    if SIZE > 1:
        if RANK:
            sys.stdout = open(os.devnull, "w")
        if gpu := torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo",
                                timeout=datetime.timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    return Team(RANK, SIZE)


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place. If one of them ends they all do: it says why itself,
    and for one that was killed the first does."""
    try:
        dist.all_reduce(tensor)
    except RuntimeError:
        if RANK:
            os._exit(2)
        raise ChildProcessError(0, "has ended", "another process of this run") from None
    return tensor


def told(text: str = "") -> str:
    """What the first process says, at most 4,096 bytes, to all."""
    letters = list(text.encode().ljust(4096, b"\0"))
    if SIZE > 1:
        letters = add_up(torch.tensor(letters, dtype=torch.uint8)).tolist()
    return bytes(letters).rstrip(b"\0").decode()


def together(network: nn.Module, team: Team) -> list:
    """Until its hooks, which are returned, are removed, each process computes its part of the batch
    that `network` is called with, all see the whole output, and backward() ends with the gradient
    of the whole: what one process learns, but for rounding. All are given the same batch."""
    mine = []           # this process's first and last row, and how many rows there are

    def part(_, batch):
        n = len(batch[0])
        mine[:] = n * team.rank // team.size, n * (team.rank + 1) // team.size, n
        return tuple(of_all[mine[0]:mine[1]] for of_all in batch)

    def whole(_, batch, own):
        first, last, n = mine
        found = own.new_zeros(n, *own.shape[1:])
        found[first:last] = own.detach()
        add_up(found)
        if own.requires_grad:           # through its own rows alone
            found = torch.cat([found[:first], own, found[last:]])
            engine = torch.autograd.Variable._execution_engine
            found.register_hook(lambda _: engine.queue_callback(add_gradients))
        return found

    def add_gradients():
        parts = [p.grad for p in network.parameters() if p.grad is not None]
        flat = add_up(torch.cat([grad.flatten() for grad in parts]))
        for grad, total in zip(parts, flat.split([grad.numel() for grad in parts])):
            grad.copy_(total.view_as(grad))

    return [network.register_forward_pre_hook(part), network.register_forward_hook(whole)]
