"""The low-rank state of LESS: how queries read H and z, and how these absorb evicted pairs."""

from __future__ import annotations

from torch import Tensor

from lesslib.ops.merge import Part
from lesslib.ops.triton.common import (
    dot,
    jit,
    launch,
    load_tile,
    load_vector,
    padded,
    store_tile,
    tl,
)

# Columns of H that a program takes.
COLUMNS = 64


@jit
def read_kernel(
    phi,  # [B, Hkv, rows, R]
    H,  # [B, Hkv, R, DV]
    z,  # [B, Hkv, R]
    output,  # [B, Hkv, rows, DV], written
    logsumexp,  # [B, Hkv, rows], written
    rows,  # queries of a key-value head: G heads of S tokens
    R: tl.constexpr,  # kernel size
    DV: tl.constexpr,  # head size of values
    R_PADDED: tl.constexpr,
    DV_BLOCK: tl.constexpr,  # columns of the values at once
    ROWS: tl.constexpr,  # queries at once
):
    # A key-value head of a batch row, a block of its queries, and a block of the values' columns.
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    value_column = tl.program_id(2) * DV_BLOCK + tl.arange(0, DV_BLOCK)
    is_row = row < rows
    feature = tl.arange(0, R_PADDED)
    phi_tile = load_tile(phi, head * rows + row, feature, is_row, R)
    H_tile = load_tile(H, head * R + feature, value_column, feature < R, DV)
    z_row = load_vector(z + head * R, feature, R)
    denominator = tl.sum(phi_tile * z_row, 1)
    holds_any = denominator > 0
    divisor = tl.where(holds_any, denominator, 1.0)
    quotient = dot(phi_tile, H_tile) / divisor[:, None]
    quotient = tl.where(holds_any[:, None], quotient, 0.0)
    store_tile(output, head * rows + row, value_column, is_row, DV, quotient)
    # All blocks of columns find the same log-sum-exp; the first one writes it.
    is_written = is_row & (tl.program_id(2) == 0)
    log_divisor = tl.where(holds_any, tl.log(divisor), float("-inf"))
    tl.store(logsumexp + head * rows + row, log_divisor, mask=is_written)


def read(phi: Tensor, H: Tensor, z: Tensor) -> Part:
    """phi H / phi z and log phi z, the low-rank part of the softmax (paper, eq. 3).

    phi [B, Hq, S, R], H [B, Hkv, R, Dv] and z [B, Hkv, R] in float32. Returns output [B, Hq, S, Dv]
    and log-sum-exp [B, Hq, S] in float32; where phi z is 0, they are 0 and -inf.
    """
    B, Hq, S, R = phi.shape
    Hkv = H.shape[1]
    Dv = H.shape[-1]
    # The heads of a group lie one after the other, and read the same state.
    rows = Hq // Hkv * S
    block = min(64, padded(rows))
    part = Part(phi.new_empty(B, Hq, S, Dv), phi.new_empty(B, Hq, S))
    launch(
        read_kernel,
        (B * Hkv, -(-rows // block), -(-Dv // COLUMNS)),
        phi=phi.contiguous(),
        H=H.contiguous(),
        z=z.contiguous(),
        output=part.output,
        logsumexp=part.logsumexp,
        rows=rows,
        R=R,
        DV=Dv,
        R_PADDED=padded(R),
        DV_BLOCK=min(COLUMNS, padded(Dv)),
        ROWS=block,
    )
    return part


@jit
def absorb_kernel(
    H,  # [B, Hkv, R, DV], changes in place
    z,  # [B, Hkv, R], changes in place
    psi,  # [B, Hkv, n, R]
    v,  # [B, Hkv, n, DV]
    is_held,  # [B, Hkv, n]
    n,  # pairs
    R: tl.constexpr,  # kernel size
    DV: tl.constexpr,  # head size of values
    R_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # pairs at once
):
    # A key-value head of a batch row.
    head = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, R_PADDED)
    value_column = tl.arange(0, DV_PADDED)
    H_tile = load_tile(H, head * R + feature, value_column, feature < R, DV)
    z_row = load_vector(z + head * R, feature, R)
    for start in range(0, n, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        counts = tl.load(is_held + head * n + pair, mask=pair < n, other=0) != 0
        psi_tile = load_tile(psi, head * n + pair, feature, counts, R)
        value_tile = load_tile(v, head * n + pair, value_column, counts, DV).to(tl.float32)
        H_tile += dot(tl.trans(psi_tile), value_tile)
        z_row += tl.sum(psi_tile, 0)
    store_tile(H, head * R + feature, value_column, feature < R, DV, H_tile)
    tl.store(z + head * R + feature, z_row, mask=feature < R)


def absorb(H: Tensor, z: Tensor, psi: Tensor, v: Tensor, is_held: Tensor) -> None:
    """H += psi^T v and z += psi in place, where `is_held` [B, Hkv, n] is True (paper, eqs 4-5).

    H [B, Hkv, R, Dv], z [B, Hkv, R] and psi [B, Hkv, n, R] in float32, v [B, Hkv, n, Dv].
    """
    B, Hkv, n, R = psi.shape
    Dv = v.shape[-1]
    launch(
        absorb_kernel,
        (B * Hkv,),
        H=H,
        z=z,
        psi=psi.contiguous(),
        v=v.contiguous(),
        is_held=is_held.contiguous(),
        n=n,
        R=R,
        DV=Dv,
        R_PADDED=padded(R),
        DV_PADDED=padded(Dv),
        BLOCK=min(32, padded(n)),
    )
