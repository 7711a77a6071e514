"""A prompt that comes one token at a time, in one pass: who stays, and what they got.

The policy's steps along the prompt are those of a whole sequence (whole_sequence.py), so eviction
times say all that a cache holds at the end: who is in the slots, what the queries gave them, and
who is in the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lesslib.attention.prompt import Candidates
from lesslib.ops.blocks import NEVER
from lesslib.policies import Policy

# Weights that are computed at once: 1 MiB in float32.
WEIGHTS = 2**18


def staying(times: Tensor, is_real: Tensor, budget: int) -> Tensor:
    """Who is in the slots after a prompt's last query: indices [B, Hkv, C] in order of position.

    By the eviction times [B, Hkv, S] of a policy with C = `budget` slots, fewer than S; `is_real`
    [B, S] is False for padding. A row that has fewer tokens than slots gets padding before them.
    """
    is_staying = (times == NEVER) & is_real[:, None]
    return is_staying.int().argsort(dim=-1, stable=True)[..., -budget:]


def leaving_last(times: Tensor) -> tuple[Tensor, Tensor]:
    """Who leaves after the last query: an index, and whether anybody does, both [B, Hkv, 1]."""
    S = times.shape[-1]
    is_last = times == S
    return is_last.int().argmax(-1, keepdim=True), is_last.any(-1, keepdim=True)


@dataclass(frozen=True)
class Rows:
    """The queries of a prompt, and what their rows of attention add up to.

    `queries` [B, Hq, S, D] times the scaling of logits; `logsumexp` [B, Hq, S] over what the cache
    held then; `is_real` [B, S] False for padding, which gives nothing.
    """

    queries: Tensor
    logsumexp: Tensor
    is_real: Tensor

    def last(self) -> Rows:
        """The last query alone."""
        return Rows(self.queries[:, :, -1:], self.logsumexp[:, :, -1:], self.is_real[:, -1:])


def observed(policy: Policy, rows: Rows, held: Candidates, token: Tensor) -> Tensor:
    """Scores [B, Hkv, n] that the policy has of the tokens `held` after a prompt's last query.

    `token` [B, Hkv, n] is where in the prompt they came. Where the policy's scores add up, all
    queries since then count, else the last one: see `Policy.sums_queries`.
    """
    if not policy.needs_probabilities:
        return held.score
    if policy.sums_queries:
        columns = columns_of_held(rows, held, token)
    else:
        # All that are held had come.
        columns = columns_of_held(rows.last(), held, torch.zeros_like(token))
    return policy.observe(held.score, columns)


def columns_of_held(rows: Rows, held: Candidates, token: Tensor) -> Tensor:
    """What each token held got from the queries since it came, [B, Hkv, G, n].

    `token` [B, Hkv, n] is the first query that saw it. Works in blocks of queries, whose weights
    fit a CPU's caches, and over the tokens that had come by then.
    """
    B, Hq, S, _ = rows.queries.shape
    Hkv, n = token.shape[1:]
    G = Hq // Hkv
    wide = rows.logsumexp.dtype
    heads = B * Hkv
    queries = rows.queries.reshape(heads, G, S, -1).to(wide)
    keys = held.keys.to(wide).flatten(0, 1).mT.contiguous()  # [heads, D, n]
    shift = (-rows.logsumexp).masked_fill(~rows.is_real[:, None], -math.inf)
    shift = shift.reshape(heads, G, S, 1)
    # An empty slot is seen by nobody.
    first = token.masked_fill(held.position < 0, S).view(heads, 1, 1, n)
    came = first.amin((0, 1, 2))  # [n]
    columns = shift.new_zeros(heads, G, n)
    size = max(1, WEIGHTS // (B * Hq * n))
    for start in range(int(came.min()), S, size):
        stop = min(start + size, S)
        seen = int((came < stop).nonzero().max()) + 1
        block = queries[:, :, start:stop].flatten(1, 2)  # [heads, G * b, D]
        logits = (block @ keys[..., :seen]).unflatten(1, (G, -1))  # [heads, G, b, seen]
        weights = logits.add_(shift[:, :, start:stop]).exp_()
        t = torch.arange(start, stop, device=token.device)[:, None]
        columns[..., :seen] += weights.masked_fill_(first[..., :seen] > t, 0.0).sum(2)
    return columns.view(B, Hkv, G, n)
