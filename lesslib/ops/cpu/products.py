"""Products of a few rows with a matrix, the inner loops of all kernels, with sums in registers.

Left to itself the compiler keeps sums in memory and loads the matrix once for every row. Here a
tile of sums stays in registers from the first term to the last, and what is loaded of the matrix
serves all rows of the tile: at LESS's shapes 4 times as quick with AVX-512, 1.7 times without.
Open `write_product` and `write_dots` first; above them is what spells out vectors for the compiler.
"""

from __future__ import annotations

import itertools
from typing import Any

from lesslib.ops.cpu.common import jit, numba
from lesslib.ops.cpu.elementary import (
    FLOAT16_INFINITY,
    FLOAT16_SCALE,
    FLOAT32_INFINITY,
    widened,
    zero_like,
)

# Of a vector of sums; where registers are smaller, the compiler takes several of them.
VECTOR_BYTES = 64
# A tile has at most so many vectors beside each other.
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
    """The vectors beside each other in a tile of so many rows: a power of 2."""
    vectors = TILE_VECTORS
    while vectors > 1 and rows * vectors > sums_in_registers():
        vectors //= 2
    return vectors


# ---------------------------------------------------------------- vectors for the compiler
if numba is not None:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    INDEX = ir.IntType(64)

    class Matrix:
        """An array [rows, columns] in code for the compiler, whose numbers are loaded as `wide`,
        the type of sums.
        """

        def __init__(self, context: Any, builder: Any, kind: Any, array: Any, wide: Any) -> None:
            # Where a row begins is computed from the number of columns.
            assert kind.layout == "C"
            array = context.make_array(kind)(context, builder, array)
            self.builder = builder
            self.kind = kind.dtype
            self.number = context.get_value_type(kind.dtype)
            self.number_bytes = kind.dtype.bitwidth // 8
            self.data = array.data
            self.columns = cgutils.unpack_tuple(builder, array.shape, 2)[1]
            self.lanes = VECTOR_BYTES // (wide.bitwidth // 8)
            self.vector = ir.VectorType(self.number, self.lanes)

        def address(self, row: Any, column: Any, kind: Any) -> Any:
            builder = self.builder
            offset = builder.add(builder.mul(row, self.columns), column)
            return builder.bitcast(builder.gep(self.data, [offset]), kind.as_pointer())

        def load(self, row: Any, column: Any) -> Any:
            """The vector of numbers from a column on."""
            address = self.address(row, column, self.vector)
            vector = self.builder.load(address, align=self.number_bytes)
            return widened_vector(self.builder, vector, self.kind)

        def load_repeated(self, row: Any, column: Any) -> Any:
            """A vector that holds one number in all its places."""
            builder = self.builder
            number = builder.load(self.address(row, column, self.number))
            empty = ir.Constant(self.vector, ir.Undefined)
            first = builder.insert_element(empty, number, INDEX(0))
            return builder.shuffle_vector(first, empty, constant_indices([0] * self.lanes))

        def store(self, numbers: Any, row: Any, column: Any) -> None:
            address = self.address(row, column, numbers.type)
            self.builder.store(numbers, address, align=self.number_bytes)

    def constant_indices(indices: list[int]) -> Any:
        return ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), indices)

    def widened_vector(builder: Any, vector: Any, kind: Any) -> Any:
        """`elementary.widened` of a vector."""
        if isinstance(kind, types.Float):
            return vector
        whole = ir.VectorType(ir.IntType(32), vector.type.count)
        real = ir.VectorType(ir.FloatType(), vector.type.count)

        def repeated(number: int) -> Any:
            return ir.Constant(whole, [number] * whole.count)

        bits = builder.zext(vector, whole)
        if kind == types.uint16:
            return builder.bitcast(builder.shl(bits, repeated(16)), real)
        magnitude = builder.shl(builder.and_(bits, repeated(0x7FFF)), repeated(13))
        scale = ir.Constant(real, [float(FLOAT16_SCALE)] * real.count)
        finite = builder.bitcast(builder.fmul(builder.bitcast(magnitude, real), scale), whole)
        infinite = builder.or_(magnitude, repeated(FLOAT32_INFINITY))
        is_finite = builder.icmp_unsigned("<", magnitude, repeated(FLOAT16_INFINITY << 13))
        sign = builder.shl(builder.and_(bits, repeated(0x8000)), repeated(16))
        return builder.bitcast(builder.or_(sign, builder.select(is_finite, finite, infinite)), real)

    def added_up(builder: Any, vectors: list[Any]) -> Any:
        """The sum of the numbers of each vector, as one vector of so many numbers.

        Halves of vectors are added until each of them has one number left. Vectors are 2^n; two
        that were halved go on together as one.
        """
        groups = 1
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [halved(builder, first, second, groups) for first, second in pairs]
            groups *= 2
        vector = vectors[0]
        while vector.type.count > groups:
            vector = halved(builder, vector, None, groups)
        return vector

    def halved(builder: Any, first: Any, second: Any, groups: int) -> Any:
        """Of each group of numbers that lie together, the first half plus the second half."""
        length = first.type.count
        numbers = list(range(length if second is None else 2 * length))
        half = length // groups // 2
        firsts = [n for n in numbers if n // half % 2 == 0]
        seconds = [n for n in numbers if n // half % 2 == 1]
        other = ir.Constant(first.type, ir.Undefined) if second is None else second
        a = builder.shuffle_vector(first, other, constant_indices(firsts))
        b = builder.shuffle_vector(first, other, constant_indices(seconds))
        return builder.fadd(a, b)

    @intrinsic(prefer_literal=True)
    def write_product_tile(
        typing_context: Any,
        weights: Any,  # [all rows, all terms]
        terms: Any,  # so many of them count
        matrix: Any,  # [all terms, all columns], may be halves
        out: Any,  # [all rows, all columns], written
        first_row: Any,  # of the tile
        first_column: Any,  # of the tile
        rows: Any,  # of the tile: a constant
        vectors: Any,  # of the tile, beside each other: a constant
    ) -> Any:
        """out = weights @ matrix, in one tile."""
        given = (weights, terms, matrix, out, first_row, first_column, rows, vectors)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w = Matrix(context, builder, weights, arguments[0], weights.dtype)
            m = Matrix(context, builder, matrix, arguments[2], weights.dtype)
            o = Matrix(context, builder, out, arguments[3], weights.dtype)
            tile_rows = places_from(builder, arguments[4], rows.literal_value, 1)
            tile_columns = places_from(builder, arguments[5], vectors.literal_value, o.lanes)
            sums = sums_of_tile(builder, o.vector, tile_rows, tile_columns)
            with cgutils.for_range(builder, arguments[1], intp=INDEX) as loop:
                loaded = {c: m.load(loop.index, c) for c in tile_columns}
                for r in tile_rows:
                    weight = w.load_repeated(r, loop.index)
                    for c in tile_columns:
                        add_product(builder, sums[r, c], weight, loaded[c])
            for (r, c), total in sums.items():
                o.store(builder.load(total), r, c)
            return context.get_dummy_value()

        return types.void(*given), code

    @intrinsic(prefer_literal=True)
    def write_dots_tile(
        typing_context: Any,
        rows: Any,  # [all rows, all terms]
        vectors: Any,  # so many vectors of terms count
        others: Any,  # [all others, all terms], may be halves
        out: Any,  # [all rows, all others], written
        first_row: Any,  # of the tile
        first_other: Any,  # of the tile
        height: Any,  # rows of the tile: a constant
        width: Any,  # others of the tile: a constant, a power of 2
    ) -> Any:
        """out = rows @ others.T, in one tile."""
        given = (rows, vectors, others, out, first_row, first_other, height, width)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a = Matrix(context, builder, rows, arguments[0], rows.dtype)
            b = Matrix(context, builder, others, arguments[2], rows.dtype)
            o = Matrix(context, builder, out, arguments[3], rows.dtype)
            tile_rows = places_from(builder, arguments[4], height.literal_value, 1)
            tile_others = places_from(builder, arguments[5], width.literal_value, 1)
            sums = sums_of_tile(builder, o.vector, tile_rows, tile_others)
            with cgutils.for_range(builder, arguments[1], intp=INDEX) as loop:
                term = builder.mul(loop.index, INDEX(a.lanes))
                loaded = {c: b.load(c, term) for c in tile_others}
                for r in tile_rows:
                    row = a.load(r, term)
                    for c in tile_others:
                        add_product(builder, sums[r, c], row, loaded[c])
            for r in tile_rows:
                totals = added_up(builder, [builder.load(sums[r, c]) for c in tile_others])
                o.store(totals, r, tile_others[0])
            return context.get_dummy_value()

        return types.void(*given), code

    def places_from(builder: Any, first: Any, count: int, step: int) -> list[Any]:
        return [builder.add(first, INDEX(i * step)) for i in range(count)]

    def sums_of_tile(builder: Any, vector: Any, rows: list[Any], columns: list[Any]) -> dict:
        """A variable for each vector of sums, at 0; the compiler puts these into registers."""
        zero = ir.Constant(vector, [0.0] * vector.count)
        places = itertools.product(rows, columns)
        return {place: cgutils.alloca_once_value(builder, zero) for place in places}

    def add_product(builder: Any, total: Any, x: Any, y: Any) -> None:
        """total += x * y, which "contract" lets the compiler make one instruction."""
        product = builder.fmul(x, y, flags=("contract",))
        after = builder.fadd(builder.load(total), product, flags=("contract",))
        builder.store(after, total)


# ---------------------------------------------------------------- weights @ matrix
def product_of_rows(rows: int) -> Any:
    """The function that writes so many rows of a product, tile by tile."""
    vectors = vectors_of_tile(rows)

    @jit
    def write_rows(
        weights,  # [all rows, all terms]
        terms,  # so many of them count
        matrix,  # [all terms, all columns], may be halves
        columns,  # so many of them count
        out,  # [all rows, all columns], written
        row,  # the first of these rows
    ):
        lanes = VECTOR_BYTES // out.itemsize
        c = 0
        while vectors >= 4 and c + 4 * lanes <= columns:
            write_product_tile(weights, terms, matrix, out, row, c, rows, 4)
            c += 4 * lanes
        while vectors >= 2 and c + 2 * lanes <= columns:
            write_product_tile(weights, terms, matrix, out, row, c, rows, 2)
            c += 2 * lanes
        while c + lanes <= columns:
            write_product_tile(weights, terms, matrix, out, row, c, rows, 1)
            c += lanes
        # columns that fill no vector
        for r in range(row, row + rows):
            for rest in range(c, columns):
                total = zero_like(out[r, rest])
                for i in range(terms):
                    total += weights[r, i] * widened(matrix[i, rest])
                out[r, rest] = total

    return write_rows


product_of_one_row = product_of_rows(1)
product_of_two_rows = product_of_rows(2)
product_of_three_rows = product_of_rows(3)


@jit
def write_product(
    weights,  # [rows, all terms]
    terms,  # so many of them count
    matrix,  # [all terms, all columns], may be halves
    columns,  # so many of them count
    out,  # [rows, all columns], written
):
    """out = weights @ matrix, of the first terms and columns; arrays are contiguous."""
    rows = weights.shape[0]
    row = 0
    # Of four rows two pairs are quicker than three rows and one.
    while rows - row == 3 or rows - row > 4:
        product_of_three_rows(weights, terms, matrix, columns, out, row)
        row += 3
    while rows - row >= 2:
        product_of_two_rows(weights, terms, matrix, columns, out, row)
        row += 2
    if row < rows:
        product_of_one_row(weights, terms, matrix, columns, out, row)


# ---------------------------------------------------------------- rows @ others.T
def dots_of_rows(height: int) -> Any:
    """The function that writes so many rows of dot products, tile by tile."""
    width = vectors_of_tile(height)

    @jit
    def write_rows(
        rows,  # [all rows, terms]
        others,  # [others, terms], may be halves
        out,  # [all rows, others], written
        row,  # the first of these rows
    ):
        terms = rows.shape[1]
        vectors = terms * rows.itemsize // VECTOR_BYTES
        last = others.shape[0]
        c = 0
        while c + width <= last:
            write_dots_tile(rows, vectors, others, out, row, c, height, width)
            c += width
        while c < last:
            write_dots_tile(rows, vectors, others, out, row, c, height, 1)
            c += 1
        # terms that fill no vector
        first = vectors * VECTOR_BYTES // rows.itemsize
        if first < terms:
            for r in range(row, row + height):
                for c in range(last):
                    total = out[r, c]
                    for i in range(first, terms):
                        total += rows[r, i] * widened(others[c, i])
                    out[r, c] = total

    return write_rows


dots_of_one_row = dots_of_rows(1)
dots_of_two_rows = dots_of_rows(2)
dots_of_three_rows = dots_of_rows(3)


@jit
def write_dots(
    rows,  # [rows, terms]
    others,  # [others, terms], may be halves
    out,  # [rows, others], written
):
    """out = rows @ others.T; arrays are contiguous."""
    count = rows.shape[0]
    row = 0
    while count - row == 3 or count - row > 4:
        dots_of_three_rows(rows, others, out, row)
        row += 3
    while count - row >= 2:
        dots_of_two_rows(rows, others, out, row)
        row += 2
    if row < count:
        dots_of_one_row(rows, others, out, row)
