"""How to use this machine well: freed memory, half precision, threads."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

# Parameters of mallopt in glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_memory() -> bool:
    """Keep freed memory in this process; False where the C library cannot be told so.

    Later buffers then find it without new page faults. By default glibc returns every large buffer
    that is freed, which made training on CPU 1.15 to 1.4 times slower; others lack `mallopt`.
    """
    # Of the C library that Python runs on.
    mallopt = getattr(ctypes.pythonapi, "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bfloat16 matmuls where they are quick: on GPUs and on CPUs with AVX-512.

    Other CPUs take over 100 times as long as in float32; there it changes nothing.
    """
    is_quick = device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and is_quick)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a matmul of x would be in: its own, but under autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread within the context.

    Over many tiny operations, waking the others costs more than they do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
