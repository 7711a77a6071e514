"""All decode steps of a sequence in one kernel, for scoring and training: eviction times and
attention.

A kernel for every rule; `step_of_head` is what a key-value head does in a step under all of them.
H2O and Lambda choose in every head by itself; TOVA's heads choose together, so its kernel serves
whole sequences of a batch. Open `h2o_kernel` first.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lesslib.ops.blocks import NEVER, dense_logsumexp
from lesslib.ops.cpu.common import array, jit, over_rows
from lesslib.ops.cpu.products import TILE_VECTORS, VECTOR_BYTES, write_product
from lesslib.ops.cpu.steps import add_scaled, copy_row, first_out, rank_by_score, weigh
from lesslib.ops.merge import Part
from lesslib.ops.rules import EvictionRule


# ---------------------------------------------------------------- one step of one head
class Head(NamedTuple):
    """The slots of a key-value head, and what its G queries find there in a step.

    Keys lie transposed, so that logits are a product of rows, as outputs are. Of their columns, and
    of the weights', there are more than N: whole tiles of a product.
    """

    # [D, columns], [N, Dv]
    keys: Any
    values: Any
    # [G, columns], e^(logit - highest logit); and [G] each, the highest logit, the weights' sum
    weights: Any
    highest: Any
    total: Any
    # [G, Dv], weights @ values
    output: Any


class Sequence(NamedTuple):
    """The tokens of all heads and what is found for them; rows are key-value heads of sequences,
    B * Hkv.
    """

    # [rows, S, G, D], times the scaling
    q: Any
    # [rows, S, D], [rows, S, Dv]
    k: Any
    v: Any
    # [B, S], False for padding
    is_real: Any
    # [rows, G, S, Dv], [rows, G, S], written
    output: Any
    logsumexp: Any


@jit
def whole_tiles(
    slots,  # a number of them
    itemsize,  # bytes of a number
):
    """So many columns are whole tiles: of a part of one a product takes as long."""
    tile = TILE_VECTORS * VECTOR_BYTES // itemsize
    return (slots + tile - 1) // tile * tile


@jit
def empty_head(
    tokens,  # Sequence
    N,  # slots
):
    G, D = tokens.q.shape[2:]
    Dv = tokens.v.shape[2]
    kind = tokens.q.dtype
    columns = whole_tiles(N, tokens.q.itemsize)
    return Head(
        # zeros, as a product reads columns of slots that nobody has taken yet
        np.zeros((D, columns), kind),
        np.empty((N, Dv), kind),
        np.empty((G, columns), kind),
        np.empty(G, kind),
        np.empty(G, kind),
        np.empty((G, Dv), kind),
    )


@jit
def step_of_head(
    head,  # Head
    tokens,  # Sequence
    row,
    t,  # the token
    slot,  # the one that it takes
    held,  # so many slots are in use then, the first ones
):
    """A token enters and attends all that are held; `head.weights` are left for the rule."""
    keys = head.keys
    for d in range(keys.shape[0]):
        keys[d, slot] = tokens.k[row, t, d]
    copy_row(tokens.v[row, t], head.values[slot])

    queries = tokens.q[row, t]
    G, D = queries.shape
    columns = whole_tiles(held, keys.itemsize)
    write_product(queries, D, keys, columns, head.weights)
    for g in range(G):
        head.highest[g], head.total[g] = weigh(head.weights[g], held)
    Dv = head.output.shape[1]
    write_product(head.weights, held, head.values, Dv, head.output)
    for g in range(G):
        share = 1 / head.total[g]
        for d in range(Dv):
            tokens.output[row, g, t, d] = head.output[g, d] * share
        tokens.logsumexp[row, g, t] = head.highest[g] + math.log(head.total[g])


# ---------------------------------------------------------------- kernels
@jit
def h2o_kernel(
    first_row,
    last_row,
    tokens_given,  # of Sequence
    times,  # [rows, S], written where a token leaves
    budget,  # slots, the newest token's apart
    recent,  # so many of the newest tokens are protected
    normaliser,  # [rows, G, S], of the probabilities that are scored; may be the log-sum-exps
):
    tokens = Sequence(*tokens_given)
    rows, S, G, _ = tokens.q.shape
    heads = rows // tokens.is_real.shape[0]
    N = budget + 1
    head = empty_head(tokens, N)
    token = np.empty(N, np.int64)
    position = np.empty(N, np.int32)
    score = np.empty(N, tokens.q.dtype)
    gained = np.empty(N, tokens.q.dtype)
    rank = np.empty(N, tokens.q.dtype)
    for row in range(first_row, last_row):
        held = 0
        entering = 0
        now = 0
        for t in range(S):
            token[entering] = t
            position[entering] = now
            score[entering] = 0
            reach = max(held, entering + 1)
            step_of_head(head, tokens, row, t, entering, reach)

            # A padded token goes at once, and nothing is scored.
            if not tokens.is_real[row // heads, t]:
                continue

            # What is held has its score; beyond the budget, a slot is freed.
            held = reach
            gained[:held] = 0
            for g in range(G):
                share = math.exp(head.highest[g] - normaliser[row, g, t])
                add_scaled(head.weights[g], share, held, gained)
            for j in range(held):
                score[j] += gained[j]
            entering = held
            if held == N:
                rank_by_score(score, position, now - recent, rank)
                entering = first_out(rank, position)
                times[row, token[entering]] = t + 1
            now += 1


@jit
def lambda_kernel(
    first_row,
    last_row,
    tokens_given,  # of Sequence
    times,  # [rows, S], written where a token leaves
    sinks,  # so many of the first tokens are protected
    recent,  # so many of the newest tokens are protected
):
    tokens = Sequence(*tokens_given)
    rows, S = tokens.q.shape[:2]
    heads = rows // tokens.is_real.shape[0]
    N = sinks + recent + 1
    head = empty_head(tokens, N)
    token = np.empty(N, np.int64)
    for row in range(first_row, last_row):
        held = 0
        entering = 0
        for t in range(S):
            token[entering] = t
            reach = max(held, entering + 1)
            step_of_head(head, tokens, row, t, entering, reach)

            # A padded token goes at once.
            if not tokens.is_real[row // heads, t]:
                continue

            # Behind the sinks slots are a ring: once all are held, the next one has the oldest.
            held = reach
            entering += 1
            if entering == N:
                entering = sinks
            if held == N:
                times[row, token[entering]] = t + 1


@jit
def tova_kernel(
    first_sequence,
    last_sequence,
    tokens_given,  # of Sequence
    times,  # [B, S], written where a token leaves
    budget,  # slots, the newest token's apart
):
    tokens = Sequence(*tokens_given)
    rows, S, G, _ = tokens.q.shape
    Hkv = rows // tokens.is_real.shape[0]
    N = budget + 1
    scratch = empty_head(tokens, N)
    keys = np.zeros((Hkv, *scratch.keys.shape), tokens.q.dtype)
    values = np.empty((Hkv, *scratch.values.shape), tokens.q.dtype)
    position = np.empty(N, np.int32)
    score = np.empty(N, tokens.q.dtype)
    for b in range(first_sequence, last_sequence):
        held = 0
        entering = 0
        for t in range(S):
            # The token enters in all heads, and each of them attends what all hold.
            position[entering] = t
            reach = max(held, entering + 1)
            score[:reach] = 0
            for h in range(Hkv):
                head = Head(keys[h], values[h], *scratch[2:])
                step_of_head(head, tokens, b * Hkv + h, t, entering, reach)
                for g in range(G):
                    add_scaled(head.weights[g], 1 / (head.total[g] * (Hkv * G)), reach, score)

            # A padded token goes at once.
            if not tokens.is_real[b, t]:
                continue

            # Beyond the budget, the token goes that the newest query gave least.
            held = reach
            entering = held
            if held == N:
                entering = first_out(score, position)
                times[b, position[entering]] = t + 1


# ---------------------------------------------------------------- calls
SEQUENCE_RULES = frozenset({"h2o", "h2o on full rows", "lambda", "tova"})


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

    `is_real` [B, S] is False for padding, which leaves no trace. Returns the eviction times [B,
    Hkv, S] (int32, NEVER for tokens that stay), as `simulate` does, and the attention over the kept
    tokens in float32 or wider, output [B, Hq, S, Dv] and log-sum-exp [B, Hq, S], as
    `ops.scan.sparse_attention` does. No gradients.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    B, Hkv, S, _ = k.shape
    Hq = q.shape[1]
    attended = Part(
        output=torch.empty(B, Hq, S, v.shape[-1], dtype=wide),
        logsumexp=torch.empty(B, Hq, S, dtype=wide),
    )
    times = torch.full((B, Hkv, S), NEVER, dtype=torch.int32)
    # [B * Hkv, S, G, D]: the queries of a step lie together.
    queries = (q.detach().to(wide) * scaling).unflatten(1, (Hkv, -1)).transpose(2, 3)
    tokens = Sequence(
        array(queries.flatten(0, 1).contiguous()),
        array(k.detach().to(wide).flatten(0, 1).contiguous()),
        array(v.detach().to(wide).flatten(0, 1).contiguous()),
        array(is_real),
        array(attended.output.unflatten(1, (Hkv, -1)).flatten(0, 1)),
        array(attended.logsumexp.unflatten(1, (Hkv, -1)).flatten(0, 1)),
    )
    if rule.name == "tova":
        # Heads that choose together have one time for all.
        shared_times = torch.full((B, S), NEVER, dtype=torch.int32)
        over_rows(tova_kernel, B, tuple(tokens), array(shared_times), budget)
        times.copy_(shared_times[:, None].expand_as(times))
        return times, attended
    given = (tuple(tokens), array(times.flatten(0, 1)))
    if rule.name == "lambda":
        over_rows(lambda_kernel, B * Hkv, *given, rule.sinks, rule.recent)
        return times, attended
    normaliser = tokens.logsumexp
    if rule.name == "h2o on full rows":
        normaliser = array(dense_logsumexp(q, k, is_real, scaling).flatten(0, 1).to(wide))
    over_rows(h2o_kernel, B * Hkv, *given, budget, rule.recent, normaliser)
    return times, attended
