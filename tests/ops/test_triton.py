"""The Triton kernels against the torch forms in float64: compiled on a GPU, else under Triton's interpreter; and compiled ahead of time.

Whether Triton interprets is settled when it is first imported, by TRITON_INTERPRET. Other tests share this process, so without a GPU
the numbers are checked by a second run of this file, in a process of its own.
"""

import copy
import importlib.util
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from lesslib import H2O, TOVA, Full, Lambda
from lesslib.attention import whole_sequence as parallel
from lesslib.attention.cache import BUFFERS, LessLayer
from lesslib.ops import dispatch as fused
from lesslib.ops import scan
from lesslib.ops import triton as ours
from lesslib.ops.blocks import gather_tokens
from lesslib.ops.triton import (
    INTERPRETED,
    absorb,
    available,
    column_sums,
    decode_step,
    features,
    lowrank_attention,
)
from lesslib.states import LayerKernels
from lesslib.util.paths import ROOT

triton = pytest.importorskip(
    "triton", reason="triton is not installed (on Linux it comes with torch for CUDA)"
)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 1e-5, F16: 1e-2, BF16: 1e-2}  # of the largest value
SHARED = 99 * 1024  # bytes; the least that a GPU of the last generations gives a program


@pytest.fixture
def device():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("interpreted in test_the_numbers_under_the_interpreter")
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def draw(device):
    """A function that draws normal numbers of a shape, in a dtype, on the device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=F32: torch.randn(
        *shape, generator=generator, dtype=torch.float64
    ).to(device, dtype)


def close(got, want, dtype=F32):
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests below do it")
def test_the_numbers_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if (
        "only 0-dimensional arrays can be converted" in done.stdout
    ):  # Triton 3.6 with NumPy 2.4: the interpreter's loops fail
        pytest.skip(
            "Triton's interpreter is too old for this NumPy: use a newer Triton, or NumPy below 2.4"
        )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout


# ---------------------------------------------------------------- when it may be used
def test_available_says_what_the_kernels_take():
    on_gpu = SimpleNamespace(is_cuda=True, itemsize=2, is_floating_point=lambda: True)
    assert available(on_gpu)
    for dtype in (F32, F16, BF16):
        assert available(torch.zeros(2, dtype=dtype)) == INTERPRETED
    for dtype in (torch.float64, torch.int32):
        assert not available(torch.zeros(2, dtype=dtype))


def test_without_triton_the_module_imports_and_warns_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("lesslib.ops.without_triton", ours.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not without.available(torch.zeros(1))
        assert said == []
        on_gpu = SimpleNamespace(is_cuda=True, itemsize=2, is_floating_point=lambda: True)
        assert [without.available(on_gpu) for _ in range(3)] == [False] * 3
    assert [str(w.message) for w in said] == [
        "Triton is not installed: using the slower torch form"
    ]


# ---------------------------------------------------------------- decode
def layers(policy, device, dtype, kernels=None, B=2, Hkv=2, D=32, Dv=32):
    """An empty layer of `dtype` for the kernels, and the same layer in float64 for `_step`."""
    R = 0 if kernels is None else kernels.psi_w3.shape[-1]
    reference = LessLayer(
        policy, None if kernels is None else copy.deepcopy(kernels).double(), R, None
    )
    reference.lazy_initialization(
        *(torch.zeros(B, Hkv, 1, n, dtype=torch.float64, device=device) for n in (D, Dv))
    )
    return narrowed(reference, kernels, dtype), reference


def narrowed(reference, kernels, dtype):
    layer = LessLayer(reference.policy, kernels, reference.kernel_size, None)
    for name, buffer in zip(BUFFERS, reference.buffers(), strict=True):
        kept = dtype if name in ("keys", "values") else F32
        setattr(layer, name, buffer.to(kept) if buffer.is_floating_point() else buffer.clone())
    return layer


def trained(device, heads=4, kv_heads=2, D=32, R=8, hidden=24):
    """Kernels whose state weighs in, as if trained."""
    kernels = (
        LayerKernels(heads, kv_heads, D, R, hidden, generator=torch.Generator().manual_seed(1))
        .to(device)
        .eval()
    )
    for scale in (kernels.s1, kernels.s2):
        torch.nn.init.uniform_(scale.data, -2, 2, generator=torch.Generator(device).manual_seed(1))
    return kernels.requires_grad_(False)


def step(layer, q, k, v, real, scaling):
    """What LessLayer._step does, by the kernels alone."""
    w = layer.kernels
    phi = None if w is None else features(q, w.phi_w1, w.phi_w2)
    out, key, value, some = decode_step(layer.policy, q, k, v, layer.buffers(), phi, real, scaling)
    if w is not None:
        absorb(
            layer.H, layer.z, features(key, w.psi_w1, w.psi_w2, w.psi_w3, w.s1, w.s2), value, some
        )
    return out, key, value, some


def compare(layer, reference, q, k, v, real, dtype):
    """One step of both; everything that a layer holds must agree, and so must what left."""
    before = reference.position.clone()
    want = reference._step(q.double(), k.double(), v.double(), real, q.shape[-1] ** -0.5)
    out, key, value, some = step(layer, q, k, v, real, q.shape[-1] ** -0.5)
    close(out, want, dtype)
    for name, got, wanted in zip(BUFFERS, layer.buffers(), reference.buffers(), strict=True):
        if name in ("score", "H", "z") and wanted.numel():
            close(got, wanted, F32 if name == "score" else dtype)
        else:
            assert torch.equal(got, wanted.to(got.dtype)), name
    assert torch.equal(key, gather_tokens(layer.keys, layer.free))
    assert torch.equal(value, gather_tokens(layer.values, layer.free))
    entered = 1 if real is None else real[:, :, None].int()
    assert torch.equal(
        some,
        (before >= 0).sum(2, keepdim=True) + entered > (layer.position >= 0).sum(2, keepdim=True),
    )


@pytest.mark.parametrize(
    ("policy", "dtype", "learned", "Hq", "Hkv"),
    [
        (H2O(heavy=3, recent=5), F32, False, 4, 2),
        (H2O(heavy=3, recent=5), F32, True, 4, 2),
        (H2O(heavy=4, recent=0), BF16, True, 4, 1),
        (H2O(heavy=0, recent=4), F16, False, 2, 2),
        (Lambda(recent=3, sinks=2), F32, True, 4, 2),
        (Lambda(recent=4, sinks=0), F16, False, 3, 1),
        (TOVA(tokens=5), F32, True, 4, 2),
    ],
    ids=str,
)
def test_many_steps_equal_those_of_the_torch_form(policy, dtype, learned, Hq, Hkv, device, draw):
    kernels = trained(device, Hq, Hkv) if learned else None
    layer, reference = layers(policy, device, dtype, kernels, Hkv=Hkv)
    real = torch.ones(2, 13, dtype=torch.bool, device=device)
    real[1, [0, 1, 2, 10, 12]] = False  # padding on the left and, as of a row that has ended, later
    for s in range(13):
        q = draw(2, 1, Hq, 32, dtype=dtype).transpose(1, 2)
        compare(
            layer,
            reference,
            q,
            draw(2, Hkv, 1, 32, dtype=dtype),
            draw(2, Hkv, 1, 32, dtype=dtype),
            real[:, s : s + 1],
            dtype,
        )
    assert layer.count.tolist() == [13, 8]
    assert (layer.position >= 0).sum(2).eq(policy.budget).all()


@pytest.mark.parametrize(
    ("policy", "dtype", "D", "Dv", "R", "Hq", "Hkv"),
    [
        (H2O(heavy=36, recent=34), F32, 256, 32, 16, 2, 2),
        (H2O(heavy=40, recent=30), F16, 128, 128, 8, 2, 1),
        (Lambda(recent=66), BF16, 80, 80, 1, 4, 2),
        (H2O(heavy=36, recent=34), BF16, 64, 64, 64, 20, 1),
        (TOVA(70), F16, 96, 64, 8, 2, 2),
    ],
    ids=str,
)
def test_steps_after_a_prompt_of_several_blocks(policy, dtype, D, Dv, R, Hq, Hkv, device, draw):
    kernels = trained(device, Hq, Hkv, D, R)
    _, reference = layers(policy, device, dtype, kernels, 1, Hkv, D, Dv)
    prompt = (
        draw(1, heads, 75, n, dtype=dtype).double() for heads, n in ((Hq, D), (Hkv, D), (Hkv, Dv))
    )
    reference.attend(*prompt, None, D**-0.5)
    layer = narrowed(reference, kernels, dtype)
    for _ in range(4):
        q, k, v = (draw(1, heads, 1, n, dtype=dtype) for heads, n in ((Hq, D), (Hkv, D), (Hkv, Dv)))
        compare(layer, reference, q, k, v, None, dtype)
    assert (reference.z > 0).any()


def test_equal_scores_let_the_lowest_position_leave(device, draw):
    layer, reference = layers(H2O(heavy=40, recent=30), device, F16)
    order = torch.randperm(71, generator=torch.Generator().manual_seed(0)).to(device)
    for one in (layer, reference):  # full slots in no order, with 0 free
        one.position.copy_(order.int() - 1)
        one.free.copy_((order == 0).int().argmax()[None, None, None].expand_as(one.free))
        one.count.fill_(70)
    for oldest in range(3):
        zeros = torch.zeros(2, 2, 1, 32, dtype=F16, device=device)
        for one in (layer, reference):
            one.score.zero_()
        compare(
            layer,
            reference,
            draw(2, 4, 1, 32, dtype=F16),
            zeros,
            draw(2, 2, 1, 32, dtype=F16),
            None,
            F16,
        )
        assert torch.equal(layer.free, (order == oldest + 1).int().argmax().expand_as(layer.free))


def test_a_state_of_zero_changes_nothing(device, draw):
    layer, _ = layers(H2O(heavy=3, recent=5), device, F32, trained(device))
    twin = copy.deepcopy(layer)
    for _ in range(3):
        q, k, v = draw(2, 4, 1, 32), draw(2, 2, 1, 32), draw(2, 2, 1, 32)
        phi = draw(2, 4, 1, 8).abs()
        outs = [
            decode_step(layer.policy, q, k, v, one.buffers(), p, None, 0.2)[0]
            for one, p in ((layer, phi), (twin, None))
        ]
        assert torch.equal(*outs)


# ---------------------------------------------------------------- features and absorption
@pytest.mark.parametrize(
    ("B", "S", "heads", "D", "R", "hidden", "dtype", "weights"),
    [
        (1, 1, 1, 32, 1, 512, F32, F32),
        (5, 1, 4, 128, 8, 100, F32, F32),
        (2, 37, 2, 80, 16, 40, F32, F32),
        (1, 7, 2, 256, 64, 96, F32, F32),
        (2, 65, 2, 64, 8, 96, F16, F16),
        (3, 7, 2, 128, 16, 512, BF16, BF16),
        (2, 7, 1, 96, 64, 70, BF16, F32),
    ],
)
def test_features_equal_those_of_the_kernels(
    B, S, heads, D, R, hidden, dtype, weights, device, draw
):
    kernels = trained(device, heads, heads, D, R, hidden).to(weights)
    exact = copy.deepcopy(kernels).double()
    x = draw(B, S, heads, D, dtype=dtype).transpose(1, 2)
    loosest = max(dtype, weights, key=TOLERANCE.get)
    close(features(x, kernels.phi_w1, kernels.phi_w2), exact.phi(x.double()), loosest)
    psi = features(x, kernels.psi_w1, kernels.psi_w2, kernels.psi_w3, kernels.s1, kernels.s2)
    close(psi, exact.psi(x.double()), loosest)
    assert psi.dtype == F32


@pytest.mark.parametrize(
    ("n", "R", "Dv", "dtype"),
    [(1, 8, 128, F32), (37, 16, 80, BF16), (70, 64, 32, F16), (7, 1, 256, F32)],
)
def test_absorb_adds_to_the_state_what_held_a_token(n, R, Dv, dtype, device, draw):
    H, z, psi, v = (
        draw(2, 2, R, Dv),
        draw(2, 2, R),
        draw(2, 2, n, R),
        draw(2, 2, n, Dv, dtype=dtype),
    )
    some = draw(2, 2, n) > 0
    some[0] = False
    some[1, 0] = True
    counted = psi.double() * some[..., None]
    wanted, weights, untouched = H + counted.mT @ v.double(), z + counted.sum(2), H[0].clone()
    absorb(H, z, psi, v, some)
    close(H, wanted)
    close(z, weights)
    assert torch.equal(H[0], untouched)


# ---------------------------------------------------------------- a prompt's scores
@pytest.mark.parametrize(
    ("S", "D", "Hq", "Hkv", "pads", "dtype"),
    [
        (1, 32, 2, 1, None, F32),
        (7, 64, 2, 2, [2, 7], BF16),
        (65, 80, 4, 2, [0, 9], F32),
        (130, 128, 2, 1, [70], F16),
        (66, 256, 3, 1, None, F32),
        (130, 32, 1, 1, [0, 100], F32),
    ],
)
def test_column_sums_equal_those_of_dense_rows(S, D, Hq, Hkv, pads, dtype, device, draw):
    B = len(pads or [0])
    q, k = draw(B, S, Hq, D, dtype=dtype).transpose(1, 2), draw(B, Hkv, S, D, dtype=dtype)
    t = torch.arange(S, device=device)
    real = t >= torch.tensor(pads or [0], device=device)[:, None]
    real[:, S // 2] &= pads is None  # a hole, whose query sees others and yet must not count
    seen = ((t <= t[:, None]) & real[:, None]) | (t == t[:, None])
    logits = q.double().unflatten(1, (Hkv, -1)) @ k.double().mT[:, :, None] * 0.2
    rows = (
        logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        * real[:, None, None, :, None]
    )
    close(column_sums(q, k, real, 0.2), rows.sum(-2))


def test_column_sums_are_the_scores_of_a_prompt(device, draw):
    q, k, v = draw(2, 4, 37, 32), draw(2, 2, 37, 32), draw(2, 2, 37, 32)
    real = torch.arange(37, device=device) >= torch.tensor([0, 5], device=device)[:, None]
    _, reference = layers(H2O(heavy=20, recent=17), device, F32)
    reference.attend(q.double(), k.double(), v.double(), real, 0.2)
    wanted = torch.zeros(2, 2, 38, dtype=torch.float64, device=device)
    position = torch.where(reference.position >= 0, reference.position, 37).long()
    wanted.scatter_(2, position, reference.score)
    got = column_sums(q, k, real, 0.2).sum(2)
    close(got[0], wanted[0, :, :37])
    close(got[1, :, 5:], wanted[1, :, :32])


# ---------------------------------------------------------------- the scan
@pytest.mark.parametrize(
    ("S", "T", "Hq", "Hkv", "R", "Dv", "arriving", "dtype"),
    [
        (1, 1, 1, 1, 8, 32, False, F32),
        (7, 7, 4, 2, 1, 64, True, F32),
        (65, 65, 2, 1, 16, 80, False, F32),
        (130, 130, 1, 1, 8, 128, True, F32),
        (34, 34, 3, 1, 64, 256, False, F32),
        (40, 65, 2, 2, 8, 64, True, F32),
        (65, 65, 2, 2, 8, 64, True, BF16),
        (65, 65, 3, 1, 16, 32, False, F16),
    ],
)
def test_the_scan_and_its_gradients_equal_the_torch_form(
    S, T, Hq, Hkv, R, Dv, arriving, dtype, device, draw
):
    given = [
        draw(1, heads, n, width, dtype=dtype)
        for heads, n, width in ((Hq, S, R), (Hkv, T, R), (Hkv, T, Dv))
    ]
    given[:2] = given[0].abs(), given[1].abs()
    arrived = None
    if arriving:  # a third of the steps brings nothing
        arrived = draw(1, Hkv, T).argsort(-1)[..., :S]
        arrived[draw(1, Hkv, S) > 0.4] = -1
    fast, slow = (
        [x.clone().requires_grad_() for x in given],
        [x.double().requires_grad_() for x in given],
    )
    phi, psi, v = slow
    if arriving:
        psi, v = (
            gather_tokens(psi, arrived.clamp(min=0)) * (arrived >= 0)[..., None],
            gather_tokens(v, arrived.clamp(min=0)),
        )
    want, got = scan.lowrank_attention(phi, psi, v), lowrank_attention(*fast, arrived)
    ways = [draw(*x.shape) for x in got]
    for a, b in zip(got, want, strict=True):
        close(a, b)  # of the inputs as they were rounded; the sums are float32
    wanted = torch.autograd.grad(want, slow, [way.double() for way in ways])
    for a, b, x in zip(torch.autograd.grad(got, fast, ways), wanted, fast, strict=True):
        close(a, b, dtype)
        assert a.dtype == x.dtype


def test_the_scan_recovers_a_policy_over_a_sequence(device, draw):
    """From eviction times, as parallel.recover calls it."""
    times = torch.full((1, 2, 40), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)
    times[..., :30] = torch.arange(10, 40, device=device) + 0 * times[..., :30]
    arrived = scan.arrivals(times)
    phi, psi, v = draw(1, 2, 40, 8).abs(), draw(1, 2, 40, 8).abs(), draw(1, 2, 40, 32)
    numerator, denominator = lowrank_attention(phi, psi, v, arrived)
    for t in (10, 25, 39):
        gone = slice(t - 9)
        similarity = phi[:, :, t, None].double() @ psi[:, :, gone].double().mT
        close(denominator[:, :, t], similarity.sum(-1)[..., 0])
        close(numerator[:, :, t], (similarity @ v[:, :, gone].double())[:, :, 0])
    assert not numerator[:, :, :10].any()
    assert not denominator[:, :, :10].any()


# ---------------------------------------------------------------- a whole sequence
@pytest.mark.parametrize(
    ("policy", "dtype", "D", "Dv", "Hq", "Hkv"),
    [
        (H2O(heavy=3, recent=5), F32, 32, 48, 4, 2),
        (H2O(heavy=4, recent=0), F32, 64, 64, 3, 1),
        (H2O(heavy=0, recent=6), F16, 32, 32, 2, 2),
        (H2O(heavy=9, recent=9), BF16, 80, 80, 17, 1),
        (Lambda(recent=4, sinks=2), F32, 32, 32, 4, 2),
        (Lambda(recent=7, sinks=0), F16, 128, 32, 2, 1),
    ],
    ids=str,
)
def test_all_steps_at_once_equal_the_torch_form(
    policy, dtype, D, Dv, Hq, Hkv, device, draw, monkeypatch
):
    """Rows as they come: whole, padded on the left, padded here and there, and shorter than the budget."""
    S, real = 33, torch.ones(4, 33, dtype=torch.bool, device=device)
    real[1, :9] = real[2, [0, 4, 5, 11, 30, 32]] = real[3, 7:] = False
    q, k, v = (
        draw(4, S, heads, n, dtype=dtype).transpose(1, 2)
        for heads, n in ((Hq, D), (Hkv, D), (Hkv, Dv))
    )
    monkeypatch.setenv("LESS_TRITON", "0")
    want = parallel.evict(policy, q.double(), k.double(), v.double(), real, D**-0.5)
    monkeypatch.setenv("LESS_TRITON", "1")
    monkeypatch.setattr(parallel, "simulate", lambda *args: pytest.fail("the torch form ran"))
    got = parallel.evict(policy, q, k, v, real, D**-0.5)
    assert torch.equal(got.times, want.times)
    assert (got.times[:3] <= S).any()
    assert got.sparse.dtype == got.logsumexp.dtype == F32
    close(got.sparse, want.sparse, dtype)
    close(got.logsumexp, want.logsumexp, dtype)


def test_a_sequence_of_several_blocks_of_slots(device, draw, monkeypatch):
    monkeypatch.setenv("LESS_TRITON", "1")
    q, k, v = draw(1, 2, 100, 32), draw(1, 1, 100, 32), draw(1, 1, 100, 32)
    for policy in (H2O(heavy=40, recent=38), Lambda(recent=70, sinks=4)):
        want = parallel.evict(policy, q.double(), k.double(), v.double())
        with monkeypatch.context() as patched:
            patched.setattr(parallel, "simulate", lambda *args: pytest.fail("the torch form ran"))
            got = parallel.evict(policy, q, k, v)
        assert torch.equal(got.times, want.times)
        close(got.sparse, want.sparse)
        close(got.logsumexp, want.logsumexp)


def test_gradients_come_from_the_torch_form(device, draw, monkeypatch):
    monkeypatch.setenv("LESS_TRITON", "1")
    for wanted in range(3):
        qkv = [draw(1, 2, 9, 32), draw(1, 1, 9, 32), draw(1, 1, 9, 32)]
        out = parallel.less_attention(
            *(x.requires_grad_(i == wanted) for i, x in enumerate(qkv)), H2O(2, 2)
        )
        torch.autograd.grad(out.square().sum(), qkv[wanted])
    with torch.no_grad():
        monkeypatch.setattr(parallel, "simulate", lambda *args: pytest.fail("the torch form ran"))
        parallel.less_attention(*(x.detach() for x in qkv), H2O(2, 2))


def test_policies_that_one_head_of_a_bounded_cache_cannot_decide_keep_the_torch_form(
    device, draw, monkeypatch
):
    monkeypatch.setenv("LESS_TRITON", "1")
    q, k, v, real = (
        draw(1, 2, 9, 32),
        draw(1, 1, 9, 32),
        draw(1, 1, 9, 32),
        torch.ones(1, 9, dtype=torch.bool, device=device),
    )
    assert fused.evict(H2O(2, 2), q, k, v, real, 0.1) is not None
    for policy in (TOVA(4), H2O(2, 2, scores="full"), Full()):
        assert fused.evict(policy, q, k, v, real, 0.1) is None
    assert fused.evict(H2O(2, 2), q.double(), k.double(), v.double(), real, 0.1) is None
    assert fused.evict(H2O(2, 2), q, k, v.clone().requires_grad_(), real, 0.1) is None
    monkeypatch.delenv("LESS_TRITON")
    assert fused.evict(H2O(2, 2), q, k, v, real, 0.1) is None


# ---------------------------------------------------------------- ahead of time
def every_kernel(dtype, D=128, R=8, S=48, N=401):
    """Calls everything once at the shapes of a Llama head."""

    def zeros(*shape, dtype=F32):
        return torch.zeros(1, 2, *shape, dtype=dtype)

    buffers = [
        zeros(N, D, dtype=dtype),
        zeros(N, D, dtype=dtype),
        zeros(N, dtype=torch.int32),
        zeros(N),
        zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int32),
        zeros(R, D),
        zeros(R),
    ]
    one, real = zeros(1, D, dtype=dtype), torch.ones(1, S, dtype=torch.bool)
    decode_step(H2O(heavy=200, recent=200), one, one, one, buffers, zeros(1, R), real[:, :1], 0.1)
    several = [zeros(S, D, dtype=dtype)] * 3
    decode_step(
        H2O(heavy=200, recent=200),
        *several,
        buffers,
        None,
        real,
        0.1,
        zeros(S),
        zeros(S, dtype=torch.int32),
    )
    w1, w2, w3, s = (
        torch.zeros(2, *shape, dtype=dtype) for shape in ((D, 512), (512, R), (R, R), (1, R))
    )
    features(zeros(S, D, dtype=dtype), w1, w2, w3, s, s)
    absorb(buffers[-2], buffers[-1], zeros(1, R), one, zeros(1, dtype=torch.bool))
    column_sums(zeros(S, D, dtype=dtype), zeros(S, D, dtype=dtype), real, 0.1)
    inputs = [zeros(S, width).requires_grad_() for width in (R, R, D)]
    torch.autograd.grad(lowrank_attention(*inputs, zeros(S, dtype=torch.int64))[0].sum(), inputs)


@pytest.mark.skipif(
    INTERPRETED, reason="needs Triton's compiler, which TRITON_INTERPRET=1 replaces"
)
def test_every_kernel_compiles_ahead_of_time(monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        F32: "*fp32",
        F16: "*fp16",
        torch.int32: "*i32",
        torch.int64: "*i64",
        torch.bool: "*i1",
    }
    built = set()

    def build(kernel, grid, *args, num_warps=4, num_stages=3, **constants):
        """In place of a launch."""
        signature, attributes, given = {}, {}, dict(zip(kernel.arg_names, args, strict=False))
        fixed = constants | {name: None for name, x in given.items() if x is None}
        for i, name in enumerate(kernel.arg_names):
            x = given.get(name)
            signature[name] = (
                "constexpr"
                if name in fixed
                else types[x.dtype]
                if isinstance(x, torch.Tensor)
                else "fp32"
                if isinstance(x, float)
                else "i32"
            )
            if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]  # as a launch would find
        for capability in (80, 90):
            source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=attributes)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert done.asm["cubin"].startswith(b"\x7fELF")
            assert done.metadata.shared <= SHARED
            built.add((kernel.__name__, capability))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ours, "_run", build)
    for dtype in (F16, F32):
        every_kernel(dtype)
    assert built == {
        (name, capability)
        for name in vars(ours)
        if name.endswith("_kernel")
        for capability in (80, 90)
    }
