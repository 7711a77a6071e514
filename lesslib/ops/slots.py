"""The tensors of one layer's bounded cache, in one place, so that every form of a decode step
takes the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Slots:
    """N = C + 1 slots per key-value head: C of the budget, and the free one that the next token
    takes.

    All tensors change in place, so that compiled steps and CUDA graphs find them where they were.
    """

    # [B, Hkv, N, D], after RoPE: a key keeps the position at which it was made
    keys: Tensor
    # [B, Hkv, N, Dv]
    values: Tensor
    # [B, Hkv, N] int32, counted from the row's first real token; -1 for an empty slot
    position: Tensor
    # [B, Hkv, N] of the policy, float32 or wider
    score: Tensor
    # [B, Hkv, 1] int64, the slot that the next token takes
    free: Tensor
    # [B] int32, real tokens seen
    count: Tensor

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor, budget: int) -> Slots:
        """Slots for `budget` tokens like keys [B, Hkv, S, D] and values [B, Hkv, S, Dv]."""
        B, Hkv, _, D = keys.shape
        Dv = values.shape[-1]
        N = budget + 1
        wide = torch.promote_types(keys.dtype, torch.float32)
        return cls(
            keys=keys.new_zeros(B, Hkv, N, D),
            values=values.new_zeros(B, Hkv, N, Dv),
            position=keys.new_full((B, Hkv, N), -1, dtype=torch.int32),
            score=keys.new_zeros(B, Hkv, N, dtype=wide),
            free=keys.new_full((B, Hkv, 1), budget, dtype=torch.int64),
            count=keys.new_zeros(B, dtype=torch.int32),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; the batch is the first dimension of each."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def clear(self) -> None:
        """Forget all tokens; keys and values stay where they are, in slots that are empty now."""
        self.position.fill_(-1)
        self.score.zero_()
        self.free.fill_(self.position.shape[-1] - 1)
        self.count.zero_()


class StepResult(NamedTuple):
    """What a decode step gives: the attention's output, and the token that left."""

    # [B, Hq, 1, Dv]
    output: Tensor
    # [B, Hkv, 1, D], of the slot that was freed
    key: Tensor
    # [B, Hkv, 1, Dv], of the slot that was freed
    value: Tensor
    # [B, Hkv, 1] bool, False where that slot was empty
    is_held: Tensor


class AttendResult(NamedTuple):
    """What a step gives that leaves the eviction to its caller."""

    # [B, Hq, 1, Dv]
    output: Tensor
    # [B, Hkv, G, N] in float32 or wider, over the slots alone; zero for a padded token
    probabilities: Tensor
