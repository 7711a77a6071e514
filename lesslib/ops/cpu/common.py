"""What all kernels share: Numba where it is installed, threads, and tensors as a kernel takes them.

A kernel is compiled for one thread, runs without the GIL, and takes the first and the last of the
rows that it works on; `over_rows` shares the rows out. Threads are ours, not Numba's: of its own
pools one aborts a process that has forked, another one that calls kernels from two threads.
Compiled code is kept on disk; see `kernel_cache`.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
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
# Quotients stay quotients: the reciprocal of a number far below normal ones is infinite.
FAST = {"reassoc", "contract", "nsz"}
# The integers that hold the bits of half-precision numbers: NumPy and Numba know no bfloat16.
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
DTYPES = (torch.float32, torch.float64, *BITS)
# An array of each dtype as kernels know it, which tells them what lies at an address.
LIKE = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}
# Multiplications and additions that take as long as handing rows to another thread
WORTH_A_THREAD = 1_000_000


# ---------------------------------------------------------------- compiling
def jit(function: Callable) -> Any:
    """A kernel, or a function that kernels are made of: compiled at its first call, once a
    machine. Without Numba the function itself, which nobody calls.
    """
    return compiled(function, FAST)


def jit_as_written(function: Callable) -> Any:
    """The same for functions whose sums must keep their order, or lose digits."""
    return compiled(function, {"contract", "nsz"})


def compiled(function: Callable, liberties: set[str]) -> Any:
    """A function for Numba to compile, with what it may do to arithmetic."""
    if numba is None:
        return function
    config: Any = numba.config
    before = config.CACHE_DIR
    # Read when a function is decorated; other packages' kernels stay where they are.
    config.CACHE_DIR = str(cache_folder())
    try:
        # Python would raise for a division by 0, and the test of it keep a loop from SIMD.
        decorate = numba.njit(nogil=True, cache=True, fastmath=liberties, error_model="numpy")
        return decorate(function)
    finally:
        config.CACHE_DIR = before


# ---------------------------------------------------------------- tensors
def available(x: Tensor) -> bool:
    """Whether the kernels take tensors like x: floating-point ones on a CPU, with Numba."""
    return numba is not None and x.device.type == "cpu" and x.dtype in DTYPES


def array(x: Tensor) -> np.ndarray:
    """The tensor's memory, as a kernel takes it; halves as the integers that hold their bits."""
    if x.requires_grad:
        x = x.detach()
    if x.dtype in BITS:
        x = x.view(BITS[x.dtype])
    return x.numpy()


if numba is not None:
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        """The pointer to an address."""

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

        return types.voidptr(types.int64), code


@jit
def tensor_at(
    address,  # of a contiguous tensor, its `data_ptr()`
    shape,  # of the tensor
    like,  # an array of the same dtype
):
    """The tensor at an address. Kernels of small work take addresses: a tensor's NumPy view, made
    by torch and read by Numba, takes a microsecond.
    """
    return numba.carray(pointer(address), shape, like.dtype)


# ---------------------------------------------------------------- threads
def do_nothing() -> None:
    pass


class Worker:
    """A thread that does one piece of work at a time; locks wake it in a third of the time that a
    ThreadPoolExecutor takes.
    """

    def __init__(self) -> None:
        self.has_work = threading.Lock()
        self.is_done = threading.Lock()
        self.has_work.acquire()
        self.is_done.acquire()
        self.work: Callable[[], None] = do_nothing
        self.error: BaseException | None = None
        threading.Thread(target=self.run, name="lesslib", daemon=True).start()

    def run(self) -> None:
        while True:
            self.has_work.acquire()
            try:
                self.work()
            except BaseException as error:
                self.error = error
            self.is_done.release()

    def begin(self, work: Callable[[], None]) -> None:
        self.work = work
        self.has_work.release()

    def wait(self) -> None:
        """Until the work is done. Raises what it raised."""
        self.is_done.acquire()
        error = self.error
        self.error = None
        if error is not None:
            raise error


# Workers that wait for work. Who takes one puts it back; a forked child has none of its parent's.
IDLE: list[Worker] = []
os.register_at_fork(after_in_child=IDLE.clear)


def idle_worker() -> Worker:
    try:
        return IDLE.pop()
    except IndexError:
        return Worker()


def rows_for_a_thread(work: int) -> int:
    """So many rows are worth a thread, at `work` multiplications and additions a row."""
    # Where there is nothing to do, as in a turn after which nobody leaves, any number is right.
    return -(-WORTH_A_THREAD // max(work, 1))


def over_rows(kernel: Callable, rows: int, *arguments: Any, at_once: int = 1) -> None:
    """Call `kernel(first, last, *arguments)` for all rows, at least `at_once` of them in a call.

    On as many threads as torch is set to use, so that `torch.set_num_threads` and OMP_NUM_THREADS
    hold for kernels too. Rows go to whichever thread is free.
    """
    blocks = rows // at_once
    threads = min(torch.get_num_threads(), blocks)
    # Not another thread for less than `at_once` rows: torch's own threads keep all processors busy
    # for some time after each of its operations, so that ours may have to wait.
    if threads < 2:
        kernel(0, rows, *arguments)
        return
    size = -(-rows // blocks)
    # `next` of a count is one step to all threads
    counter = itertools.count()

    def work() -> None:
        for block in iter(lambda: next(counter), None):
            first = block * size
            if first >= rows:
                return
            kernel(first, min(first + size, rows), *arguments)

    workers = [idle_worker() for _ in range(threads - 1)]
    for worker in workers:
        worker.begin(work)
    try:
        work()
    finally:
        for worker in workers:
            worker.wait()
            IDLE.append(worker)
