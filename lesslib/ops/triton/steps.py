"""One token's step over the slots of a key-value head, in the pieces that decoding, one step at a
time, and a whole sequence are made of: the token enters, attends, and a rule says who leaves.

A program serves one key-value head of a batch row, with the G query heads of its group together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lesslib.ops.blocks import NEVER
from lesslib.ops.triton.common import (
    constant,
    copy_row,
    dot,
    jit,
    load_tile,
    padded,
    store_tile,
    tile_rows,
    tl,
)

# The rules that a step knows.
RULES = frozenset({"h2o", "lambda"})
# A position after all others.
NO_POSITION = constant(NEVER)
# Where a running maximum starts; -inf would make NaN of the difference of two.
LOWEST = constant(-3.4e38)


def step_sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """The sizes and options that all kernels of steps take: q [B, Hq, S, D], k [B, Hkv, S, D], v
    [B, Hkv, S, Dv].
    """
    G = q.shape[1] // k.shape[1]
    D = k.shape[-1]
    DV = v.shape[-1]
    # The logits of a block of slots are a tile, too.
    block = min(tile_rows(max(D, DV), k.itemsize), 2048 // padded(G))
    return {
        "G": G,
        "D": D,
        "DV": DV,
        "G_PADDED": padded(G),
        "D_PADDED": padded(D),
        "DV_PADDED": padded(DV),
        "BLOCK": max(16, block),
        "num_warps": 4 if G <= 16 else 8,
        "num_stages": 2,
    }


# ---------------------------------------------------------------- entering
@jit
def enter_slot(
    k,  # new keys
    v,  # new values
    token,  # row of the new token in k and v
    keys,  # keys of this head's slots [N, D]
    values,  # values of this head's slots [N, DV]
    slot,  # the free one
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr,
):
    """The new token's key and value take the free slot."""
    copy_row(k, token, keys, slot, tl.arange(0, D_PADDED), D)
    copy_row(v, token, values, slot, tl.arange(0, DV_PADDED), DV)
    # Every thread sees the new token.
    tl.debug_barrier()


# ---------------------------------------------------------------- attending
@jit
def add_block(highest, total, numerator, logit_tile, value_tile):
    """One block of an online softmax: its logits [rows, BLOCK] and values [BLOCK, DV_PADDED] join
    the running maximum [rows], the sum of weights [rows] and the weighted values [rows, DV_PADDED].
    """
    higher = tl.maximum(highest, tl.max(logit_tile, 1))
    weight = tl.exp(logit_tile - higher[:, None])
    fade = tl.exp(highest - higher)
    total = total * fade + tl.sum(weight, 1)
    numerator = numerator * fade[:, None] + dot(weight.to(value_tile.dtype), value_tile)
    return higher, total, numerator


@jit
def add_part(highest, total, numerator, part_output, part_logsumexp):
    """A partial softmax joins as one more block, of one logit, its log-sum-exp; -inf changes
    nothing.
    """
    higher = tl.maximum(highest, part_logsumexp)
    weight = tl.exp(part_logsumexp - higher)
    fade = tl.exp(highest - higher)
    total = total * fade + weight
    numerator = numerator * fade[:, None] + part_output * weight[:, None]
    return higher, total, numerator


