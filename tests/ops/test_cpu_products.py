"""Products in tiles against NumPy, at shapes that fill no tile, and of halves as bits."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="Numba is not installed")

from lesslib.ops.cpu.common import array
from lesslib.ops.cpu.products import write_dots, write_product
from lesslib.ops.cpu.steps import highest_of

# rows, terms, columns
SHAPES = [(1, 5, 3), (2, 16, 16), (3, 37, 130), (4, 64, 103), (8, 50, 41)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def numbers(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_equals_numpy(shape, dtype):
    rows, terms, columns = shape
    wide = torch.promote_types(dtype, torch.float32)
    weights = numbers(0, rows, terms + 2, dtype=wide)
    matrix = numbers(1, terms + 2, columns, dtype=dtype)
    out = np.full((rows, columns), np.nan, weights.numpy().dtype)
    write_product(weights.numpy(), terms, array(matrix), columns, out)
    wanted = weights[:, :terms].double() @ matrix[:terms].double()
    np.testing.assert_allclose(
        out, wanted.numpy(), rtol=0, atol=1e-12 if wide != torch.float32 else 2e-5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dot_products_equal_numpy(shape, dtype):
    count, terms, others = shape
    wide = torch.promote_types(dtype, torch.float32)
    rows = numbers(0, count, terms, dtype=wide)
    matrix = numbers(1, others, terms, dtype=dtype)
    out = np.full((count, others), np.nan, rows.numpy().dtype)
    write_dots(rows.numpy(), array(matrix), out)
    wanted = rows.double() @ matrix.double().T
    np.testing.assert_allclose(
        out, wanted.numpy(), rtol=0, atol=1e-12 if wide != torch.float32 else 2e-5
    )


def test_halves_keep_infinity_zero_and_the_smallest_numbers():
    for dtype in (torch.bfloat16, torch.float16):
        values = [float("inf"), -float("inf"), 0.0, -0.0, 6e-8, -3.5, 65504.0]
        matrix = torch.tensor([values + [0.0] * 25], dtype=dtype)
        out = np.zeros((1, 32), np.float32)
        write_product(np.ones((1, 1), np.float32), 1, array(matrix), 32, out)
        np.testing.assert_array_equal(out, matrix.float().numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_highest_number_is_found_among_all_signs(dtype):
    numbers = np.array([-3.0, -1.5, -7.0, -0.25, -9.0], dtype)
    assert highest_of(numbers, 5) == dtype(-0.25)
    assert highest_of(numbers, 3) == dtype(-1.5)
    numbers[1] = 1e-30
    assert highest_of(numbers, 5) == dtype(1e-30)
    numbers[2] = np.nan
    assert np.isnan(highest_of(numbers, 5))
