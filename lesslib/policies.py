"""Who leaves the cache: Full, H2O, Lambda, TOVA, and the eviction times they give a whole sequence.

A policy is one online step over a set of slots: `observe` the probabilities of the newest query, then name the
`victim`. `simulate` runs that very step along a sequence and returns one integer per token, the time it leaves:

    keep(t, j)  =  j <= t < evicted_at[j]

so a token with `evicted_at[j] == t` has been absorbed before query t attends. A token is attended on top of the
budget C while it is the newest one; after its query the cache is brought back to C slots. `NEVER` marks tokens that
stay. Shapes: B batch, Hkv key-value heads, G query heads per key-value head, S tokens, N slots, D head size.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int32).max
BLOCK = 64  # queries whose logits are computed at once


@dataclass(frozen=True)
class Policy:
    """Base of all policies. `budget` is the number of slots C, in tokens; None keeps everything."""

    name: ClassVar[str]
    needs_probabilities: ClassVar[bool] = True

    @property
    def budget(self) -> int | None:
        raise NotImplementedError

    @classmethod
    def from_fraction(cls, fraction: float, max_context: int) -> Policy:
        """The policy whose budget is `fraction` of `max_context` tokens, rounded down to an even number (paper, Table 1)."""
        return cls.from_budget(budget_of(fraction, max_context))

    @classmethod
    def from_budget(cls, budget: int) -> Policy:
        """The policy with the paper's split of `budget` slots."""
        raise NotImplementedError

    def observe(self, score: Tensor, probabilities: Tensor) -> Tensor:
        """New scores [B, Hkv, N] after a query that gave `probabilities` [B, Hkv, G, N] to the slots."""
        return score

    def priority(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """What keeps a slot, [B, Hkv, N]: the lowest leaves; inf is protected.

        `position` [B, Hkv, N] or broadcastable counts from the row's first real token (-1: an empty slot), `now` [B, 1, 1]
        is the newest position.
        """
        raise NotImplementedError

    def victim(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        """Index [B, Hkv] of the slot that leaves next, the first among equals; never an empty one while another may go."""
        return self.priority(score, position, now).masked_fill(position < 0, math.inf).argmin(-1)

    def plus(self, tokens: int) -> Policy:
        """The same policy with `tokens` more slots: Baseline+ spends the low-rank state's memory, R/2 tokens, this way."""
        return self.from_budget(_required(self.budget) + tokens)

    def check(self, max_context: int) -> None:
        """Raises ValueError when the budget does not fit a model with `max_context` positions."""
        if self.budget is not None and self.budget > max_context:
            raise ValueError(
                f"{self}: a budget of {self.budget} tokens is above the model's context of {max_context}; "
                f"use at most {max_context}, or Full()"
            )


def _required(budget: int | None) -> int:
    if budget is None:
        raise ValueError("Full() keeps every token and has no budget")
    return budget


def budget_of(fraction: float, max_context: int) -> int:
    """`fraction` of `max_context`, rounded down to an even number of tokens. Raises ValueError outside (0, 1] or below 2 tokens."""
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction!r} must lie in (0, 1]: 0.05 means 5% of the model's maximum context")
    budget = int(fraction * max_context + 1e-9) // 2 * 2
    if budget < 2:
        tokens = f"fraction {fraction!r} of a context of {max_context} is {fraction * max_context:.1f} tokens"
        raise ValueError(f"{tokens}: a policy needs at least 2, use a larger fraction")
    return budget


def _check_counts(policy: Policy, **counts: int) -> None:
    for what, n in counts.items():
        if not isinstance(n, int) or isinstance(n, bool) or n < 0:
            raise ValueError(f"{type(policy).__name__}({what}={n!r}): {what} must be a whole number of tokens, at least 0")
    total = sum(counts.values())
    if total < 2:
        raise ValueError(f"{type(policy).__name__} with a budget of {total} tokens: a policy needs at least 2")


@dataclass(frozen=True)
class Full(Policy):
    """Keeps every token: dense attention."""

    name: ClassVar[str] = "full"

    @property
    def budget(self) -> None:
        return None

    @classmethod
    def from_budget(cls, budget: int) -> Full:
        raise ValueError(f"Full() keeps every token and has no budget of {budget}: write Full(), or choose another policy")


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

    def __post_init__(self) -> None:
        _check_counts(self, heavy=self.heavy, recent=self.recent)
        if self.scores not in ("cache", "full"):
            raise ValueError(f"H2O(scores={self.scores!r}): choose 'cache' or 'full'")

    @property
    def budget(self) -> int:
        return self.heavy + self.recent

    @classmethod
    def from_budget(cls, budget: int) -> H2O:
        return cls(heavy=budget // 2, recent=budget - budget // 2)

    def plus(self, tokens: int) -> H2O:
        return replace(self, heavy=self.heavy + tokens // 2, recent=self.recent + tokens - tokens // 2)

    def observe(self, score: Tensor, probabilities: Tensor) -> Tensor:
        return score + probabilities.sum(2)

    def priority(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        return score.masked_fill(position > now - self.recent, math.inf)


@dataclass(frozen=True)
class Lambda(Policy):
    """Lambda-shaped mask (Han et al., 2023; Xiao et al., 2023): the first `sinks` tokens and the `recent` newest.

    Keys keep their original positions.
    """

    recent: int
    sinks: int = 4
    name: ClassVar[str] = "lambda"
    needs_probabilities: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_counts(self, recent=self.recent, sinks=self.sinks)
        if self.recent < 1:
            raise ValueError(f"Lambda(recent=0, sinks={self.sinks}): the budget must be larger than the sinks")

    @property
    def budget(self) -> int:
        return self.sinks + self.recent

    @classmethod
    def from_budget(cls, budget: int) -> Lambda:
        if budget <= 4:
            raise ValueError(f"Lambda with a budget of {budget} tokens: it keeps 4 sinks, so use at least 5, or name sinks= and recent=")
        return cls(recent=budget - 4)

    def plus(self, tokens: int) -> Lambda:
        return replace(self, recent=self.recent + tokens)

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

    def __post_init__(self) -> None:
        _check_counts(self, tokens=self.tokens)

    @property
    def budget(self) -> int:
        return self.tokens

    @classmethod
    def from_budget(cls, budget: int) -> TOVA:
        return cls(tokens=budget)

    def observe(self, score: Tensor, probabilities: Tensor) -> Tensor:
        return probabilities.mean((1, 2))[:, None].expand_as(score)

    def priority(self, score: Tensor, position: Tensor, now: Tensor) -> Tensor:
        return score


POLICIES: dict[str, type[Policy]] = {p.name: p for p in (Full, H2O, Lambda, TOVA)}


def get_policy(name: str) -> type[Policy]:
    """The policy class called `name`. Raises ValueError for an unknown one."""
    if str(name).lower() not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: choose from {', '.join(POLICIES)}")
    return POLICIES[name.lower()]


# ---------------------------------------------------------------- policies along whole sequences, block by block
def block_keys(evicted_at: Tensor, start: int, stop: int, budget: int, real: Tensor) -> tuple[Tensor, Tensor]:
    """Keys that queries start..stop-1 may attend: (index, valid), each [B, Hkv, n + stop - start] with n = min(C, start).

    First up to C tokens older than `start` that are still kept at `start`, in order of position, then the block's own.
    `evicted_at` [B, Hkv, S]; `real` [B, S] is False for padding. Invalid entries point at arbitrary tokens.
    """
    B, Hkv, _ = evicted_at.shape
    own = torch.arange(start, stop, device=evicted_at.device)
    alive = (evicted_at[..., :start] > start) & real[:, None, :start]
    n = min(budget, start)
    slot = (alive.cumsum(-1) - 1).masked_fill(~alive, n)
    older = torch.zeros(B, Hkv, n + 1, dtype=torch.int64, device=own.device)
    older.scatter_(2, slot, torch.arange(start, device=own.device).expand(B, Hkv, -1))
    index = torch.cat([older[..., :n], own.expand(B, Hkv, -1)], -1)
    valid = torch.arange(n, device=own.device) < alive.sum(-1, keepdim=True)
    return index, torch.cat([valid, real[:, None, start:stop].expand(B, Hkv, -1)], -1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, S, D] at token `index` [B, H, N] -> [B, H, N, D]."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def block_logits(q: Tensor, k: Tensor, index: Tensor, scaling: float) -> Tensor:
    """Scaled logits [B, Hkv, G, b, N], float32 or wider: queries q [B, Hq, b, D], keys k [B, Hkv, S, D] at `index` [B, Hkv, N]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    Hkv = k.shape[1]
    grouped = q.unflatten(1, (Hkv, q.shape[1] // Hkv)).to(dtype)
    return grouped @ gather_tokens(k, index).to(dtype).transpose(-1, -2)[:, :, None] * scaling


@torch.no_grad()
def dense_logsumexp(q: Tensor, k: Tensor, real: Tensor, scaling: float) -> Tensor:
    """log-sum-exp of every causal row of dense attention, [B, Hkv, G, S], in blocks of queries (never S x S at once)."""
    S, rows = q.shape[2], []
    for start in range(0, S, BLOCK):
        stop = min(start + BLOCK, S)
        index = torch.arange(stop, device=q.device).expand(*k.shape[:2], stop)
        logits = block_logits(q[:, :, start:stop], k, index, scaling)
        seen = index[..., None, None, :] <= torch.arange(start, stop, device=q.device)[:, None]
        rows.append(logits.masked_fill(~(seen & real[:, None, None, None, :stop]), -math.inf).logsumexp(-1))
    return torch.cat(rows, -1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread within the context: over many tiny operations, waking the others costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@one_thread()
def simulate(policy: Policy, q: Tensor, k: Tensor, real: Tensor | None = None, scaling: float | None = None) -> Tensor:
    """Eviction times [B, Hkv, S] (int32, `NEVER` for tokens that stay) of `policy` along whole sequences.

    q [B, Hq, S, D], k [B, Hkv, S, D] after RoPE; `real` [B, S] is False for padding, which is never scored and never
    holds a slot; `scaling` multiplies the logits (1/sqrt D). Works through blocks of queries, each of which sees at most
    C + BLOCK keys, so nothing of size S x S is stored; `scores="full"` adds a blockwise pass over all keys.
    """
    B, Hkv, S, _ = k.shape
    times = torch.full((B, Hkv, S), NEVER, dtype=torch.int32, device=k.device)
    budget = policy.budget
    if budget is None or budget >= S:
        return times
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    padded = real is not None and not bool(real.all())
    real = torch.ones(B, S, dtype=torch.bool, device=k.device) if real is None else real
    position = (real.int().cumsum(-1, dtype=torch.int32) - 1).masked_fill(~real, -1)  # counted from the first real token
    one_leaves = position >= budget  # [B, S]: the cache overflows at this query
    leaves_at = torch.arange(1, S + 1, dtype=torch.int32, device=k.device).where(one_leaves, NEVER)
    empties = torch.where(one_leaves, -1, NEVER).int()
    normaliser = dense_logsumexp(q, k, real, scaling) if isinstance(policy, H2O) and policy.scores == "full" else None
    token_score = torch.zeros(B, Hkv, S, dtype=torch.promote_types(q.dtype, torch.float32), device=k.device)
    for start in range(0, S, BLOCK):
        stop = min(start + BLOCK, S)
        index, alive = block_keys(times, start, stop, budget, real)  # [B, Hkv, N]: the kept tokens, then the block's own
        score, victims = token_score.gather(2, index), []
        where = position[:, None].expand(B, Hkv, S).gather(2, index).masked_fill(~alive, -1)
        kept = where.shape[-1] - (stop - start)
        where[..., kept:] = -1  # the block's tokens arrive one at a time
        if policy.needs_probabilities:
            logits = block_logits(q[:, :, start:stop], k, index, scaling)
            if padded:
                logits.masked_fill_(~real[:, None, None, start:stop, None], -math.inf)
        for i, t in enumerate(range(start, stop)):
            now = position[:, None, None, t]
            where[..., kept + i] = now[..., 0]
            if policy.needs_probabilities:
                row = logits[..., i, :].masked_fill((where < 0)[:, :, None], -math.inf)
                probabilities = row.softmax(-1) if normaliser is None else (row - normaliser[..., t, None]).exp()
                score = policy.observe(score, probabilities.nan_to_num(0.0) if padded else probabilities)
            if t >= budget:
                victims.append(policy.victim(score, where, now)[..., None])
                where.scatter_reduce_(2, victims[-1], empties[:, None, t, None].expand(B, Hkv, 1), "amin")
        if victims:
            slot, when = torch.cat(victims, -1), leaves_at[:, None, max(start, budget) : stop]
            times.scatter_reduce_(2, index.gather(2, slot), when.expand_as(slot), "amin")
        token_score.scatter_(2, index, score)
    return times
