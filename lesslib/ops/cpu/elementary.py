"""Functions of single numbers: those of the C library would keep a loop from running in SIMD.

And half-precision numbers from the bits that hold them. Each is chosen by the type of its argument,
so that one kernel serves float32, float64 and halves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lesslib.ops.cpu.common import jit_as_written, numba

# log2(e), and ln 2 in two parts, the first of few bits so that its multiples are exact
LOG2_E = np.float32(1.44269504)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
# below it e^x is not a normal number of float32
LOWEST = np.float32(-88.0)
# the bias of the exponent in float32's bits, and with a half more, to round
BIAS = np.float32(127.0)
HALF_ABOVE_BIAS = np.float32(127.5)
HALF = np.float32(0.5)
SQRT_HALF = np.float32(math.sqrt(0.5))
# of the normal distribution's density
INVERSE_ROOT = (2 * math.pi) ** -0.5
FLOAT32_INVERSE_ROOT = np.float32(INVERSE_ROOT)
# 2^112, by which exponents of float16 and float32 differ
FLOAT16_SCALE = np.float32(2.0**112)
# bits without the sign, of infinity in float16 and float32
FLOAT16_INFINITY = 0x7C00
FLOAT32_INFINITY = 0x7F800000


def exponential(x: Any) -> Any:
    """e^x of a number that is not above 0, as every logit less the highest one is.

    In float32 within 2e-7 of itself, and 0 below e^-87; in float64 the C library's.
    """
    return math.exp(x)


def gelu(x: Any) -> Any:
    """x times the normal distribution's share below x: torch's `gelu`.

    In float32 within 1e-6, in float64 by the C library's erf.
    """
    return x * (1 + math.erf(x * math.sqrt(0.5))) / 2


def gelu_and_slope(x: Any) -> Any:
    """`gelu` and its derivative: with P the normal distribution's share below x and p its density,
    x P and P + x p.
    """
    share = math.erfc(-x * math.sqrt(0.5)) / 2
    return x * share, share + x * math.exp(-x * x / 2) * INVERSE_ROOT


def zero_like(x: Any) -> Any:
    """0 in the type of x, where a sum of that type starts."""
    return 0 * x


def rank_of(x: Any) -> Any:
    """An integer that is higher the higher x is, and highest for NaN: the highest of integers is
    found in SIMD, that of numbers one by one, as one of them may be NaN.
    """
    return x


def of_rank(rank: Any) -> Any:
    """The number whose `rank_of` is an int32 or an int64."""
    return rank


def widened(x: Any) -> Any:
    """A number as sums take it: halves, from their bits, as float32; others as they are.

    The bits are those of `common.BITS`: a uint16 holds a bfloat16, an int16 a float16.
    """
    return x


def narrowed(x: Any, like: Any) -> Any:
    """x in the type of `like`: a bfloat16's bits, rounded to the nearest; others as they are."""
    return x


@jit_as_written
def float32_exponential(x):
    # Written so that NaN stays NaN.
    x = LOWEST if x < LOWEST else x
    # 2^n e^r, with n counted from -127 and r = x - n ln 2 within half of ln 2. The difference is of
    # floats: one of integers would have 64 bits, which AVX2 cannot convert.
    n = np.int32(x * LOG2_E + HALF_ABOVE_BIAS)
    whole = np.float32(n) - BIAS
    r = x - whole * LN2_HIGH
    r = r - whole * LN2_LOW
    # coefficients of Cephes' expf
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + ONE
    # n = 0 has the bits of zero
    return p * float32_of_bits(np.int32(n << 23))


@jit_as_written
def float64_exponential(x):
    return math.exp(x)


@jit_as_written
def float32_zero(x):
    return np.float32(0)


@jit_as_written
def float64_zero(x):
    return np.float64(0)


@jit_as_written
def float32_gelu(x):
    # max(x, 0) - |x| / 2 * erfc(|x| / sqrt 2): no difference of numbers near 1
    y = abs(x) * SQRT_HALF
    # Abramowitz and Stegun 7.1.26, within 1.5e-7
    t = ONE / (ONE + np.float32(0.3275911) * y)
    p = np.float32(1.061405429)
    p = p * t - np.float32(1.453152027)
    p = p * t + np.float32(1.421413741)
    p = p * t - np.float32(0.284496736)
    p = p * t + np.float32(0.254829592)
    tail = p * t * float32_exponential(-y * y)
    return max(x, ZERO) - HALF * abs(x) * tail


@jit_as_written
def float64_gelu(x):
    return x * (1 + math.erf(x * math.sqrt(0.5))) / 2


