"""What this machine has, and how to use it well: memory, half precision, threads."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of glibc's malloc.h


def keep_memory() -> bool:
    """Keep freed memory in this process, where later buffers find it without new page faults; False where this cannot be set.

    glibc returns every large buffer that is freed, which made training on CPU 1.15 to 1.4 times slower; others lack `mallopt`.
    """
    mallopt = getattr(ctypes.pythonapi, "mallopt", None)  # of the C library that Python runs on
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bfloat16 matmuls where they are quick: on GPUs and on CPUs with AVX-512. Other CPUs take over 100 times as long as in float32."""
    quick = device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and quick)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread within the context: over many tiny operations, waking the others costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
