"""All decode steps of a sequence in one kernel, for scoring and training: eviction times and
attention.

One kernel for every rule. H2O and Lambda choose in every key-value head by itself; TOVA's heads
choose together, so its kernel serves whole sequences of a batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lesslib.ops.blocks import NEVER, dense_logsumexp
from lesslib.ops.cpu.common import array, jit, over_rows
from lesslib.ops.cpu.steps import add_scaled, attend, enter, first_of_lowest
from lesslib.ops.merge import Part
from lesslib.ops.rules import EvictionRule

SEQUENCE_RULES = frozenset({"h2o", "h2o on full rows", "lambda", "tova"})


@jit
def h2o_kernel(
    first_row,  # rows are key-value heads of sequences, B * Hkv
    last_row,
    q,  # [rows, G, S, D], times the scaling
    k,  # [rows, S, D]
    v,  # [rows, S, Dv]
    is_real,  # [B, S]
    budget,  # slots, the newest token's apart
    recent,  # so many of the newest tokens are protected
    times,  # [rows, S], written where a token leaves
    output,  # [rows, G, S, Dv], written
    logsumexp,  # [rows, G, S], written
    normaliser,  # [rows, G, S], of the probabilities that are scored; may be `logsumexp` itself
):
    rows, G, S, D = q.shape
    heads = rows // is_real.shape[0]
    N = budget + 1
    keys = np.empty((D, N), q.dtype)
    values = np.empty((N, v.shape[2]), q.dtype)
    token = np.empty(N, np.int64)
    position = np.empty(N, np.int64)
    score = np.empty(N, q.dtype)
    gained = np.empty(N, q.dtype)
    weights = np.empty(N, q.dtype)
    for row in range(first_row, last_row):
        held = 0
        entering = 0
        now = 0
        for t in range(S):
            # The token enters, and attends all that are held.
            enter(k[row, t], v[row, t], keys, values, entering)
            token[entering] = t
            position[entering] = now
            score[entering] = 0
            reach = max(held, entering + 1)
            gained[:reach] = 0
            for g in range(G):
                highest, total = attend(
                    q[row, g, t], keys, values, reach, weights, output[row, g, t]
                )
                logsumexp[row, g, t] = highest + math.log(total)
                share = math.exp(highest - normaliser[row, g, t])
                add_scaled(weights, share, reach, gained)

            # A padded token goes at once, and nothing is scored.
            if not is_real[row // heads, t]:
                continue

            # What is held has its score; beyond the budget, a slot is freed.
            held = reach
            for j in range(held):
                score[j] += gained[j]
            entering = held
            if held == N:
                entering = first_of_lowest(score, position, now - recent, held)
                times[row, token[entering]] = t + 1
            now += 1


@jit
def lambda_kernel(
    first_row,  # rows are key-value heads of sequences, B * Hkv
    last_row,
    q,  # [rows, G, S, D], times the scaling
    k,  # [rows, S, D]
    v,  # [rows, S, Dv]
    is_real,  # [B, S]
    sinks,  # so many of the first tokens are protected
    recent,  # so many of the newest tokens are protected
    times,  # [rows, S], written where a token leaves
    output,  # [rows, G, S, Dv], written
    logsumexp,  # [rows, G, S], written
):
    rows, G, S, D = q.shape
    heads = rows // is_real.shape[0]
    N = sinks + recent + 1
    keys = np.empty((D, N), q.dtype)
    values = np.empty((N, v.shape[2]), q.dtype)
    token = np.empty(N, np.int64)
    weights = np.empty(N, q.dtype)
    for row in range(first_row, last_row):
        held = 0
        entering = 0
        for t in range(S):
            # The token enters, and attends all that are held.
            enter(k[row, t], v[row, t], keys, values, entering)
            token[entering] = t
            reach = max(held, entering + 1)
            for g in range(G):
                highest, total = attend(
                    q[row, g, t], keys, values, reach, weights, output[row, g, t]
                )
                logsumexp[row, g, t] = highest + math.log(total)

            # A padded token goes at once.
            if not is_real[row // heads, t]:
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
    first_row,  # rows are sequences, B
    last_row,
    q,  # [B, Hkv, G, S, D], times the scaling
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    is_real,  # [B, S]
    budget,  # slots, the newest token's apart
    times,  # [B, S], written where a token leaves
    output,  # [B, Hkv, G, S, Dv], written
    logsumexp,  # [B, Hkv, G, S], written
):
    _, Hkv, G, S, D = q.shape
    N = budget + 1
    keys = np.empty((Hkv, D, N), q.dtype)
    values = np.empty((Hkv, N, v.shape[3]), q.dtype)
    token = np.empty(N, np.int64)
    score = np.empty(N, q.dtype)
    weights = np.empty(N, q.dtype)
    for row in range(first_row, last_row):
        held = 0
        entering = 0
        for t in range(S):
            # The token enters in all heads, and each of them attends what all hold.
            token[entering] = t
            reach = max(held, entering + 1)
            score[:reach] = 0
            for h in range(Hkv):
                enter(k[row, h, t], v[row, h, t], keys[h], values[h], entering)
                for g in range(G):
                    highest, total = attend(
                        q[row, h, g, t], keys[h], values[h], reach, weights, output[row, h, g, t]
                    )
                    logsumexp[row, h, g, t] = highest + math.log(total)
                    add_scaled(weights, 1 / (total * (Hkv * G)), reach, score)

            # A padded token goes at once.
            if not is_real[row, t]:
                continue

            # Beyond the budget, the token goes that the newest query gave least.
            held = reach
            entering = held
            if held == N:
                entering = first_of_lowest(score, token, t, held)
                times[row, token[entering]] = t + 1


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
    # [B, Hkv, G, S, D], [B, Hkv, S, D], [B, Hkv, S, Dv]
    queries = (q.detach().to(wide) * scaling).unflatten(1, (Hkv, -1)).contiguous()
    keys = k.detach().to(wide).contiguous()
    values = v.detach().to(wide).contiguous()
    if rule.name == "tova":
        # Heads that choose together have one time for all.
        shared_times = torch.full((B, S), NEVER, dtype=torch.int32)
        over_rows(
            tova_kernel,
            B,
            array(queries),
            array(keys),
            array(values),
            array(is_real),
            budget,
            array(shared_times),
            array(attended.output.unflatten(1, (Hkv, -1))),
            array(attended.logsumexp.unflatten(1, (Hkv, -1))),
        )
        return times.copy_(shared_times[:, None].expand_as(times)), attended

    tensors = (
        array(queries.flatten(0, 1)),
        array(keys.flatten(0, 1)),
        array(values.flatten(0, 1)),
        array(is_real),
    )
    output = array(attended.output.unflatten(1, (Hkv, -1)).flatten(0, 1))
    logsumexp = array(attended.logsumexp.unflatten(1, (Hkv, -1)).flatten(0, 1))
    results = (array(times.flatten(0, 1)), output, logsumexp)
    if rule.name == "lambda":
        over_rows(lambda_kernel, B * Hkv, *tensors, rule.sinks, rule.recent, *results)
        return times, attended
    normaliser = logsumexp
    if rule.name == "h2o on full rows":
        normaliser = array(dense_logsumexp(q, k, is_real, scaling).flatten(0, 1).to(wide))
    over_rows(h2o_kernel, B * Hkv, *tensors, budget, rule.recent, *results, normaliser)
    return times, attended
