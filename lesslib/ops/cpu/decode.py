"""A decode step: one token takes the free slot and attends, and one slot is freed.

`decode_step` does all of it, for policies whose rule the kernels know; `attend_step` leaves the
choice of who leaves to its caller. Open `h2o_kernel` first. Slots lie here as in `Slots`, a key or
value in a row: [N, D], [N, Dv].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lesslib.ops.cpu.common import LIKE, jit, over_rows, rows_for_a_thread, tensor_at
from lesslib.ops.cpu.elementary import widened
from lesslib.ops.cpu.products import write_dots, write_product
from lesslib.ops.cpu.steps import copy_row, first_out, rank_by_position, rank_by_score, weigh
from lesslib.ops.merge import Part
from lesslib.ops.rules import EvictionRule
from lesslib.ops.slots import AttendResult, Slots, StepResult

# The rules that `decode_step` takes.
STEP_RULES = frozenset({"h2o", "lambda", "tova"})
# The logit of an empty slot; -inf would make NaN of the difference of two.
LOWEST = -3e38


# ---------------------------------------------------------------- what a step is given
class StepAddresses(NamedTuple):
    """Where the tensors of a step lie, as `StepTensors` says."""

    q: int
    k: int
    v: int
    keys: int
    values: int
    position: int
    score: int
    free: int
    seen: int
    is_real: int
    part_output: int
    part_logsumexp: int
    output: int


class StepSizes(NamedTuple):
    """B rows of a batch, Hkv key-value heads, G query heads of each, N slots, `parts` to merge."""

    B: int
    Hkv: int
    G: int
    N: int
    D: int
    Dv: int
    parts: int


class StepTensors(NamedTuple):
    """The tensors of a step; rows are key-value heads of sequences, B * Hkv."""

    # [rows, G, D], [rows, D], [rows, Dv] of the new token
    q: Any
    k: Any
    v: Any
    # [rows, N, D], [rows, N, Dv], [rows, N], [rows, N], [rows] of the slots
    keys: Any
    values: Any
    position: Any
    score: Any
    free: Any
    # [B], real tokens before this one, `count` of the slots
    seen: Any
    # [B], False for padding
    is_real: Any
    # [parts, rows, G, Dv], [parts, rows, G]
    part_output: Any
    part_logsumexp: Any
    # [rows, G, Dv], written
    output: Any


class LeavingAddresses(NamedTuple):
    """Where it is written who leaves, as `LeavingTensors` says."""

    key: int
    value: int
    is_held: int


class LeavingTensors(NamedTuple):
    """The key [rows, D] and the value [rows, Dv] that left, and whether their slot held a token
    [rows].
    """

    key: Any
    value: Any
    is_held: Any


@jit
def step_tensors(
    addresses,  # of StepAddresses
    sizes,  # of StepSizes
    like,  # an array of the dtype of keys and values
    wide,  # an array of the dtype of sums
):
    at = StepAddresses(*addresses)
    B, Hkv, G, N, D, Dv, parts = sizes
    rows = B * Hkv
    whole = np.empty(0, np.int32)
    long = np.empty(0, np.int64)
    boolean = np.empty(0, np.bool_)
    return StepTensors(
        tensor_at(at.q, (rows, G, D), like),
        tensor_at(at.k, (rows, D), like),
        tensor_at(at.v, (rows, Dv), like),
        tensor_at(at.keys, (rows, N, D), like),
        tensor_at(at.values, (rows, N, Dv), like),
        tensor_at(at.position, (rows, N), whole),
        tensor_at(at.score, (rows, N), wide),
        tensor_at(at.free, (rows,), long),
        tensor_at(at.seen, (B,), whole),
        tensor_at(at.is_real, (B,), boolean),
        tensor_at(at.part_output, (parts, rows, G, Dv), wide),
        tensor_at(at.part_logsumexp, (parts, rows, G), wide),
        tensor_at(at.output, (rows, G, Dv), wide),
    )


@jit
def leaving_tensors(
    addresses,  # of LeavingAddresses
    sizes,  # StepSizes
    like,  # an array of the dtype of keys and values
):
    at = LeavingAddresses(*addresses)
    rows = sizes.B * sizes.Hkv
    return LeavingTensors(
        tensor_at(at.key, (rows, sizes.D), like),
        tensor_at(at.value, (rows, sizes.Dv), like),
        tensor_at(at.is_held, (rows,), np.empty(0, np.bool_)),
    )


# ---------------------------------------------------------------- entering and attending
class Scratch(NamedTuple):
    """What a row is computed with."""

    # [G, D], times the scaling
    queries: Any
    # [G, N], over the slots alone; [G], their log-sum-exps
    probabilities: Any
    logsumexp: Any
    # [N], the lowest one leaves
    rank: Any


@jit
def scratch_for(
    sizes,  # StepSizes
    wide,  # an array of the dtype of sums
):
    return Scratch(
        np.empty((sizes.G, sizes.D), wide.dtype),
        np.empty((sizes.G, sizes.N), wide.dtype),
        np.empty(sizes.G, wide.dtype),
        np.empty(sizes.N, wide.dtype),
    )


@jit
def scale(x, share):
    factor = x.dtype.type(share)
    for d in range(x.shape[0]):
        x[d] *= factor


@jit
def softmax_of_slots(
    logits,  # [N], become probabilities
    position,  # [N], -1 for an empty slot
):
    """The logits become probabilities, 0 of empty slots; returns their log-sum-exp."""
    N = logits.shape[0]
    lowest = logits.dtype.type(LOWEST)
    for j in range(N):
        logits[j] = logits[j] if position[j] >= 0 else lowest
    highest, total = weigh(logits, N)
    scale(logits, 1 / total)
    return highest + math.log(total)


@jit
def merge_parts(
    output,  # [Dv], of the slots; then of all parts together
    logsumexp,  # of the slots
    step,  # StepTensors
    row,
    g,  # the query head
):
    """Attention over slots and parts together, as `ops.merge.merge`; a part at -inf changes
    nothing.
    """
    parts = step.part_logsumexp.shape[0]
    if parts == 0:
        return
    highest = logsumexp
    for p in range(parts):
        highest = max(highest, step.part_logsumexp[p, row, g])
    total = math.exp(logsumexp - highest)
    for p in range(parts):
        total += math.exp(step.part_logsumexp[p, row, g] - highest)
    scale(output, math.exp(logsumexp - highest) / total)
    for p in range(parts):
        share = math.exp(step.part_logsumexp[p, row, g] - highest) / total
        for d in range(output.shape[0]):
            output[d] += share * step.part_output[p, row, g, d]


@jit
def attend_row(
    step,  # StepTensors
    row,
    now,  # the new token's position
    scaling,  # of the logits
    queries,  # [G, D], scratch
    probabilities,  # [G, N], written, over the slots alone
    logsumexp,  # [G], written
):
    """A row's token enters the free slot and attends all slots, merged with the parts."""
    slot = step.free[row]
    copy_row(step.k[row], step.keys[row, slot])
    copy_row(step.v[row], step.values[row, slot])
    step.position[row, slot] = now
    step.score[row, slot] = 0
    G, D = queries.shape
    factor = queries.dtype.type(scaling)
    for g in range(G):
        for d in range(D):
            queries[g, d] = widened(step.q[row, g, d]) * factor
    write_dots(queries, step.keys[row], probabilities)
    for g in range(G):
        logsumexp[g] = softmax_of_slots(probabilities[g], step.position[row])
    N, Dv = step.values.shape[1:]
    write_product(probabilities, N, step.values[row], Dv, step.output[row])
    for g in range(G):
        merge_parts(step.output[row, g], logsumexp[g], step, row, g)


