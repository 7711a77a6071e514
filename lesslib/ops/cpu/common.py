"""What all kernels share: Numba where it is installed, threads, and tensors as a kernel takes them.

A kernel is compiled for one thread, runs without the GIL, and takes the first and the last of the
rows that it works on; `over_rows` shares the rows out. Threads are ours, not Numba's: of its own
pools one aborts a process that has forked, another one that calls kernels from two threads.
Compiled code is kept on disk; see `kernel_cache`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lesslib.ops.kernel_cache import cache_folder

try:
    import numba
except ImportError:
    numba = None

# Sums may be reordered and fused, so that loops run in SIMD; NaN and infinities keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz"}
# The integers that hold the bits of half-precision numbers: NumPy and Numba know no bfloat16.
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
DTYPES = (torch.float32, torch.float64, *BITS)


# ---------------------------------------------------------------- compiling
def jit(function: Callable) -> Any:
    """A kernel, or a function that kernels are made of: compiled at its first call, once a
    machine. Without Numba the function itself, which nobody calls.
    """
    if numba is None:
        return function
    before = numba.config.CACHE_DIR
    # Read when a function is decorated; other packages' kernels stay where they are.
    numba.config.CACHE_DIR = str(cache_folder())
    try:
        return numba.njit(nogil=True, cache=True, fastmath=FAST)(function)
    finally:
        numba.config.CACHE_DIR = before


# ---------------------------------------------------------------- tensors
def available(x: Tensor) -> bool:
    """Whether the kernels take tensors like x: floating-point ones on a CPU, with Numba."""
    return numba is not None and x.device.type == "cpu" and x.dtype in DTYPES


def array(x: Tensor) -> np.ndarray:
    """The tensor's memory, as a kernel takes it; halves as the integers that hold their bits."""
    x = x.detach()
    if x.dtype in BITS:
        x = x.view(BITS[x.dtype])
    return x.numpy()


# ---------------------------------------------------------------- threads
class Threads:
    """The threads of this process besides the calling one; a forked child starts its own."""

    def __init__(self) -> None:
        self.pool: ThreadPoolExecutor | None = None
        self.size = 0
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.pool = None
        self.size = 0

    def of(self, size: int) -> ThreadPoolExecutor:
        """A pool of at least `size` threads."""
        if self.pool is None or self.size < size:
            self.pool = ThreadPoolExecutor(size, thread_name_prefix="lesslib")
            self.size = size
        return self.pool


THREADS = Threads()


def over_rows(kernel: Callable, rows: int, *arguments: Any, at_once: int = 1) -> None:
    """Call `kernel(first, last, *arguments)` for all rows, `at_once` of them in a call.

    On as many threads as torch is set to use, so that `torch.set_num_threads` and OMP_NUM_THREADS
    hold for kernels too. Rows go to whichever thread is free.
    """
    blocks = -(-rows // at_once)
    threads = min(torch.get_num_threads(), blocks)
    if threads < 2:
        kernel(0, rows, *arguments)
        return
    # `next` of a count is one step to all threads
    counter = itertools.count()

    def work() -> None:
        for block in iter(lambda: next(counter), None):
            if block >= blocks:
                return
            first = block * at_once
            kernel(first, min(first + at_once, rows), *arguments)

    others = [THREADS.of(threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()
