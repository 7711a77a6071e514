"""What the keys of a prompt get from its queries, for policies that score by sums of probabilities.

One pass along the keys for the rows' log-sum-exps, then one along the queries for the columns:
nothing of size S x S is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lesslib.ops.triton.common import dot, jit, launch, load_tile, padded, tile_rows, tl
from lesslib.ops.triton.steps import LOWEST


@jit
def row_logsumexp_kernel(
    q,  # [B, Hq, S, D]
    k,  # [B, Hkv, S, D]
    is_real,  # [B, S]
    logsumexp,  # [B, Hq, S], written
    scaling,  # of the logits
    S,  # tokens
    Hq,  # query heads
    G,  # query heads of a key-value head
    D: tl.constexpr,  # head size
    D_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # queries, and keys, at once
):
    # A query head of a batch row, and a block of its queries.
    head = tl.program_id(0).to(tl.int64)
    first_query = tl.program_id(1) * BLOCK
    query = first_query + tl.arange(0, BLOCK)
    column = tl.arange(0, D_PADDED)
    key_row = head // G * S
    is_real += head // Hq * S
    query_tile = load_tile(q, head * S + query, column, query < S, D)
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    # Along the keys, up to the last query of this block.
    for start in range(0, first_query + BLOCK, BLOCK):
        key = start + tl.arange(0, BLOCK)
        is_key = tl.load(is_real + key, mask=key < S, other=0) != 0
        is_seen = is_key & (key <= query[:, None])
        key_tile = load_tile(k, key_row + key, column, key < S, D)
        product = dot(query_tile, tl.trans(key_tile)) * scaling
        logit_tile = tl.where(is_seen, product, float("-inf"))
        higher = tl.maximum(highest, tl.max(logit_tile, 1))
        weight = tl.exp(logit_tile - higher[:, None])
        total = total * tl.exp(highest - higher) + tl.sum(weight, 1)
        highest = higher
    # A padded query may see nothing.
    sees_any = total > 0
    safe_total = tl.where(sees_any, total, 1.0)
    result = tl.where(sees_any, highest + tl.log(safe_total), float("-inf"))
    tl.store(logsumexp + head * S + query, result, mask=query < S)


@jit
def column_sums_kernel(
    q,  # [B, Hq, S, D]
    k,  # [B, Hkv, S, D]
    is_real,  # [B, S]
    logsumexp,  # [B, Hq, S], of the rows
    sums,  # [B, Hq, S], written
    scaling,  # of the logits
    S,  # tokens
    Hq,  # query heads
    G,  # query heads of a key-value head
    D: tl.constexpr,  # head size
    D_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # queries, and keys, at once
):
    # A query head of a batch row, and a block of the keys that it sees.
    head = tl.program_id(0).to(tl.int64)
    first_key = tl.program_id(1) * BLOCK
    key = first_key + tl.arange(0, BLOCK)
    column = tl.arange(0, D_PADDED)
    is_real += head // Hq * S
    key_tile = tl.trans(load_tile(k, head // G * S + key, column, key < S, D))
    is_key = tl.load(is_real + key, mask=key < S, other=0) != 0
    total = tl.zeros([BLOCK], tl.float32)
    # Along the queries, from the first key of this block on.
    for start in range(first_key, S, BLOCK):
        query = start + tl.arange(0, BLOCK)
        is_query = tl.load(is_real + query, mask=query < S, other=0) != 0
        counts = is_query[:, None] & is_key & (key <= query[:, None])
        query_tile = load_tile(q, head * S + query, column, query < S, D)
        row_logsumexp = tl.load(logsumexp + head * S + query, mask=query < S, other=0.0)
        log_probability = dot(query_tile, key_tile) * scaling - row_logsumexp[:, None]
        total += tl.sum(tl.exp(tl.where(counts, log_probability, float("-inf"))), 0)
    tl.store(sums + head * S + key, total, mask=key < S)


def row_logsumexp(q: Tensor, k: Tensor, is_real: Tensor, scaling: float) -> Tensor:
    """The log-sum-exp of every causal row of dense attention over real keys, [B, Hq, S] in float32.

    q [B, Hq, S, D], k [B, Hkv, S, D], `is_real` [B, S] False for padding. -inf for a row that sees
    no real key. The torch form is `ops.blocks.dense_logsumexp`.
    """
    B, Hq, S, D = q.shape
    block = tile_rows(D, q.itemsize)
    logsumexp = q.new_empty(B, Hq, S, dtype=torch.float32)
    launch(
        row_logsumexp_kernel,
        (B * Hq, -(-S // block)),
        q=q.contiguous(),
        k=k.contiguous(),
        is_real=is_real.contiguous(),
        logsumexp=logsumexp,
        scaling=scaling,
        S=S,
        Hq=Hq,
        G=Hq // k.shape[1],
        D=D,
        D_PADDED=padded(D),
        BLOCK=block,
    )
    return logsumexp


def column_sums(q: Tensor, k: Tensor, is_real: Tensor, scaling: float) -> Tensor:
    """What each key gets from a prompt's real queries: the columns of softmax(q k^T * scaling),
    causal, summed over them.

    q [B, Hq, S, D], k [B, Hkv, S, D], `is_real` [B, S] False for padding. Returns [B, Hkv, G, S] in
    float32, which a layer's prefill computes in torch as sums of its rows.
    """
    B, Hq, S, D = q.shape
    Hkv = k.shape[1]
    q = q.contiguous()
    k = k.contiguous()
    block = tile_rows(D, q.itemsize)
    sums = q.new_empty(B, Hq, S, dtype=torch.float32)
    launch(
        column_sums_kernel,
        (B * Hq, -(-S // block)),
        q=q,
        k=k,
        is_real=is_real.contiguous(),
        logsumexp=row_logsumexp(q, k, is_real, scaling),
        sums=sums,
        scaling=scaling,
        S=S,
        Hq=Hq,
        G=Hq // Hkv,
        D=D,
        D_PADDED=padded(D),
        BLOCK=block,
    )
    return sums.unflatten(1, (Hkv, -1))
