"""All decode steps of a sequence in one kernel, for scoring: eviction times and attention."""

from __future__ import annotations

import torch
from torch import Tensor

from lesslib.ops.blocks import NEVER
from lesslib.ops.merge import Part
from lesslib.ops.rules import EvictionRule
from lesslib.ops.scan import arrivals
from lesslib.ops.slots import Slots
from lesslib.ops.triton.common import jit, launch, tl
from lesslib.ops.triton.steps import (
    attend,
    choose_leaver,
    enter_slot,
    free_slot,
    step_sizes,
)


@jit
def sequence_kernel(
    q,  # [B, Hq, S, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, DV]
    keys,  # [B, Hkv, N, D], scratch
    values,  # [B, Hkv, N, DV], scratch
    position,  # [B, Hkv, N], scratch: -1 everywhere, as all slots are empty
    score,  # [B, Hkv, N], scratch
    is_real,  # [B, S]
    logits,  # [B, Hkv, G, N], scratch
    output,  # [B, Hq, S, DV], written
    logsumexps,  # [B, Hq, S], written
    position_left,  # [B, Hkv, S], written: the position that left after each query, or -1
    scaling,  # of the logits
    recent,  # of the EvictionRule
    sinks,  # of the EvictionRule
    S,  # tokens
    N,  # slots
    Hkv,  # key-value heads
    RULE: tl.constexpr,  # name of the EvictionRule
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
    score += head * N
    logits += head * G * N

    entering = tl.cast(N - 1, tl.int64)
    now = 0
    for t in range(0, S):
        # The token enters and attends.
        enter_slot(k, v, head * S + t, keys, values, entering, D, DV, D_PADDED, DV_PADDED)
        query_row = query_head * S + t
        # By itself, without a part: a state's is merged in by the caller.
        logsumexp = attend(
            q,
            query_row,
            keys,
            values,
            position,
            logits,
            entering,
            None,
            None,
            output,
            N,
            scaling,
            False,
            G,
            D,
            DV,
            G_PADDED,
            D_PADDED,
            DV_PADDED,
            BLOCK,
        )
        tl.store(logsumexps + query_row, logsumexp, mask=group < G)

        # One slot is freed; a padded token attended itself, and now it goes.
        is_counted = tl.load(is_real + head // Hkv * S + t).to(tl.int32)
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
        tl.store(position_left + head * S + t, leaver_position)
        free_slot(position, leaver, entering, entered_at)
        entering = leaver
        now += is_counted


def sequence_of_steps(
    rule: EvictionRule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    budget: int,
    is_real: Tensor,
    scaling: float,
) -> tuple[Tensor, Part]:
    """Run the rule along q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], and attend what it
    keeps.

    `is_real` [B, S] is False for padding, which attends itself and leaves no trace. Returns the
    eviction times [B, Hkv, S] (int32, NEVER for tokens that stay), as `simulate` does, and the
    attention over the kept tokens in float32, output [B, Hq, S, Dv] and log-sum-exp [B, Hq, S], as
    `ops.scan.sparse_attention` does. No gradients.
    """
    B, Hkv, S, _ = k.shape
    G = q.shape[1] // Hkv
    slots = Slots.empty(k, v, budget)
    attended = Part(
        output=q.new_empty(*q.shape[:3], v.shape[-1], dtype=torch.float32),
        logsumexp=q.new_empty(q.shape[:3], dtype=torch.float32),
    )
    position_left = slots.position.new_empty(B, Hkv, S)
    launch(
        sequence_kernel,
        (B * Hkv,),
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        keys=slots.keys,
        values=slots.values,
        position=slots.position,
        score=slots.score,
        is_real=is_real.contiguous(),
        logits=slots.score.new_empty(B, Hkv, G, budget + 1),
        output=attended.output,
        logsumexps=attended.logsumexp,
        position_left=position_left,
        scaling=scaling,
        recent=rule.recent,
        sinks=rule.sinks,
        S=S,
        N=budget + 1,
        Hkv=Hkv,
        RULE=rule.name,
        **step_sizes(q, k, v),
    )
    return eviction_times(position_left, is_real), attended


def eviction_times(position_left: Tensor, is_real: Tensor) -> Tensor:
    """When each token leaves, [B, Hkv, S], from the position that left after each query.

    `position_left` [B, Hkv, S] is -1 where none did; `is_real` [B, S].
    """
    # Seen as times, `arrivals` inverts it: the query after which each position left, -1 for none.
    last_query = arrivals(position_left.where(position_left >= 0, NEVER))
    times = (last_query + 1).where(last_query >= 0, NEVER).int()
    # From positions to tokens: real ones in their order, then padding, at positions none held.
    token = (~is_real).int().argsort(dim=1, stable=True)  # [B, S]
    return torch.empty_like(times).scatter_(2, token[:, None].expand_as(times), times)
