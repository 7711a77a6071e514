"""Several new tokens at once: who competes for the slots, and what each got from the new
queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lesslib.attention.whole_sequence import dense_attention
from lesslib.ops import dispatch
from lesslib.ops.blocks import exponentiate, gather_tokens, logit_blocks
from lesslib.ops.merge import Part
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

    def at(self, index: Tensor) -> Candidates:
        """The candidates at `index` [B, Hkv, m]."""
        return Candidates(
            gather_tokens(self.keys, index),
            gather_tokens(self.values, index),
            self.position.gather(2, index),
            self.score.gather(2, index),
        )

    def followed_by(self, others: Candidates) -> Candidates:
        """These candidates and then the `others`."""
        return Candidates(
            torch.cat([self.keys, others.keys], 2),
            torch.cat([self.values, others.values], 2),
            torch.cat([self.position, others.position], 2),
            torch.cat([self.score, others.score], 2),
        )


@dataclass
class Attended:
    """What new queries found, and what they gave.

    `part` is the attention [B, Hq, S, ...] over the candidates; `columns` [B, Hkv, G, n] what each
    candidate got from the queries that a policy observes.
    """

    part: Part
    columns: Tensor


def attend_candidates(
    policy: Policy, q: Tensor, candidates: Candidates, real: Tensor, scaling: float
) -> Attended:
    """New queries over the candidates, of which they are the last, in one pass.

    q [B, Hq, S, D], `real` [B, S] False for padding. All real queries are observed where the
    policy's scores add up, else the last one. Works in blocks of rows, each of which is whole: so
    what a candidate got is summed up while the rows are there, and nothing of size S x S is stored.
    """
    B, Hq, S, _ = q.shape
    Hkv, n = candidates.score.shape[1:]
    G = Hq // Hkv
    values = candidates.values.to(candidates.score.dtype).flatten(0, 1)
    output = values.new_empty(B * Hkv, G, S, values.shape[-1])
    logsumexp = values.new_empty(B * Hkv, G, S, 1)
    columns = values.new_zeros(B * Hkv, G, n)
    is_counted = real if policy.sums_queries else real & is_last(S, q.device)
    is_counted = is_counted[:, None].expand(B, Hkv, S).flatten(0, 1)
    for block in logit_blocks(q, candidates.keys, candidates.position >= 0, scaling):
        rows = block.rows
        queries = block.queries
        if policy.needs_probabilities and (policy.sums_queries or queries.stop == S):
            counted = is_counted[rows, queries]
            highest, total = dispatch.weigh_rows(block.logits, counted, columns[rows])
        else:
            highest, total = exponentiate(block.logits)
        weights = block.logits  # [rows, G, b, seen]
        seen = weights.shape[-1]
        found = weights.flatten(1, 2) @ values[rows, :seen]
        torch.div(found.unflatten(1, (G, -1)), total, out=output[rows, :, queries])
        logsumexp[rows, :, queries] = highest + total.log()
    part = Part(output.view(B, Hq, S, -1), logsumexp.view(B, Hq, S))
    return Attended(part, columns.view(B, Hkv, G, n))


def is_last(S: int, device: torch.device) -> Tensor:
    """True for the last of S queries."""
    return torch.arange(S, device=device) == S - 1


def attend_prompt(
    policy: Policy, q: Tensor, prompt: Candidates, real: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Dense attention [B, Hq, S, Dv] of the first tokens, and the columns [B, Hkv, G, S] that
    `policy` observes.
    """
    kernels = dispatch.prompt_kernels(q)
    if policy.sums_queries and kernels is None:
        attended = attend_candidates(policy, q, prompt, real, scaling)
        return attended.part.output, attended.columns
    output = dense_attention(q, prompt.keys, prompt.values, real, scaling)
    if policy.sums_queries and kernels is not None:
        return output, kernels.column_sums(q, prompt.keys, real, scaling)
    if not policy.needs_probabilities:
        B, Hkv, S = prompt.score.shape
        return output, prompt.score.new_zeros(B, Hkv, q.shape[1] // Hkv, S)
    # The last row alone.
    return output, attend_candidates(policy, q[:, :, -1:], prompt, real[:, -1:], scaling).columns