@jit
def attend_slots(
    query_tile,  # [G_PADDED, D_PADDED]
    keys,  # keys of this head's slots [N, D]
    values,  # values of this head's slots [N, DV]
    position,  # positions of this head's slots [N], -1 for an empty one
    logits,  # logits of this head's slots [G, N], written for what follows
    entering,  # the slot of the new token, whose position is not written yet
    N,  # slots
    scaling,  # of the logits
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    G_PADDED: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attention over the slots, in blocks of them: the running state of `add_block`."""
    group = tl.arange(0, G_PADDED)
    column = tl.arange(0, D_PADDED)
    value_column = tl.arange(0, DV_PADDED)
    highest = tl.full([G_PADDED], LOWEST, tl.float32)
    total = tl.zeros([G_PADDED], tl.float32)
    numerator = tl.zeros([G_PADDED, DV_PADDED], tl.float32)
    for start in range(0, N, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        is_held = tl.load(position + slot, mask=slot < N, other=-1) >= 0
        is_held = is_held | (slot == entering)
        key_tile = load_tile(keys, slot, column, is_held, D)
        value_tile = load_tile(values, slot, value_column, is_held, DV)
        product = dot(query_tile, tl.trans(key_tile)) * scaling
        logit_tile = tl.where(is_held, product, float("-inf"))
        mask = (group < G)[:, None] & (slot < N)
        tl.store(logits + group[:, None] * N + slot, logit_tile, mask=mask)
        highest, total, numerator = add_block(highest, total, numerator, logit_tile, value_tile)
    return highest, total, numerator


@jit
def attend(
    q,  # queries [rows, D]
    query_row,  # rows of this head's group in q and output [G_PADDED]
    keys,  # keys of this head's slots [N, D]
    values,  # values of this head's slots [N, DV]
    position,  # positions of this head's slots [N], -1 for an empty one
    logits,  # logits of this head's slots [G, N], written for what follows
    entering,  # the slot of the new token, whose position is not written yet
    part_output,  # of a partial softmax [rows, DV], read where HAS_PART
    part_logsumexp,  # of a partial softmax [rows], read where HAS_PART
    output,  # [rows, DV], written
    N,  # slots
    scaling,  # of the logits
    HAS_PART: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    G_PADDED: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The new token's queries attend the slots, and the part; returns the log-sum-exps of the slots
    alone, [G_PADDED].
    """
    is_query = tl.arange(0, G_PADDED) < G
    value_column = tl.arange(0, DV_PADDED)
    query_tile = load_tile(q, query_row, tl.arange(0, D_PADDED), is_query, D)
    highest, total, numerator = attend_slots(
        query_tile,
        keys,
        values,
        position,
        logits,
        entering,
        N,
        scaling,
        G,
        D,
        DV,
        G_PADDED,
        D_PADDED,
        DV_PADDED,
        BLOCK,
    )
    logsumexp = highest + tl.log(total)
    if HAS_PART:
        part_tile = load_tile(part_output, query_row, value_column, is_query, DV)
        part_weight = tl.load(part_logsumexp + query_row, mask=is_query, other=float("-inf"))
        highest, total, numerator = add_part(highest, total, numerator, part_tile, part_weight)
    store_tile(output, query_row, value_column, is_query, DV, numerator / total[:, None])
    # Every thread sees the logits.
    tl.debug_barrier()
    return logsumexp


# ---------------------------------------------------------------- leaving
@jit
def load_probabilities(
    logits,  # of this head's slots [G, N]
    logsumexp,  # of the slots [G_PADDED]
    slot,  # numbers of the slots of a block
    N,  # slots
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
):
    """What the new query gave to a block of slots, [G_PADDED, BLOCK]; 0 beyond G and N."""
    group = tl.arange(0, G_PADDED)
    mask = (group < G)[:, None] & (slot < N)
    logit_tile = tl.load(logits + group[:, None] * N + slot, mask=mask, other=float("-inf"))
    return tl.exp(logit_tile - logsumexp[:, None])


@jit
def add_to_score(score, probabilities, slot, entering, N):
    """A block of H2O's scores, after the new query's probabilities [G_PADDED, BLOCK] were added,
    summed over the query heads; the new token starts at 0.
    """
    mask = (slot < N) & (slot != entering)
    new_score = tl.sum(probabilities, 0) + tl.load(score + slot, mask=mask, other=0.0)
    # Several threads may hold the same slot: none may read what another one wrote.
    tl.debug_barrier()
    tl.store(score + slot, new_score, mask=slot < N)
    return new_score


@jit
def protected_rank(rank, held_at, now, recent, sinks, is_slot):
    """The ranks of a block of slots by which the lowest leaves: an empty slot before all others, a
    protected one or none at all after them.
    """
    is_protected = (held_at < sinks) | (held_at > now - recent)
    rank = tl.where(is_protected, float("inf"), rank)
    rank = tl.where(held_at < 0, float("-inf"), rank)
    return tl.where(is_slot, rank, float("inf"))


@jit
def choose_leaver(
    logits,  # of this head's slots [G, N]
    logsumexp,  # of the slots [G_PADDED]
    position,  # positions of this head's slots [N], -1 for an empty one
    score,  # scores of this head's slots [N], updated where the rule is "h2o"
    entering,  # the slot of the new token, whose position is not written yet
    entered_at,  # its position, -1 for padding, which leaves no trace
    now,  # position of the newest token
    is_counted,  # 1, or 0 for padding, which gives no slot a score
    recent,  # so many of the newest tokens are protected
    sinks,  # so many of the first tokens are protected
    N,  # slots
    RULE: tl.constexpr,  # name of an EvictionRule
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The slot that leaves and the position that it held: of the slots with the lowest rank the one
    with the lowest position, as `Policy.first_out` says.
    """
    lowest_rank = float("inf")
    leaver_position = NO_POSITION
    leaver = entering
    for start in range(0, N, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        is_slot = slot < N
        held_at = tl.load(position + slot, mask=is_slot, other=NO_POSITION)
        held_at = tl.where(slot == entering, entered_at, held_at)
        rank = held_at.to(tl.float32)
        if RULE == "h2o":
            probabilities = load_probabilities(logits, logsumexp, slot, N, G, G_PADDED)
            rank = add_to_score(score, probabilities * is_counted, slot, entering, N)
        rank = protected_rank(rank, held_at, now, recent, sinks, is_slot)
        # The first of this block, and whether it goes before the first of the blocks so far.
        rank_here = tl.min(rank, 0)
        is_lowest = is_slot & (rank == rank_here)
        position_here = tl.min(tl.where(is_lowest, held_at, NO_POSITION), 0)
        leaver_here = tl.min(tl.where(is_lowest & (held_at == position_here), slot, N), 0)
        is_tie = rank_here == lowest_rank
        goes_first = (rank_here < lowest_rank) | (is_tie & (position_here < leaver_position))
        lowest_rank = tl.where(goes_first, rank_here, lowest_rank)
        leaver_position = tl.where(goes_first, position_here, leaver_position)
        leaver = tl.where(goes_first, leaver_here.to(tl.int64), leaver)
    # Every thread has read the positions, which may change now.
    tl.debug_barrier()
    return leaver, leaver_position


@jit
def free_slot(position, leaver, entering, entered_at):
    """The new token's position is written, and the leaver's slot is empty; they may be the same."""
    tl.store(position + leaver, -1)
    tl.store(position + entering, tl.where(leaver == entering, -1, entered_at))
