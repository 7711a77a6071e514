"""The readable spec: LESS one token at a time, in plain loops.

Slow on purpose; every fast form is tested against it. It takes a policy's fields but none of its
code, so that a slip in `lesslib.policies` cannot hide here too. Read `naive_attention`, then
`one_token`: its five numbered steps are the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# the eviction time of a token that never leaves
NEVER = torch.iinfo(torch.int32).max


@dataclass
class Sequence:
    """One row of a batch; phi and psi are the kernels' features of q and k."""

    # [Hq, S, D], [Hkv, S, D], [Hkv, S, Dv]
    q: Tensor
    k: Tensor
    v: Tensor
    # [Hq, S, R], [Hkv, S, R]
    phi: Tensor
    psi: Tensor
    # the real ones of the S tokens, in order
    tokens: list[int]
    scaling: float


@dataclass
class HeadMemory:
    """What one key-value head holds of a sequence: exact tokens in slots, a state of the others."""

    head: int
    # tokens in the order in which they came, and the policy's score of each
    slots: list[int]
    score: dict[int, float]
    # [R, Dv], [R]
    H: Tensor
    z: Tensor


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Any,
    phi: Tensor | None = None,
    psi: Tensor | None = None,
    real: Tensor | None = None,
    scaling: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, S, Dv] and eviction times [B, Hkv, S] of a policy, with LESS or alone.

    q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]; phi [B, Hq, S, R] and psi [B, Hkv, S, R]
    are the kernels' features of q and k, in order of position: give both for LESS, neither for
    eviction alone. `real` [B, S] is False for padding. A token that leaves after query t has
    t + 1 as its eviction time: the first query that no longer sees it.
    """
    B, Hq, S, D = q.shape
    Hkv = k.shape[1]
    if phi is None or psi is None:
        # eviction alone is LESS with a state of size R = 0
        phi = q.new_zeros(B, Hq, S, 0)
        psi = k.new_zeros(B, Hkv, S, 0)
    if real is None:
        real = torch.ones(B, S, dtype=torch.bool)
    if scaling is None:
        scaling = D**-0.5

    out = torch.zeros(B, Hq, S, v.shape[-1], dtype=q.dtype)
    times = torch.full((B, Hkv, S), NEVER, dtype=torch.int32)
    for b in range(B):
        tokens = [t for t in range(S) if real[b, t]]
        sequence = Sequence(q[b], k[b], v[b], phi[b], psi[b], tokens, scaling)
        out[b], times[b] = one_sequence(sequence, policy)
    return out, times


def one_sequence(sequence: Sequence, policy: Any) -> tuple[Tensor, Tensor]:
    """Output [Hq, S, Dv] and eviction times [Hkv, S] of one row of a batch."""
    Hq, S, _ = sequence.q.shape
    Hkv, _, Dv = sequence.v.shape
    out = torch.zeros(Hq, S, Dv, dtype=sequence.q.dtype)
    times = torch.full((Hkv, S), NEVER, dtype=torch.int32)
    memories = [empty_memory(sequence, h) for h in range(Hkv)]
    for t in range(S):
        if t in sequence.tokens:
            out[:, t], leavers = one_token(sequence, policy, memories, t)
            for h, leaver in leavers.items():
                times[h, leaver] = t + 1
        else:
            # a padded query attends itself, and leaves no trace
            out[:, t] = sequence.v[:, t].repeat_interleave(Hq // Hkv, 0)
    return out, times


def one_token(
    sequence: Sequence, policy: Any, memories: list[HeadMemory], t: int
) -> tuple[Tensor, dict[int, int]]:
    """Output [Hq, Dv] of token t, and who leaves because of it, by key-value head."""
    Hq = sequence.q.shape[0]
    # query heads that share a key-value head
    G = Hq // len(memories)
    seen = [j for j in sequence.tokens if j <= t]

    # **1. The new token enters the slots of every key-value head.**
    for memory in memories:
        memory.slots.append(t)
        memory.score[t] = 0.0

    # **2. Every query head attends slots and state, under one softmax.**
    outputs = []
    rows = []
    for g in range(Hq):
        memory = memories[g // G]
        out, weights = attend(sequence, memory, g, t)
        outputs.append(out)
        rows.append(probabilities(sequence, policy, memory, weights, g, seen))

    leavers = {}
    for h, memory in enumerate(memories):
        # **3. The policy scores what is held by the probabilities it just got.**
        rows_of_head = rows[h * G : (h + 1) * G]
        observe(policy, memory, rows, rows_of_head)

        # **4. Beyond the budget, the token of the policy's choice leaves the slots.**
        if policy.budget is None or len(memory.slots) <= policy.budget:
            continue
        leavers[h] = choose(policy, memory, seen)
        memory.slots.remove(leavers[h])

        # **5. The state absorbs the token that left.**
        absorb(memory, sequence.psi[h, leavers[h]], sequence.v[h, leavers[h]])
    return torch.stack(outputs), leavers


def empty_memory(sequence: Sequence, head: int) -> HeadMemory:
    """No slots in use, and a state of zeros."""
    R = sequence.psi.shape[-1]
    Dv = sequence.v.shape[-1]
    dtype = sequence.q.dtype
    return HeadMemory(head, [], {}, torch.zeros(R, Dv, dtype=dtype), torch.zeros(R, dtype=dtype))


def attend(sequence: Sequence, memory: HeadMemory, g: int, t: int) -> tuple[Tensor, Tensor]:
    """Output [Dv] of query head g at t, and the slots' weights [slots] before normalisation.

    (phi(q) H + exp(q K'^T / sqrt D) V') / (phi(q) z + exp(q K'^T / sqrt D) 1): the paper's
    equations 3 to 5, where K' and V' are the tokens in the slots.
    """
    V = sequence.v[memory.head, memory.slots]
    phi = sequence.phi[g, t]
    weights = exp_logits(sequence, memory, g, t, memory.slots)
    numerator = weights @ V + phi @ memory.H
    denominator = weights.sum() + phi @ memory.z
    return numerator / denominator, weights


def exp_logits(sequence: Sequence, memory: HeadMemory, g: int, t: int, tokens: list[int]) -> Tensor:
    """exp(q K^T / sqrt D), [tokens], of query head g at t."""
    K = sequence.k[memory.head, tokens]
    return (sequence.q[g, t] @ K.T * sequence.scaling).exp()


def probabilities(
    sequence: Sequence, policy: Any, memory: HeadMemory, weights: Tensor, g: int, seen: list[int]
) -> Tensor:
    """What a policy observes of the newest query of head g, [slots]: `weights` over their sum.

    The sum runs over the slots, which is all that a cache has; for H2O with scores "full" over
    all tokens `seen` so far, held or not.
    """
    if policy.name == "h2o" and policy.scores == "full":
        newest = seen[-1]
        return weights / exp_logits(sequence, memory, g, newest, seen).sum()
    return weights / weights.sum()


def observe(
    policy: Any, memory: HeadMemory, rows: list[Tensor], rows_of_head: list[Tensor]
) -> None:
    """Update the scores of what one key-value head holds.

    `rows` are the probabilities [slots] of all query heads, `rows_of_head` of those that read it.
    """
    for i, j in enumerate(memory.slots):
        if policy.name == "h2o":
            # all attention that the token got so far, from this head's queries
            memory.score[j] += sum(float(row[i]) for row in rows_of_head)
        elif policy.name == "tova":
            # what the newest query gave it, averaged over all heads, which hold the same tokens
            memory.score[j] = sum(float(row[i]) for row in rows) / len(rows)


def choose(policy: Any, memory: HeadMemory, seen: list[int]) -> int:
    """The token that leaves, of those that one head holds; `seen`: the tokens that came so far.

    Among equal scores the oldest one.
    """
    if policy.name == "h2o":
        recent = seen[max(0, len(seen) - policy.recent) :]
        may_leave = [j for j in memory.slots if j not in recent]
        return min(may_leave, key=lambda j: memory.score[j])
    if policy.name == "tova":
        return min(memory.slots, key=lambda j: memory.score[j])
    # Lambda: the oldest one but for the first tokens of all
    sinks = seen[: policy.sinks]
    return min(j for j in memory.slots if j not in sinks)


def absorb(memory: HeadMemory, psi: Tensor, value: Tensor) -> None:
    """H += psi(k)^T v and z += psi(k), for psi(k) [R] and v [Dv] of the token that leaves."""
    # new tensors, not in place: gradients need the old ones
    memory.H = memory.H + torch.outer(psi, value)
    memory.z = memory.z + psi
