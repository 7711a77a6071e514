"""The low-rank state over a whole sequence: linear attention as a chunked scan, and its gradients.

    numerator_t = phi_t H_t    with H_t = sum over s <= t of psi_s^T v_s
    denominator_t = phi_t z_t  with z_t = sum over s <= t of psi_s

A program walks along the chunks of a sequence with the state in registers: within a chunk queries
meet pairs directly, earlier ones through the state. It holds DV_BLOCK columns of the values; what
does not depend on them is done by the program of the first block alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lesslib.ops.triton.common import dot, jit, launch, load_tile, padded, store_tile, tl

# Columns of the values that a program takes.
COLUMNS = 64
# Queries at once.
CHUNK = 16


@jit
def arriving_pairs(
    arrived,  # [B, Hkv, S], read where BY_POSITION
    head,  # key-value head of a batch row
    step,  # of a chunk
    S,
    T,
    BY_POSITION: tl.constexpr,
):
    """The rows in psi and v of the pairs that arrive at some steps, and whether one does."""
    token = step
    if BY_POSITION:
        token = tl.load(arrived + head * S + step, mask=step < S, other=-1)
    return head * T + token, (step < S) & (token >= 0)


@jit
def scan_kernel(
    phi,  # [B, Hq, S, R]
    psi,  # [B, Hkv, T, R]
    v,  # [B, Hkv, T, DV]
    arrived,  # [B, Hkv, S], read where BY_POSITION
    numerator,  # [B, Hq, S, DV], written
    denominator,  # [B, Hq, S], written
    S,  # queries
    T,  # pairs
    G,  # query heads of a key-value head
    BY_POSITION: tl.constexpr,  # pairs lie by position, and `arrived` says when each one arrives
    R: tl.constexpr,  # kernel size
    DV: tl.constexpr,  # head size of values
    R_PADDED: tl.constexpr,
    DV_BLOCK: tl.constexpr,  # columns of the values at once
    CHUNK: tl.constexpr,  # queries at once
):
    # A query head of a batch row, and a block of the values' columns.
    head = tl.program_id(0).to(tl.int64)
    value_block = tl.program_id(1).to(tl.int64)
    value_column = value_block * DV_BLOCK + tl.arange(0, DV_BLOCK)
    feature = tl.arange(0, R_PADDED)
    offset = tl.arange(0, CHUNK)
    is_causal = offset[:, None] >= offset
    H = tl.zeros([R_PADDED, DV_BLOCK], tl.float32)
    z = tl.zeros([R_PADDED], tl.float32)
    for start in range(0, S, CHUNK):
        step = start + offset
        query = head * S + step
        pair, arrives = arriving_pairs(arrived, head // G, step, S, T, BY_POSITION)
        phi_tile = load_tile(phi, query, feature, step < S, R).to(tl.float32)
        psi_tile = load_tile(psi, pair, feature, arrives, R).to(tl.float32)
        value_tile = load_tile(v, pair, value_column, arrives, DV).to(tl.float32)
        # Within the chunk, and through the state before it.
        weight = tl.where(is_causal, dot(phi_tile, tl.trans(psi_tile)), 0.0)
        numerator_tile = dot(weight, value_tile) + dot(phi_tile, H)
        denominator_row = tl.sum(weight, 1) + tl.sum(phi_tile * z, 1)
        store_tile(numerator, query, value_column, step < S, DV, numerator_tile)
        is_written = (step < S) & (value_block == 0)
        tl.store(denominator + query, denominator_row, mask=is_written)
        H += dot(tl.trans(psi_tile), value_tile)
        z += tl.sum(psi_tile, 0)


@jit
def scan_backward_phi_kernel(
    psi,  # [B, Hkv, T, R]
    v,  # [B, Hkv, T, DV]
    arrived,  # [B, Hkv, S], read where BY_POSITION
    dnumerator,  # [B, Hq, S, DV], the gradient that comes in
    ddenominator,  # [B, Hq, S], the gradient that comes in
    dphi,  # [blocks of columns, B, Hq, S, R], written; to be summed over the blocks
    S,  # queries
    T,  # pairs
    G,  # query heads of a key-value head
    BY_POSITION: tl.constexpr,  # pairs lie by position, and `arrived` says when each one arrives
    R: tl.constexpr,  # kernel size
    DV: tl.constexpr,  # head size of values
    R_PADDED: tl.constexpr,
    DV_BLOCK: tl.constexpr,  # columns of the values at once
    CHUNK: tl.constexpr,  # queries at once
):
    # A query head of a batch row, and a block of the values' columns.
    head = tl.program_id(0).to(tl.int64)
    value_block = tl.program_id(1).to(tl.int64)
    value_column = value_block * DV_BLOCK + tl.arange(0, DV_BLOCK)
    feature = tl.arange(0, R_PADDED)
    offset = tl.arange(0, CHUNK)
    is_causal = offset[:, None] >= offset
    dphi += value_block * tl.num_programs(0) * S * R
    H = tl.zeros([R_PADDED, DV_BLOCK], tl.float32)
    z = tl.zeros([R_PADDED], tl.float32)
    for start in range(0, S, CHUNK):
        step = start + offset
        query = head * S + step
        pair, arrives = arriving_pairs(arrived, head // G, step, S, T, BY_POSITION)
        psi_tile = load_tile(psi, pair, feature, arrives, R).to(tl.float32)
        value_tile = load_tile(v, pair, value_column, arrives, DV).to(tl.float32)
        dnumerator_tile = load_tile(dnumerator, query, value_column, step < S, DV)
        is_taken = (step < S) & (value_block == 0)
        ddenominator_row = tl.load(ddenominator + query, mask=is_taken, other=0.0)[:, None]
        # Within the chunk, and through the state before it.
        dweight = dot(dnumerator_tile, tl.trans(value_tile)) + ddenominator_row
        dweight = tl.where(is_causal, dweight, 0.0)
        dphi_tile = dot(dweight, psi_tile) + dot(dnumerator_tile, tl.trans(H))
        dphi_tile += ddenominator_row * z
        store_tile(dphi, query, feature, step < S, R, dphi_tile)
        H += dot(tl.trans(psi_tile), value_tile)
        z += tl.sum(psi_tile, 0)


@jit
def scan_backward_psi_v_kernel(
    phi,  # [B, Hq, S, R]
    psi,  # [B, Hkv, T, R]
    v,  # [B, Hkv, T, DV]
    arrived,  # [B, Hkv, S], read where BY_POSITION
    dnumerator,  # [B, Hq, S, DV], the gradient that comes in
    ddenominator,  # [B, Hq, S], the gradient that comes in
    dpsi,  # [blocks of columns, B, Hkv, T, R], written; to be summed over the blocks
    dv,  # [B, Hkv, T, DV], written
    S,  # queries
    T,  # pairs
    G,  # query heads of a key-value head
    BY_POSITION: tl.constexpr,  # pairs lie by position, and `arrived` says when each one arrives
    R: tl.constexpr,  # kernel size
    DV: tl.constexpr,  # head size of values
    R_PADDED: tl.constexpr,
    DV_BLOCK: tl.constexpr,  # columns of the values at once
    CHUNK: tl.constexpr,  # queries at once
):
    # A key-value head of a batch row, and a block of the values' columns.
    head = tl.program_id(0).to(tl.int64)
    value_block = tl.program_id(1).to(tl.int64)
    value_column = value_block * DV_BLOCK + tl.arange(0, DV_BLOCK)
    feature = tl.arange(0, R_PADDED)
    offset = tl.arange(0, CHUNK)
    is_later = offset[:, None] <= offset
    dpsi += value_block * tl.num_programs(0) * T * R
    # Gradients of the state, from all later queries of all G heads: the chunks come last one first.
    dH = tl.zeros([R_PADDED, DV_BLOCK], tl.float32)
    dz = tl.zeros([R_PADDED], tl.float32)
    for back in range(0, S, CHUNK):
        step = (S - 1 - back) // CHUNK * CHUNK + offset
        pair, arrives = arriving_pairs(arrived, head, step, S, T, BY_POSITION)
        psi_tile = load_tile(psi, pair, feature, arrives, R).to(tl.float32)
        value_tile = load_tile(v, pair, value_column, arrives, DV).to(tl.float32)
        # Through the state after the chunk, and within it.
        dpsi_tile = dot(value_tile, tl.trans(dH)) + dz
        dv_tile = dot(psi_tile, dH)
        for g in range(0, G):
            query = (head * G + g) * S + step
            phi_tile = load_tile(phi, query, feature, step < S, R).to(tl.float32)
            dnumerator_tile = load_tile(dnumerator, query, value_column, step < S, DV)
            is_taken = (step < S) & (value_block == 0)
            ddenominator_row = tl.load(ddenominator + query, mask=is_taken, other=0.0)
            dweight = dot(value_tile, tl.trans(dnumerator_tile)) + ddenominator_row
            weight = dot(psi_tile, tl.trans(phi_tile))
            dpsi_tile += dot(tl.where(is_later, dweight, 0.0), phi_tile)
            dv_tile += dot(tl.where(is_later, weight, 0.0), dnumerator_tile)
            dH += dot(tl.trans(phi_tile), dnumerator_tile)
            dz += tl.sum(phi_tile * ddenominator_row[:, None], 0)
        store_tile(dpsi, pair, feature, arrives, R, dpsi_tile)
        store_tile(dv, pair, value_column, arrives, DV, dv_tile)


def scan_sizes(phi: Tensor, psi: Tensor, v: Tensor, by_position: bool) -> dict[str, Any]:
    """The sizes and options that all three kernels take."""
    R = phi.shape[-1]
    DV = v.shape[-1]
    R_PADDED = padded(R)
    DV_BLOCK = min(COLUMNS, padded(DV))
    return {
        "S": phi.shape[2],
        "T": psi.shape[2],
        "G": phi.shape[1] // psi.shape[1],
        "BY_POSITION": by_position,
        "R": R,
        "DV": DV,
        "R_PADDED": R_PADDED,
        "DV_BLOCK": DV_BLOCK,
        "CHUNK": CHUNK,
        "num_warps": 4 if R_PADDED * DV_BLOCK <= 2048 else 8,
    }


class Scan(torch.autograd.Function):
    """The scan and its gradients; `arrived` is None for pairs in order of arrival."""

    @staticmethod
    def forward(ctx, phi, psi, v, arrived):
        ctx.save_for_backward(phi, psi, v, arrived)
        ctx.sizes = scan_sizes(phi, psi, v, arrived is not None)
        ctx.value_blocks = -(-v.shape[-1] // COLUMNS)
        B, Hq, S, _ = phi.shape
        numerator = phi.new_empty(B, Hq, S, v.shape[-1], dtype=torch.float32)
        denominator = phi.new_empty(B, Hq, S, dtype=torch.float32)
        launch(
            scan_kernel,
            (B * Hq, ctx.value_blocks),
            phi=phi,
            psi=psi,
            v=v,
            arrived=arrived,
            numerator=numerator,
            denominator=denominator,
            **ctx.sizes,
        )
        return numerator, denominator

    @staticmethod
    @once_differentiable
    def backward(ctx, dnumerator, ddenominator):
        phi, psi, v, arrived = ctx.saved_tensors
        # What both kernels take.
        incoming = {
            "psi": psi,
            "v": v,
            "arrived": arrived,
            "dnumerator": dnumerator.contiguous(),
            "ddenominator": ddenominator.contiguous(),
        }
        # Zeros, as a pair may never arrive.
        dphi = phi.new_zeros(ctx.value_blocks, *phi.shape, dtype=torch.float32)
        dpsi = psi.new_zeros(ctx.value_blocks, *psi.shape, dtype=torch.float32)
        dv = torch.zeros_like(v)
        query_heads = phi.shape[0] * phi.shape[1]
        kv_heads = psi.shape[0] * psi.shape[1]
        launch(
            scan_backward_phi_kernel,
            (query_heads, ctx.value_blocks),
            **incoming,
            dphi=dphi,
            **ctx.sizes,
        )
        launch(
            scan_backward_psi_v_kernel,
            (kv_heads, ctx.value_blocks),
            phi=phi,
            **incoming,
            dpsi=dpsi,
            dv=dv,
            **ctx.sizes,
        )
        return dphi.sum(0).to(phi.dtype), dpsi.sum(0).to(psi.dtype), dv, None


def lowrank_attention(phi: Tensor, psi: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """phi_t H_t and phi_t z_t of every query t, for pairs in order of ARRIVAL: one before each
    query, of zero psi where nothing arrives.

    phi [B, Hq, S, R], psi [B, Hkv, S, R], v [B, Hkv, S, Dv]. Returns the numerator [B, Hq, S, Dv]
    and the denominator [B, Hq, S] in float32; differentiable in phi, psi and v. The torch form is
    `ops.scan.lowrank_attention`.
    """
    return Scan.apply(phi.contiguous(), psi.contiguous(), v.contiguous(), None)


def lowrank_attention_by_position(
    phi: Tensor, psi: Tensor, v: Tensor, arrived: Tensor
) -> tuple[Tensor, Tensor]:
    """`lowrank_attention` for pairs in order of POSITION.

    phi [B, Hq, S, R], psi [B, Hkv, T, R], v [B, Hkv, T, Dv]; `arrived` [B, Hkv, S] of
    `ops.scan.arrivals` says which one arrives before each query, -1 for none; each at most once.
    """
    return Scan.apply(phi.contiguous(), psi.contiguous(), v.contiguous(), arrived.contiguous())