@jit_as_written
def float32_rank(x):
    return flipped_int32(bits_of_float32(x))


@jit_as_written
def float64_rank(x):
    return flipped_int64(bits_of_float64(x))


@jit_as_written
def flipped_int32(bits):
    # Of numbers below 0 all bits but the sign are flipped: the larger they are, the lower.
    return np.int32(bits ^ np.int32(np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))


@jit_as_written
def flipped_int64(bits):
    return bits ^ ((bits >> 63) & np.int64(0x7FFFFFFFFFFFFFFF))


@jit_as_written
def float32_of_rank(rank):
    return float32_of_bits(flipped_int32(rank))


@jit_as_written
def float64_of_rank(rank):
    return float64_of_bits(flipped_int64(rank))


@jit_as_written
def float32_gelu_and_slope(x):
    # as in float32_gelu: the share beyond |x| is half of erfc
    y = abs(x) * SQRT_HALF
    t = ONE / (ONE + np.float32(0.3275911) * y)
    p = np.float32(1.061405429)
    p = p * t - np.float32(1.453152027)
    p = p * t + np.float32(1.421413741)
    p = p * t - np.float32(0.284496736)
    p = p * t + np.float32(0.254829592)
    power = float32_exponential(-y * y)
    beyond = HALF * p * t * power
    share = beyond if x < 0 else ONE - beyond
    return x * share, share + x * power * FLOAT32_INVERSE_ROOT


@jit_as_written
def float64_gelu_and_slope(x):
    share = math.erfc(-x * math.sqrt(0.5)) / 2
    return x * share, share + x * math.exp(-x * x / 2) * INVERSE_ROOT


@jit_as_written
def bits_of_bfloat16(x):
    bits = bits_of_float32(x)
    # of two equally near, the even one
    is_odd = np.int32(np.int32(bits >> 16) & 1)
    return np.uint16(np.int32(bits + np.int32(0x7FFF) + is_odd) >> 16)


@jit_as_written
def widened_bfloat16(x):
    return float32_of_bits(np.int32(np.int32(x) << 16))


@jit_as_written
def widened_float16(x):
    magnitude = np.int32(x) & 0x7FFF
    value = float32_of_bits(np.int32(magnitude << 13)) * FLOAT16_SCALE
    if magnitude >= FLOAT16_INFINITY:
        value = float32_of_bits(np.int32((magnitude << 13) | FLOAT32_INFINITY))
    return -value if x < 0 else value


if numba is not None:
    from numba import types
    from numba.extending import intrinsic, overload

    def bits_as(source: Any, target: Any) -> Any:
        """A function that takes the bits of a `source` for a `target`."""

        @intrinsic
        def cast(typing_context: Any, x: Any) -> Any:
            def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                return builder.bitcast(arguments[0], context.get_value_type(target))

            return target(source), code

        return cast

    float32_of_bits = bits_as(types.int32, types.float32)
    float64_of_bits = bits_as(types.int64, types.float64)
    bits_of_float32 = bits_as(types.float32, types.int32)
    bits_of_float64 = bits_as(types.float64, types.int64)

    # What numba compiles where one of the functions above is called.
    @overload(exponential)
    def exponential_by_type(x):
        if x == types.float32:
            return lambda x: float32_exponential(x)
        return lambda x: float64_exponential(x)

    @overload(gelu)
    def gelu_by_type(x):
        if x == types.float32:
            return lambda x: float32_gelu(x)
        return lambda x: float64_gelu(x)

    @overload(gelu_and_slope)
    def gelu_and_slope_by_type(x):
        if x == types.float32:
            return lambda x: float32_gelu_and_slope(x)
        return lambda x: float64_gelu_and_slope(x)

    @overload(narrowed)
    def narrowed_by_type(x, like):
        if like == types.uint16:
            return lambda x, like: bits_of_bfloat16(x)
        return lambda x, like: x

    @overload(zero_like)
    def zero_by_type(x):
        if x == types.float32:
            return lambda x: float32_zero(x)
        return lambda x: float64_zero(x)

    @overload(rank_of)
    def rank_by_type(x):
        if x == types.float32:
            return lambda x: float32_rank(x)
        return lambda x: float64_rank(x)

    @overload(of_rank)
    def number_by_type(rank):
        if rank == types.int32:
            return lambda rank: float32_of_rank(rank)
        return lambda rank: float64_of_rank(rank)

    @overload(widened)
    def widened_by_type(x):
        if x == types.uint16:
            return lambda x: widened_bfloat16(x)
        if x == types.int16:
            return lambda x: widened_float16(x)
        return lambda x: x