@jit
def add_probabilities(
    probabilities,  # [G, N], of a group's query heads
    total,  # [N], added to
):
    """total += the sum of the probabilities over the heads."""
    G, N = probabilities.shape
    for g in range(G):
        for j in range(N):
            total[j] += probabilities[g, j]


# ---------------------------------------------------------------- leaving
@jit
def leave(
    leaver,  # the slot to free
    step,  # StepTensors
    left,  # LeavingTensors, written
    row,
):
    """Free a slot, and give what it held."""
    copy_row(step.keys[row, leaver], left.key[row])
    copy_row(step.values[row, leaver], left.value[row])
    left.is_held[row] = step.position[row, leaver] >= 0
    step.position[row, leaver] = -1
    step.free[row] = leaver


# ---------------------------------------------------------------- kernels
@jit
def h2o_kernel(
    first_row,  # rows are key-value heads of sequences, B * Hkv
    last_row,
    addresses,  # of StepAddresses
    left_at,  # of LeavingAddresses
    sizes_given,  # of StepSizes
    scaling,  # of the logits
    recent,  # of the EvictionRule
    like,  # an array of the dtype of keys and values
    wide,  # an array of the dtype of sums
):
    sizes = StepSizes(*sizes_given)
    step = step_tensors(addresses, sizes, like, wide)
    left = leaving_tensors(left_at, sizes, like)
    scratch = scratch_for(sizes, wide)
    for row in range(first_row, last_row):
        b = row // sizes.Hkv
        now = step.seen[b]
        attend_row(step, row, now, scaling, *scratch[:3])
        # What it gave to the slots is added to their scores; a padded token gives nothing and goes.
        if step.is_real[b]:
            add_probabilities(scratch.probabilities, step.score[row])
        else:
            step.position[row, step.free[row]] = -1
        rank_by_score(step.score[row], step.position[row], now - recent, scratch.rank)
        leave(first_out(scratch.rank, step.position[row]), step, left, row)


