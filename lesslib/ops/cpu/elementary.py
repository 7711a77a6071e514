"""Functions of single numbers: those of the C library would keep a loop from running in SIMD.

And half-precision numbers from the bits that hold them. Each is chosen by the type of its argument,
so that one kernel serves float32, float64 and halves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lesslib.ops.cpu.common import jit, numba

# log2(e), and ln 2 in two parts, the first of few bits so that its multiples are exact
LOG2_E = np.float32(1.44269504)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
ONE = np.float32(1.0)
# below it e^x is not a normal number of float32
LOWEST = np.float32(-88.0)
# the bias of the exponent in float32's bits, and a half to round
HALF_ABOVE_BIAS = np.float32(127.5)


def exponential(x: Any) -> Any:
    """e^x of a number that is not above 0, as every logit less the highest one is.

    In float32 within 2e-7 of itself, and 0 below e^-87; in float64 the C library's.
    """
    return math.exp(x)


def zero_like(x: Any) -> Any:
    """0 in the type of x, where a sum of that type starts."""
    return 0 * x


def widened(x: Any) -> Any:
    """A number as sums take it: halves, from their bits, as float32; others as they are."""
    return x


@jit
def float32_exponential(x):
    # Written so that NaN stays NaN.
    x = LOWEST if x < LOWEST else x
    # 2^n e^r, with n counted from -127 and r = x - n ln 2 within half of ln 2.
    n = np.int32(x * LOG2_E + HALF_ABOVE_BIAS)
    whole = np.float32(n - 127)
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


@jit
def float64_exponential(x):
    return math.exp(x)


@jit
def float32_zero(x):
    return np.float32(0)


@jit
def float64_zero(x):
    return np.float64(0)


if numba is not None:
    from numba import types
    from numba.extending import intrinsic, overload

    @intrinsic
    def float32_of_bits(typing_context: Any, bits: Any) -> Any:
        """The float32 whose bits an int32 holds."""

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(types.float32))

        return types.float32(types.int32), code

    # What numba compiles where one of the functions above is called.
    @overload(exponential)
    def exponential_by_type(x):
        if x == types.float32:
            return lambda x: float32_exponential(x)
        return lambda x: float64_exponential(x)

    @overload(zero_like)
    def zero_by_type(x):
        if x == types.float32:
            return lambda x: float32_zero(x)
        return lambda x: float64_zero(x)
