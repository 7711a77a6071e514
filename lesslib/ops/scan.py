"""The fast torch form of LESS over a whole sequence: linear in S in time and memory, differentiable, any device.

From eviction times (see `lesslib.policies`): a block of queries sees at most C old keys and its own, and the low-rank state
is linear attention whose keys arrive when they are evicted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from lesslib.ops.blocks import block_keys, block_logits, gather_tokens

CHUNK, SCAN = 64, 16  # queries that look up their kept keys together; arrivals that share a state


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, evicted_at: Tensor, budget: int, real: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the kept tokens and the current one.

    q [B, Hq, S, D]; k, v [B, Hkv, S, D]; `evicted_at` [B, Hkv, S] of a policy with `budget` slots; `real` [B, S].
    Returns the output [B, Hq, S, Dv] and the log-sum-exp [B, Hq, S], both float32 or wider. A padded query attends itself.
    """
    S, outputs, sums = q.shape[2], [], []
    for start in range(0, S, CHUNK):
        stop = min(start + CHUNK, S)
        index, valid = block_keys(evicted_at, start, stop, budget, real)
        logits = block_logits(q[:, :, start:stop], k, index, scaling)
        t = torch.arange(start, stop, device=q.device)[:, None]
        at, leaves = index[..., None, :], evicted_at.gather(2, index)[..., None, :]
        seen = ((at <= t) & (t < leaves) & valid[..., None, :]) | (at == t)
        logits = logits.masked_fill(~seen[:, :, None], -math.inf)
        total = logits.logsumexp(-1)
        outputs.append(
            (logits - total[..., None]).exp() @ gather_tokens(v, index).to(logits.dtype)[:, :, None]
        )
        sums.append(total)
    return torch.cat(outputs, 3).flatten(1, 2), torch.cat(sums, 3).flatten(1, 2)


def arrivals(evicted_at: Tensor) -> Tensor:
    """Which token is absorbed before query t: [B, Hkv, S], -1 for none. The inverse of `evicted_at`, at most one a step."""
    S = evicted_at.shape[-1]
    arrived = torch.full(
        (*evicted_at.shape[:-1], S + 1), -1, dtype=torch.int64, device=evicted_at.device
    )
    tokens = torch.arange(S, device=evicted_at.device).expand_as(evicted_at)
    return arrived.scatter_(-1, evicted_at.long().clamp(max=S), tokens)[..., :S]


def lowrank_attention(phi: Tensor, psi: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """phi(q_t) H_t and phi(q_t) z_t with H_t = sum over s <= t of psi_s^T v_s, z_t = sum of psi_s (paper, eqs 3-5).

    phi [B, Hq, S, R]; psi [B, Hkv, S, R] and v [B, Hkv, S, Dv] in order of ARRIVAL, zero psi where nothing arrives.
    Returns the numerator [B, Hq, S, Dv] and the denominator [B, Hq, S]. A chunked scan, O(S R Dv).
    """
    Hkv, S = psi.shape[1:3]
    denominator = phi.unflatten(1, (Hkv, -1)).mul(psi.cumsum(2)[:, :, None]).sum(-1).flatten(1, 2)
    phi, psi, v = (pad(x, (0, 0, 0, -S % SCAN)).unflatten(2, (-1, SCAN)) for x in (phi, psi, v))
    phi = phi.unflatten(1, (Hkv, -1))  # [B, Hkv, G, n, chunk, R]
    states = (psi.mT @ v).cumsum(2)  # H after each chunk, [B, Hkv, n, R, Dv]
    before = pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))[:, :, None]
    inside = (phi @ psi.mT[:, :, None]).tril() @ v[:, :, None]
    return inside.add_(phi @ before).flatten(3, 4).flatten(1, 2)[:, :, :S], denominator


def merge(sparse: Tensor, logsumexp: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """(numerator + e^lse sparse) / (denominator + e^lse), the paper's eq 3, in log space with one logaddexp.

    sparse, numerator [..., Dv]; logsumexp, denominator [...]. With a zero denominator (nothing evicted yet, or kernels at
    zero) the sparse output comes back unchanged; no floor is added anywhere.
    """
    some = denominator > 0
    safe = denominator.where(some, 1.0)
    logden = safe.log().where(some, -math.inf)
    total = torch.logaddexp(logsumexp, logden)
    return (
        sparse * (logsumexp - total).exp()[..., None]
        + numerator * ((logden - total).exp() / safe)[..., None]
    )
