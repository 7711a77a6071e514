"""Blocks of queries and the keys that they may attend, by eviction times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The eviction time of tokens that stay.
NEVER = torch.iinfo(torch.int32).max
# Queries whose logits are computed at once.
BLOCK = 64


def positions(is_real: Tensor) -> Tensor:
    """Position of each token from its row's first real one, [B, S] int32; -1 for padding."""
    return (is_real.int().cumsum(-1, dtype=torch.int32) - 1).masked_fill(~is_real, -1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, S, D] at token `index` [B, H, N] -> [B, H, N, D]."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


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


def dense_logsumexp(q: Tensor, k: Tensor, is_real: Tensor, scaling: float) -> Tensor:
    """log-sum-exp of every row of dense causal attention, [B, Hkv, G, S], block by block."""
    B, Hkv, S, _ = k.shape
    index = torch.arange(S, device=q.device)
    sums = []
    for start in range(0, S, BLOCK):
        stop = min(start + BLOCK, S)
        seen = index[:stop] <= index[start:stop, None]
        seen = seen & is_real[:, None, None, None, :stop]  # [B, 1, 1, b, stop]
        logits = block_logits(q[:, :, start:stop], k, index[:stop].expand(B, Hkv, stop), scaling)
        sums.append(logits.masked_fill(~seen, -math.inf).logsumexp(-1))
    return torch.cat(sums, -1)
