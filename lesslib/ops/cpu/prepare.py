"""Compile every kernel before its first use, instead of in each process that needs it first.

A kernel is compiled for the types of what it is called with, so an example calls every operation
as a model calls it. Add one here for a new operation of this folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lesslib.ops import kernel_cache
from lesslib.ops.cpu.sequence import SEQUENCE_RULES, sequence_of_steps
from lesslib.ops.rules import EvictionRule, RuleName
from lesslib.util.progress import minutes

# What models are loaded in on a CPU.
DTYPES = ("float32",)
LABEL = "compiling the CPU kernels, once for this machine"


class Example(NamedTuple):
    """A call that has the kernels of an operation compiled."""

    operation: Callable
    arguments: tuple


def examples(dtype: torch.dtype) -> Iterator[Example]:
    """A call of each operation, and of each rule that has kernels of its own."""

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    is_real = torch.ones(2, 5, dtype=torch.bool)
    sequence = (numbers(2, 4, 5, 8), numbers(2, 2, 5, 8), numbers(2, 2, 5, 8))
    for name in sorted(SEQUENCE_RULES):
        rule = EvictionRule(cast(RuleName, name), recent=1, sinks=1)
        yield Example(sequence_of_steps, (rule, *sequence, 2, is_real, 0.5))


def prepare(dtypes: tuple[str, ...] = DTYPES) -> None:
    """Compile what models in `dtypes` use, unless that was done, and say how far it is.

    Of the processes of a machine, one does so, and the others wait.
    """
    if kernel_cache.is_complete(dtypes):
        return
    with kernel_cache.alone():
        if kernel_cache.is_complete(dtypes):
            return
        begun = time.time()
        for dtype in dtypes:
            calls = list(examples(getattr(torch, dtype)))
            for done, (operation, arguments) in enumerate(calls):
                _say(f"{LABEL}: {dtype} {done}/{len(calls)}")
                operation(*arguments)
            kernel_cache.marker(dtype).touch()
        _say(f"{LABEL}: {minutes(time.time() - begun)}", is_last=True)


def _say(words: str, is_last: bool = False) -> None:
    """Rewrite the line of a terminal; elsewhere print the last line alone."""
    if sys.stdout.isatty():
        print(f"\r\033[K{words}", end="\n" if is_last else "", flush=True)
    elif is_last:
        print(words, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """`python -m lesslib.ops.cpu`."""
    parser = argparse.ArgumentParser("python -m lesslib.ops.cpu", description=__doc__)
    parser.add_argument("dtypes", nargs="*", default=DTYPES, help="of models")
    prepare(tuple(parser.parse_args(arguments).dtypes))
