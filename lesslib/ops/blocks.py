"""Blocks of queries and the keys that they may attend, by eviction times."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# The eviction time of tokens that stay.
NEVER = torch.iinfo(torch.int32).max
# Queries whose logits are computed at once.
BLOCK = 64
# Numbers of a buffer of logits. On a CPU 4 MiB in float32, which the caches of two cores hold.
CPU_BUFFER = 2**20
GPU_BUFFER = 2**26


def positions(is_real: Tensor) -> Tensor:
    """Position of each token from its row's first real one, [B, S] int32; -1 for padding."""
    return (is_real.int().cumsum(-1, dtype=torch.int32) - 1).masked_fill(~is_real, -1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, S, D] at token `index` [B, H, N] -> [B, H, N, D]."""
    B, H, S, D = x.shape
    # Whole rows are copied, where `gather` looks every number up: a sixth of its time on a CPU.
    first = S * torch.arange(B * H, device=x.device).view(B, H, 1)
    rows = x.reshape(B * H * S, D).index_select(0, (first + index).flatten())
    return rows.view(*index.shape, D)


def block_keys(
    evicted_at: Tensor, start: int, stop: int, budget: int, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys that queries start..stop-1 may attend: (index, valid), each [B, Hkv, n + stop - start].

    First up to n = min(C, start) tokens older than `start` that are still kept at `start`, in order
    of position, then the block's own. `evicted_at` [B, Hkv, S]; `real` [B, S] is False for padding.
    Invalid entries point at arbitrary tokens.
    """
    B, Hkv, _ = evicted_at.shape
    device = evicted_at.device
    block = torch.arange(start, stop, device=device)
    is_kept = (evicted_at[..., :start] > start) & real[:, None, :start]
    n = min(budget, start)
    # The i-th kept token goes to column i, all others to a spare column n.
    column = (is_kept.cumsum(-1) - 1).masked_fill(~is_kept, n)
    older = torch.zeros(B, Hkv, n + 1, dtype=torch.int64, device=device)
    older.scatter_(2, column, torch.arange(start, device=device).expand(B, Hkv, -1))
    index = torch.cat([older[..., :n], block.expand(B, Hkv, -1)], -1)
    is_older = torch.arange(n, device=device) < is_kept.sum(-1, keepdim=True)
    is_own = real[:, None, start:stop].expand(B, Hkv, -1)
    return index, torch.cat([is_older, is_own], -1)


def block_logits(q: Tensor, k: Tensor, index: Tensor, scaling: float) -> Tensor:
    """Scaled logits [B, Hkv, G, b, N], float32 or wider.

    Queries q [B, Hq, b, D], keys k [B, Hkv, S, D] at `index` [B, Hkv, N].
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(dtype)  # [B, Hkv, G, b, D]
    keys = gather_tokens(k, index).to(dtype)
    return grouped @ keys.transpose(-1, -2)[:, :, None] * scaling


@dataclass(frozen=True)
class LogitBlock:
    """Logits of some queries of some heads: [rows, G, b, n], in memory that may be overwritten.

    `rows` are key-value heads of sequences, B * Hkv in all; `queries` count from the first of S.
    """

    rows: slice
    queries: slice
    logits: Tensor


def logit_blocks(q: Tensor, keys: Tensor, is_token: Tensor, scaling: float) -> Iterator[LogitBlock]:
    """Logits of causal attention, one block after the other, in float32 or wider.

    q [B, Hq, S, D] are the queries of the last S of the keys [B, Hkv, M, D]. They see what
    `is_token` [B, Hkv, M] says up to their own key, and that one in any case; what they do not see
    is -inf. All blocks lie in one buffer, small enough to stay in a CPU's caches: use each before
    asking for the next.
    """
    _, _, S, D = q.shape
    B, Hkv, M, _ = keys.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = B * Hkv
    old = M - S
    queries = (q.to(wide) * scaling).reshape(rows, -1, S, D)
    G = queries.shape[1]
    # Laid out so that a block of rows reads them in order.
    columns = keys.to(wide).reshape(rows, M, D).mT.contiguous()
    is_gap = ~is_token.reshape(rows, 1, 1, M)
    holds_gaps = bool(is_gap.any())
    # -inf for gaps: to add numbers is quicker than to fill in where a mask says so.
    hidden = torch.zeros_like(is_gap, dtype=wide).masked_fill_(is_gap, -math.inf)
    b = min(BLOCK, S)
    t = torch.arange(b, device=q.device)
    is_later = t > t[:, None]
    is_other = t != t[:, None]
    # At least one head's block, and that of more heads where they fit.
    size = CPU_BUFFER if q.device.type == "cpu" else GPU_BUFFER
    buffer = queries.new_empty(max(size, G * b * M))
    for start in range(0, S, b):
        stop = min(start + b, S)
        m = stop - start
        n = old + stop
        at_once = max(1, buffer.numel() // (G * m * n))
        for first in range(0, rows, at_once):
            now = slice(first, min(first + at_once, rows))
            block = queries[now, :, start:stop].flatten(1, 2)  # [rows, G * m, D]
            shape = (len(block), G * m, n)
            logits = buffer[: math.prod(shape)].view(shape)
            torch.bmm(block, columns[now, :, :n], out=logits)
            logits = logits.unflatten(1, (G, m))
            # The queries' own keys come last.
            own = logits[..., n - m :]
            own.masked_fill_(is_later[:m, :m], -math.inf)
            if holds_gaps:
                logits[..., : n - m].add_(hidden[now, ..., : n - m])
                own.masked_fill_(is_gap[now, ..., n - m : n] & is_other[:m, :m], -math.inf)
            yield LogitBlock(now, slice(start, stop), logits)


def exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn rows of logits [..., n] into weights e^(logit - highest), in place.

    Returns the highest logits and the sums of the weights, each [..., 1].
    """
    highest = logits.amax(-1, keepdim=True)
    weights = logits.sub_(highest).exp_()
    return highest, weights.sum(-1, keepdim=True)


def weigh_rows(logits: Tensor, is_counted: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """`exponentiate` rows of logits [rows, G, b, n] in place, and add their probabilities up.

    `columns` [rows, G, M], of which the first n are the logits' keys, gain what the queries gave
    that `is_counted` [rows, b]. Returns the highest logits and the sums of the weights, each [rows,
    G, b, 1].
    """
    highest, total = exponentiate(logits)
    share = is_counted[:, None, :, None] / total
    columns[..., : logits.shape[-1]] += (share.mT @ logits).squeeze(2)
    return highest, total


@torch.no_grad()
def dense_logsumexp(q: Tensor, k: Tensor, is_real: Tensor, scaling: float) -> Tensor:
    """log-sum-exp of every row of dense causal attention, [B, Hkv, G, S], block by block.

    q [B, Hq, S, D], k [B, Hkv, S, D], `is_real` [B, S] False for padding, which sees itself.
    """
    B, Hkv, S, _ = k.shape
    G = q.shape[1] // Hkv
    wide = torch.promote_types(q.dtype, torch.float32)
    logsumexp = q.new_empty(B * Hkv, G, S, 1, dtype=wide)
    for block in logit_blocks(q, k, is_real[:, None].expand(B, Hkv, S), scaling):
        highest, total = exponentiate(block.logits)
        logsumexp[block.rows, :, block.queries] = highest + total.log()
    return logsumexp.view(B, Hkv, G, S)
