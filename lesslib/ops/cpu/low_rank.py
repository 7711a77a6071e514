"""The low-rank state of LESS: how queries read H and z, and how these absorb evicted pairs."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from lesslib.ops.cpu.common import LIKE, jit, over_rows, rows_for_a_thread, tensor_at
from lesslib.ops.cpu.elementary import widened, zero_like
from lesslib.ops.cpu.products import write_product
from lesslib.ops.merge import Part


@jit
def read_kernel(
    first_row,  # rows are key-value heads of sequences, B * Hkv
    last_row,
    addresses,  # of the five tensors below
    sizes,  # rows, queries of a row, R, Dv
    like,  # an array of their dtype
):
    rows, queries, R, Dv = sizes
    # The heads of a group lie one after the other, and read the same state.
    phi = tensor_at(addresses[0], (rows, queries, R), like)
    H = tensor_at(addresses[1], (rows, R, Dv), like)
    z = tensor_at(addresses[2], (rows, R), like)
    output = tensor_at(addresses[3], (rows, queries, Dv), like)
    logsumexp = tensor_at(addresses[4], (rows, queries), like)
    for row in range(first_row, last_row):
        write_product(phi[row], R, H[row], Dv, output[row])
        for i in range(queries):
            denominator = zero_like(z[row, 0])
            for r in range(R):
                denominator += phi[row, i, r] * z[row, r]
            if denominator > 0:
                # Not times 1 / denominator, which is infinite far below normal numbers.
                for d in range(Dv):
                    output[row, i, d] /= denominator
                logsumexp[row, i] = math.log(denominator)
            else:
                output[row, i] = 0
                logsumexp[row, i] = -math.inf


def read(phi: Tensor, H: Tensor, z: Tensor) -> Part:
    """phi H / phi z and log phi z, the low-rank part of the softmax (paper, eq. 3).

    phi [B, Hq, S, R], H [B, Hkv, R, Dv] and z [B, Hkv, R] in float32 or wider. Returns output [B,
    Hq, S, Dv] and log-sum-exp [B, Hq, S] in H's dtype; where phi z is 0, they are 0 and -inf.
    """
    B, Hq, S, R = phi.shape
    Hkv = H.shape[1]
    Dv = H.shape[-1]
    part = Part(H.new_empty(B, Hq, S, Dv), H.new_empty(B, Hq, S))
    tensors = (phi.to(H.dtype).contiguous(), H, z, part.output, part.logsumexp)
    queries = Hq // Hkv * S
    over_rows(
        read_kernel,
        B * Hkv,
        tuple([x.data_ptr() for x in tensors]),
        (B * Hkv, queries, R, Dv),
        LIKE[H.dtype],
        at_once=rows_for_a_thread(queries * R * Dv),
    )
    return part


@jit
def absorb_kernel(
    first_row,  # rows are key-value heads of sequences, B * Hkv
    last_row,
    addresses,  # of the five tensors below
    sizes,  # rows, pairs of a row, R, Dv
    like_psi,  # an array of psi's dtype
    like_v,  # an array of v's dtype
    like,  # an array of the dtype of H and z
):
    rows, pairs, R, Dv = sizes
    # H and z change in place.
    H = tensor_at(addresses[0], (rows, R, Dv), like)
    z = tensor_at(addresses[1], (rows, R), like)
    psi = tensor_at(addresses[2], (rows, pairs, R), like_psi)
    v = tensor_at(addresses[3], (rows, pairs, Dv), like_v)
    is_held = tensor_at(addresses[4], (rows, pairs), np.empty(0, np.bool_))
    value = np.empty(Dv, like.dtype)
    for row in range(first_row, last_row):
        for i in range(pairs):
            if not is_held[row, i]:
                continue
            for d in range(Dv):
                value[d] = widened(v[row, i, d])
            for r in range(R):
                feature = psi[row, i, r]
                z[row, r] += feature
                for d in range(Dv):
                    H[row, r, d] += feature * value[d]


def absorb(H: Tensor, z: Tensor, psi: Tensor, v: Tensor, is_held: Tensor) -> None:
    """H += psi^T v and z += psi in place, where `is_held` [B, Hkv, n] is True (paper, eqs 4-5).

    H [B, Hkv, R, Dv], z [B, Hkv, R] and psi [B, Hkv, n, R] in float32 or wider, v [B, Hkv, n, Dv].
    """
    B, Hkv, n, R = psi.shape
    Dv = v.shape[-1]
    tensors = (H, z, psi.contiguous(), v.contiguous(), is_held.contiguous())
    over_rows(
        absorb_kernel,
        B * Hkv,
        tuple([x.data_ptr() for x in tensors]),
        (B * Hkv, n, R, Dv),
        LIKE[psi.dtype],
        LIKE[v.dtype],
        LIKE[H.dtype],
        at_once=rows_for_a_thread(n * R * Dv),
    )
