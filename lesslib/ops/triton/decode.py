"""A decode step: one token takes the free slot and attends, and one slot is freed.

`decode_step` does all of it, for policies whose rule the kernel knows; `attend_step` leaves the
choice of who leaves to its caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lesslib.ops.merge import Part
from lesslib.ops.rules import EvictionRule
from lesslib.ops.slots import AttendResult, Slots, StepResult
from lesslib.ops.triton.common import copy_row, jit, launch, tl
from lesslib.ops.triton.steps import (
    attend,
    choose_leaver,
    enter_slot,
    free_slot,
    load_probabilities,
    step_sizes,
)


@jit
def decode_kernel(
    q,  # [B, Hq, 1, D]
    k,  # [B, Hkv, 1, D]
    v,  # [B, Hkv, 1, DV]
    keys,  # [B, Hkv, N, D], the new one enters
    values,  # [B, Hkv, N, DV], the new one enters
    position,  # [B, Hkv, N], changes in place
    score,  # [B, Hkv, N], changes in place where the rule is "h2o"
    free,  # [B, Hkv, 1], the slot to enter; then the one that was freed
    count,  # [B], real tokens seen before this one
    part_output,  # [B, Hq, 1, DV], read where HAS_PART
    part_logsumexp,  # [B, Hq, 1], read where HAS_PART
    is_real,  # [B, 1], read where HAS_PADDING
    logits,  # [B, Hkv, G, N], scratch
    output,  # [B, Hq, 1, DV], written
    key_left,  # [B, Hkv, 1, D], written: the key that left
    value_left,  # [B, Hkv, 1, DV], written: the value that left
    is_held,  # [B, Hkv, 1], written: whether the slot that was freed held a token
    scaling,  # of the logits
    recent,  # of the EvictionRule
    sinks,  # of the EvictionRule
    N,  # slots
    Hkv,  # key-value heads
    RULE: tl.constexpr,  # name of the EvictionRule
    HAS_PART: tl.constexpr,  # the attention is merged with one partial softmax
    HAS_PADDING: tl.constexpr,  # the token of a row may be padding
    G: tl.constexpr,  # query heads of a key-value head
    D: tl.constexpr,  # head size of keys
    DV: tl.constexpr,  # head size of values
    G_PADDED: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # slots at once
):
    # A key-value head of a batch row, its query heads, and its part of every tensor of slots.
    head = tl.program_id(0).to(tl.int64)
    query_head = head * G + tl.arange(0, G_PADDED)
    keys += head * N * D
    values += head * N * DV
    position += head * N
    score += head * N
    logits += head * G * N

    # The token enters.
    entering = tl.load(free + head)
    now = tl.load(count + head // Hkv)
    enter_slot(k, v, head, keys, values, entering, D, DV, D_PADDED, DV_PADDED)

    # It attends.
    logsumexp = attend(
        q,
        query_head,
        keys,
        values,
        position,
        logits,
        entering,
        part_output,
        part_logsumexp,
        output,
        N,
        scaling,
        HAS_PART,
        G,
        D,
        DV,
        G_PADDED,
        D_PADDED,
        DV_PADDED,
        BLOCK,
    )

    # One slot is freed; a padded token attended itself, and now it goes.
    entered_at = now
    is_counted = 1
    if HAS_PADDING:
        is_counted = tl.load(is_real + head // Hkv).to(tl.int32)
        entered_at = tl.where(is_counted > 0, now, -1)
    leaver, leaver_position = choose_leaver(
        logits,
        logsumexp,
        position,
        score,
        entering,
        entered_at,
        now,
        is_counted,
        recent,
        sinks,
        N,
        RULE,
        G,
        G_PADDED,
        BLOCK,
    )
    copy_row(keys, leaver, key_left, head, tl.arange(0, D_PADDED), D)
    copy_row(values, leaver, value_left, head, tl.arange(0, DV_PADDED), DV)
    tl.store(is_held + head, leaver_position >= 0)
    tl.store(free + head, leaver)
    free_slot(position, leaver, entering, entered_at)


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
    B, Hkv, N, _ = slots.keys.shape
    result = StepResult(
        output=v.new_empty(B, q.shape[1], 1, v.shape[-1]),
        key=k.new_empty(k.shape),
        value=v.new_empty(v.shape),
        is_held=torch.empty_like(slots.free, dtype=torch.bool),
    )
    launch(
        decode_kernel,
        (B * Hkv,),
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        **slots.tensors(),
        **part_arguments(parts),
        **padding_arguments(is_real),
        logits=slots.score.new_empty(B, Hkv, q.shape[1] // Hkv, N),
        output=result.output,
        key_left=result.key,
        value_left=result.value,
        is_held=result.is_held,
        scaling=scaling,
        recent=rule.recent,
        sinks=rule.sinks,
        N=N,
        Hkv=Hkv,
        RULE=rule.name,
        **step_sizes(q, k, v),
    )
    slots.count.add_(1 if is_real is None else is_real[:, 0].int())
    return result


@jit
def attend_kernel(
    q,  # [B, Hq, 1, D]
    k,  # [B, Hkv, 1, D]
    v,  # [B, Hkv, 1, DV]
    keys,  # [B, Hkv, N, D], the new one enters
    values,  # [B, Hkv, N, DV], the new one enters
    position,  # [B, Hkv, N], changes where the token enters
    score,  # [B, Hkv, N], 0 where the token enters
    free,  # [B, Hkv, 1], the slot to enter
    count,  # [B], real tokens seen before this one
    part_output,  # [B, Hq, 1, DV], read where HAS_PART
    part_logsumexp,  # [B, Hq, 1], read where HAS_PART
    is_real,  # [B, 1], read where HAS_PADDING
    output,  # [B, Hq, 1, DV], written
    probabilities,  # [B, Hkv, G, N], written; holds the logits for a while
    scaling,  # of the logits
    N,  # slots
    Hkv,  # key-value heads
    HAS_PART: tl.constexpr,  # the attention is merged with one partial softmax
    HAS_PADDING: tl.constexpr,  # the token of a row may be padding
    G: tl.constexpr,  # query heads of a key-value head
    D: tl.constexpr,  # head size of keys
    DV: tl.constexpr,  # head size of values
    G_PADDED: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # slots at once
):
    # A key-value head of a batch row, its query heads, and its part of every tensor of slots.
    head = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, G_PADDED)
    query_head = head * G + group
    keys += head * N * D
    values += head * N * DV
    position += head * N
    probabilities += head * G * N

    # The token enters.
    entering = tl.load(free + head)
    now = tl.load(count + head // Hkv)
    enter_slot(k, v, head, keys, values, entering, D, DV, D_PADDED, DV_PADDED)
    tl.store(score + head * N + entering, 0.0)

    # It attends.
    logsumexp = attend(
        q,
        query_head,
        keys,
        values,
        position,
        probabilities,
        entering,
        part_output,
        part_logsumexp,
        output,
        N,
        scaling,
        HAS_PART,
        G,
        D,
        DV,
        G_PADDED,
        D_PADDED,
        DV_PADDED,
        BLOCK,
    )

    # The logits become probabilities; of a padded token nothing stays.
    entered_at = now
    is_counted = 1
    if HAS_PADDING:
        is_counted = tl.load(is_real + head // Hkv).to(tl.int32)
        entered_at = tl.where(is_counted > 0, now, -1)
    for start in range(0, N, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tile = load_probabilities(probabilities, logsumexp, slot, N, G, G_PADDED) * is_counted
        # Several threads may hold the same slot: none may read what another one wrote.
        tl.debug_barrier()
        mask = (group < G)[:, None] & (slot < N)
        tl.store(probabilities + group[:, None] * N + slot, tile, mask=mask)
    tl.store(position + entering, entered_at)


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
    B, Hkv, N, _ = slots.keys.shape
    result = AttendResult(
        output=v.new_empty(B, q.shape[1], 1, v.shape[-1]),
        probabilities=slots.score.new_empty(B, Hkv, q.shape[1] // Hkv, N),
    )
    launch(
        attend_kernel,
        (B * Hkv,),
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        **slots.tensors(),
        **part_arguments(parts),
        **padding_arguments(is_real),
        output=result.output,
        probabilities=result.probabilities,
        scaling=scaling,
        N=N,
        Hkv=Hkv,
        **step_sizes(q, k, v),
    )
    return result


# ---------------------------------------------------------------- arguments of both
def part_arguments(parts: Sequence[Part]) -> dict[str, Any]:
    """What a kernel takes for `parts`: their fold into one, or a flag that there is none."""
    if not parts:
        return {"part_output": None, "part_logsumexp": None, "HAS_PART": False}
    part = parts[0] if len(parts) == 1 else fold(parts)
    return {
        "part_output": part.output.to(torch.float32).contiguous(),
        "part_logsumexp": part.logsumexp.to(torch.float32).contiguous(),
        "HAS_PART": True,
    }


def padding_arguments(is_real: Tensor | None) -> dict[str, Any]:
    """What a kernel takes for `is_real` [B, 1], or a flag that there is no padding."""
    if is_real is None:
        return {"is_real": None, "HAS_PADDING": False}
    return {"is_real": is_real.contiguous(), "HAS_PADDING": True}


def fold(parts: Sequence[Part]) -> Part:
    """Several partial softmaxes as one; it holds nothing where none of them does."""
    logsumexps = torch.stack([part.logsumexp for part in parts])  # [parts, ...]
    outputs = torch.stack([part.output for part in parts])  # [parts, ..., Dv]
    logsumexp = logsumexps.logsumexp(0)
    # Where all are -inf their weights are exp(-inf - 0) = 0, not exp(-inf + inf).
    finite = logsumexp.masked_fill(logsumexp == -math.inf, 0.0)
    weights = (logsumexps - finite).exp()
    return Part((weights[..., None] * outputs).sum(0), logsumexp)