@jit
def lambda_kernel(
    first_row,  # rows are key-value heads of sequences, B * Hkv
    last_row,
    addresses,  # of StepAddresses
    left_at,  # of LeavingAddresses
    sizes_given,  # of StepSizes
    scaling,  # of the logits
    recent,  # of the EvictionRule
    sinks,  # of the EvictionRule
    like,  # an array of the dtype of keys and values
    wide,  # an array of the dtype of sums
):
    sizes = StepSizes(*sizes_given)
    step = step_tensors(addresses, sizes, like, wide)
    left = leaving_tensors(left_at, sizes, like)
    scratch = scratch_for(sizes, wide)
    for row in range(first_row, last_row):
        b = row // sizes.Hkv
        now = step.seen[b]
        attend_row(step, row, now, scaling, *scratch[:3])
        if not step.is_real[b]:
            step.position[row, step.free[row]] = -1
        rank_by_position(step.position[row], sinks, now - recent, scratch.rank)
        leave(first_out(scratch.rank, step.position[row]), step, left, row)


@jit
def tova_kernel(
    first_row,  # rows are sequences here, B, whose heads choose together
    last_row,
    addresses,  # of StepAddresses
    left_at,  # of LeavingAddresses
    sizes_given,  # of StepSizes
    scaling,  # of the logits
    like,  # an array of the dtype of keys and values
    wide,  # an array of the dtype of sums
):
    sizes = StepSizes(*sizes_given)
    step = step_tensors(addresses, sizes, like, wide)
    left = leaving_tensors(left_at, sizes, like)
    scratch = scratch_for(sizes, wide)
    average = np.empty(sizes.N, wide.dtype)
    for b in range(first_row, last_row):
        now = step.seen[b]
        heads = range(b * sizes.Hkv, b * sizes.Hkv + sizes.Hkv)
        # All heads attend; the score is what the newest query gave, averaged over them.
        average[:] = 0
        for row in heads:
            attend_row(step, row, now, scaling, *scratch[:3])
            if step.is_real[b]:
                add_probabilities(scratch.probabilities, average)
            else:
                step.position[row, step.free[row]] = -1
        scale(average, 1 / (sizes.Hkv * sizes.G))
        for row in heads:
            copy_row(average, step.score[row])
            rank_by_score(average, step.position[row], now, scratch.rank)
            leave(first_out(scratch.rank, step.position[row]), step, left, row)


@jit
def attend_kernel(
    first_row,  # rows are key-value heads of sequences, B * Hkv
    last_row,
    addresses,  # of StepAddresses
    probabilities_at,  # [rows, G, N], written, over the slots alone
    sizes_given,  # of StepSizes
    scaling,  # of the logits
    like,  # an array of the dtype of keys and values
    wide,  # an array of the dtype of sums
):
    sizes = StepSizes(*sizes_given)
    step = step_tensors(addresses, sizes, like, wide)
    rows = sizes.B * sizes.Hkv
    probabilities = tensor_at(probabilities_at, (rows, sizes.G, sizes.N), wide)
    scratch = scratch_for(sizes, wide)
    for row in range(first_row, last_row):
        b = row // sizes.Hkv
        found = (probabilities[row], scratch.logsumexp)
        attend_row(step, row, step.seen[b], scaling, scratch.queries, *found)
        if not step.is_real[b]:
            # Of a padded token nothing stays.
            step.position[row, step.free[row]] = -1
            probabilities[row] = 0


@jit
def count_kernel(
    count_at,  # [B], changes in place
    is_real_at,  # [B]
    B,  # rows of a batch
):
    """Rows whose token is real have seen one more."""
    count = tensor_at(count_at, (B,), np.empty(0, np.int32))
    is_real = tensor_at(is_real_at, (B,), np.empty(0, np.bool_))
    for b in range(B):
        count[b] += is_real[b]


