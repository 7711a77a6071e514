"""The CPU kernels that training runs in, and their gradients, against autograd of the plain forms
in float64, on ragged shapes.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from lesslib.ops import scan

pytest.importorskip("numba", reason="numba is not installed")

from lesslib.ops.cpu import hidden_layer, join, mlp
from lesslib.ops.merge import Part, merge, part_of_sums
from lesslib.states import LayerKernels

F64 = torch.float64
NOTHING_DROPPED = (torch.empty(0, dtype=torch.bool), 1.0)
# sequences, query heads, key-value heads, tokens, head size of values, features
SHAPES = [(1, 1, 1, 1, 16, 1), (2, 4, 2, 37, 24, 5), (1, 9, 3, 300, 64, 8), (3, 2, 2, 65, 20, 16)]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def draw(generator):
    """A function that draws normal numbers of a shape, in float64."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    return normal


@pytest.fixture
def choose(generator):
    """A function that keeps a share of a hidden layer of a shape, at random."""

    def kept(share, *shape):
        return torch.rand(*shape, generator=generator) < share

    return kept


def copies(tensors, dtype):
    return [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]


def assert_close(got, want, share=1e-12):
    """Of the largest number, as sums have both signs."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= share * b.abs().max() + 1e-300


# ---------------------------------------------------------------- slots and state
def plain_join(slots, phi, psi, v):
    """With all states H_t and z_t written out."""
    H = (psi[..., None] * v[..., None, :]).cumsum(2)  # [B, Hkv, S, R, Dv]
    z = psi.cumsum(2)
    grouped = phi.unflatten(1, (psi.shape[1], -1))  # [B, Hkv, G, S, R]
    numerator = (grouped[..., None, :] @ H[:, :, None]).squeeze(-2).flatten(1, 2)
    denominator = (grouped * z[:, :, None]).sum(-1).flatten(1, 2)
    weight = slots.logsumexp.exp()
    total = weight + denominator
    return (slots.output * weight[..., None] + numerator) / total[..., None]


@pytest.mark.parametrize("shape", SHAPES)
def test_slots_and_state_and_their_gradients_are_those_of_states_written_out(shape, draw):
    B, Hq, Hkv, S, Dv, R = shape
    psi = draw(B, Hkv, S, R).abs()
    # Nothing arrives at first.
    psi[:, :, :3] = 0
    features = (draw(B, Hq, S, R).abs(), psi)
    v = draw(B, Hkv, S, Dv)
    slots = Part(draw(B, Hq, S, Dv), draw(B, Hq, S))
    doutput = draw(B, Hq, S, Dv)

    def results(function, dtype):
        leaves = copies(features, dtype)
        slots_of_type = Part(slots.output.to(dtype), slots.logsumexp.to(dtype))
        out = function(slots_of_type, *leaves, v.to(dtype))
        return [out, *torch.autograd.grad(out, leaves, doutput.to(dtype))]

    want = results(plain_join, F64)
    for dtype, share in ((F64, 1e-12), (torch.float32, 1e-5)):
        got = results(join, dtype)
        assert_close(got[:1], want[:1], share)
        # Where the state holds nothing its logarithm has no slope, and pairs that never arrive have
        # no features to change.
        arrived = (x[:, :, 3:] for x in got[1:])
        assert_close(arrived, (x[:, :, 3:] for x in want[1:]), share)


def test_gradients_of_slots_and_state_are_those_of_differences(draw):
    features = copies((draw(1, 4, 7, 3).abs() + 0.1, draw(1, 2, 7, 3).abs() + 0.1), F64)
    v = draw(1, 2, 7, 5)
    slots = Part(draw(1, 4, 7, 5), draw(1, 4, 7))
    assert torch.autograd.gradcheck(lambda phi, psi: join(slots, phi, psi, v), features)


def test_slots_and_state_far_from_one_another_stay_finite(draw):
    phi, psi, v = draw(1, 2, 9, 4).abs(), draw(1, 2, 9, 4).abs(), draw(1, 2, 9, 16)
    output = draw(1, 2, 9, 16)
    for magnitude in (-1e4, -100.0, 0.0, 100.0, 1e4):
        for size in (0.0, 1e-18, 1.0, 1e15):
            slots = Part(output.float(), torch.full((1, 2, 9), magnitude))
            leaves = copies((phi * size, psi * size), torch.float32)
            got = join(slots, *leaves, v.float())
            want = merge(slots, part_of_sums(*scan.lowrank_attention(*leaves, v.float())))
            assert_close([got], [want], share=1e-5)
            for gradient in torch.autograd.grad(got.sum(), leaves):
                assert gradient.isfinite().all()


def test_slots_and_state_join_as_in_torch_at_the_shapes_of_a_public_model(draw):
    phi = draw(2, 9, 1024, 8).float().abs()
    psi = draw(2, 3, 1024, 8).float().abs()
    v = draw(2, 3, 1024, 64).float()
    slots = Part(draw(2, 9, 1024, 64).float(), draw(2, 9, 1024).float())
    want = merge(slots, part_of_sums(*scan.lowrank_attention(phi, psi, v)))
    assert_close([join(slots, phi, psi, v)], [want], share=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_slots_and_state_take_strided_tensors_and_halves(half, draw):
    phi = draw(2, 4, 5, 33).mT.abs().to(half)
    psi = draw(2, 33, 2, 5).transpose(1, 2).abs().to(half)
    v = draw(33, 2, 2, 16).permute(1, 2, 0, 3).to(half)
    slots = Part(draw(2, 33, 4, 16).transpose(1, 2).to(half), draw(2, 4, 33))
    got = join(slots, phi, psi, v)
    assert got.dtype == torch.float32
    exact = Part(slots.output.double(), slots.logsumexp)
    want = plain_join(exact, phi.double(), psi.double(), v.double())
    assert_close([got], [want], share=1e-5)


# ---------------------------------------------------------------- the MLP
# sequences, heads, tokens, head size, hidden units, features
MLPS = [(1, 1, 1, 16, 1, 1), (2, 3, 37, 24, 20, 5), (1, 2, 600, 64, 33, 8), (3, 1, 256, 16, 8, 16)]


def plain_mlp(x, w1, w2, is_kept, share):
    hidden = x @ w1
    if share < 1:
        hidden = hidden * is_kept.mT / share
    return (F.gelu(hidden) @ w2).mT


@pytest.fixture
def one_and_two_threads():
    """Kernels are told how many by torch."""
    before = torch.get_num_threads()
    yield (1, 2)
    torch.set_num_threads(before)


@pytest.mark.parametrize("kept", [1.0, 0.7])
@pytest.mark.parametrize("shape", MLPS)
def test_the_mlp_and_its_gradients_are_those_of_autograd(
    shape, kept, draw, choose, one_and_two_threads, monkeypatch
):
    B, H, S, D, units, R = shape
    x = draw(B, H, S, D)
    weights = (draw(H, D, units) / math.sqrt(D), draw(H, units, R))
    dout = draw(B, H, R, S)
    dropped = (choose(kept, B, H, units, S), kept)
    # Several heads and pieces at once, the last ones smaller.
    monkeypatch.setattr(hidden_layer, "TOGETHER", 2 * S * units)
    monkeypatch.setattr(hidden_layer, "PIECE", 100)

    def results(function, dtype):
        leaves = copies(weights, dtype)
        out = function(x.to(dtype), *leaves, *dropped)
        with torch.no_grad():
            assert torch.equal(out, function(x.to(dtype), *leaves, *dropped))
        return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]

    want = results(plain_mlp, F64)
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        assert_close(results(mlp, F64), want)
        assert_close(results(mlp, torch.float32), want, share=1e-5)


def test_gradients_of_the_mlp_are_those_of_differences(draw, choose):
    x = draw(2, 2, 5, 4)
    weights = copies((draw(2, 4, 6), draw(2, 6, 3)), F64)
    is_kept = choose(0.7, 2, 2, 6, 5)
    for dropped in (NOTHING_DROPPED, (is_kept, 0.7)):
        assert torch.autograd.gradcheck(lambda w1, w2, d=dropped: mlp(x, w1, w2, *d), weights)


def test_a_hidden_layer_in_bfloat16_gives_gradients_in_float32(draw, choose):
    half = torch.bfloat16
    x = draw(2, 3, 70, 16).to(half)
    weights = [w.to(half) for w in (draw(3, 16, 40) / 4, draw(3, 40, 8) / 6)]
    dout = draw(2, 3, 8, 70)
    dropped = (choose(0.7, 2, 3, 40, 70), 0.7)

    exact = copies(weights, F64)
    want = plain_mlp(x.double(), *exact, *dropped)
    leaves = copies(weights, torch.float32)
    got = mlp(x, *leaves, *dropped)
    assert got.dtype == half
    # bfloat16 has eight bits
    assert_close([got], [want], share=1e-2)
    got_gradients = torch.autograd.grad(got, leaves, dout.to(half))
    want_gradients = torch.autograd.grad(want, exact, dout)
    assert_close(got_gradients, want_gradients, share=1e-2)
    assert {gradient.dtype for gradient in got_gradients} == {torch.float32}


# ---------------------------------------------------------------- states
def results_of(layer, form, monkeypatch, q, k):
    """Features of a training step and gradients of all weights, by a form."""
    monkeypatch.setenv("LESS_OPS", form)
    layer.generator = torch.Generator().manual_seed(3)
    features = (layer.phi(q), layer.psi(k))
    loss = sum(x.square().sum() for x in features)
    return [*features, *torch.autograd.grad(loss, tuple(layer.parameters()))]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_phi_and_psi_and_their_random_numbers_are_those_of_torch(dropout, draw, monkeypatch):
    layer = LayerKernels(9, 3, 64, hidden=128, dropout=dropout).train()
    torch.nn.init.constant_(layer.s1, 1.0)
    q = draw(2, 9, 500, 64).float()
    k = draw(2, 3, 500, 64).float()
    got = results_of(layer, "cpu", monkeypatch, q, k)
    assert_close(got, results_of(layer, "torch", monkeypatch, q, k), share=1e-5)
    exact = results_of(layer.eval(), "cpu", monkeypatch, q, k)
    assert_close(exact, results_of(layer, "torch", monkeypatch, q, k), share=1e-5)
    assert torch.allclose(got[0], exact[0]) == (dropout == 0)


def test_queries_that_need_gradients_keep_to_torch(draw, monkeypatch):
    layer = LayerKernels(2, 2, 16, hidden=24, dropout=0.0)
    q = draw(1, 2, 50, 16).float().requires_grad_()
    got = torch.autograd.grad(layer.phi(q).sum(), q)
    monkeypatch.setenv("LESS_OPS", "torch")
    assert_close(got, torch.autograd.grad(layer.phi(q).sum(), q), share=1e-6)


def test_states_join_slots_as_their_parts_merge(draw, monkeypatch):
    layer = LayerKernels(4, 2, 16, kernel_size=4, hidden=24, dropout=0.0)
    torch.nn.init.constant_(layer.s1, 1.0)
    q, k, v = draw(2, 4, 50, 16).float(), draw(2, 2, 50, 16).float(), draw(2, 2, 50, 16).float()
    slots = Part(draw(2, 4, 50, 16).float(), draw(2, 4, 50).float())
    has_arrived = torch.ones(2, 2, 50, dtype=torch.bool)
    arguments = (q, k, v, has_arrived, 0.25)

    def results(function, form):
        monkeypatch.setenv("LESS_OPS", form)
        out = function()
        return [out, *torch.autograd.grad(out.square().sum(), tuple(layer.parameters()))]

    want = results(lambda: merge(slots, layer.over_arrivals(*arguments)), "torch")
    for form in ("cpu", "torch"):
        got = results(lambda: layer.join_over_arrivals(slots, *arguments), form)
        assert_close(got, want, share=1e-5)
    # A state that nobody trains
    layer.requires_grad_(False)
    assert_close([layer.join_over_arrivals(slots, *arguments)], want[:1], share=1e-5)


def test_a_state_with_parts_of_its_own_inherits_no_shortcut_past_them(draw):
    class Forgetful(LayerKernels):
        """Finds nothing in its state."""

        def over_arrivals(self, queries, keys, values, has_arrived, scaling):
            part = super().over_arrivals(queries, keys, values, has_arrived, scaling)
            return Part(part.output, torch.full_like(part.logsumexp, -torch.inf))

    layer = Forgetful(2, 2, 16, kernel_size=4, hidden=24, dropout=0.0)
    q, k, v = (draw(1, 2, 40, 16).float() for _ in range(3))
    slots = Part(draw(1, 2, 40, 16).float(), draw(1, 2, 40).float())
    has_arrived = torch.ones(1, 2, 40, dtype=torch.bool)
    joined = layer.join_over_arrivals(slots, q, k, v, has_arrived, 0.25)
    assert torch.equal(joined, slots.output)
