"""A prompt's rows of logits, which torch's matmuls give: weights, and what each key got."""

from __future__ import annotations

from torch import Tensor

from lesslib.ops.cpu.common import array, jit, over_rows, rows_for_a_thread
from lesslib.ops.cpu.elementary import exponential, zero_like
from lesslib.ops.cpu.steps import add_scaled

# What a number of a row costs, in multiplications and additions: an exponential, mostly
WORK = 16


@jit
def weigh_kernel(
    first_row,  # rows are query heads of sequences, B * Hq
    last_row,
    logits,  # [rows, b, n], become weights e^(logit - highest)
    is_counted,  # [rows, b], whether the columns add up a query's probabilities
    columns,  # [rows, M], added to; the first n are those of the logits
    highest,  # [rows, b], logits
    total,  # [rows, b], written: the sum of the weights
):
    _, b, n = logits.shape
    for row in range(first_row, last_row):
        for i in range(b):
            weights = logits[row, i]
            top = highest[row, i]
            added = zero_like(top)
            for j in range(n):
                weight = exponential(weights[j] - top)
                weights[j] = weight
                added += weight
            total[row, i] = added
            if is_counted[row, i]:
                add_scaled(weights, weights.dtype.type(1 / added), n, columns[row])


def weigh_rows(logits: Tensor, is_counted: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.blocks.weigh_rows`: a row is read once, where the torch form reads it six times.

    logits [rows, G, b, n] and columns [rows, G, M >= n] in float32 or float64, contiguous, change
    in place; `is_counted` [rows, b].
    """
    rows, G, b, n = logits.shape
    highest = logits.amax(-1, keepdim=True)
    total = logits.new_empty(rows, G, b, 1)
    counted = is_counted[:, None].expand(rows, G, b).reshape(rows * G, b)
    tensors = (logits.flatten(0, 1), counted, columns.flatten(0, 1))
    results = (highest.view(rows * G, b), total.view(rows * G, b))
    arrays = [array(x) for x in (*tensors, *results)]
    over_rows(weigh_kernel, rows * G, *arrays, at_once=rows_for_a_thread(WORK * b * n))
    return highest, total
