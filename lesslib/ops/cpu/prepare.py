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
from lesslib.ops.cpu.decode import STEP_RULES, attend_step, decode_step
from lesslib.ops.cpu.features import phi, psi
from lesslib.ops.cpu.hidden_layer import mlp
from lesslib.ops.cpu.join import join
from lesslib.ops.cpu.low_rank import absorb, read
from lesslib.ops.cpu.prompt import weigh_rows
from lesslib.ops.cpu.sequence import SEQUENCE_RULES, sequence_of_steps
from lesslib.ops.merge import Part
from lesslib.ops.rules import EvictionRule, RuleName
from lesslib.ops.slots import Slots
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
    wide = torch.promote_types(dtype, torch.float32)
    columns = torch.zeros(2, 2, 5, dtype=wide)
    logits = torch.zeros(2, 2, 3, 5, dtype=wide)
    yield Example(weigh_rows, (logits, is_real[:, :3], columns))
    yield from examples_of_a_step(dtype)
    yield from examples_of_training(dtype)


def examples_of_a_step(dtype: torch.dtype) -> Iterator[Example]:
    """A call of each operation of a decode step: 2 rows, 4 query heads, 2 key-value heads of 8,
    R = 3.
    """

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    q = numbers(2, 4, 1, 8)
    k = numbers(2, 2, 1, 8)
    slots = Slots.empty(k, k, 2)
    parts = [Part(q.float() if dtype.itemsize < 4 else q, slots.score.new_zeros(2, 4, 1))]
    for name in sorted(STEP_RULES):
        rule = EvictionRule(cast(RuleName, name), recent=1, sinks=1)
        yield Example(decode_step, (rule, q, k, k, slots, parts, None, 0.5))
    yield Example(attend_step, (q, k, k, slots, parts, None, 0.5))
    w1 = numbers(4, 8, 16)
    w2 = numbers(4, 16, 3)
    scale = numbers(2, 1, 3)
    yield Example(phi, (q, w1, w2))
    yield Example(psi, (k, w1[:2], w2[:2], numbers(2, 3, 3), scale, scale))
    H = slots.score.new_zeros(2, 2, 3, 8)
    z = slots.score.new_zeros(2, 2, 3)
    features = slots.score.new_zeros(2, 2, 1, 3)
    is_held = torch.ones(2, 2, 1, dtype=torch.bool)
    yield Example(absorb, (H, z, features, k, is_held))
    yield Example(read, (slots.score.new_zeros(2, 4, 1, 3), H, z))


def examples_of_training(dtype: torch.dtype) -> Iterator[Example]:
    """A call of each operation that has gradients: 2 sequences of 5 tokens, 4 query heads, 2
    key-value heads of 8, R = 3, 16 hidden units.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=wide)

    def weights(*shape: int) -> Tensor:
        return numbers(*shape).requires_grad_()

    slots = Part(numbers(2, 4, 5, 8), numbers(2, 4, 5))
    yield Example(join, (slots, weights(2, 4, 5, 3), weights(2, 2, 5, 3), numbers(2, 2, 5, 8)))
    is_kept = torch.ones(2, 4, 16, 5, dtype=torch.bool)
    # The hidden layer may be in half precision while training.
    for of_hidden in (wide, torch.bfloat16):
        x = numbers(2, 4, 5, 8).to(of_hidden)
        yield Example(mlp, (x, weights(4, 8, 16), weights(4, 16, 3), is_kept, 0.5))


def run(example: Example) -> None:
    """Call an operation, and what computes its gradients."""
    result = example.operation(*example.arguments)
    if isinstance(result, Tensor) and result.requires_grad:
        result.sum().backward()


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
            for done, example in enumerate(calls):
                _say(f"{LABEL}: {dtype} {done}/{len(calls)}")
                run(example)
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
