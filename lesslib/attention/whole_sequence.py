"""Policy x state over a whole sequence at once, for scoring and training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lesslib.ops import dispatch
from lesslib.ops.blocks import gather_tokens
from lesslib.ops.merge import Part, merge
from lesslib.ops.scan import arrivals, sparse_attention
from lesslib.policies import Policy, simulate
from lesslib.states import State


@dataclass(frozen=True)
class Evicted:
    """What a policy did to a sequence; none of it depends on a state, so training computes it once.

    `times` [B, Hkv, S] eviction times; `sparse` [B, Hq, S, Dv] attention over the kept tokens;
    `logsumexp` [B, Hq, S].
    """

    times: Tensor
    sparse: Tensor
    logsumexp: Tensor

    @property
    def part(self) -> Part:
        """Attention over the kept tokens, to be merged with a state's part."""
        return Part(self.sparse, self.logsumexp)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Causal softmax attention, [B, Hq, S, Dv]; padding (`real` [B, S] False) attends itself
    alone.
    """
    mask = None
    if real is not None and not bool(real.all()):
        t = torch.arange(q.shape[2], device=q.device)
        is_causal = (t <= t[:, None]) & real[:, None, None]
        mask = is_causal | (t == t[:, None])
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def evict(
    policy: Policy,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None = None,
    scaling: float | None = None,
) -> Evicted:
    """Run `policy` along q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]; attend what it
    keeps.
    """
    B, _, S, D = k.shape
    if scaling is None:
        scaling = D**-0.5
    if real is None:
        real = torch.ones(B, S, dtype=torch.bool, device=k.device)
    budget = S if policy.budget is None else policy.budget
    rule = policy.rule()
    kernels = dispatch.sequence_kernels(rule, q, k, v)
    if rule is not None and kernels is not None:
        times, part = kernels.sequence_of_steps(rule, q, k, v, budget, real, scaling)
        return Evicted(times, *part)
    times = simulate(policy, q, k, real, scaling)
    return Evicted(times, *sparse_attention(q, k, v, times, budget, real, scaling))


def recover(evicted: Evicted, phi: Tensor, psi: Tensor, v: Tensor) -> Tensor:
    """Add a low-rank state of known features to the sparse attention: [B, Hq, S, Dv] (eqs 3-5).

    phi [B, Hq, S, R] and psi [B, Hkv, S, R] are the features of q and k in order of position, v
    [B, Hkv, S, Dv].
    """
    arrived = arrivals(evicted.times)
    token = arrived.clamp(min=0)
    dtype = evicted.sparse.dtype
    arriving = gather_tokens(psi, token).to(dtype) * (arrived >= 0)[..., None]
    values = gather_tokens(v, token).to(dtype)
    return merge(evicted.part, dispatch.lowrank_part(phi.to(dtype), arriving, values))


def less_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Policy,
    state: State | None = None,
    real: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Attention [B, Hq, S, Dv] under `policy`, with the `state` of this layer; None forgets.

    Dense if the budget holds all.
    """
    if policy.budget is None or policy.budget >= q.shape[2]:
        return dense_attention(q, k, v, real, scaling)
    evicted = evict(policy, q, k, v, real, scaling)
    if state is None or state.is_empty:
        return evicted.sparse.to(v.dtype)
    if scaling is None:
        scaling = q.shape[-1] ** -0.5
    remembered = state.over_sequence(q, k, v, evicted.times, scaling)
    return merge(evicted.part, remembered).to(v.dtype)
