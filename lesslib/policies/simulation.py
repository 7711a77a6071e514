"""A policy over a whole sequence: the online step of decoding, run along all queries.

What it gives are eviction times, the key object of every whole-sequence form: a token enters once
and leaves once, so query t attends token j exactly when j <= t < evicted_at[j].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lesslib.ops.blocks import BLOCK, NEVER, block_keys, block_logits, positions
from lesslib.util.hardware import one_thread

if TYPE_CHECKING:
    from lesslib.policies.base import Policy

# (logits of query t over the slots [B, Hkv, G, N], t) -> probabilities [B, Hkv, G, N]
RowProbabilities = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def simulate(
    policy: Policy,
    q: Tensor,
    k: Tensor,
    real: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Eviction times [B, Hkv, S] (int32, `NEVER` for tokens that stay) of `policy` along whole
    sequences.

    q [B, Hq, S, D], k [B, Hkv, S, D] after RoPE; `real` [B, S] is False for padding, which is never
    scored and never holds a slot; `scaling` multiplies the logits (1/sqrt D).
    """
    B, Hkv, S, D = k.shape
    if policy.budget is None or policy.budget >= S:
        return torch.full((B, Hkv, S), NEVER, dtype=torch.int32, device=k.device)
    if scaling is None:
        scaling = D**-0.5
    if real is None:
        real = torch.ones(B, S, dtype=torch.bool, device=k.device)
    return policy.eviction_times(q, k, real, scaling)


def softmax_over_slots(logits: Tensor, t: int) -> Tensor:
    """What a bounded cache sees: the row's softmax over the slots that it holds."""
    return logits.softmax(-1)


@torch.no_grad()
@one_thread()
def simulate_steps(
    policy: Policy,
    q: Tensor,
    k: Tensor,
    is_real: Tensor,
    scaling: float,
    probabilities_of: RowProbabilities = softmax_over_slots,
) -> Tensor:
    """`simulate` by the policy's own step, one query after the other, for a budget below S.

    Works in blocks of queries that see at most C + BLOCK keys, so nothing of size S x S is stored.
    `probabilities_of` gives a row's probabilities from its logits.
    """
    B, Hkv, S, _ = k.shape
    simulation = _Simulation(policy, is_real, probabilities_of)
    times = torch.full((B, Hkv, S), NEVER, dtype=torch.int32, device=k.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    # One column more than tokens: entries of a block that hold no token write there.
    token_score = torch.zeros(B, Hkv, S + 1, dtype=wide, device=k.device)
    for start in range(0, S, BLOCK):
        stop = min(start + BLOCK, S)
        # [B, Hkv, N]: the tokens that are kept at `start`, then the block's own
        index, is_kept = block_keys(times, start, stop, simulation.budget, is_real)
        logits = block_logits(q[:, :, start:stop], k, index, scaling)  # [B, Hkv, G, b, N]
        slots = simulation.slots_before(start, index, is_kept)
        score = simulation.run(range(start, stop), logits, slots, token_score.gather(2, index))
        departures = (-slots).where(slots < -1, NEVER)
        times.scatter_reduce_(2, index, departures, "amin")
        token_score.scatter_(2, index.masked_fill(~is_kept, S), score)
    return times


class _Simulation:
    """The steps of a policy along one batch of sequences; what does not change from block to
    block.
    """

    def __init__(self, policy: Policy, is_real: Tensor, probabilities_of: RowProbabilities) -> None:
        assert policy.budget is not None
        self.policy = policy
        self.budget: int = policy.budget
        self.probabilities_of = probabilities_of
        self.is_real = is_real
        self.is_padded = not bool(is_real.all())
        self.position = positions(is_real)  # [B, S]
        # The mark of a token that left after query t is -(t + 1); NEVER where none leaves.
        times = torch.arange(1, is_real.shape[1] + 1, dtype=torch.int32, device=is_real.device)
        self.marks = (-times).where(self.position >= self.budget, NEVER)  # [B, S]

    def slots_before(self, start: int, index: Tensor, is_kept: Tensor) -> Tensor:
        """What the keys `index` [B, Hkv, N] of a block are worth before query `start`.

        A position, or -1 for no token (yet): the block's own tokens arrive one at a time. A token
        that leaves gets its mark in place of its position.
        """
        slots = self.position[:, None].take_along_dim(index, 2).masked_fill(~is_kept, -1)
        slots[..., min(self.budget, start) :] = -1
        return slots

    def run(self, queries: range, logits: Tensor, slots: Tensor, score: Tensor) -> Tensor:
        """The steps of a block's `queries`: changes `slots` in place, returns the scores [B, Hkv,
        N].

        logits [B, Hkv, G, b, N]; slots, score [B, Hkv, N].
        """
        B, Hkv, _ = score.shape
        older = min(self.budget, queries.start)
        for i, t in enumerate(queries):
            now = self.position[:, None, None, t]  # [B, 1, 1]
            slots[..., older + i] = now[..., 0]
            row = logits[..., i, :].masked_fill((slots < 0)[:, :, None], -math.inf)
            probabilities = self.probabilities_of(row, t)
            if self.is_padded:
                is_padding = ~self.is_real[:, t, None, None, None]
                probabilities = probabilities.masked_fill(is_padding, 0.0)
            score = self.policy.observe(score, probabilities)
            if t >= self.budget:
                victim = self.policy.victim(score, slots, now)[..., None]
                mark = self.marks[:, None, t, None].expand(B, Hkv, 1)
                slots.scatter_reduce_(2, victim, mark, "amin")
        return score
