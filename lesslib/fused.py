"""Where $LESS_TRITON=1 asks for them, the GPU kernels of ops.triton in the places of the torch forms: in decoding, prompts and training.

They are not the default: they were compiled for GPUs and run in Triton's interpreter, not on a GPU yet. torch.compile makes kernels of its
own from the torch forms, so a step that it traces keeps to those.
"""
from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .ops import scan, triton


def wanted(x: Tensor) -> bool:
    """Whether the kernels are asked for, and take tensors like x."""
    return not torch.compiler.is_compiling() and os.environ.get("LESS_TRITON") == "1" and triton.available(x)


def step(layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float) -> Tensor:
    """`LessLayer._step` in four kernels: phi; attention, scores and the slot that is freed; psi; the update of the state."""
    kernels, buffers = layer.kernels, layer.buffers()
    learned = hasattr(kernels, "phi_w1")  # random features are a product and an exponential, which torch does
    phi = None
    if kernels is not None:
        phi = triton.features(q, kernels.phi_w1, kernels.phi_w2) if learned else kernels.phi(q).float()
    out, key, value, some = triton.decode_step(layer.policy, q, k, v, buffers, phi, real, scaling)
    if kernels is not None:
        weights = (kernels.psi_w1, kernels.psi_w2, kernels.psi_w3, kernels.s1, kernels.s2) if learned else ()
        triton.absorb(layer.H, layer.z, triton.features(key, *weights) if learned else kernels.psi(key).float(), value, some)
    return out


def lowrank_attention(phi: Tensor, psi: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.scan.lowrank_attention`, by either form."""
    return (triton if wanted(phi) else scan).lowrank_attention(phi, psi, v)
