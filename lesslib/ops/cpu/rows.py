from lesslib.ops.cpu.common import jit
from lesslib.ops.cpu.elementary import widened
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


