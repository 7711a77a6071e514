"""The GPU form of LESS in Triton: one decode step, the feature maps, a prompt's column sums, and the scan with its gradients.

Every function computes what a torch form elsewhere does, named in its docstring, with sums in float32; callers ask `available` first.
B batch, Hq query heads, Hkv key-value heads, G = Hq / Hkv, S tokens, N slots, D and Dv head sizes, R kernel size.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lesslib.ops.blocks import NEVER, gather_tokens
from lesslib.policies import H2O, Lambda, Policy

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
jit: Any = triton.jit if triton else lambda kernel: kernel  # without Triton no kernel is called
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDEN: Any = triton and tl.constexpr(
    INTERPRETED
)  # the interpreter's dot reads bfloat16 as integers


@functools.cache
def _say_once() -> None:
    warnings.warn(
        "Triton is not installed: using the slower torch form", RuntimeWarning, stacklevel=3
    )


def available(x: Tensor) -> bool:
    """True where the functions below take tensors like x: of 16 or 32 bits, on a GPU; on a CPU if TRITON_INTERPRET=1."""
    if triton is None and x.is_cuda:
        _say_once()
    return (
        triton is not None
        and x.is_floating_point()
        and x.itemsize in (2, 4)
        and (x.is_cuda or INTERPRETED)
    )


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())  # tl.dot wants powers of two from 16


def _block(D: int, itemsize: int) -> int:
    return max(
        16, min(64, 16384 // (_padded(D) * itemsize))
    )  # rows in 16 KiB: shared memory holds keys and values, twice


def _flat(*tensors: Tensor | None) -> Any:
    return [x if x is None else x.contiguous() for x in tensors]


def _run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    with torch.cuda.device(
        args[0].get_device()
    ):  # a model may lie on several; of a CPU tensor: -1, which changes nothing
        kernel[grid](*args, **options)


@jit
def _dot(a, b):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")  # float32 stays float32


@jit
def _tile(x, row, column, seen, WIDTH):
    return tl.load(
        x + row[:, None] * WIDTH + column, mask=seen[:, None] & (column < WIDTH), other=0.0
    )


@jit
def _put(x, row, column, seen, WIDTH, value):
    tl.store(x + row[:, None] * WIDTH + column, value, mask=seen[:, None] & (column < WIDTH))


@jit
def _decode_kernel(
    q,
    k,
    v,
    keys,
    values,
    position,
    score,
    free,
    count,
    real,
    phi,
    H,
    z,
    logits,
    out,
    sums,
    left,
    key_left,
    value_left,
    some,
    scaling,
    S,
    N,
    Hkv,
    recent,
    sinks,
    LAST: tl.constexpr,
    POLICY: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a key-value head of a batch row
    d, dv, g, r = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, GP), tl.arange(0, RP)
    position, score, logits = (
        position + row * N,
        score + row * N,
        logits + (row * G + g)[:, None] * N,
    )
    slot, now = tl.load(free + row), tl.load(count + row // Hkv)
    for t in range(0, S):  # one step, or all of a sequence
        head, here = (row * G + g) * S + t, row * S + t
        tl.store(keys + (row * N + slot) * D + d, tl.load(k + here * D + d, mask=d < D), mask=d < D)
        tl.store(
            values + (row * N + slot) * DV + dv,
            tl.load(v + here * DV + dv, mask=dv < DV),
            mask=dv < DV,
        )
        tl.debug_barrier()  # every thread sees the new token
        Q, top, total = (
            _tile(q, head, d, g < G, D),
            tl.full([GP], -3.4e38, tl.float32),
            tl.zeros([GP], tl.float32),
        )
        o = tl.zeros([GP, DVP], tl.float32)
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            seen = (tl.load(position + n, mask=n < N, other=-1) >= 0) | (n == slot)
            K, V = _tile(keys, row * N + n, d, seen, D), _tile(values, row * N + n, dv, seen, DV)
            x = tl.where(seen, _dot(Q, tl.trans(K)) * scaling, float("-inf"))
            tl.store(logits + n, x, mask=(g < G)[:, None] & (n < N))
            higher = tl.maximum(top, tl.max(x, 1))
            p, fade = tl.exp(x - higher[:, None]), tl.exp(top - higher)
            o = o * fade[:, None] + _dot(p.to(V.dtype), V)
            total, top = total * fade + tl.sum(p, 1), higher
        lse = top + tl.log(total)
        if (
            R > 0
        ):  # the state joins as one more block, whose logits are log(denominator); nothing changes where that is -inf
            P, z_row = (
                _tile(phi, head, r, g < G, R),
                tl.load(z + row * R + r, mask=r < R, other=0.0),
            )
            denominator, numerator = (
                tl.sum(P * z_row, 1),
                _dot(P, _tile(H, row * R + r, dv, r < R, DV)),
            )
            safe = tl.where(denominator > 0, denominator, 1.0)
            logden = tl.where(denominator > 0, tl.log(safe), float("-inf"))
            higher = tl.maximum(top, logden)
            fade, joins = tl.exp(top - higher), tl.exp(logden - higher)
            o, total = o * fade[:, None] + numerator * (joins / safe)[:, None], total * fade + joins
        _put(out, head, dv, g < G, DV, o / total[:, None])
        entered, counts = now, 1
        if real is not None:  # a padded token attended itself; now it goes
            counts = tl.load(real + row // Hkv * S + t).to(tl.int32)
            entered = tl.where(counts > 0, now, -1)
        tl.debug_barrier()  # every thread sees the logits
        least, oldest, leaver = float("inf"), LAST, slot
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            at = tl.where(n == slot, entered, tl.load(position + n, mask=n < N, other=LAST))
            rank = at.to(tl.float32)
            if POLICY != "lambda":
                x = tl.load(logits + n, mask=(g < G)[:, None] & (n < N), other=float("-inf"))
                rank = tl.sum(tl.exp(x - lse[:, None]), 0) * counts
                if POLICY == "h2o":
                    rank += tl.load(score + n, mask=(n < N) & (n != slot), other=0.0)
                tl.debug_barrier()  # threads may share a slot: none reads what another of them wrote
                tl.store(score + n, rank, mask=n < N)
            if POLICY != "other":  # Policy.first_out
                rank = tl.where((at < sinks) | (at > now - recent), float("inf"), rank)
                rank = tl.where(n < N, tl.where(at < 0, float("-inf"), rank), float("inf"))
                lowest = tl.min(rank, 0)
                first = tl.min(tl.where((n < N) & (rank == lowest), at, LAST), 0)
                better = (lowest < least) | ((lowest == least) & (first < oldest))
                leaver = tl.where(
                    better, tl.min(tl.where(at == first, n, N), 0).to(tl.int64), leaver
                )
                least, oldest = tl.where(better, lowest, least), tl.where(better, first, oldest)
        tl.debug_barrier()  # every thread has read the positions
        if POLICY != "other":
            if left is None:  # the one step
                tl.store(
                    key_left + row * D + d,
                    tl.load(keys + (row * N + leaver) * D + d, mask=d < D),
                    mask=d < D,
                )
                tl.store(
                    value_left + row * DV + dv,
                    tl.load(values + (row * N + leaver) * DV + dv, mask=dv < DV),
                    mask=dv < DV,
                )
                tl.store(some + row, oldest >= 0)
                tl.store(free + row, leaver)
            tl.store(position + leaver, -1)
            entered = tl.where(leaver == slot, -1, entered)
        tl.store(position + slot, entered)
        if left is not None:
            tl.store(sums + head, lse, mask=g < G)
            tl.store(left + here, oldest)
        slot, now = leaver, now + counts


def decode_step(
    policy: Policy,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buffers: list[Any],
    phi: Tensor | None,
    real: Tensor | None,
    scaling: float,
    sums: Tensor | None = None,
    left: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LessLayer._step up to its `_absorb`: (phi H + exp(q K' / sqrt D) V') / (phi z + exp(q K' / sqrt D) 1), then one slot is freed.

    q [B, Hq, 1, D], k [B, Hkv, 1, D], v [B, Hkv, 1, Dv]; `buffers` of the layer, in the order of cache.BUFFERS, change in place (but H, z);
    phi [B, Hq, 1, R] in float32, None without a state; `real` [B, 1]. Returns the output [B, Hq, 1, Dv] and what left: key [B, Hkv, 1, D],
    value [B, Hkv, 1, Dv], and [B, Hkv, 1] whether it held a token. S steps of all at once: see fused.evict.
    """
    keys, values, position, score, free, count, H, z = buffers
    (B, Hkv, N, D), (Hq, S), Dv = keys.shape, q.shape[1:3], values.shape[-1]
    R, kind, G = (
        0 if phi is None else phi.shape[-1],
        policy.name if isinstance(policy, H2O | Lambda) else "other",
        Hq // Hkv,
    )
    logits, out = (
        score.new_empty(B, Hkv, G, N),
        v.new_empty(B, Hq, S, Dv, dtype=v.dtype if left is None else score.dtype),
    )
    key, value, some = (
        k.new_empty(B, Hkv, 1, D),
        v.new_empty(B, Hkv, 1, Dv),
        torch.empty_like(free, dtype=torch.bool),
    )
    _run(
        _decode_kernel,
        (B * Hkv,),
        *_flat(q, k, v),
        keys,
        values,
        position,
        score,
        free,
        count,
        *_flat(real, phi),
        H,
        z,
        logits,
        out,
        sums,
        left,
        key,
        value,
        some,
        scaling,
        S,
        N,
        Hkv,
        getattr(policy, "recent", 0),
        getattr(policy, "sinks", 0),
        LAST=NEVER,
        POLICY=kind,
        G=G,
        D=D,
        DV=Dv,
        R=R,
        GP=_padded(G),
        DP=_padded(D),
        DVP=_padded(Dv),
        RP=_padded(R),
        BLOCK=max(16, min(_block(max(D, Dv), k.itemsize), 2048 // _padded(G))),
        num_warps=4 if G <= 16 else 8,
        num_stages=2,
    )
    if (
        kind == "other"
    ):  # the kernel left sums over G in `score`; TOVA's mean over all heads is more than one program sees
        score.copy_(policy.observe(score, (score / G)[:, :, None]))
        free.copy_(policy.first_out(score, position, count[:, None, None].expand(B, Hkv, 1)))
        key, value, some = (
            gather_tokens(keys, free),
            gather_tokens(values, free),
            position.gather(2, free) >= 0,
        )
        position.scatter_(2, free, -1)
    count.add_(S if real is None else real.sum(1, dtype=torch.int32))
    return out, key, value, some


@jit
def _gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@jit
def _features_kernel(
    x,
    w1,
    w2,
    w3,
    s1,
    s2,
    out,
    batch_stride,
    head_stride,
    token_stride,
    heads,
    S,
    rows,
    hidden,
    D: tl.constexpr,
    R: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h, row = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS),
    )
    d, r, b, s = (
        tl.arange(0, DP),
        tl.arange(0, RP),
        row // S,
        row % S,
    )  # all of a batch share their head's weights
    X = _tile(
        x + (b * batch_stride + h * head_stride + s * token_stride)[:, None],
        0 * row,
        d,
        row < rows,
        D,
    ).to(w1.dtype.element_ty)
    u = tl.zeros([ROWS, RP], tl.float32)
    for start in range(0, hidden, BLOCK):  # the hidden layer is never stored
        j = start + tl.arange(0, BLOCK)
        W1, W2 = (
            _tile(w1 + h * D * hidden, d, j, d < D, hidden),
            tl.trans(_tile(w2 + h * R * hidden, r, j, r < R, hidden)),
        )
        u += _dot(_gelu(_dot(X, W1)).to(W2.dtype), W2)
    u = _gelu(u)
    if w3 is not None:  # psi has scales and a residual
        u *= tl.abs(tl.load(s1 + h * R + r, mask=r < R, other=0.0).to(tl.float32))
        u += _dot(u, _tile(w3, h * R + r, r, r < R, R).to(tl.float32)) * tl.load(
            s2 + h * R + r, mask=r < R, other=0.0
        ).to(tl.float32)
    _put(out, (b * heads + h) * S + s, r, row < rows, R, tl.abs(u))


def features(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor | None = None,
    s1: Tensor | None = None,
    s2: Tensor | None = None,
) -> Tensor:
    """LayerKernels.phi, |gelu(gelu(x W1) W2)|, or with w3, s1, s2 its psi, |u + (u W3) * s2| of u = |s1| * gelu(gelu(x W1) W2).

    x [B, heads, S, D] of any strides, w1 [heads, D, hidden], w2 [heads, hidden, R], w3 [heads, R, R], s1 and s2 [heads, 1, R].
    Returns [B, heads, S, R] in float32. Products take the weights' type, as in torch; no dropout, no gradients.
    """
    (B, heads, S, D), hidden, R = x.shape, w1.shape[-1], w2.shape[-1]
    x, block = x if x.stride(-1) == 1 else x.contiguous(), _block(D, w1.itemsize)
    out, rows = x.new_empty(B, heads, S, R, dtype=torch.float32), 16 if B * S <= 16 else block
    _run(
        _features_kernel,
        (heads, -(-B * S // rows)),
        x,
        *_flat(w1, w2.mT, w3, s1, s2),
        out,
        *x.stride()[:3],
        heads,
        S,
        B * S,
        hidden,
        D=D,
        R=R,
        DP=_padded(D),
        RP=_padded(R),
        ROWS=rows,
        BLOCK=block,
        num_stages=2,
    )
    return out


@jit
def _absorb_kernel(
    H,
    z,
    psi,
    v,
    some,
    n,
    R: tl.constexpr,
    DV: tl.constexpr,
    RP: tl.constexpr,
    DVP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, r, dv = tl.program_id(0).to(tl.int64), tl.arange(0, RP), tl.arange(0, DVP)
    Hs, zs = _tile(H, row * R + r, dv, r < R, DV), tl.load(z + row * R + r, mask=r < R, other=0.0)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        held = tl.load(some + row * n + i, mask=i < n, other=0) != 0
        U, V = (
            _tile(psi, row * n + i, r, held, R),
            _tile(v, row * n + i, dv, held, DV).to(tl.float32),
        )
        Hs, zs = Hs + _dot(tl.trans(U), V), zs + tl.sum(U, 0)
    _put(H, row * R + r, dv, r < R, DV, Hs)
    tl.store(z + row * R + r, zs, mask=r < R)


def absorb(H: Tensor, z: Tensor, psi: Tensor, v: Tensor, some: Tensor) -> None:
    """H += psi^T v and z += psi in place, where `some` [B, Hkv, n] is True (paper, eqs 4-5; LessLayer._absorb after its psi).

    H [B, Hkv, R, Dv], z [B, Hkv, R] and psi [B, Hkv, n, R] in float32, v [B, Hkv, n, Dv].
    """
    (B, Hkv, n, R), Dv = psi.shape, v.shape[-1]
    block = min(32, _padded(n))
    _run(
        _absorb_kernel,
        (B * Hkv,),
        H,
        z,
        *_flat(psi, v, some),
        n,
        R=R,
        DV=Dv,
        RP=_padded(R),
        DVP=_padded(Dv),
        BLOCK=block,
    )


@jit
def _column_kernel(
    q,
    k,
    real,
    lse,
    columns,
    scaling,
    S,
    Hq,
    G,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, d, mine = tl.program_id(0).to(tl.int64), tl.arange(0, DP), tl.program_id(1) * BLOCK
    m, kv, real = mine + tl.arange(0, BLOCK), row // G * S, real + row // Hq * S
    top, total = tl.full([BLOCK], -3.4e38, tl.float32), tl.zeros([BLOCK], tl.float32)
    if columns is None:  # the rows' log-sum-exps, along the keys up to this block of queries
        Q = _tile(q, row * S + m, d, m < S, D)
        for start in range(0, mine + BLOCK, BLOCK):
            j = start + tl.arange(0, BLOCK)
            seen = (tl.load(real + j, mask=j < S, other=0) != 0) & (j <= m[:, None])
            x = tl.where(
                seen, _dot(Q, tl.trans(_tile(k, kv + j, d, j < S, D))) * scaling, float("-inf")
            )
            higher = tl.maximum(top, tl.max(x, 1))
            total, top = (
                total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[:, None]), 1),
                higher,
            )
        tl.store(
            lse + row * S + m, top + tl.log(tl.where(total > 0, total, 1.0)), mask=m < S
        )  # a padded query may see nothing
    else:  # the columns of this block of keys, along the queries from it on
        K, held = (
            tl.trans(_tile(k, kv + m, d, m < S, D)),
            tl.load(real + m, mask=m < S, other=0) != 0,
        )
        for start in range(mine, S, BLOCK):
            t = start + tl.arange(0, BLOCK)
            counts = (
                (tl.load(real + t, mask=t < S, other=0) != 0)[:, None] & held & (m <= t[:, None])
            )
            x = (
                _dot(_tile(q, row * S + t, d, t < S, D), K) * scaling
                - tl.load(lse + row * S + t, mask=t < S, other=0.0)[:, None]
            )
            total += tl.sum(tl.exp(tl.where(counts, x, float("-inf"))), 0)
        tl.store(columns + row * S + m, total, mask=m < S)


def column_sums(q: Tensor, k: Tensor, real: Tensor, scaling: float) -> Tensor:
    """What each key gets from a prompt's real queries: the columns of softmax(q k^T * scaling), causal, summed over them.

    q [B, Hq, S, D], k [B, Hkv, S, D], `real` [B, S] False for padding. Returns [B, Hkv, G, S] in float32, the `columns` of
    LessLayer._block on an empty cache. A pass for the rows' log-sum-exps, then one along the columns: nothing of size S x S is stored.
    """
    (B, Hq, S, D), G, block = q.shape, q.shape[1] // k.shape[1], _block(q.shape[-1], q.itemsize)
    q, k, real = _flat(q, k, real)
    lse, columns = (q.new_empty(B, Hq, S, dtype=torch.float32) for _ in range(2))
    for into in (None, columns):
        _run(
            _column_kernel,
            (B * Hq, -(-S // block)),
            q,
            k,
            real,
            lse,
            into,
            scaling,
            S,
            Hq,
            G,
            D=D,
            DP=_padded(D),
            BLOCK=block,
        )
    return columns.unflatten(1, (-1, G))


@jit
def _arrivals(arrived, kv, t, S, T):
    token = t if arrived is None else tl.load(arrived + kv * S + t, mask=t < S, other=-1)
    return kv * T + token, (t < S) & (token >= 0)


@jit
def _scan_kernel(
    phi,
    psi,
    v,
    arrived,
    numerator,
    denominator,
    dphi,
    S,
    T,
    G,
    R: tl.constexpr,
    DV: tl.constexpr,
    RP: tl.constexpr,
    DVP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, part = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1).to(tl.int64),
    )  # a query head of a batch row, and DVP of the values' columns
    c, r, dv = tl.arange(0, CHUNK), tl.arange(0, RP), part * DVP + tl.arange(0, DVP)
    H, z, once = (
        tl.zeros([RP, DVP], tl.float32),
        tl.zeros([RP], tl.float32),
        c >= part * CHUNK,
    )  # once: by the first part alone
    for start in range(0, S, CHUNK):
        t, at, here = start + c, row * S + start + c, start + c < S
        token, some = _arrivals(arrived, row // G, t, S, T)
        U, V = (
            _tile(psi, token, r, some, R).to(tl.float32),
            _tile(v, token, dv, some, DV).to(tl.float32),
        )
        if dphi is None:
            P = _tile(phi, at, r, here, R).to(tl.float32)
            A = tl.where(c[:, None] >= c, _dot(P, tl.trans(U)), 0.0)
            _put(numerator, at, dv, here, DV, _dot(A, V) + _dot(P, H))
            tl.store(denominator + at, tl.sum(A, 1) + tl.sum(P * z, 1), mask=here & once)
        else:  # the gradients take the places of numerator and denominator; the parts of dphi are to be added up
            dN, dD = (
                _tile(numerator, at, dv, here, DV),
                tl.load(denominator + at, mask=here & once, other=0.0)[:, None],
            )
            A = tl.where(c[:, None] >= c, _dot(dN, tl.trans(V)) + dD, 0.0)
            _put(
                dphi,
                part * tl.num_programs(0) * S + at,
                r,
                here,
                R,
                _dot(A, U) + _dot(dN, tl.trans(H)) + dD * z,
            )
        H, z = H + _dot(tl.trans(U), V), z + tl.sum(U, 0)


@jit
def _reverse_scan_kernel(
    phi,
    psi,
    v,
    arrived,
    numerator,
    denominator,
    dpsi,
    dvalue,
    S,
    T,
    G,
    R: tl.constexpr,
    DV: tl.constexpr,
    RP: tl.constexpr,
    DVP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, part = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1).to(tl.int64),
    )  # a key-value head of a batch row
    c, r, dv = tl.arange(0, CHUNK), tl.arange(0, RP), part * DVP + tl.arange(0, DVP)
    dH, dz, once = (
        tl.zeros([RP, DVP], tl.float32),
        tl.zeros([RP], tl.float32),
        c >= part * CHUNK,
    )  # of later queries, of all G heads
    for back in range(0, S, CHUNK):
        t = (S - 1 - back) // CHUNK * CHUNK + c
        token, some = _arrivals(arrived, row, t, S, T)
        U, V = (
            _tile(psi, token, r, some, R).to(tl.float32),
            _tile(v, token, dv, some, DV).to(tl.float32),
        )
        dU, dV = _dot(V, tl.trans(dH)) + dz, _dot(U, dH)
        for g in range(0, G):
            at = (row * G + g) * S + t
            P, dN = _tile(phi, at, r, t < S, R).to(tl.float32), _tile(numerator, at, dv, t < S, DV)
            dD = tl.load(denominator + at, mask=(t < S) & once, other=0.0)
            dU += _dot(tl.where(c[:, None] <= c, _dot(V, tl.trans(dN)) + dD, 0.0), P)
            dV += _dot(tl.where(c[:, None] <= c, _dot(U, tl.trans(P)), 0.0), dN)
            dH, dz = dH + _dot(tl.trans(P), dN), dz + tl.sum(P * dD[:, None], 0)
        _put(dpsi, part * tl.num_programs(0) * T + token, r, some, R, dU)
        _put(dvalue, token, dv, some, DV, dV)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, phi, psi, v, arrived):
        (B, Hq, S, R), (Hkv, T), Dv = phi.shape, psi.shape[1:3], v.shape[-1]
        ctx.save_for_backward(phi, psi, v, arrived)
        RP, DVP, ctx.parts, ctx.sizes = (
            _padded(R),
            min(64, _padded(Dv)),
            -(-Dv // 64),
            (S, T, Hq // Hkv),
        )
        ctx.options = {
            "R": R,
            "DV": Dv,
            "RP": RP,
            "DVP": DVP,
            "CHUNK": 16,
            "num_warps": 4 if RP * DVP <= 2048 else 8,
        }
        numerator, denominator = (
            phi.new_empty(B, Hq, S, *wide, dtype=torch.float32) for wide in ((Dv,), ())
        )
        _run(
            _scan_kernel,
            (B * Hq, ctx.parts),
            phi,
            psi,
            v,
            arrived,
            numerator,
            denominator,
            None,
            *ctx.sizes,
            **ctx.options,
        )
        return numerator, denominator

    @staticmethod
    @once_differentiable
    def backward(ctx, dnumerator, ddenominator):
        phi, psi, v, arrived = ctx.saved_tensors
        given, dv = (
            (phi, psi, v, arrived, *_flat(dnumerator, ddenominator)),
            torch.zeros_like(v),
        )  # 0 for tokens that never arrive
        dphi, dpsi = (x.new_zeros(ctx.parts, *x.shape, dtype=torch.float32) for x in (phi, psi))
        _run(
            _scan_kernel,
            (phi.shape[0] * phi.shape[1], ctx.parts),
            *given,
            dphi,
            *ctx.sizes,
            **ctx.options,
        )
        _run(
            _reverse_scan_kernel,
            (psi.shape[0] * psi.shape[1], ctx.parts),
            *given,
            dpsi,
            dv,
            *ctx.sizes,
            **ctx.options,
        )
        return dphi.sum(0).to(phi.dtype), dpsi.sum(0).to(psi.dtype), dv, None


def lowrank_attention(
    phi: Tensor, psi: Tensor, v: Tensor, arrived: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ops.scan.lowrank_attention: phi(q_t) H_t and phi(q_t) z_t with H_t = sum over s <= t of psi_s^T v_s, z_t = sum of psi_s.

    phi [B, Hq, S, R]; psi [B, Hkv, S, R] and v [B, Hkv, S, Dv] in order of ARRIVAL, zero psi where nothing arrives. With `arrived`
    [B, Hkv, S] of ops.scan.arrivals, psi and v [B, Hkv, T, ...] are in order of position; each token arrives at most once.
    Returns the numerator [B, Hq, S, Dv] and the denominator [B, Hq, S] in float32; differentiable in phi, psi and v.
    """
    return _Scan.apply(*_flat(phi, psi, v, arrived))
