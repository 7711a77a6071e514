"""Work that torchrun spreads over processes, its ranks.

Which rank this is, which GPU belongs to it, and the little that passes between ranks. Without
torchrun there is one rank, and torch.distributed is not touched.
"""

import atexit
import functools
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# How long a rank that is done waits for the slowest: it may have one more layer to train.
WAIT = timedelta(days=1)


def place() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun says, (0, 1) without it.

    Raises ValueError for numbers that cannot be.
    """
    rank = os.environ.get("RANK")
    if rank is None:
        return 0, 1
    world = os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(
            f"RANK={rank!r} of WORLD_SIZE={world!r}: "
            "start with torchrun, which sets both, or unset RANK"
        )
    return int(rank), int(world)


def own_device(device: str | None = None) -> str | None:
    """`device`, or this rank's own GPU where that leaves it open.

    Raises ValueError on a node with fewer GPUs than ranks.
    """
    _, world = place()
    leaves_gpu_open = device in (None, "cuda")
    if world == 1 or not leaves_gpu_open or not torch.cuda.is_available():
        return device
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(
            f"LOCAL_RANK={local_rank} on a node with {gpus} GPUs: "
            f"use torchrun --nproc-per-node {gpus}, or --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def gather(value: Any) -> list[Any]:
    """The `value` of every rank, in order, once all have given one; [value] without torchrun.

    Raises RuntimeError where a rank died, or after WAIT.
    """
    _, world = place()
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value, group=_group())
    return values


@functools.cache
def _group() -> Any:
    """The ranks connected by Gloo, between CPUs, so that no GPU spins while it waits.

    A user's script may have begun torch.distributed with another backend, which stays.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        # Else its threads outlive the interpreter.
        atexit.register(dist.destroy_process_group)
    return dist.new_group(backend="gloo", timeout=WAIT)
