"""The fast torch form over a whole sequence: linear in S in time and memory, differentiable, any
device.

From eviction times: a block of queries sees at most C old keys and its own, and the low-rank
state is linear attention whose keys arrive in the state when they are evicted from the slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from lesslib.ops.blocks import block_keys, block_logits, gather_tokens
from lesslib.ops.merge import Part

# Queries that look up their kept keys together.
CHUNK = 64
# Arrivals that share a state.
SCAN = 16


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, budget: int, real: Tensor, scaling: float
) -> Part:
    """Softmax attention over the kept tokens and the current one.

    q [B, Hq, S, D]; k [B, Hkv, S, D], v [B, Hkv, S, Dv]; `evicted_at` [B, Hkv, S] of a policy
    with `budget` slots; `real` [B, S]. Returns the output [B, Hq, S, Dv] and the log-sum-exp [B,
    Hq, S], both float32 or wider. A padded query attends itself.
    """
    S = q.shape[2]
    outputs = []
    sums = []
    for start in range(0, S, CHUNK):
        stop = min(start + CHUNK, S)
        index, is_valid = block_keys(evicted_at, start, stop, budget, real)  # [B, Hkv, N]
        logits = block_logits(q[:, :, start:stop], k, index, scaling)  # [B, Hkv, G, b, N]
        t = torch.arange(start, stop, device=q.device)[:, None]
        token = index[..., None, :]
        leaves = evicted_at.gather(2, index)[..., None, :]
        is_seen = (token <= t) & (t < leaves) & is_valid[..., None, :]
        is_seen = is_seen | (token == t)
        logits = logits.masked_fill(~is_seen[:, :, None], -math.inf)
        total = logits.logsumexp(-1)
        values = gather_tokens(v, index).to(logits.dtype)[:, :, None]
        outputs.append((logits - total[..., None]).exp() @ values)
        sums.append(total)
    return Part(torch.cat(outputs, 3).flatten(1, 2), torch.cat(sums, 3).flatten(1, 2))


def arrivals(evicted_at: Tensor) -> Tensor:
    """Which token is absorbed before query t: [B, Hkv, S], -1 for none.

    The inverse of `evicted_at`: at most one leaves in a step.
    """
    S = evicted_at.shape[-1]
    device = evicted_at.device
    # One column more: tokens that stay go there.
    arrived = torch.full((*evicted_at.shape[:-1], S + 1), -1, dtype=torch.int64, device=device)
    tokens = torch.arange(S, device=device).expand_as(evicted_at)
    return arrived.scatter_(-1, evicted_at.long().clamp(max=S), tokens)[..., :S]


def lowrank_attention(phi: Tensor, psi: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """phi(q_t) H_t and phi(q_t) z_t for every query t (paper, eqs 3-5).

    H_t is the sum over s <= t of psi_s^T v_s, z_t that of psi_s. phi [B, Hq, S, R]; psi [B, Hkv,
    S, R] and v [B, Hkv, S, Dv] in order of ARRIVAL, zero psi where nothing arrives. Returns the
    numerator [B, Hq, S, Dv] and the denominator [B, Hq, S].
    """
    return _numerator(phi, psi, v), _denominator(phi, psi)


def _denominator(phi: Tensor, psi: Tensor) -> Tensor:
    """phi(q_t) z_t, [B, Hq, S]."""
    phi = phi.unflatten(1, (psi.shape[1], -1))  # [B, Hkv, G, S, R]
    return phi.mul(psi.cumsum(2)[:, :, None]).sum(-1).flatten(1, 2)


def _numerator(phi: Tensor, psi: Tensor, v: Tensor) -> Tensor:
    """phi(q_t) H_t, [B, Hq, S, Dv]: a chunked scan, O(S R Dv)."""
    Hkv, S = psi.shape[1:3]
    phi = in_chunks(phi).unflatten(1, (Hkv, -1))  # [B, Hkv, G, n, SCAN, R]
    psi = in_chunks(psi)  # [B, Hkv, n, SCAN, R]
    v = in_chunks(v)
    after = (psi.mT @ v).cumsum(2)  # H after each chunk, [B, Hkv, n, R, Dv]
    before = pad(after[:, :, :-1], (0, 0, 0, 0, 1, 0))[:, :, None]
    inside = (phi @ psi.mT[:, :, None]).tril() @ v[:, :, None]
    return inside.add_(phi @ before).flatten(3, 4).flatten(1, 2)[:, :, :S]


def in_chunks(x: Tensor) -> Tensor:
    """[..., S, R] -> [..., n, SCAN, R], with zeros after the last token."""
    S = x.shape[-2]
    return pad(x, (0, 0, 0, -S % SCAN)).unflatten(-2, (-1, SCAN))
