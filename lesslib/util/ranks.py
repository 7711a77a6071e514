"""Work that torchrun spreads over processes: which rank this is, its GPU, and the little that passes between ranks."""

import atexit
import functools
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

WAIT = timedelta(
    days=1
)  # of a rank that is done, for the slowest: it may have one more layer to train


def place() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun says, (0, 1) without it. Raises ValueError for numbers that cannot be."""
    if (rank := os.environ.get("RANK")) is None:
        return 0, 1
    world = os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(
            f"RANK={rank!r} of WORLD_SIZE={world!r}: start with torchrun, which sets both, or unset RANK"
        )
    return int(rank), int(world)


def own_device(device: str | None = None) -> str | None:
    """`device`, or this rank's own GPU where that leaves it open. Raises ValueError on a node with fewer GPUs than ranks."""
    if place()[1] == 1 or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"LOCAL_RANK={local} on a node with {count} GPUs: use torchrun --nproc-per-node {count}, or --device cpu"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@functools.cache
def _group() -> Any:
    """Gloo, between CPUs, wherever the model runs: no GPU spins in a collective. A user's script may have begun another backend."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)  # or its threads outlive the interpreter
    return dist.new_group(backend="gloo", timeout=WAIT)


def gather(mine: Any) -> list[Any]:
    """What every rank gave, in order, once all are here; [mine] without torchrun. RuntimeError where one died, or after WAIT."""
    found = [mine] * place()[1]
    if len(found) > 1:
        dist.all_gather_object(found, mine, group=_group())
    return found
