"""Those stay that the newest query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lesslib.ops.rules import EvictionRule
from lesslib.policies.base import Policy
from lesslib.policies.registry import register_policy


@register_policy
@dataclass(frozen=True)
class TOVA(Policy):
    """Token omission via attention (Oren et al., 2024).

    The token with least weight in the newest query's row leaves. The row is averaged over all
    heads, so every head of a layer keeps the same tokens.
    """

    tokens: int
    name: ClassVar[str] = "tova"
    counts: ClassVar[tuple[str, ...]] = ("tokens",)

    def rule(self) -> EvictionRule:
        return EvictionRule("tova", recent=0, sinks=0)

    def observe(self, score: Tensor, probabilities: Tensor) -> Tensor:
        return probabilities.mean((1, 2))[:, None].expand_as(score)
