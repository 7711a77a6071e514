"""What every policy is: numbers of slots, a score that each query changes, and an order in which
slots leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from lesslib.ops.blocks import NEVER
from lesslib.ops.rules import EvictionRule
from lesslib.policies.simulation import simulate_steps


@dataclass(frozen=True)
class Policy:
    """Base of all policies: who leaves a cache of C slots once a newer token has come.

    A policy `observe`s the probabilities of the newest query, which change the score of every
    slot, and gives each slot a `priority`; the slot with the lowest one leaves. The newest token
    is attended on top of the budget C, then the cache is brought back to C: so a query always sees
    its own token, the newest competes on the same terms as all others, and nothing is shifted, as
    the slot that the next token takes is the one that was freed.

    A new policy is a frozen dataclass under `@register_policy` that names its fields of slots in
    `counts` and overrides `observe` and `priority`. The other methods are for special cases.
    Shapes: B batch, Hkv key-value heads, G query heads per key-value head, N slots.
    """

    # How it is called in kernel files, on command lines and in results.
    name: ClassVar[str]
    # The fields that are numbers of slots, in tokens; they add up to the budget.
    counts: ClassVar[tuple[str, ...]] = ()
    # False where scores do not come from attention, which spares computing it.
    needs_probabilities: ClassVar[bool] = True
    # True where scores add up, so that a prompt's queries may be observed by the sum of their rows;
    # else the last row alone counts.
    sums_queries: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class with a step of its own inherits no shortcut that was made for another step."""
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "observe" not in own and "priority" not in own:
            return
        if "rule" not in own:
            cls.rule = Policy.rule  # type: ignore[method-assign]
        if "eviction_times" not in own:
            cls.eviction_times = Policy.eviction_times  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        for field in self.counts:
            count = getattr(self, field)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"{self}: {field} must be a whole number of tokens, at least 0")
        if self.budget is not None and self.budget < 2:
            raise ValueError(
                f"{self} has a budget of {self.budget} tokens: a policy needs at least 2"
            )

    # ------------------------------------------------------------------ budgets
    @property
    def budget(self) -> int | None:
        """Slots C, in tokens; None keeps everything."""
        if not self.counts:
            return None
        return sum(getattr(self, field) for field in self.counts)

    @classmethod
    def shares(cls, slots: int) -> dict[str, int]:
        """The paper's split of `slots` over the fields of `counts`."""
        if not cls.counts:
            raise ValueError(
                "Full() keeps every token and has no budget: write Full(), or choose another policy"
            )
        return {cls.counts[0]: slots}

    @classmethod
    def from_budget(cls, budget: int) -> Self:
        """The policy with the paper's split of `budget` slots."""
        return cls(**cls.shares(budget))

    @classmethod
    def from_fraction(cls, fraction: float, max_context: int) -> Self:
        """The policy whose budget is `fraction` of `max_context` tokens, rounded down to an even
        number.

        Paper, Table 1. Raises ValueError as `budget_of` does.
        """
        return cls.from_budget(budget_of(fraction, max_context))

    def plus(self, tokens: int) -> Self:
        """The same policy with `tokens` more slots.

        Baseline+ spends the low-rank state's memory, R/2 tokens, this way.
        """
        more = {}
        for field, share in self.shares(tokens).items():
            more[field] = getattr(self, field) + share
        return replace(self, **more)

    def check(self, max_context: int) -> None:
        """Raises ValueError when the budget does not fit a model with `max_context` positions."""
        if self.budget is not None and self.budget > max_context:
            raise ValueError(
                f"{self}: {self.budget} tokens is above the model's context of {max_context};"
                " use fewer, or Full()"
            )

    # ------------------------------------------------------------------ one step
    def observe(self, score: Tensor, probabilities: Tensor) -> Tensor:
        """New scores [B, Hkv, N] after a query that gave `probabilities` [B, Hkv, G, N] to the
        slots.
        """
        return score

    def priority(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """What keeps a slot, [B, Hkv, N]: the lowest leaves; inf is protected.

        `position` [B, Hkv, N] counts from the row's first real token (-1: an empty slot), `now`
        [B, 1, 1] is the newest one.
        """
        return score

    def victim(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """Index [B, Hkv] of the slot that leaves next, the first among equals (used by `simulate`).

        Never an empty one while another may go.
        """
        priority = self.priority(score, position, now)
        return priority.masked_fill(position < 0, math.inf).argmin(-1)

    def first_out(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """Index [B, Hkv, 1] of an empty slot, or else of the `victim` among slots in no order.

        The lowest position breaks ties.
        """
        rank = self.priority(score, position, now).masked_fill(position < 0, -math.inf)
        is_higher = rank > rank.amin(-1, keepdim=True)
        return position.masked_fill(is_higher, NEVER).argmin(-1, keepdim=True)

    def out_order(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """Indices [B, Hkv, N] in the order in which slots would go at once.

        Empty ones come first; among equals the lowest position does.
        """
        rank = self.priority(score, position, now).masked_fill(position < 0, -math.inf)
        by_position = position.argsort(dim=-1, stable=True)
        by_rank = rank.gather(2, by_position).argsort(dim=-1, stable=True)
        return by_position.gather(2, by_rank)

    # ------------------------------------------------------------------ special cases
    @property
    def needs_full_rows(self) -> bool:
        """True where scores need rows of dense attention, which a bounded cache no longer has."""
        return False

    def rule(self) -> EvictionRule | None:
        """The rule by which fused kernels decide as this policy does; None: no kernel knows it."""
        return None

    def eviction_times(self, q: Tensor, k: Tensor, is_real: Tensor, scaling: float) -> Tensor:
        """When each token leaves, [B, Hkv, S] int32, `NEVER` for those that stay: see `simulate`.

        By default the online step is run along the sequence; a policy that knows its times
        beforehand overrides this.
        """
        return simulate_steps(self, q, k, is_real, scaling)


def budget_of(fraction: float, max_context: int) -> int:
    """`fraction` of `max_context`, rounded down to an even number of tokens.

    Raises ValueError outside (0, 1] or below 2 tokens.
    """
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(
            f"fraction {fraction!r} must lie in (0, 1]: 0.05 means 5% of the model's maximum"
            " context"
        )
    # 0.29 * 100 is 28.999999999999996 in floats
    tokens = fraction * max_context + 1e-9
    if tokens < 2:
        raise ValueError(
            f"fraction {fraction!r} of a context of {max_context} is {fraction * max_context:.1f}"
            " tokens, below 2: use a larger fraction"
        )
    return int(tokens) // 2 * 2
