"""What a sequence of steps is made of: a token enters, queries attend, a rule says who leaves.

Keys of slots lie transposed here, [D, N]: a query's logits are then a sum of D rows, each a loop
over slots that runs in SIMD. Sums over rows take EIGHT rows at a time, which spares storing and
loading what they add to.
"""

from __future__ import annotations

from lesslib.ops.cpu.common import jit
from lesslib.ops.cpu.elementary import exponential, widened, zero_like

FOUR = 4
EIGHT = 8


@jit
def add_rows(
    weights,  # [rows]
    matrix,  # [rows, columns], may be halves
    rows,  # so many rows count
    columns,  # so many columns count
    total,  # [columns], added to
):
    """total += weights @ matrix, of the first rows and columns."""
    whole = rows - rows % EIGHT
    for r in range(0, whole, EIGHT):
        w0 = weights[r]
        w1 = weights[r + 1]
        w2 = weights[r + 2]
        w3 = weights[r + 3]
        w4 = weights[r + 4]
        w5 = weights[r + 5]
        w6 = weights[r + 6]
        w7 = weights[r + 7]
        for c in range(columns):
            total[c] += (
                w0 * widened(matrix[r, c])
                + w1 * widened(matrix[r + 1, c])
                + w2 * widened(matrix[r + 2, c])
                + w3 * widened(matrix[r + 3, c])
                + w4 * widened(matrix[r + 4, c])
                + w5 * widened(matrix[r + 5, c])
                + w6 * widened(matrix[r + 6, c])
                + w7 * widened(matrix[r + 7, c])
            )
    for r in range(whole, rows):
        weight = weights[r]
        for c in range(columns):
            total[c] += weight * widened(matrix[r, c])


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
def enter(
    key,  # [D], of the new token
    value,  # [Dv]
    keys,  # [D, N], of the slots
    values,  # [N, Dv]
    slot,  # the one that it takes
):
    """The new token's key and value take a slot."""
    for d in range(key.shape[0]):
        keys[d, slot] = key[d]
    for d in range(value.shape[0]):
        values[slot, d] = value[d]


@jit
def highest_of(
    numbers,  # [N]
    held,  # so many count, the first ones
):
    """The highest number; four maxima at once, as each waits for the one before it."""
    h0 = numbers[0]
    h1 = h0
    h2 = h0
    h3 = h0
    whole = held - held % FOUR
    for j in range(0, whole, FOUR):
        h0 = max(h0, numbers[j])
        h1 = max(h1, numbers[j + 1])
        h2 = max(h2, numbers[j + 2])
        h3 = max(h3, numbers[j + 3])
    for j in range(whole, held):
        h0 = max(h0, numbers[j])
    return max(max(h0, h1), max(h2, h3))


@jit
def weigh(
    query,  # [D], times the scaling
    keys,  # [D, N], of the slots
    held,  # so many slots are in use, the first ones
    weights,  # [N], written: e^(logit - highest logit)
):
    """The weights of the slots before normalisation; returns the highest logit and their sum."""
    weights[:held] = 0
    add_rows(query, keys, query.shape[0], held, weights)
    highest = highest_of(weights, held)
    total = zero_like(highest)
    for j in range(held):
        weight = exponential(weights[j] - highest)
        weights[j] = weight
        total += weight
    return highest, total


@jit
def attend(
    query,  # [D], times the scaling
    keys,  # [D, N], of the slots
    values,  # [N, Dv]
    held,  # so many slots are in use, the first ones
    weights,  # [N], written: e^(logit - highest logit)
    output,  # [Dv], written
):
    """Attention over the slots; returns the highest logit and the sum of the weights."""
    highest, total = weigh(query, keys, held, weights)
    Dv = output.shape[0]
    output[:] = 0
    add_rows(weights, values, held, Dv, output)
    share = 1 / total
    for d in range(Dv):
        output[d] *= share
    return highest, total


@jit
def first_of_lowest(
    score,  # [N]
    position,  # [N], of what the slots hold
    newest_leaver,  # positions beyond it are protected
    held,  # so many slots are in use, the first ones
):
    """The slot with the lowest score among those that may leave, the lowest position among equals;
    -1 where none may.
    """
    leaver = -1
    for j in range(held):
        if position[j] > newest_leaver:
            continue
        if leaver < 0:
            leaver = j
            continue
        is_tie = score[j] == score[leaver] and position[j] < position[leaver]
        if score[j] < score[leaver] or is_tie:
            leaver = j
    return leaver
