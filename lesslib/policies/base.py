"""Who leaves the cache: Full, H2O, Lambda, TOVA, and the eviction times they give a whole sequence.

A policy `observe`s the newest query's probabilities, then names the `victim`; `simulate` runs that step along a sequence:
keep(t, j) = j <= t < evicted_at[j]. The newest token is attended on top of the budget C, and then the cache is brought back to C.
Shapes: B batch, Hkv key-value heads, G query heads per key-value head, S tokens, N slots, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from lesslib.ops.blocks import BLOCK, NEVER, block_keys, block_logits, dense_logsumexp
from lesslib.util.hardware import one_thread


@dataclass(frozen=True)
class Policy:
    """Base of all policies: the fields named in `counts` are numbers of slots, in tokens, and add up to the budget C."""

    name: ClassVar[str]
    counts: ClassVar[tuple[str, ...]] = ()
    needs_probabilities: ClassVar[bool] = True
    sums_queries: ClassVar[bool] = (
        False  # scores add up, so that queries may be observed by the sum of their rows; else by the last row
    )

    def __post_init__(self) -> None:
        for what in self.counts:
            n = getattr(self, what)
            if not isinstance(n, int) or isinstance(n, bool) or n < 0:
                raise ValueError(f"{self}: {what} must be a whole number of tokens, at least 0")
        if self.budget is not None and self.budget < 2:
            raise ValueError(
                f"{self} has a budget of {self.budget} tokens: a policy needs at least 2"
            )

    @property
    def budget(self) -> int | None:
        """Slots C, in tokens; None keeps everything."""
        return sum(getattr(self, what) for what in self.counts) if self.counts else None

    @classmethod
    def shares(cls, slots: int) -> dict[str, int]:
        """The paper's split of `slots` over the counts."""
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
        """The policy whose budget is `fraction` of `max_context` tokens, rounded down to an even number (paper, Table 1)."""
        return cls.from_budget(budget_of(fraction, max_context))

    def plus(self, tokens: int) -> Self:
        """The same policy with `tokens` more slots: Baseline+ spends the low-rank state's memory, R/2 tokens, this way."""
        return replace(
            self, **{what: getattr(self, what) + n for what, n in self.shares(tokens).items()}
        )

    def check(self, max_context: int) -> None:
        """Raises ValueError when the budget does not fit a model with `max_context` positions."""
        if self.budget is not None and self.budget > max_context:
            raise ValueError(
                f"{self}: {self.budget} tokens is above the model's context of {max_context}; use fewer, or Full()"
            )

    def observe(self, score: Tensor, probabilities: Tensor) -> Tensor:
        """New scores [B, Hkv, N] after a query that gave `probabilities` [B, Hkv, G, N] to the slots."""
        return score

    def priority(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """What keeps a slot, [B, Hkv, N]: the lowest leaves; inf is protected.

        `position` [B, Hkv, N] counts from the row's first real token (-1: an empty slot), `now` [B, 1, 1] is the newest one.
        """
        return score

    def victim(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """Index [B, Hkv] of the slot that leaves next, the first among equals; never an empty one while another may go."""
        return self.priority(score, position, now).masked_fill(position < 0, math.inf).argmin(-1)

    def first_out(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """Index [B, Hkv, 1] of an empty slot, or else of `victim` among slots in no order: the lowest position breaks ties."""
        rank = self.priority(score, position, now).masked_fill(position < 0, -math.inf)
        return position.masked_fill(rank > rank.amin(-1, keepdim=True), NEVER).argmin(
            -1, keepdim=True
        )

    def out_order(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """Indices [B, Hkv, N] in the order in which slots would go at once: empty ones first, among equals the lowest position."""
        by_position = position.argsort(dim=-1, stable=True)
        rank = self.priority(score, position, now).masked_fill(position < 0, -math.inf)
        return by_position.gather(2, rank.gather(2, by_position).argsort(dim=-1, stable=True))


def budget_of(fraction: float, max_context: int) -> int:
    """`fraction` of `max_context`, rounded down to an even number of tokens. Raises ValueError outside (0, 1] or below 2 tokens."""
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(
            f"fraction {fraction!r} must lie in (0, 1]: 0.05 means 5% of the model's maximum context"
        )
    if (tokens := fraction * max_context) + 1e-9 < 2:
        raise ValueError(
            f"fraction {fraction!r} of a context of {max_context} is {tokens:.1f} tokens, below 2: use a larger fraction"
        )
    return int(tokens + 1e-9) // 2 * 2


@dataclass(frozen=True)
class Full(Policy):
    """Keeps every token: dense attention."""

    name: ClassVar[str] = "full"


@dataclass(frozen=True)
class H2O(Policy):
    """Heavy-hitter oracle (Zhang et al., 2023): the `recent` newest tokens and the `heavy` ones with most probability so far.

    A key-value head's score sums over its query heads. `scores="cache"` normalises over what the cache holds, which is
    all a real cache sees; `"full"` uses rows of dense attention, as the paper's scoring runs did.
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
        return {"heavy": slots // 2, "recent": slots - slots // 2}

    def observe(self, score: Tensor, probabilities: Tensor) -> Tensor:
        return score + probabilities.sum(2)

    def priority(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        return score.masked_fill(position > now - self.recent, math.inf)


@dataclass(frozen=True)
class Lambda(Policy):
    """Lambda-shaped mask (Han et al., 2023; Xiao et al., 2023): the first `sinks` tokens and the `recent` newest, at their positions."""

    recent: int
    sinks: int = 4
    name: ClassVar[str] = "lambda"
    counts: ClassVar[tuple[str, ...]] = ("recent", "sinks")
    needs_probabilities: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.recent, int) and isinstance(self.sinks, int) and self.recent < 1:
            raise ValueError(
                f"{self}: the budget must be larger than the sinks, at least {self.sinks + 1} tokens"
            )
        super().__post_init__()

    @classmethod
    def from_budget(cls, budget: int) -> Self:
        return cls(recent=budget - cls.sinks)

    def priority(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        protected = (position < self.sinks) | (position > now - self.recent)
        return position.to(score.dtype).masked_fill(protected, math.inf).expand_as(score)


@dataclass(frozen=True)
class TOVA(Policy):
    """Token omission via attention (Oren et al., 2024): the token with least weight in the newest query's row leaves.

    The row is averaged over all heads, so every head of a layer keeps the same tokens.
    """

    tokens: int
    name: ClassVar[str] = "tova"
    counts: ClassVar[tuple[str, ...]] = ("tokens",)

    def observe(self, score: Tensor, probabilities: Tensor) -> Tensor:
        return probabilities.mean((1, 2))[:, None].expand_as(score)


POLICIES: dict[str, type[Policy]] = {p.name: p for p in (Full, H2O, Lambda, TOVA)}


def get_policy(name: str) -> type[Policy]:
    """The policy class called `name`. Raises ValueError for an unknown one."""
    if str(name).lower() not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: choose from {', '.join(POLICIES)}")
    return POLICIES[name.lower()]


@torch.no_grad()
@one_thread()
def simulate(
    policy: Policy, q: Tensor, k: Tensor, real: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """Eviction times [B, Hkv, S] (int32, `NEVER` for tokens that stay) of `policy` along whole sequences.

    q [B, Hq, S, D], k [B, Hkv, S, D] after RoPE; `real` [B, S] is False for padding, which is never scored and never holds a
    slot; `scaling` multiplies the logits (1/sqrt D). Works in blocks of queries that see at most C + BLOCK keys (all keys for
    `scores="full"`), so nothing of size S x S is stored.
    """
    (B, Hkv, S, D), budget, device = k.shape, policy.budget, k.device
    times = torch.full((B, Hkv, S), NEVER, dtype=torch.int32, device=device)
    if budget is None or budget >= S:
        return times
    scaling = D**-0.5 if scaling is None else scaling
    real = torch.ones(B, S, dtype=torch.bool, device=device) if real is None else real
    padded, dense_rows = not bool(real.all()), isinstance(policy, H2O) and policy.scores == "full"
    position = (real.int().cumsum(-1, dtype=torch.int32) - 1).masked_fill(
        ~real, -1
    )  # counted from the first real token
    mark = -torch.arange(
        1, S + 1, dtype=torch.int32, device=device
    )  # -(t + 1), of the one that leaves after query t
    leaves = mark.where(position >= budget, NEVER)  # [B, S]; NEVER: none does
    if isinstance(
        policy, Lambda
    ):  # known beforehand: a token leaves when one arrives `recent` positions after it
        by_position = torch.full(
            (B, S + policy.recent + 1), NEVER, dtype=torch.int32, device=device
        )
        by_position.scatter_(
            1, position.masked_fill(~real, S + policy.recent).long(), (-mark).expand(B, S)
        )
        after = by_position.gather(1, (position + policy.recent).clamp(min=0).long())
        return (
            after.masked_fill(position < policy.sinks, NEVER)[:, None].expand_as(times).contiguous()
        )
    token_score = torch.zeros(
        B, Hkv, S + 1, dtype=torch.promote_types(q.dtype, torch.float32), device=device
    )
    for start in range(0, S, BLOCK):
        stop, kept = min(start + BLOCK, S), min(budget, start)
        index, alive = block_keys(
            times, start, stop, budget, real
        )  # [B, Hkv, N]: the kept tokens, then the block's own
        score = token_score.gather(2, index)
        slots = (
            position[:, None].take_along_dim(index, 2).masked_fill(~alive, -1)
        )  # position held; -1: none, -t: left before query t
        slots[..., kept:] = -1  # the block's tokens arrive one at a time
        logits = block_logits(q[:, :, start:stop], k, index, scaling)
        normaliser = dense_logsumexp(q, k, start, stop, real, scaling) if dense_rows else None
        for i, t in enumerate(range(start, stop)):
            now = position[:, None, None, t]
            slots[..., kept + i] = now[..., 0]
            row = logits[..., i, :].masked_fill((slots < 0)[:, :, None], -math.inf)
            probabilities = (
                row.softmax(-1) if normaliser is None else (row - normaliser[..., i, None]).exp()
            )
            if padded:
                probabilities = probabilities.masked_fill(~real[:, t, None, None, None], 0.0)
            score = policy.observe(score, probabilities)
            if t >= budget:
                victim = policy.victim(score, slots, now)[..., None]
                slots.scatter_reduce_(2, victim, leaves[:, None, t, None].expand(B, Hkv, 1), "amin")
        times.scatter_reduce_(2, index, (-slots).where(slots < -1, NEVER), "amin")
        token_score.scatter_(
            2, index.masked_fill(~alive, S), score
        )  # invalid entries may repeat a token: they go to a spare column
    return times
