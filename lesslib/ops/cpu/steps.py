"""What steps are made of, along a sequence as in decoding: weights of slots, who leaves."""

from __future__ import annotations

import math

import numpy as np

from lesslib.ops.cpu.common import jit
from lesslib.ops.cpu.elementary import exponential, of_rank, rank_of, zero_like

# A position above all others
NOWHERE = np.int32(2**31 - 1)


@jit
def copy_row(source, target):
    for d in range(source.shape[0]):
        target[d] = source[d]


@jit
def add_scaled(
    weights,  # [N]
    share,  # what each is multiplied with
    held,  # so many slots count, the first ones
    total,  # [N], added to
):
    """total += weights * share."""
    for j in range(held):
        total[j] += weights[j] * share


@jit
def highest_of(
    numbers,  # [N]
    held,  # so many count, the first ones
):
    """The highest number, NaN where there is one."""
    highest = rank_of(numbers[0])
    for j in range(held):
        highest = max(highest, rank_of(numbers[j]))
    return of_rank(highest)


@jit
def lowest_of(
    numbers,  # [N]
    held,  # so many count, the first ones
):
    """The lowest number."""
    lowest = rank_of(numbers[0])
    for j in range(held):
        lowest = min(lowest, rank_of(numbers[j]))
    return of_rank(lowest)


@jit
def weigh(
    logits,  # [N], become weights: e^(logit - highest logit)
    held,  # so many slots count, the first ones
):
    """The weights of slots before normalisation; returns the highest logit and their sum."""
    highest = highest_of(logits, held)
    total = zero_like(highest)
    for j in range(held):
        weight = exponential(logits[j] - highest)
        logits[j] = weight
        total += weight
    return highest, total


# ---------------------------------------------------------------- who leaves
@jit
def rank_by_score(
    score,  # [N]
    position,  # [N], -1 for an empty slot
    newest_leaver,  # positions beyond it are protected
    rank,  # [N], written: the lowest one leaves
):
    for j in range(position.shape[0]):
        place = score[j]
        if position[j] > newest_leaver:
            place = math.inf
        if position[j] < 0:
            place = -math.inf
        rank[j] = place


@jit
def rank_by_position(
    position,  # [N], -1 for an empty slot
    sinks,  # so many of the first tokens are protected
    newest_leaver,  # positions beyond it are protected
    rank,  # [N], written: the lowest one leaves
):
    for j in range(position.shape[0]):
        place = rank.dtype.type(position[j])
        if position[j] < sinks or position[j] > newest_leaver:
            place = math.inf
        if position[j] < 0:
            place = -math.inf
        rank[j] = place


@jit
def first_out(
    rank,  # [N]
    position,  # [N] int32, of what the slots hold
):
    """The slot with the lowest rank, of equals the one with the lowest position, of empty ones the
    first: `Policy.first_out`.
    """
    N = rank.shape[0]
    lowest = lowest_of(rank, N)
    # Two loops in SIMD, and then a short one; one that keeps the best slot runs in none.
    oldest = NOWHERE
    for j in range(N):
        place = position[j] if rank[j] == lowest else NOWHERE
        oldest = min(oldest, place)
    for j in range(N):
        if rank[j] == lowest and position[j] == oldest:
            return j
    # All are NaN, and it matters to nobody.
    return 0
