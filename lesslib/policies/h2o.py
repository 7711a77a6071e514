"""Those stay that were attended most so far, and the newest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lesslib.ops.blocks import dense_logsumexp
from lesslib.ops.rules import EvictionRule, RuleName
from lesslib.policies.base import Policy
from lesslib.policies.registry import register_policy
from lesslib.policies.simulation import simulate_steps


@register_policy
@dataclass(frozen=True)
class H2O(Policy):
    """Heavy-hitter oracle (Zhang et al., 2023).

    The `recent` newest tokens stay, and the `heavy` ones with most probability so far. A key-value
    head's score sums over its query heads. `scores="cache"` normalises a row over what the cache
    holds, which is all a real cache sees; `"full"` uses rows of dense attention, as the paper's
    scoring runs did.
    """

    heavy: int
    recent: int
    scores: Literal["cache", "full"] = "cache"
    name: ClassVar[str] = "h2o"
    counts: ClassVar[tuple[str, ...]] = ("heavy", "recent")
    sums_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores not in ("cache", "full"):
            raise ValueError(f"{self}: scores must be 'cache' or 'full'")

    @property
    def budget(self) -> int:
        return self.heavy + self.recent

    @classmethod
    def shares(cls, slots: int) -> dict[str, int]:
        heavy = slots // 2
        return {"heavy": heavy, "recent": slots - heavy}

    def observe(self, score: Tensor, probabilities: Tensor) -> Tensor:
        return score + probabilities.sum(2)

    def priority(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        return score.masked_fill(position > now - self.recent, math.inf)

    @property
    def needs_full_rows(self) -> bool:
        return self.scores == "full"

    def rule(self) -> EvictionRule:
        name: RuleName = "h2o on full rows" if self.scores == "full" else "h2o"
        return EvictionRule(name, recent=self.recent, sinks=0)

    def eviction_times(self, q: Tensor, k: Tensor, is_real: Tensor, scaling: float) -> Tensor:
        if self.scores == "cache":
            return super().eviction_times(q, k, is_real, scaling)
        normaliser = dense_logsumexp(q, k, is_real, scaling)  # [B, Hkv, G, S]

        def dense_row(logits: Tensor, t: int) -> Tensor:
            """What the kept slots got of query t's row of dense attention."""
            return (logits - normaliser[..., t, None]).exp()

        return simulate_steps(self, q, k, is_real, scaling, probabilities_of=dense_row)
