"""Blocks of queries and the keys they may attend, from eviction times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int32).max  # the eviction time of tokens that stay
BLOCK = 64  # queries whose logits are computed at once


def block_keys(
    evicted_at: Tensor, start: int, stop: int, budget: int, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys that queries start..stop-1 may attend: (index, valid), each [B, Hkv, n + stop - start] with n = min(C, start).

    First up to C tokens older than `start` that are still kept at `start`, in order of position, then the block's own.
    `evicted_at` [B, Hkv, S]; `real` [B, S] is False for padding. Invalid entries point at arbitrary tokens.
    """
    B, Hkv, _ = evicted_at.shape
    own = torch.arange(start, stop, device=evicted_at.device)
    alive = (evicted_at[..., :start] > start) & real[:, None, :start]
    n = min(budget, start)
    slot = (alive.cumsum(-1) - 1).masked_fill(~alive, n)
    older = torch.zeros(B, Hkv, n + 1, dtype=torch.int64, device=own.device)
    older.scatter_(2, slot, torch.arange(start, device=own.device).expand(B, Hkv, -1))
    index = torch.cat([older[..., :n], own.expand(B, Hkv, -1)], -1)
    valid = torch.arange(n, device=own.device) < alive.sum(-1, keepdim=True)
    return index, torch.cat([valid, real[:, None, start:stop].expand(B, Hkv, -1)], -1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, S, D] at token `index` [B, H, N] -> [B, H, N, D]."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def block_logits(q: Tensor, k: Tensor, index: Tensor, scaling: float) -> Tensor:
    """Scaled logits [B, Hkv, G, b, N], float32 or wider: queries q [B, Hq, b, D], keys k [B, Hkv, S, D] at `index` [B, Hkv, N]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(dtype)
    return grouped @ gather_tokens(k, index).to(dtype).transpose(-1, -2)[:, :, None] * scaling


def dense_logsumexp(
    q: Tensor, k: Tensor, start: int, stop: int, real: Tensor, scaling: float
) -> Tensor:
    """log-sum-exp of the causal rows start..stop-1 of dense attention, [B, Hkv, G, stop - start]."""
    index = torch.arange(stop, device=q.device)
    seen = (index <= index[start:, None]) & real[:, None, None, None, :stop]
    return (
        block_logits(q[:, :, start:stop], k, index.expand(*k.shape[:2], stop), scaling)
        .masked_fill(~seen, -math.inf)
        .logsumexp(-1)
    )
