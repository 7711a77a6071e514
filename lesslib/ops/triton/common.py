"""What all kernels share: Triton where it is installed, launching a kernel, and tiles in and out of
memory.

Matrices lie row after row in memory, so a tile is named by its rows, its columns and the WIDTH of a
whole row. `tl.dot` wants sides that are powers of two from 16; every size has a padded form, and
what lies beyond the true size reads as 0 and is never written.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Rows of a tile fill so much: shared memory holds a tile of keys and one of values, twice.
TILE_BYTES = 16 * 1024


def without_triton(x: Any) -> Any:
    """In the place of `triton.jit` and `tl.constexpr`: without Triton no kernel is called."""
    return x


jit: Any = without_triton if triton is None else triton.jit
constant: Any = without_triton if triton is None else tl.constexpr

# The interpreter's dot reads bfloat16 as integers.
WIDEN = constant(INTERPRETED)


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "Triton is not installed: using the slower torch form", RuntimeWarning, stacklevel=3
    )


def available(x: Tensor) -> bool:
    """Whether the kernels take tensors like x.

    They do where Triton is installed, for numbers of 16 or 32 bits on a GPU; with
    TRITON_INTERPRET=1 on a CPU, too. Warns once where a GPU lacks Triton alone.
    """
    if triton is None:
        if x.is_cuda:
            _warn_once()
        return False
    is_taken = x.is_floating_point() and x.itemsize in (2, 4)
    return is_taken and (x.is_cuda or INTERPRETED)


# ---------------------------------------------------------------- launching
def padded(size: int) -> int:
    """The side of a tile that holds `size` rows or columns: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def tile_rows(width: int, itemsize: int) -> int:
    """Rows of a tile of `width` numbers each, so that a tile fits into TILE_BYTES."""
    return max(16, min(64, TILE_BYTES // (padded(width) * itemsize)))


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run `kernel`, a program for every point of `grid`. The first of the arguments is a tensor,
    and it is on its device that the kernel runs.
    """
    first = next(iter(arguments.values()))
    # A model may lie on several GPUs; a tensor on the CPU says -1, which changes nothing.
    with torch.cuda.device(first.get_device()):
        kernel[grid](**arguments)


# ---------------------------------------------------------------- within a kernel
@jit
def dot(a, b):
    """The product of two tiles, summed in float32; float32 is not rounded to fewer bits."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def load_vector(x, column, WIDTH):
    """WIDTH numbers from the pointer x on, and 0 beyond them."""
    return tl.load(x + column, mask=column < WIDTH, other=0.0)


@jit
def load_tile(x, row, column, is_row, WIDTH):
    """A tile of the matrix x, whose rows have WIDTH columns; 0 where `is_row` is False."""
    mask = is_row[:, None] & (column < WIDTH)
    return tl.load(x + row[:, None] * WIDTH + column, mask=mask, other=0.0)


@jit
def store_tile(x, row, column, is_row, WIDTH, tile):
    """Write `tile` into the matrix x, whose rows have WIDTH columns, where `is_row` is True."""
    mask = is_row[:, None] & (column < WIDTH)
    tl.store(x + row[:, None] * WIDTH + column, tile, mask=mask)


@jit
def copy_row(source, source_row, target, target_row, column, WIDTH):
    """Row `source_row` of the matrix `source` becomes row `target_row` of `target`."""
    is_column = column < WIDTH
    numbers = tl.load(source + source_row * WIDTH + column, mask=is_column)
    tl.store(target + target_row * WIDTH + column, numbers, mask=is_column)
