"""Products of a few rows with a matrix, the inner loops of most kernels, with sums in registers.

Left to itself the compiler keeps sums in memory and loads the matrix once for every row. Here a
tile of sums, some rows by some vectors of columns, stays in registers from the first term to the
last, and what is loaded of the matrix serves all rows of the tile: at LESS's shapes 4 times as
quick with AVX-512, 1.7 times without. Open `write_product` first; `write_tile` is the one place
where vectors are spelled out.
"""

from __future__ import annotations

from typing import Any

from lesslib.ops.cpu.common import jit, numba
from lesslib.ops.cpu.elementary import widened, zero_like

# Of a vector; where registers are smaller, the compiler takes several of them.
VECTOR_BYTES = 64
# A tile has at most so many rows and vectors.
TILE_ROWS = 3
TILE_VECTORS = 4
# Vectors of sums that registers hold, beside what is multiplied
SUMS = 4
SUMS_WITH_AVX512 = 12


def sums_in_registers() -> int:
    """Of the processor that Numba compiles for."""
    if numba is None:
        return SUMS
    from numba.core.codegen import get_host_cpu_features

    features = numba.config.CPU_FEATURES
    if features is None:
        features = get_host_cpu_features()
    return SUMS_WITH_AVX512 if "+avx512f" in features else SUMS


def vectors_of_tile(rows: int) -> int:
    """The vectors of a tile with so many rows: a power of 2."""
    vectors = TILE_VECTORS
    while vectors > 1 and rows * vectors > sums_in_registers():
        vectors //= 2
    return vectors


if numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic, overload

    INDEX = ir.IntType(64)

    @intrinsic(prefer_literal=True)
    def write_tile(
        typing_context: Any,
        weights: Any,  # [all rows, all terms]
        terms: Any,  # so many of them count
        matrix: Any,  # [all terms, all columns]
        out: Any,  # [all rows, all columns], written
        first_row: Any,  # of the tile
        first_column: Any,
        rows: Any,  # of the tile: a constant
        vectors: Any,  # of the tile: a constant
    ) -> Any:
        """out = weights @ matrix, in one tile."""
        given = (weights, terms, matrix, out, first_row, first_column, rows, vectors)
        number_bytes = matrix.dtype.bitwidth // 8
        lanes = VECTOR_BYTES // number_bytes

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = context.get_value_type(matrix.dtype)
            vector = ir.VectorType(number, lanes)

            def address(i: int, row: Any, column: Any, kind: Any) -> Any:
                """Where argument i has what lies in a row from a column on."""
                array = context.make_array(signature.args[i])(context, builder, arguments[i])
                _, columns = cgutils.unpack_tuple(builder, array.shape, 2)
                place = builder.gep(array.data, [builder.add(builder.mul(row, columns), column)])
                return builder.bitcast(place, kind.as_pointer())

            tile_rows = [builder.add(arguments[4], INDEX(r)) for r in range(rows.literal_value)]
            tile_columns = [
                builder.add(arguments[5], INDEX(v * lanes)) for v in range(vectors.literal_value)
            ]
            places = [(r, c) for r in tile_rows for c in tile_columns]
            # A variable for every vector of sums: the compiler puts these into registers.
            zero = ir.Constant(vector, [0.0] * lanes)
            sums = {place: cgutils.alloca_once_value(builder, zero) for place in places}
            with cgutils.for_range(builder, arguments[1], intp=INDEX) as loop:
                term = loop.index
                loaded = {
                    c: builder.load(address(2, term, c, vector), align=number_bytes)
                    for c in tile_columns
                }
                for r in tile_rows:
                    weight = builder.load(address(0, r, term, number))
                    repeated = cgutils_repeat(builder, weight, vector)
                    for c in tile_columns:
                        # "contract": one instruction that multiplies and adds
                        product = builder.fmul(repeated, loaded[c], flags=("contract",))
                        total = builder.fadd(
                            builder.load(sums[r, c]), product, flags=("contract",)
                        )
                        builder.store(total, sums[r, c])
            for r, c in places:
                total = builder.load(sums[r, c])
                builder.store(total, address(3, r, c, vector), align=number_bytes)
            return context.get_dummy_value()

        return types.void(*given), code

    def cgutils_repeat(builder: Any, number: Any, vector: Any) -> Any:
        """A vector that holds a number in all its places."""
        empty = ir.Constant(vector, ir.Undefined)
        one = builder.insert_element(empty, number, INDEX(0))
        first = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
        return builder.shuffle_vector(one, empty, first)


def writer_of_rows(rows: int) -> Any:
    """The function that writes so many rows of a product, tile by tile."""
    vectors = vectors_of_tile(rows)

    @jit
    def write_rows(
        weights,  # [all rows, all terms]
        terms,  # so many of them count
        matrix,  # [all terms, all columns]
        columns,  # so many of them count
        out,  # [all rows, all columns], written
        row,  # the first of these rows
    ):
        lanes = VECTOR_BYTES // out.itemsize
        c = 0
        while vectors >= 4 and c + 4 * lanes <= columns:
            write_tile(weights, terms, matrix, out, row, c, rows, 4)
            c += 4 * lanes
        while vectors >= 2 and c + 2 * lanes <= columns:
            write_tile(weights, terms, matrix, out, row, c, rows, 2)
            c += 2 * lanes
        while c + lanes <= columns:
            write_tile(weights, terms, matrix, out, row, c, rows, 1)
            c += lanes
        # columns that fill no vector
        for r in range(row, row + rows):
            for rest in range(c, columns):
                total = zero_like(out[r, rest])
                for i in range(terms):
                    total += weights[r, i] * matrix[i, rest]
                out[r, rest] = total

    return write_rows


write_one_row = writer_of_rows(1)
write_two_rows = writer_of_rows(2)
write_three_rows = writer_of_rows(3)


@jit
def write_product(
    weights,  # [rows, all terms]
    terms,  # so many of them count
    matrix,  # [all terms, all columns]
    columns,  # so many of them count
    out,  # [rows, all columns], written
):
    """out = weights @ matrix, of the first terms and columns; arrays are contiguous."""
    rows = weights.shape[0]
    row = 0
    # Of four rows two pairs are quicker than three rows and one.
    while rows - row == 3 or rows - row > 4:
        write_three_rows(weights, terms, matrix, columns, out, row)
        row += 3
    while rows - row >= 2:
        write_two_rows(weights, terms, matrix, columns, out, row)
        row += 2
    if row < rows:
        write_one_row(weights, terms, matrix, columns, out, row)
