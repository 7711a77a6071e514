"""Where $LESS_TRITON=1 asks for them, the GPU kernels of ops.triton in the places of the torch forms, in decoding, scoring and training.

They are not the default: they were compiled for GPUs and run in Triton's interpreter, not on a GPU yet. torch.compile makes kernels of its
own from the torch forms, so a step that it traces keeps to those.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from lesslib.ops import scan, triton
from lesslib.ops.blocks import NEVER
from lesslib.policies import H2O, Lambda, Policy


def wanted(x: Tensor) -> bool:
    """Whether the kernels are asked for, and take tensors like x."""
    return (
        not torch.compiler.is_compiling()
        and os.environ.get("LESS_TRITON") == "1"
        and triton.available(x)
    )


def step(
    layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
) -> Tensor:
    """`LessLayer._step` in four kernels: phi; attention, scores and the slot that is freed; psi; the update of the state."""
    kernels, buffers = layer.kernels, layer.buffers()
    learned = hasattr(
        kernels, "phi_w1"
    )  # random features are a product and an exponential, which torch does
    phi = None
    if kernels is not None:
        phi = (
            triton.features(q, kernels.phi_w1, kernels.phi_w2)
            if learned
            else kernels.phi(q).float()
        )
    out, key, value, some = triton.decode_step(layer.policy, q, k, v, buffers, phi, real, scaling)
    if kernels is not None:
        weights = (
            (kernels.psi_w1, kernels.psi_w2, kernels.psi_w3, kernels.s1, kernels.s2)
            if learned
            else ()
        )
        triton.absorb(
            layer.H,
            layer.z,
            triton.features(key, *weights) if learned else kernels.psi(key).float(),
            value,
            some,
        )
    return out


def evict(
    policy: Policy, q: Tensor, k: Tensor, v: Tensor, real: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`parallel.evict`, all steps of a sequence in one kernel: times, output and log-sum-exps, the last two in float32. None where the
    kernels are not wanted or gradients are, and for policies that ask for more than one key-value head of a bounded cache sees."""
    (B, Hkv, S), C = k.shape[:3], policy.budget or 0
    taken = isinstance(policy, Lambda) or (isinstance(policy, H2O) and policy.scores == "cache")
    if not taken or not wanted(q) or any(x.requires_grad for x in (q, k, v)):
        return None
    empty, free = (
        real.new_full((B, Hkv, C + 1), -1, dtype=torch.int32),
        real.new_full((B, Hkv, 1), C, dtype=torch.int64),
    )
    sums, left = q.new_empty(q.shape[:3], dtype=torch.float32), empty.new_empty(B, Hkv, S)
    buffers = [
        *(x.new_empty(B, Hkv, C + 1, x.shape[-1]) for x in (k, v)),
        empty,
        empty.float(),
        free,
        empty.new_zeros(B),
        None,
        None,
    ]
    out = triton.decode_step(policy, q, k, v, buffers, None, real, scaling, sums, left)[0]
    last = scan.arrivals(
        left.where(left >= 0, NEVER)
    )  # by position, the query that it left after, -1 for none: the inverse of `left`
    times = (last + 1).where(last >= 0, NEVER).int()
    token = (~real).int().argsort(dim=1, stable=True)[:, None].expand(B, Hkv, S)  # at each position
    return torch.empty_like(times).scatter_(2, token, times), out, sums


def lowrank_attention(phi: Tensor, psi: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.scan.lowrank_attention`, by either form."""
    return (triton if wanted(phi) else scan).lowrank_attention(phi, psi, v)
