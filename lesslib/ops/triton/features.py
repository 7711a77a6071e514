"""The feature maps phi and psi of LESS (paper, eqs 1-2), each one kernel; the hidden layer is never
stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lesslib.ops.triton.common import (
    dot,
    jit,
    launch,
    load_tile,
    load_vector,
    padded,
    store_tile,
    tile_rows,
    tl,
)


@jit
def gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@jit
def load_tokens(
    x,  # [B, heads, S, D], of any strides but a last one of 1
    batch_stride,
    head_stride,
    token_stride,
    head,  # of all rows
    row,  # numbers of tokens, counted through the batch [ROWS]
    is_row,  # False beyond the last token [ROWS]
    S,  # tokens of a batch row
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """One head's vectors of some tokens of a batch, [ROWS, D_PADDED]."""
    column = tl.arange(0, D_PADDED)
    start = row // S * batch_stride + head * head_stride + row % S * token_stride
    mask = is_row[:, None] & (column < D)
    return tl.load(x + start[:, None] + column, mask=mask, other=0.0)


@jit
def mlp(
    x_tile,  # [ROWS, D_PADDED]
    w1,  # [heads, D, hidden]
    w2,  # [heads, R, hidden], transposed
    head,  # whose weights are used
    hidden,  # size of the hidden layer
    ROWS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    D_PADDED: tl.constexpr,
    R_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # of the hidden layer at once
):
    """gelu(gelu(x W1) W2), [ROWS, R_PADDED] in float32."""
    column = tl.arange(0, D_PADDED)
    feature = tl.arange(0, R_PADDED)
    x_tile = x_tile.to(w1.dtype.element_ty)
    total = tl.zeros([ROWS, R_PADDED], tl.float32)
    for start in range(0, hidden, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        w1_tile = load_tile(w1, head * D + column, unit, column < D, hidden)
        w2_tile = tl.trans(load_tile(w2, head * R + feature, unit, feature < R, hidden))
        activation = gelu(dot(x_tile, w1_tile))
        total += dot(activation.to(w2_tile.dtype), w2_tile)
    return gelu(total)


@jit
def phi_kernel(
    x,  # [B, heads, S, D], of any strides but a last one of 1
    w1,  # [heads, D, hidden]
    w2,  # [heads, R, hidden], transposed
    out,  # [B, heads, S, R], written
    batch_stride,  # of x
    head_stride,  # of x
    token_stride,  # of x
    heads,  # of queries
    S,  # tokens of a batch row
    tokens,  # of the whole batch, which share their head's weights
    hidden,  # size of the hidden layer
    D: tl.constexpr,  # head size
    R: tl.constexpr,  # kernel size
    D_PADDED: tl.constexpr,
    R_PADDED: tl.constexpr,
    ROWS: tl.constexpr,  # tokens at once
    BLOCK: tl.constexpr,  # of the hidden layer at once
):
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < tokens
    feature = tl.arange(0, R_PADDED)
    x_tile = load_tokens(
        x, batch_stride, head_stride, token_stride, head, row, is_row, S, D, D_PADDED
    )
    u = mlp(x_tile, w1, w2, head, hidden, ROWS, D, R, D_PADDED, R_PADDED, BLOCK)
    out_row = (row // S * heads + head) * S + row % S
    store_tile(out, out_row, feature, is_row, R, tl.abs(u))


@jit
def psi_kernel(
    x,  # [B, heads, S, D], of any strides but a last one of 1
    w1,  # [heads, D, hidden]
    w2,  # [heads, R, hidden], transposed
    w3,  # [heads, R, R]
    s1,  # [heads, 1, R]
    s2,  # [heads, 1, R]
    out,  # [B, heads, S, R], written
    batch_stride,  # of x
    head_stride,  # of x
    token_stride,  # of x
    heads,  # of keys
    S,  # tokens of a batch row
    tokens,  # of the whole batch, which share their head's weights
    hidden,  # size of the hidden layer
    D: tl.constexpr,  # head size
    R: tl.constexpr,  # kernel size
    D_PADDED: tl.constexpr,
    R_PADDED: tl.constexpr,
    ROWS: tl.constexpr,  # tokens at once
    BLOCK: tl.constexpr,  # of the hidden layer at once
):
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < tokens
    feature = tl.arange(0, R_PADDED)
    x_tile = load_tokens(
        x, batch_stride, head_stride, token_stride, head, row, is_row, S, D, D_PADDED
    )
    u = mlp(x_tile, w1, w2, head, hidden, ROWS, D, R, D_PADDED, R_PADDED, BLOCK)
    u *= tl.abs(load_vector(s1 + head * R, feature, R).to(tl.float32))
    w3_tile = load_tile(w3, head * R + feature, feature, feature < R, R).to(tl.float32)
    u += dot(u, w3_tile) * load_vector(s2 + head * R, feature, R).to(tl.float32)
    out_row = (row // S * heads + head) * S + row % S
    store_tile(out, out_row, feature, is_row, R, tl.abs(u))


def phi(q: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """|gelu(gelu(q W1) W2)|, features of queries [B, Hq, S, D] -> [B, Hq, S, R] in float32.

    w1 [Hq, D, hidden], w2 [Hq, hidden, R]. Products take the weights' type, as in torch; no
    dropout, no gradients.
    """
    return launch_features(phi_kernel, q, w1, w2)


def psi(k: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
    """|u + (u W3) * s2| with u = |s1| * gelu(gelu(k W1) W2), features of keys [B, Hkv, S, D] ->
    [B, Hkv, S, R] in float32.

    w1 [Hkv, D, hidden], w2 [Hkv, hidden, R], w3 [Hkv, R, R], s1 and s2 [Hkv, 1, R]. Products take
    the weights' type, as in torch; no dropout, no gradients.
    """
    return launch_features(
        psi_kernel, k, w1, w2, w3=w3.contiguous(), s1=s1.contiguous(), s2=s2.contiguous()
    )


def launch_features(kernel: Any, x: Tensor, w1: Tensor, w2: Tensor, **weights: Tensor) -> Tensor:
    """The features [B, heads, S, R] of x [B, heads, S, D] by `kernel`; `weights` are of psi."""
    B, heads, S, D = x.shape
    R = w2.shape[-1]
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty(B, heads, S, R, dtype=torch.float32)
    block = tile_rows(D, w1.itemsize)
    rows = 16 if B * S <= 16 else block
    launch(
        kernel,
        (heads, -(-B * S // rows)),
        x=x,
        w1=w1.contiguous(),
        w2=w2.mT.contiguous(),
        **weights,
        out=out,
        batch_stride=x.stride(0),
        head_stride=x.stride(1),
        token_stride=x.stride(2),
        heads=heads,
        S=S,
        tokens=B * S,
        hidden=w1.shape[-1],
        D=D,
        R=R,
        D_PADDED=padded(D),
        R_PADDED=padded(R),
        ROWS=rows,
        BLOCK=block,
        num_stages=2,
    )
    return out