# ---------------------------------------------------------------- calls
def decode_step(
    rule: EvictionRule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Slots,
    parts: Sequence[Part],
    is_real: Tensor | None,
    scaling: float,
) -> StepResult:
    """One token attends the slots, merged with `parts`, and then the rule frees one slot.

    The torch form is the layer's own step. q [B, Hq, 1, D], k [B, Hkv, 1, D], v [B, Hkv, 1, Dv];
    `slots` change in place; `parts` are of output [B, Hq, 1, Dv] and log-sum-exp [B, Hq, 1], what a
    state gives; `is_real` [B, 1] is False for padding, which leaves no trace.
    """
    step = Step(q, k, v, slots, parts, is_real)
    key = k.new_empty(k.shape)
    value = v.new_empty(v.shape)
    is_held = torch.empty_like(slots.free, dtype=torch.bool)
    left_at = (key.data_ptr(), value.data_ptr(), is_held.data_ptr())
    given = (step.addresses, left_at, step.sizes, scaling)
    B, Hkv = step.sizes[:2]
    rows = B * Hkv
    if rule.name == "h2o":
        over_rows(h2o_kernel, rows, *given, rule.recent, *step.likes, at_once=step.at_once)
    elif rule.name == "lambda":
        settings = (rule.recent, rule.sinks)
        over_rows(lambda_kernel, rows, *given, *settings, *step.likes, at_once=step.at_once)
    else:
        at_once = -(-step.at_once // Hkv)
        over_rows(tova_kernel, B, *given, *step.likes, at_once=at_once)
    count_kernel(slots.count.data_ptr(), step.is_real.data_ptr(), B)
    return StepResult(step.output.to(v.dtype), key, value, is_held)


def attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Slots,
    parts: Sequence[Part],
    is_real: Tensor | None,
    scaling: float,
) -> AttendResult:
    """One token enters and attends the slots, merged with `parts`; its caller then evicts.

    Shapes as in `decode_step`. Of `slots` the new token's key, value, position (-1 for padding) and
    score (0) are written; `free` and `count` stay, as the choice of who leaves needs them.
    """
    step = Step(q, k, v, slots, parts, is_real)
    B, Hkv, G, N = step.sizes[:4]
    probabilities = slots.score.new_empty(B, Hkv, G, N)
    given = (step.addresses, probabilities.data_ptr(), step.sizes, scaling)
    over_rows(attend_kernel, B * Hkv, *given, *step.likes, at_once=step.at_once)
    return AttendResult(step.output.to(v.dtype), probabilities)


class Step:
    """What both kinds of step are given; it holds the tensors as long as their addresses are
    used.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Slots,
        parts: Sequence[Part],
        is_real: Tensor | None,
    ) -> None:
        B, Hkv, N, D = slots.keys.shape
        Dv = v.shape[-1]
        Hq = q.shape[1]
        G = Hq // Hkv
        self.sizes = (B, Hkv, G, N, D, Dv, len(parts))
        self.output = slots.score.new_empty(B, Hq, 1, Dv)
        self.likes = (LIKE[k.dtype], LIKE[self.output.dtype])
        self.at_once = rows_for_a_thread(G * N * (D + Dv))
        self.is_real = all_real(B) if is_real is None else is_real.contiguous()
        part = one_tensor(parts, self.output)
        self.inputs = (
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            *slots_of(slots),
            self.is_real,
            part.output,
            part.logsumexp,
            self.output,
        )
        self.addresses = tuple([tensor.data_ptr() for tensor in self.inputs])


def slots_of(slots: Slots) -> tuple[Tensor, ...]:
    """The tensors of slots in the order of `StepAddresses`."""
    return (slots.keys, slots.values, slots.position, slots.score, slots.free, slots.count)


@functools.cache
def all_real(rows: int) -> Tensor:
    """Rows without padding, [rows]; only read."""
    return torch.ones(rows, dtype=torch.bool)


def one_tensor(parts: Sequence[Part], output: Tensor) -> Part:
    """All parts in one of [parts, B, Hq, 1, Dv] and [parts, B, Hq, 1], contiguous in the dtype of
    `output`, which stands for them where there are none.
    """
    if not parts:
        return Part(output, output)
    if len(parts) == 1:
        outputs, logsumexps = parts[0]
    else:
        outputs = torch.stack([part.output for part in parts])
        logsumexps = torch.stack([part.logsumexp for part in parts])
    dtype = output.dtype
    return Part(outputs.to(dtype).contiguous(), logsumexps.to(dtype).contiguous())
