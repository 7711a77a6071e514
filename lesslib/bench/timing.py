"""Where and how all is measured: the device, one clock, peak memory, fresh processes."""

import ctypes
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lesslib.util.hardware import keep_memory

# everything is timed there, models on a GPU in half precision
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.float32

# Fresh processes fork from one that has loaded this module and all below it (torch, transformers,
# the trainer), which takes longer than some of what they time. It must not be a module of
# lesslib.bench: asking for a GPU, as this file does, before a fork breaks CUDA after it.
PRELOADED = "lesslib.train"


def now() -> float:
    """Seconds, once the device has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def restart_peak_memory() -> float | None:
    """Let `peak_memory` count from now on; MiB held now, None where they cannot be counted."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return peak_memory()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return peak_memory()


def peak_memory() -> float | None:
    """The most MiB that this process held at once since `restart_peak_memory`.

    Of a GPU's memory if it uses one; None where there is no Linux.
    """
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM"):
            kib = int(line.split()[1])
            return kib / 1024
    return None


def peak_above(held: float | None) -> float | None:
    """MiB by which the peak lies above `held`, of `restart_peak_memory`; None where unknown."""
    peak = peak_memory()
    if held is None or peak is None:
        return None
    return peak - held


def copy_bandwidth(mib: int = 256) -> float:
    """Bytes a second that the device reads and writes in a copy of `mib` MiB, best of five."""
    numbers = mib * 2**20 // torch.float32.itemsize
    source = torch.ones(numbers, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        begun = now()
        target.copy_(source)
        best = min(best, now() - begun)
    return 2 * source.nbytes / best


def fresh_process() -> ProcessPoolExecutor:
    """A pool of one process with nothing of this one but its environment: its peak is its own."""
    return ProcessPoolExecutor(1, _process_context(), _begin, (dict(os.environ),))


def _process_context() -> Any:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def _begin(environment: dict[str, str]) -> None:
    # the server that it forks from may have been started under another environment
    os.environ.clear()
    os.environ.update(environment)
    keep_memory()
