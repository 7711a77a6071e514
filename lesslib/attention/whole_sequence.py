"""LESS over a whole sequence at once, for scoring and training: policy alone or policy plus low-rank state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lesslib.ops import dispatch as fused
from lesslib.ops.blocks import gather_tokens
from lesslib.ops.scan import arrivals, merge, sparse_attention
from lesslib.policies import Policy, simulate


@dataclass(frozen=True)
class Evicted:
    """What a policy did to a sequence; none of it depends on the kernels, so training computes it once.

    `times` [B, Hkv, S] eviction times; `sparse` [B, Hq, S, Dv] attention over the kept tokens; `logsumexp` [B, Hq, S].
    """

    times: Tensor
    sparse: Tensor
    logsumexp: Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """Causal softmax attention, [B, Hq, S, Dv]; padding (`real` [B, S] False) is attended by itself alone."""
    mask, grouped = None, q.shape[1] != k.shape[1]
    if real is not None and not bool(real.all()):
        t = torch.arange(q.shape[2], device=q.device)
        mask = ((t <= t[:, None]) & real[:, None, None]) | (t == t[:, None])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def evict(
    policy: Policy,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None = None,
    scaling: float | None = None,
) -> Evicted:
    """Run `policy` along q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] and attend what it keeps."""
    B, _, S, D = k.shape
    scaling = D**-0.5 if scaling is None else scaling
    real = torch.ones(B, S, dtype=torch.bool, device=k.device) if real is None else real
    if found := fused.evict(policy, q, k, v, real, scaling):
        return Evicted(*found)
    times = simulate(policy, q, k, real, scaling)
    sparse, logsumexp = sparse_attention(
        q, k, v, times, S if policy.budget is None else policy.budget, real, scaling
    )
    return Evicted(times, sparse, logsumexp)


def recover(evicted: Evicted, phi: Tensor, psi: Tensor, v: Tensor) -> Tensor:
    """Add the low-rank state to the sparse attention: [B, Hq, S, Dv] (paper, eqs 3-5).

    phi [B, Hq, S, R] and psi [B, Hkv, S, R] are the features of q and k in order of position, v [B, Hkv, S, Dv].
    """
    arrived, dtype = arrivals(evicted.times), evicted.sparse.dtype
    token = arrived.clamp(min=0)
    arriving = gather_tokens(psi, token).to(dtype) * (arrived >= 0)[..., None]
    return merge(
        evicted.sparse,
        evicted.logsumexp,
        *fused.lowrank_attention(phi.to(dtype), arriving, gather_tokens(v, token).to(dtype)),
    )


def less_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Policy,
    kernels=None,
    real: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Attention [B, Hq, S, Dv] under `policy`, with LESS where `kernels` (of this layer) are given; dense if the budget holds all."""
    if policy.budget is None or policy.budget >= q.shape[2]:
        return dense_attention(q, k, v, real, scaling)
    evicted = evict(policy, q, k, v, real, scaling)
    out = evicted.sparse if kernels is None else recover(evicted, kernels.phi(q), kernels.psi(k), v)
    return out.to(v.dtype)
