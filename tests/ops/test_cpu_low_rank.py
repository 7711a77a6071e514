"""The state's features, reading and absorption in the CPU kernels, against torch in float64."""

import copy

import pytest
import torch

from lesslib.states import LayerKernels, LayerPerformer

pytest.importorskip("numba", reason="numba is not installed: the torch forms serve")

from lesslib.ops import cpu

F32 = torch.float32
F64 = torch.float64
F16 = torch.float16
BF16 = torch.bfloat16
# of the largest value; halves are read exactly, and summed in float32
TOLERANCE = {F32: 5e-6, F64: 1e-12, F16: 5e-6, BF16: 5e-6}


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=F32):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    return normal


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize(
    ("B", "S", "heads", "D", "R", "hidden", "dtype", "weights"),
    [
        (1, 1, 1, 32, 1, 512, F32, F32),
        (5, 1, 4, 128, 8, 100, F32, F32),
        (8, 1, 3, 64, 8, 128, F32, F32),
        (2, 7, 2, 19, 16, 40, F64, F64),
        (1, 7, 2, 256, 64, 96, F32, F32),
        (2, 5, 2, 64, 8, 96, F16, F32),
        (3, 7, 2, 128, 16, 512, BF16, BF16),
        # of many tokens
        (2, 37, 2, 80, 16, 40, F32, F32),
        (3, 33, 2, 16, 5, 9, F64, F64),
    ],
)
def test_features_equal_those_of_the_kernels(B, S, heads, D, R, hidden, dtype, weights, draw):
    kernels = LayerKernels(heads, heads, D, R, hidden).to(weights).eval()
    torch.nn.init.uniform_(kernels.s1, -2, 2)
    torch.nn.init.uniform_(kernels.s2, -2, 2)
    exact = copy.deepcopy(kernels).double()
    # as a model gives them, heads after tokens in memory
    x = draw(B, S, heads, D, dtype=dtype).transpose(1, 2)
    tolerance = TOLERANCE[weights]
    of_queries = kernels.fused_phi(cpu, x)
    close(of_queries, exact.phi(x.double()), tolerance)
    of_keys = kernels.fused_psi(cpu, x)
    close(of_keys, exact.psi(x.double()), tolerance)
    assert of_queries.dtype == of_keys.dtype == torch.promote_types(weights, F32)
    assert not of_queries.requires_grad


def torch_read(features, H, z):
    grouped = features.unflatten(1, (H.shape[1], -1))  # [B, Hkv, G, S, R]
    weight = (grouped @ z[:, :, None, :, None])[..., 0]
    output = (grouped @ H[:, :, None]) / weight[..., None]
    output = output.masked_fill(weight[..., None] == 0, 0.0)
    return output.flatten(1, 2), weight.log().flatten(1, 2)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("B", "S", "Hq", "Hkv", "R", "Dv"),
    [(8, 1, 9, 3, 8, 64), (1, 37, 2, 2, 16, 19), (2, 7, 20, 1, 64, 32), (1, 70, 3, 1, 1, 256)],
)
def test_read_gives_the_part_of_the_state(B, S, Hq, Hkv, R, Dv, dtype, draw):
    features = draw(B, S, Hq, R, dtype=dtype).abs().transpose(1, 2)
    H = draw(B, Hkv, R, Dv, dtype=dtype)
    z = draw(B, Hkv, R, dtype=dtype).abs()
    # a query whose features are all 0 finds nothing
    features[:, 0, 0] = 0
    want, want_sum = torch_read(features.double(), H.double(), z.double())
    output, logsumexp = cpu.read(features, H, z)
    assert output.dtype == logsumexp.dtype == dtype
    close(output, want, TOLERANCE[dtype])
    finds_nothing = want_sum == -torch.inf
    assert finds_nothing.any()
    assert torch.equal(logsumexp == -torch.inf, finds_nothing)
    close(
        logsumexp.masked_fill(finds_nothing, 0),
        want_sum.masked_fill(finds_nothing, 0),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize(("n", "R", "Dv"), [(1, 8, 64), (37, 16, 19), (70, 64, 32), (7, 1, 256)])
def test_absorb_adds_to_the_state_what_held_a_token(n, R, Dv, dtype, draw):
    wide = torch.promote_types(dtype, F32)
    H = draw(2, 2, R, Dv, dtype=wide)
    z = draw(2, 2, R, dtype=wide)
    features = draw(2, 2, n, R, dtype=wide)
    v = draw(2, 2, n, Dv, dtype=dtype)
    is_held = draw(2, 2, n) > 0
    is_held[0] = False
    is_held[1, 0] = True
    counted = features.double() * is_held[..., None]
    wanted = H.double() + counted.mT @ v.double()
    weights = z.double() + counted.sum(2)
    untouched = H[0].clone()
    cpu.absorb(H, z, features, v, is_held)
    close(H, wanted, TOLERANCE[wide])
    close(z, weights, TOLERANCE[wide])
    assert torch.equal(H[0], untouched)


def test_a_state_with_features_of_its_own_reads_and_absorbs_by_the_kernels(draw, monkeypatch):
    state = LayerPerformer(4, 2, 16, 8, torch.Generator().manual_seed(0))
    k, v, q = draw(2, 2, 5, 16), draw(2, 2, 5, 6), draw(2, 4, 1, 16)
    parts = []
    for form in ("torch", "cpu"):
        monkeypatch.setenv("LESS_OPS", form)
        memory = state.empty(k, v)
        state.absorb(memory, k, v, torch.ones(2, 2, 5, dtype=torch.bool))
        parts.append(state.read(memory, q, 0.25))
    for got, want in zip(*parts, strict=True):
        close(got, want.double(), 1e-5)


@pytest.mark.parametrize("size", [1e-38, 1e-40, 1e-44])
def test_a_part_far_below_the_smallest_normal_number_stays_finite(size):
    features = torch.full((1, 2, 1, 8), size)
    H = torch.rand(1, 2, 8, 8)
    output, logsumexp = cpu.read(features, H, torch.full((1, 2, 8), 0.3))
    assert output.isfinite().all()
    assert output.amax() <= 4
    assert logsumexp.isfinite().all()


def test_no_tokens_change_nothing(draw):
    kernels = LayerKernels(4, 2, 16, 8, 12).eval()
    none = torch.zeros(2, 2, 0, 16)
    assert kernels.fused_psi(cpu, none).shape == (2, 2, 0, 8)
    assert kernels.fused_phi(cpu, torch.zeros(2, 4, 0, 16)).shape == (2, 4, 0, 8)
    H, z = draw(2, 2, 8, 16), draw(2, 2, 8)
    before = H.clone()
    cpu.absorb(H, z, torch.zeros(2, 2, 0, 8), none, torch.zeros(2, 2, 0, dtype=torch.bool))
    assert torch.equal(H, before)
    assert cpu.read(torch.zeros(2, 4, 0, 8), H, z).output.shape == (2, 4, 0, 16)
