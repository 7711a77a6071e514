"""Slots and a low-rank state along a sequence, and the gradients of its features: the recurrence as
it is written, one token after the other.

A state [R, Dv] stays in the processor's nearest cache, so a step costs what its sums cost. The
torch form works in chunks, whose many tensors go through memory.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lesslib.ops.cpu.common import array, jit, over_rows
from lesslib.ops.cpu.elementary import widened, zero_like
from lesslib.ops.cpu.products import write_product
from lesslib.ops.cpu.steps import copy_row
from lesslib.ops.merge import Part


@jit
def widen(
    row,  # [n], may be halves
    wide,  # [n], written
):
    """The row as sums take it."""
    for i in range(wide.shape[0]):
        wide[i] = widened(row[i])


@jit
def take_up(
    features,  # [R]
    value,  # [Dv]
    weight,  # what goes with the value
    H,  # [R, Dv], added to
    z,  # [R], added to
):
    """H += features^T value and z += features * weight."""
    for r in range(features.shape[0]):
        feature = features[r]
        z[r] += feature * weight
        for c in range(value.shape[0]):
            H[r, c] += feature * value[c]


@jit
def look_up(
    value,  # [Dv]
    weight,  # what goes with the value
    H,  # [R, Dv]
    z,  # [R]
    features,  # [R], written
):
    """features = H value + z * weight."""
    for r in range(features.shape[0]):
        features[r] = dot(H[r], value) + z[r] * weight


@jit
def dot(
    first,  # [n]
    second,  # [n]
):
    """first @ second."""
    total = zero_like(first[0])
    for i in range(first.shape[0]):
        total += first[i] * second[i]
    return total


@jit
def scale(
    x,  # [n]
    divisor,
    factor,
    scaled,  # [n], written
):
    """scaled = x / divisor * factor."""
    for i in range(x.shape[0]):
        scaled[i] = x[i] / divisor * factor


@jit
def mix(
    slots,  # [Dv], the attention over them, may be halves
    numerator,  # [Dv], of the state
    denominator,
    share,  # the state's weight beside the slots'
    output,  # [Dv], written
):
    """output = (1 - share) * slots + share * numerator / denominator."""
    for c in range(slots.shape[0]):
        of_slots = widened(slots[c])
        output[c] = of_slots + (numerator[c] / denominator - of_slots) * share


@jit
def join_kernel(
    first_row,  # rows are key-value heads of sequences, B * Hkv
    last_row,
    phi,  # [rows, G, S, R]
    psi,  # [rows, S, R]
    v,  # [rows, S, Dv], may be halves
    slots,  # [rows, G, S, Dv], the attention over them, may be halves
    logsumexp,  # [rows, G, S], of the slots
    output,  # [rows, G, S, Dv], written
    share,  # [rows, G, S], written: the state's weight beside the slots'
    denominator,  # [rows, G, S], written; 1 where the state holds nothing
):
    _, G, S, R = phi.shape
    Dv = v.shape[2]
    H = np.empty((R, Dv), phi.dtype)
    z = np.empty(R, phi.dtype)
    value = np.empty(Dv, phi.dtype)
    features = np.empty((G, R), phi.dtype)
    numerator = np.empty((G, Dv), phi.dtype)
    one = np.ones(1, phi.dtype)[0]
    for row in range(first_row, last_row):
        H[:] = 0
        z[:] = 0
        for t in range(S):
            widen(v[row, t], value)
            take_up(psi[row, t], value, one, H, z)
            for g in range(G):
                copy_row(phi[row, g, t], features[g])
            write_product(features, R, H, Dv, numerator)
            for g in range(G):
                total = dot(features[g], z)
                weight = 0 * total
                if total > 0:
                    weight = 1 / (1 + math.exp(logsumexp[row, g, t] - math.log(total)))
                else:
                    total = one
                share[row, g, t] = weight
                denominator[row, g, t] = total
                mix(slots[row, g, t], numerator[g], total, share[row, g, t], output[row, g, t])


@jit
def join_backward_kernel(
    first_row,  # rows are key-value heads of sequences, B * Hkv
    last_row,
    phi,  # [rows, G, S, R]
    psi,  # [rows, S, R]
    v,  # [rows, S, Dv], may be halves
    output,  # [rows, G, S, Dv]
    share,  # [rows, G, S]
    denominator,  # [rows, G, S]
    doutput,  # [rows, G, S, Dv]
    dphi,  # [rows, G, S, R], written
    dpsi,  # [rows, S, R], written
):
    _, G, S, R = phi.shape
    Dv = v.shape[2]
    H = np.empty((R, Dv), phi.dtype)
    z = np.empty(R, phi.dtype)
    value = np.empty(Dv, phi.dtype)
    scaled = np.empty(R, phi.dtype)
    one = np.ones(1, phi.dtype)[0]
    # Of a query's sums: numerator and denominator have the gradients doutput and `pull`, both times
    # share / denominator.
    pull = np.empty((G, S), phi.dtype)
    for row in range(first_row, last_row):
        # A query's features: from the state that it saw, built anew.
        H[:] = 0
        z[:] = 0
        for t in range(S):
            widen(v[row, t], value)
            take_up(psi[row, t], value, one, H, z)
            for g in range(G):
                pull[g, t] = -dot(doutput[row, g, t], output[row, g, t])
                look_up(doutput[row, g, t], pull[g, t], H, z, dphi[row, g, t])
                scale(dphi[row, g, t], denominator[row, g, t], share[row, g, t], dphi[row, g, t])

        # A pair's: from all queries that saw it, so from the last one back.
        H[:] = 0
        z[:] = 0
        for t in range(S - 1, -1, -1):
            for g in range(G):
                scale(phi[row, g, t], denominator[row, g, t], share[row, g, t], scaled)
                take_up(scaled, doutput[row, g, t], pull[g, t], H, z)
            widen(v[row, t], value)
            look_up(value, one, H, z, dpsi[row, t])


class Join(torch.autograd.Function):
    """Attention over slots and a low-rank state together, and the gradients of phi and psi."""

    @staticmethod
    def forward(
        ctx: Any, phi: Tensor, psi: Tensor, v: Tensor, slots: Tensor, logsumexp: Tensor
    ) -> Tensor:
        rows, G, S, _ = phi.shape
        output = phi.new_empty(slots.shape)
        share = phi.new_empty(rows, G, S)
        denominator = phi.new_empty(rows, G, S)
        inputs = [array(x) for x in (phi, psi, v, slots, logsumexp)]
        over_rows(join_kernel, rows, *inputs, array(output), array(share), array(denominator))
        ctx.save_for_backward(phi, psi, v, output, share, denominator)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        phi, psi, v, output, share, denominator = ctx.saved_tensors
        dphi = torch.empty_like(phi)
        dpsi = torch.empty_like(psi)
        inputs = (phi, psi, v, output, share, denominator, doutput.contiguous())
        arrays = [array(x) for x in (*inputs, dphi, dpsi)]
        over_rows(join_backward_kernel, len(phi), *arrays)
        return dphi, dpsi, None, None, None


def join(slots: Part, phi: Tensor, psi: Tensor, v: Tensor) -> Tensor:
    """Attention [B, Hq, S, Dv] over slots and a low-rank state together (paper, eq. 3), for pairs
    in order of ARRIVAL: one before each query, of zero psi where nothing arrives.

    `slots`: output [B, Hq, S, Dv] and log-sum-exp [B, Hq, S]; phi [B, Hq, S, R], psi [B, Hkv, S,
    R], v [B, Hkv, S, Dv]. In float32 or wider, whatever slots and v are in; differentiable in phi
    and psi. The torch form is `merge(slots, dispatch.lowrank_part(phi, psi, v))`.
    """
    kv_heads = psi.shape[1]
    wide = torch.promote_types(phi.dtype, torch.float32)
    output = Join.apply(
        query_rows(phi.to(wide), kv_heads),
        psi.to(wide).contiguous().flatten(0, 1),
        v.contiguous().flatten(0, 1),
        query_rows(slots.output, kv_heads),
        query_rows(slots.logsumexp.to(wide), kv_heads),
    )
    return output.view(slots.output.shape)


def query_rows(x: Tensor, kv_heads: int) -> Tensor:
    """x [B, Hq, S, ...] as [B * Hkv, G, S, ...], contiguous."""
    return x.contiguous().unflatten(1, (kv_heads, -1)).flatten(0, 1)
