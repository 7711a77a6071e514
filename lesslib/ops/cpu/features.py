"""The feature maps phi and psi of LESS (paper, eqs 1-2), each one kernel for one or a few tokens.

Of many tokens torch's matmuls are quicker, and serve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lesslib.ops.cpu.common import LIKE, jit, over_rows, rows_for_a_thread, tensor_at
from lesslib.ops.cpu.elementary import gelu, widened
from lesslib.ops.cpu.products import write_dots, write_product

# Up to so many tokens of a batch the kernels are quicker than matmuls.
FEW = 32


@jit
def mlp(
    head,
    addresses,  # of x, out, W1, W2 transposed, and what psi has besides
    sizes,  # B, heads, S, D, hidden, R
    like,  # an array of x's dtype
    like_weights,  # an array of the weights' dtype
    features,  # [B * S, R], written
):
    """gelu(gelu(x W1) W2) of a head's tokens, which share what is loaded of its weights."""
    B, heads, S, D, width, R = sizes
    x = tensor_at(addresses[0], (B, heads, S, D), like)
    w1 = tensor_at(addresses[2], (heads, D, width), like_weights)
    w2 = tensor_at(addresses[3], (heads, R, width), like_weights)
    tokens = np.empty((B * S, D), features.dtype)
    hidden = np.empty((B * S, width), features.dtype)
    for b in range(B):
        for t in range(S):
            for d in range(D):
                tokens[b * S + t, d] = widened(x[b, head, t, d])
    write_product(tokens, D, w1[head], width, hidden)
    gelu_of_all(hidden)
    write_dots(hidden, w2[head], features)
    gelu_of_all(features)


@jit
def gelu_of_all(
    x,  # [rows, columns], changes in place
):
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[row, i] = gelu(x[row, i])


@jit
def phi_kernel(
    first_head,  # query heads, whose tokens share their weights
    last_head,
    addresses,  # of x [B, heads, S, D], out [B, heads, S, R], W1 and W2, see `mlp`
    sizes,  # B, heads, S, D, hidden, R
    like,  # an array of x's dtype
    like_weights,  # an array of the weights' dtype
    wide,  # an array of the dtype of sums
):
    B, heads, S, _, _, R = sizes
    out = tensor_at(addresses[1], (B, heads, S, R), wide)
    features = np.empty((B * S, R), wide.dtype)
    for head in range(first_head, last_head):
        mlp(head, addresses, sizes, like, like_weights, features)
        for b in range(B):
            for t in range(S):
                for r in range(R):
                    out[b, head, t, r] = abs(features[b * S + t, r])


@jit
def psi_kernel(
    first_head,  # key-value heads, whose tokens share their weights
    last_head,
    addresses,  # of x [B, heads, S, D], out [B, heads, S, R], W1 and W2, see `mlp`, W3, s1, s2
    sizes,  # B, heads, S, D, hidden, R
    like,  # an array of x's dtype
    like_weights,  # an array of the weights' dtype
    wide,  # an array of the dtype of sums
):
    B, heads, S, _, _, R = sizes
    out = tensor_at(addresses[1], (B, heads, S, R), wide)
    w3 = tensor_at(addresses[4], (heads, R, R), like_weights)
    s1 = tensor_at(addresses[5], (heads, R), like_weights)
    s2 = tensor_at(addresses[6], (heads, R), like_weights)
    u = np.empty((B * S, R), wide.dtype)
    mixed = np.empty((B * S, R), wide.dtype)
    for head in range(first_head, last_head):
        mlp(head, addresses, sizes, like, like_weights, u)
        for i in range(B * S):
            for r in range(R):
                u[i, r] *= abs(widened(s1[head, r]))
        write_product(u, R, w3[head], R, mixed)
        for b in range(B):
            for t in range(S):
                i = b * S + t
                for r in range(R):
                    out[b, head, t, r] = abs(u[i, r] + mixed[i, r] * widened(s2[head, r]))


def phi(q: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """|gelu(gelu(q W1) W2)|, features of queries [B, Hq, S, D] -> [B, Hq, S, R] in float32 or
    wider.

    w1 [Hq, D, hidden], w2 [Hq, hidden, R]. No dropout, no gradients.
    """
    if q.shape[0] * q.shape[2] > FEW:
        return phi_of_many(q, w1, w2)
    return few_features(phi_kernel, q, w1, w2)


def psi(k: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
    """|u + (u W3) * s2| with u = |s1| * gelu(gelu(k W1) W2), features of keys [B, Hkv, S, D] ->
    [B, Hkv, S, R] in float32 or wider.

    w1 [Hkv, D, hidden], w2 [Hkv, hidden, R], w3 [Hkv, R, R], s1 and s2 [Hkv, 1, R]. No dropout, no
    gradients.
    """
    if k.shape[0] * k.shape[2] > FEW:
        return psi_of_many(k, w1, w2, w3, s1, s2)
    return few_features(psi_kernel, k, w1, w2, w3, s1, s2)


def few_features(kernel: Any, x: Tensor, w1: Tensor, w2: Tensor, *weights: Tensor) -> Tensor:
    """The features [B, heads, S, R] of x [B, heads, S, D] by `kernel`; `weights` are of psi."""
    B, heads, S, D = x.shape
    hidden, R = w2.shape[-2:]
    out = w1.new_empty(B, heads, S, R, dtype=sums_dtype(w1))
    tensors = [x, out, w1, w2.mT, *weights]
    # Held here as long as their addresses are used
    tensors = [tensor.contiguous() for tensor in tensors]
    over_rows(
        kernel,
        heads,
        tuple([tensor.data_ptr() for tensor in tensors]),
        (B, heads, S, D, hidden, R),
        LIKE[x.dtype],
        LIKE[w1.dtype],
        LIKE[out.dtype],
        at_once=rows_for_a_thread(B * S * D * hidden),
    )
    return out


# ---------------------------------------------------------------- many tokens
@torch.no_grad()
def phi_of_many(q: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return mlp_of_many(q, w1, w2).abs()


@torch.no_grad()
def psi_of_many(k: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
    u = mlp_of_many(k, w1, w2) * s1.abs()
    return (u + u @ w3.to(u.dtype) * s2).abs()


def mlp_of_many(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """gelu(gelu(x W1) W2) of x [B, heads, S, D] by matmuls, in the weights' dtype: [B, heads, S, R]
    in float32 or wider.
    """
    B, heads, S, D = x.shape
    # A head's tokens are columns, [heads, D, B * S]: so a CPU's matmuls are quickest.
    tokens = x.permute(1, 3, 0, 2).reshape(heads, D, B * S).to(w1.dtype)
    hidden = F.gelu(w1.mT @ tokens)
    features = F.gelu(w2.mT @ hidden)  # [heads, R, B * S]
    return features.unflatten(2, (B, S)).permute(2, 0, 3, 1).to(sums_dtype(w1))


def sums_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
