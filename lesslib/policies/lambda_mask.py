"""The first tokens stay, and the newest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lesslib.ops.blocks import NEVER, positions
from lesslib.ops.rules import EvictionRule
from lesslib.policies.base import Policy
from lesslib.policies.registry import register_policy


@register_policy
@dataclass(frozen=True)
class Lambda(Policy):
    """Lambda-shaped mask (Han et al., 2023; Xiao et al., 2023).

    The first `sinks` tokens and the `recent` newest stay, at the positions where they were made.
    """

    recent: int
    sinks: int = 4
    name: ClassVar[str] = "lambda"
    counts: ClassVar[tuple[str, ...]] = ("recent", "sinks")
    needs_probabilities: ClassVar[bool] = False

    def __post_init__(self) -> None:
        are_numbers = isinstance(self.recent, int) and isinstance(self.sinks, int)
        if are_numbers and self.recent < 1:
            raise ValueError(
                f"{self}: the budget must be larger than the sinks,"
                f" at least {self.sinks + 1} tokens"
            )
        super().__post_init__()

    @classmethod
    def from_budget(cls, budget: int) -> Self:
        return cls(recent=budget - cls.sinks)

    def priority(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        is_protected = (position < self.sinks) | (position > now - self.recent)
        return position.to(score.dtype).masked_fill(is_protected, math.inf).expand_as(score)

    def rule(self) -> EvictionRule:
        return EvictionRule("lambda", recent=self.recent, sinks=self.sinks)

    def eviction_times(self, q: Tensor, k: Tensor, is_real: Tensor, scaling: float) -> Tensor:
        """Known beforehand: a token leaves when one arrives `recent` positions after it."""
        B, Hkv, S, _ = k.shape
        position = positions(is_real)  # [B, S]
        # The time after which the token at each position is there, by position; padding goes to a
        # spare last column.
        spare = S + self.recent
        time_of = torch.full((B, spare + 1), NEVER, dtype=torch.int32, device=k.device)
        times = torch.arange(1, S + 1, dtype=torch.int32, device=k.device).expand(B, S)
        time_of.scatter_(1, position.masked_fill(~is_real, spare).long(), times)
        leaves = time_of.gather(1, (position + self.recent).clamp(min=0).long())  # [B, S]
        leaves = leaves.masked_fill(position < self.sinks, NEVER)
        return leaves[:, None].expand(B, Hkv, S).contiguous()
