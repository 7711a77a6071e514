"""A policy of one file: every second token stays."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lesslib.policies import Policy, register_policy


@register_policy
@dataclass(frozen=True)
class EverySecond(Policy):
    """The newest tokens at even positions stay; those at odd positions leave first, oldest
    first.
    """

    tokens: int
    name: ClassVar[str] = "every-second"
    counts: ClassVar[tuple[str, ...]] = ("tokens",)
    # Positions decide, so attention need not be computed for this policy.
    needs_probabilities: ClassVar[bool] = False

    def priority(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """The lowest leaves: odd positions come out below all even ones."""
        is_odd = position % 2 == 1
        rank = position - is_odd * (now + 1)
        return rank.to(score.dtype).expand_as(score)
