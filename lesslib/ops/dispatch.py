"""Which form of an operation runs: torch's, or the GPU kernels of ops/triton where $LESS_TRITON=1
asks.

The kernels are not the default: they were compiled for GPUs and run in Triton's interpreter, not
on a GPU yet. torch.compile makes kernels of its own from the torch forms, so a step that it
traces keeps to those.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lesslib.ops import scan, triton
from lesslib.ops.merge import Part, part_of_sums
from lesslib.ops.rules import EvictionRule


def wants_triton(x: Tensor) -> bool:
    """Whether the GPU kernels are asked for, and take tensors like x."""
    if torch.compiler.is_compiling() or os.environ.get("LESS_TRITON") != "1":
        return False
    return triton.available(x)


def runs_steps_in_one_kernel(rule: EvictionRule | None, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether one kernel takes all steps of a sequence: for policies with a rule, without
    gradients.
    """
    needs_gradients = q.requires_grad or k.requires_grad or v.requires_grad
    return rule is not None and not needs_gradients and wants_triton(q)


def lowrank_part(phi: Tensor, psi: Tensor, v: Tensor) -> Part:
    """`scan.lowrank_attention` as a part, by either form."""
    if wants_triton(phi):
        return part_of_sums(*triton.lowrank_attention(phi, psi, v))
    return part_of_sums(*scan.lowrank_attention(phi, psi, v))
