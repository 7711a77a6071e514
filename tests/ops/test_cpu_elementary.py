"""Functions of single numbers that the CPU kernels are made of, against torch's in float64."""

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba", reason="numba is not installed: the torch forms serve")

from lesslib.ops.cpu.common import array, jit  # noqa: E402
from lesslib.ops.cpu.elementary import exponential, gelu, widened  # noqa: E402


@jit
def exponentials(x, out):
    for i in range(x.shape[0]):
        out[i] = exponential(x[i])


@jit
def gelus(x, out):
    for i in range(x.shape[0]):
        out[i] = gelu(x[i])


@jit
def widened_all(x, out):
    for i in range(x.shape[0]):
        out[i] = widened(x[i])


def applied(loop, x, dtype=None):
    out = torch.empty_like(x, dtype=dtype)
    loop(array(x), array(out))
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_exponentials(dtype, tolerance):
    x = torch.cat([-torch.rand(100_000) * 87, torch.linspace(-1, 0, 1000)]).to(dtype)
    want = x.double().exp()
    assert ((applied(exponentials, x).double() - want).abs() / want).max() <= tolerance


def test_the_exponential_of_what_is_far_below_is_zero_and_of_nan_is_nan():
    x = torch.tensor([-100.0, -1e5, -1e20, -3e38, -torch.inf, torch.nan, 0.0])
    got = applied(exponentials, x)
    assert not got[:5].any()
    assert got[5].isnan()
    assert got[6] == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_gelu(dtype, tolerance):
    x = torch.cat([torch.linspace(-30, 30, 100_001), torch.tensor([-1e30, 1e30])]).to(dtype)
    want = torch.nn.functional.gelu(x.double())
    error = (applied(gelus, x).double() - want).abs()
    # beyond 8 it is x, as it is rounded
    assert (error <= tolerance * want.abs().clamp(min=1)).all()
    assert applied(gelus, torch.tensor([torch.nan], dtype=dtype)).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_halves_are_widened_exactly(dtype):
    x = torch.from_numpy(np.arange(2**16, dtype=np.uint16)).view(dtype)
    got = applied(widened_all, x, torch.float32)
    torch.testing.assert_close(got, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("loop", [exponentials, gelus], ids=["exponential", "gelu"])
def test_loops_in_float32_run_in_simd(loop):
    x = torch.zeros(8)
    applied(loop, x)
    of_float32 = next(s for s in loop.signatures if s[0].dtype == numba.float32)
    code = loop.inspect_llvm(of_float32)
    # a loop that was not vectorised has no operations on vectors of floats
    assert "fmul" in code
    assert " x float>" in code
