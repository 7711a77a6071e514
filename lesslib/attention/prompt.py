"""Several new tokens at once: who competes for the slots, and what each got from the new
queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lesslib.ops import dispatch
from lesslib.ops.blocks import BLOCK
from lesslib.ops.slots import Slots
from lesslib.policies import Policy


@dataclass
class Candidates:
    """n tokens that compete for C slots.

    keys [B, Hkv, n, D], values [B, Hkv, n, Dv]; position [B, Hkv, n] int32, -1 for padding or an
    empty slot; score [B, Hkv, n] of the policy, float32 or wider.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    score: Tensor

    @classmethod
    def arriving(cls, k: Tensor, v: Tensor, real: Tensor, slots: Slots) -> Self:
        """New tokens k [B, Hkv, S, D], v [B, Hkv, S, Dv], counted on from those that `slots`
        saw.
        """
        B, Hkv, S, _ = k.shape
        position = slots.count[:, None] + real.cumsum(1, dtype=torch.int32) - 1
        position = position.masked_fill(~real, -1)[:, None].expand(B, Hkv, S)
        return cls(k, v, position, slots.score.new_zeros(B, Hkv, S))

    @classmethod
    def of_slots(cls, slots: Slots) -> Self:
        """What the slots hold."""
        return cls(slots.keys, slots.values, slots.position, slots.score)

    def followed_by(self, others: Candidates) -> Candidates:
        """These candidates and then the `others`."""
        return Candidates(
            torch.cat([self.keys, others.keys], 2),
            torch.cat([self.values, others.values], 2),
            torch.cat([self.position, others.position], 2),
            torch.cat([self.score, others.score], 2),
        )


def rows_of_block(q: Tensor, candidates: Candidates, queries: range, scaling: float) -> Tensor:
    """Logits [B, Hkv, G, b, n] of a block of new queries over the candidates up to its last one.

    q [B, Hq, S, D] are the queries of the last S candidates; what a query may not see is -inf.
    """
    old = candidates.keys.shape[2] - q.shape[2]
    wide = candidates.score.dtype
    n = old + queries.stop
    block = q[:, :, queries.start : queries.stop].to(wide) * scaling
    block = block.unflatten(1, (candidates.keys.shape[1], -1))  # [B, Hkv, G, b, D]
    logits = block @ candidates.keys[:, :, :n].to(wide).mT[:, :, None]
    # Old candidates count below 0.
    key = torch.arange(-old, queries.stop, device=q.device)
    t = torch.arange(queries.start, queries.stop, device=q.device)[:, None]
    is_token = candidates.position[:, :, None, :n] >= 0
    is_seen = ((key <= t) & is_token) | (key == t)  # [B, Hkv, b, n]
    return logits.masked_fill_(~is_seen[:, :, None], -math.inf)


def column_sums(
    policy: Policy, q: Tensor, prompt: Candidates, real: Tensor, scaling: float
) -> Tensor:
    """What each token of a prompt got from the queries that `policy` observes, [B, Hkv, G, S].

    From all real queries where scores add up, else from the last one. Works in blocks of queries,
    so nothing of size S x S is stored.
    """
    B, Hkv, S = prompt.score.shape
    wide = prompt.score.dtype
    columns = prompt.score.new_zeros(B, Hkv, q.shape[1] // Hkv, S)
    if not policy.needs_probabilities:
        return columns
    kernels = dispatch.prompt_kernels(q)
    if policy.sums_queries and kernels is not None:
        return kernels.column_sums(q, prompt.keys, real, scaling)
    first = 0 if policy.sums_queries else S - 1
    for start in range(first, S, BLOCK):
        stop = min(start + BLOCK, S)
        probabilities = rows_of_block(q, prompt, range(start, stop), scaling).softmax(-1)
        counts = real[:, None, None, None, start:stop].to(wide)  # [B, 1, 1, 1, b]
        columns[..., :stop] += (counts @ probabilities)[..., 0, :]
    return columns
