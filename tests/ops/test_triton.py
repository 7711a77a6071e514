"""The Triton kernels against torch forms in float64: compiled on a GPU, else under Triton's
interpreter; and compiled ahead of time.

Whether Triton interprets is settled when it is first imported, by TRITON_INTERPRET. Other tests
share this process, so without a GPU the numbers are checked by a second run of this file, in a
process of its own.
"""

import copy
import importlib
import os
import pkgutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import lesslib.ops
from lesslib import H2O, TOVA, Full, Lambda
from lesslib.attention import whole_sequence
from lesslib.ops import dispatch, scan
from lesslib.ops import triton as ours
from lesslib.ops.blocks import NEVER, gather_tokens
from lesslib.ops.merge import Part, merge
from lesslib.ops.rules import EvictionRule
from lesslib.ops.slots import Slots
from lesslib.ops.triton import (
    INTERPRETED,
    absorb,
    attend_step,
    available,
    column_sums,
    decode_step,
    lowrank_attention,
    lowrank_attention_by_position,
    phi,
    psi,
    read,
    row_logsumexp,
    sequence_of_steps,
)
from lesslib.policies import Policy, simulate
from lesslib.states import LayerKernels
from lesslib.util.paths import ROOT

triton = pytest.importorskip(
    "triton", reason="triton is not installed (on Linux it comes with torch for CUDA)"
)
MODULES = [
    importlib.import_module(f"lesslib.ops.triton.{module.name}")
    for module in pkgutil.iter_modules(ours.__path__)
]
F32 = torch.float32
F16 = torch.float16
BF16 = torch.bfloat16
F64 = torch.float64
# of the largest value
TOLERANCE = {F32: 1e-5, F16: 1e-2, BF16: 1e-2}
# bytes; the least that a GPU of the last generations gives a program
SHARED = 99 * 1024


@pytest.fixture
def device():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("interpreted in test_the_numbers_under_the_interpreter")
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def draw(device):
    """A function that draws normal numbers of a shape, in a dtype, on the device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=F32):
        return torch.randn(*shape, generator=generator, dtype=F64).to(device, dtype)

    return normal


@pytest.fixture
def launches(monkeypatch):
    """The kernels that were launched, by name, in order."""
    names = []

    def counted(kernel, grid, launch=ours.common.launch, **arguments):
        names.append(kernel.__name__)
        launch(kernel, grid, **arguments)

    patch_launch(monkeypatch, counted)
    return names


def patch_launch(monkeypatch, launch):
    for module in MODULES:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", launch)


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
    # Triton 3.6 with NumPy 2.4: the interpreter's loops fail
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip(
            "Triton's interpreter is too old for this NumPy: use a newer Triton, or NumPy below 2.4"
        )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout


# ---------------------------------------------------------------- when it may be used
ON_GPU = SimpleNamespace(is_cuda=True, itemsize=2, is_floating_point=lambda: True)


def test_available_says_what_the_kernels_take():
    assert available(ON_GPU)
    for dtype in (F32, F16, BF16):
        assert available(torch.zeros(2, dtype=dtype)) == INTERPRETED
    for dtype in (F64, torch.int32):
        assert not available(torch.zeros(2, dtype=dtype))


def test_without_triton_the_package_imports_and_warns_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    # a second copy of the package is imported; afterwards all is as it was
    monkeypatch.setattr(lesslib.ops, "triton", ours)
    for name in list(sys.modules):
        if name.startswith("lesslib.ops.triton"):
            monkeypatch.delitem(sys.modules, name)
    without = importlib.import_module("lesslib.ops.triton")
    assert without is not ours
    assert without.common.triton is None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not without.available(torch.zeros(1))
        assert said == []
        assert [without.available(ON_GPU) for _ in range(3)] == [False] * 3
    assert [str(w.message) for w in said] == [
        "Triton is not installed: using the slower torch form"
    ]


# ---------------------------------------------------------------- decode
@dataclass
class Layer:
    """What one attention layer holds: `kernels`, H and z are None for a policy alone."""

    policy: Policy
    kernels: LayerKernels | None
    slots: Slots
    H: torch.Tensor | None
    z: torch.Tensor | None

    def evict(self, probabilities, now):
        """Score the slots and free one, in torch: its key, its value, and whether it held one."""
        slots = self.slots
        slots.score.copy_(self.policy.observe(slots.score, probabilities))
        slots.free.copy_(self.policy.first_out(slots.score, slots.position, now))
        key = gather_tokens(slots.keys, slots.free)
        value = gather_tokens(slots.values, slots.free)
        is_held = slots.position.gather(2, slots.free) >= 0
        slots.position.scatter_(2, slots.free, -1)
        return key, value, is_held


def layers(policy, device, dtype, kernels=None, B=2, Hkv=2, D=32, Dv=32):
    """An empty layer of `dtype` for the kernels, and the same layer in float64 for torch."""
    keys = torch.zeros(B, Hkv, 1, D, dtype=F64, device=device)
    values = torch.zeros(B, Hkv, 1, Dv, dtype=F64, device=device)
    slots = Slots.empty(keys, values, policy.budget)
    if kernels is None:
        reference = Layer(policy, None, slots, None, None)
    else:
        R = kernels.psi_w3.shape[-1]
        H = keys.new_zeros(B, Hkv, R, Dv)
        z = keys.new_zeros(B, Hkv, R)
        reference = Layer(policy, copy.deepcopy(kernels).double(), slots, H, z)
    return narrowed(reference, kernels, dtype), reference


def narrowed(reference, kernels, dtype):
    """The same layer for the kernels: keys and values in `dtype`, all else in float32."""
    tensors = {}
    for name, tensor in reference.slots.tensors().items():
        narrow = dtype if name in ("keys", "values") else F32
        tensors[name] = tensor.to(narrow) if tensor.is_floating_point() else tensor.clone()
    H = None if reference.H is None else reference.H.to(F32)
    z = None if reference.z is None else reference.z.to(F32)
    return Layer(reference.policy, kernels, Slots(**tensors), H, z)


def trained(device, heads=4, kv_heads=2, D=32, R=8, hidden=24):
    """Kernels whose state weighs in, as if trained."""
    generator = torch.Generator().manual_seed(1)
    kernels = LayerKernels(heads, kv_heads, D, R, hidden, generator=generator).to(device).eval()
    for scale in (kernels.s1, kernels.s2):
        torch.nn.init.uniform_(scale.data, -2, 2, generator=torch.Generator(device).manual_seed(1))
    return kernels.requires_grad_(False)


def step(layer, q, k, v, is_real, scaling):
    """A step by the kernels: the output, and the key, value and `is_held` of what left."""
    slots = layer.slots
    w = layer.kernels
    rule = layer.policy.rule()
    parts = [] if w is None else [read(phi(q, w.phi_w1, w.phi_w2), layer.H, layer.z)]
    if rule is None or rule.name not in ours.STEP_RULES:
        now = slots.count[:, None, None].expand_as(slots.free).clone()
        out, probabilities = attend_step(q, k, v, slots, parts, is_real, scaling)
        key, value, is_held = layer.evict(probabilities, now)
        slots.count.add_(1 if is_real is None else is_real[:, 0].int())
    else:
        out, key, value, is_held = decode_step(rule, q, k, v, slots, parts, is_real, scaling)
    if w is not None:
        features = psi(key, w.psi_w1, w.psi_w2, w.psi_w3, w.s1, w.s2)
        absorb(layer.H, layer.z, features, value, is_held)
    return out, key, value, is_held


def enter(slots, k, v):
    """The new token takes the free slot, in torch."""
    slots.keys.scatter_(2, slots.free[..., None].expand(-1, -1, -1, k.shape[-1]), k)
    slots.values.scatter_(2, slots.free[..., None].expand(-1, -1, -1, v.shape[-1]), v)
    slots.position.scatter_(2, slots.free, slots.count[:, None, None].expand_as(slots.free))
    slots.score.scatter_(2, slots.free, 0.0)


def attend(slots, q, scaling):
    """The softmax over the slots in torch: a Part, and its probabilities [B, Hkv, G, N]."""
    grouped = q.unflatten(1, (slots.keys.shape[1], -1)).squeeze(3)  # [B, Hkv, G, D]
    logits = grouped @ slots.keys.mT * scaling
    logits = logits.masked_fill((slots.position < 0)[:, :, None], -torch.inf)
    output = logits.softmax(-1) @ slots.values  # [B, Hkv, G, Dv]
    part = Part(output.flatten(1, 2)[:, :, None], logits.logsumexp(-1).flatten(1, 2)[:, :, None])
    return part, logits.softmax(-1)


def torch_read(features, H, z):
    """phi H / phi z and log phi z, in torch."""
    grouped = features.unflatten(1, (H.shape[1], -1))  # [B, Hkv, G, S, R]
    weight = (grouped @ z[:, :, None, :, None])[..., 0]
    output = (grouped @ H[:, :, None]) / weight[..., None]
    output = output.masked_fill(weight[..., None] == 0, 0.0)
    return Part(output.flatten(1, 2), weight.log().flatten(1, 2))


def torch_step(layer, q, k, v, is_real, scaling):
    """The same step in torch, as the dtypes of the layer are; returns the output alone."""
    slots = layer.slots
    now = slots.count[:, None, None].expand_as(slots.free).clone()
    enter(slots, k, v)
    part, probabilities = attend(slots, q, scaling)
    out = part.output
    if layer.kernels is not None:
        out = merge(part, torch_read(layer.kernels.phi(q), layer.H, layer.z))
    if is_real is not None:  # a padded token attended itself; now it goes
        probabilities = probabilities * is_real[:, None, None]
        slots.position.scatter_(2, slots.free, torch.where(is_real[:, None], now, -1))
    key, value, is_held = layer.evict(probabilities, now)
    if layer.kernels is not None:
        features = layer.kernels.psi(key) * is_held[..., None]
        layer.H.add_(features.mT @ value)
        layer.z.add_(features.sum(2))
    slots.count.add_(1 if is_real is None else is_real[:, 0].int())
    return out


def compare(layer, reference, q, k, v, is_real, dtype):
    """One step of both; everything that a layer holds must agree, and so must what left."""
    before = reference.slots.position.clone()
    scaling = q.shape[-1] ** -0.5
    want = torch_step(reference, q.double(), k.double(), v.double(), is_real, scaling)
    out, key, value, is_held = step(layer, q, k, v, is_real, scaling)
    assert out.dtype == dtype
    close(out, want, dtype)
    wanted = reference.slots.tensors()
    for name, got in layer.slots.tensors().items():
        if name == "score":
            close(got, wanted[name])
        else:
            assert torch.equal(got, wanted[name].to(got.dtype)), name
    if layer.kernels is not None:
        close(layer.H, reference.H, dtype)
        close(layer.z, reference.z, dtype)
    slots = layer.slots
    assert torch.equal(key, gather_tokens(slots.keys, slots.free))
    assert torch.equal(value, gather_tokens(slots.values, slots.free))
    entered = 1 if is_real is None else is_real[:, :, None].int()
    held_before = (before >= 0).sum(2, keepdim=True) + entered
    assert torch.equal(is_held, held_before > (slots.position >= 0).sum(2, keepdim=True))


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
    # padding on the left and, as of a row that has ended, later
    is_real = torch.ones(2, 13, dtype=torch.bool, device=device)
    is_real[1, [0, 1, 2, 10, 12]] = False
    for t in range(13):
        q = draw(2, 1, Hq, 32, dtype=dtype).transpose(1, 2)
        k = draw(2, Hkv, 1, 32, dtype=dtype)
        v = draw(2, Hkv, 1, 32, dtype=dtype)
        compare(layer, reference, q, k, v, is_real[:, t : t + 1], dtype)
    assert layer.slots.count.tolist() == [13, 8]
    assert (layer.slots.position >= 0).sum(2).eq(policy.budget).all()


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
def test_steps_over_several_blocks_of_slots(policy, dtype, D, Dv, R, Hq, Hkv, device, draw):
    kernels = trained(device, Hq, Hkv, D, R)
    _, reference = layers(policy, device, dtype, kernels, 1, Hkv, D, Dv)

    def token():
        q = draw(1, Hq, 1, D, dtype=dtype)
        k = draw(1, Hkv, 1, D, dtype=dtype)
        v = draw(1, Hkv, 1, Dv, dtype=dtype)
        return q, k, v

    for _ in range(75):
        q, k, v = token()
        torch_step(reference, q.double(), k.double(), v.double(), None, D**-0.5)
    layer = narrowed(reference, kernels, dtype)
    for _ in range(4):
        compare(layer, reference, *token(), None, dtype)
    assert (reference.z > 0).any()


@pytest.mark.parametrize("is_reversed", [False, True])
def test_equal_scores_let_the_lowest_position_leave(is_reversed, device, draw):
    layer, reference = layers(H2O(heavy=40, recent=30), device, F16)
    order = torch.randperm(71, generator=torch.Generator().manual_seed(0)).to(device)
    if is_reversed:
        # the lowest positions are in the second block of slots, beside equals in the first
        order = torch.arange(70, -1, -1, device=device)
    # full slots in no order, with 0 free
    for slots in (layer.slots, reference.slots):
        slots.position.copy_(order.int() - 1)
        slots.free.copy_((order == 0).int().argmax()[None, None, None].expand_as(slots.free))
        slots.count.fill_(70)
    for oldest in range(3):
        zeros = torch.zeros(2, 2, 1, 32, dtype=F16, device=device)
        for slots in (layer.slots, reference.slots):
            slots.score.zero_()
        q = draw(2, 4, 1, 32, dtype=F16)
        v = draw(2, 2, 1, 32, dtype=F16)
        compare(layer, reference, q, zeros, v, None, F16)
        leaver = (order == oldest + 1).int().argmax()
        assert torch.equal(layer.slots.free, leaver.expand_as(layer.slots.free))


@pytest.mark.parametrize("policy", [H2O(heavy=3, recent=5), TOVA(8)], ids=str)
def test_a_state_of_zero_changes_nothing(policy, device, draw):
    kernels = trained(device)
    layer, _ = layers(policy, device, F32, kernels)
    twin = Layer(policy, None, copy.deepcopy(layer.slots), None, None)
    # the state stays at zero: what leaves is not absorbed
    kernels.s1.zero_()
    for _ in range(3):
        q = draw(2, 4, 1, 32)
        k = draw(2, 2, 1, 32)
        v = draw(2, 2, 1, 32)
        out = step(layer, q, k, v, None, 0.2)[0]
        assert torch.equal(out, step(twin, q, k, v, None, 0.2)[0])


@pytest.mark.parametrize("n_parts", [0, 1, 2, 3])
@pytest.mark.parametrize("takes", ["decode_step", "attend_step"])
def test_a_step_merges_its_parts(takes, n_parts, device, draw):
    policy = H2O(heavy=3, recent=5)
    layer, reference = layers(policy, device, F32, Dv=48)
    is_real = torch.tensor([[True], [False]], device=device)
    for t in range(11):
        q = draw(2, 4, 1, 32)
        k = draw(2, 2, 1, 32)
        v = draw(2, 2, 1, 48)
        parts = []
        for number in range(n_parts):
            part = Part(draw(2, 4, 1, 48), draw(2, 4, 1) + 1)
            # heads 0: one part holds nothing; heads 1: none of them holds anything
            part.logsumexp[:, 0] = -torch.inf if number == 0 else 0.5
            part.logsumexp[:, 1] = -torch.inf
            part.output.masked_fill_(part.logsumexp[..., None] == -torch.inf, 0.0)
            parts.append(part)
        real = is_real if t % 2 else None
        enter(reference.slots, k.double(), v.double())
        slots_part, probabilities = attend(reference.slots, q.double(), 0.2)
        others = [Part(part.output.double(), part.logsumexp.double()) for part in parts]
        want = merge(slots_part, *others)
        if takes == "decode_step":
            got = decode_step(policy.rule(), q, k, v, layer.slots, parts, real, 0.2).output
        else:
            got, given = attend_step(q, k, v, layer.slots, parts, real, 0.2)
            # over the slots alone, whatever the parts
            counts = torch.ones(2, device=device) if real is None else real[:, 0]
            close(given, probabilities * counts[:, None, None, None])
            position = reference.slots.count.where(counts > 0, -1)[:, None, None]
            position = position.expand_as(layer.slots.free)
            assert torch.equal(layer.slots.position.gather(2, layer.slots.free), position)
            assert not layer.slots.score.gather(2, layer.slots.free).any()
            assert torch.equal(layer.slots.count, reference.slots.count)
            decode_step(policy.rule(), q, k, v, layer.slots, (), real, 0.2)
        close(got, want)
        # the reference goes on from where the kernel is
        reference.slots = Slots(
            **{
                name: x.double() if x.is_floating_point() else x.clone()
                for name, x in layer.slots.tensors().items()
            }
        )


def test_a_step_of_less_is_five_kernels(device, draw, launches):
    for policy, attends in ((H2O(3, 5), "decode_kernel"), (TOVA(8), "attend_kernel")):
        launches.clear()
        layer, _ = layers(policy, device, F32, trained(device))
        step(layer, draw(2, 4, 1, 32), draw(2, 2, 1, 32), draw(2, 2, 1, 32), None, 0.2)
        step_of_less = ["phi_kernel", "read_kernel", attends, "psi_kernel", "absorb_kernel"]
        assert launches == step_of_less


# ---------------------------------------------------------------- features, reading, absorption
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
    of_queries = phi(x, kernels.phi_w1, kernels.phi_w2)
    close(of_queries, exact.phi(x.double()), loosest)
    of_keys = psi(x, kernels.psi_w1, kernels.psi_w2, kernels.psi_w3, kernels.s1, kernels.s2)
    close(of_keys, exact.psi(x.double()), loosest)
    assert of_queries.dtype == of_keys.dtype == F32


@pytest.mark.parametrize(
    ("B", "S", "Hq", "Hkv", "R", "Dv"),
    [
        (2, 1, 4, 2, 8, 128),
        (1, 37, 2, 2, 16, 80),
        (2, 7, 20, 1, 64, 32),
        (1, 70, 3, 1, 1, 256),
    ],
)
def test_read_gives_the_part_of_the_state(B, S, Hq, Hkv, R, Dv, device, draw):
    features = draw(B, S, Hq, R).abs().transpose(1, 2)
    H = draw(B, Hkv, R, Dv)
    z = draw(B, Hkv, R).abs()
    # a query whose features are all 0 finds nothing
    features[:, 0, 0] = 0
    want = torch_read(features.double(), H.double(), z.double())
    got = read(features, H, z)
    assert got.output.dtype == got.logsumexp.dtype == F32
    close(got.output, want.output)
    finds_nothing = want.logsumexp == -torch.inf
    assert torch.equal(got.logsumexp == -torch.inf, finds_nothing)
    assert finds_nothing.any()
    close(got.logsumexp.masked_fill(finds_nothing, 0), want.logsumexp.masked_fill(finds_nothing, 0))


def test_a_state_that_holds_nothing_has_an_empty_part(device, draw):
    z = draw(2, 2, 8).abs()
    z[1] = 0
    output, logsumexp = read(draw(2, 4, 3, 8).abs(), z[..., None] * draw(2, 2, 8, 32), z)
    assert logsumexp[0].isfinite().all()
    assert (logsumexp[1] == -torch.inf).all()
    assert output[0].all()
    assert not output[1].any()


@pytest.mark.parametrize(
    ("n", "R", "Dv", "dtype"),
    [(1, 8, 128, F32), (37, 16, 80, BF16), (70, 64, 32, F16), (7, 1, 256, F32)],
)
def test_absorb_adds_to_the_state_what_held_a_token(n, R, Dv, dtype, device, draw):
    H = draw(2, 2, R, Dv)
    z = draw(2, 2, R)
    features = draw(2, 2, n, R)
    v = draw(2, 2, n, Dv, dtype=dtype)
    is_held = draw(2, 2, n) > 0
    is_held[0] = False
    is_held[1, 0] = True
    counted = features.double() * is_held[..., None]
    wanted = H + counted.mT @ v.double()
    weights = z + counted.sum(2)
    untouched = H[0].clone()
    absorb(H, z, features, v, is_held)
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
def test_rows_and_columns_equal_those_of_dense_attention(
    S, D, Hq, Hkv, pads, dtype, device, draw, launches
):
    B = len(pads or [0])
    q = draw(B, S, Hq, D, dtype=dtype).transpose(1, 2)
    k = draw(B, Hkv, S, D, dtype=dtype)
    t = torch.arange(S, device=device)
    is_real = t >= torch.tensor(pads or [0], device=device)[:, None]
    # a hole, whose query sees others and yet must not count
    is_real[:, S // 2] &= pads is None
    logits = q.double().unflatten(1, (Hkv, -1)) @ k.double().mT[:, :, None] * 0.2
    seen = (t <= t[:, None]) & is_real[:, None]
    rows = logits.masked_fill(~seen[:, None, None], -torch.inf).logsumexp(-1).flatten(1, 2)
    got = row_logsumexp(q, k, is_real, 0.2)
    assert got.dtype == F32
    sees_nothing = rows == -torch.inf
    assert torch.equal(got == -torch.inf, sees_nothing)
    close(got.masked_fill(sees_nothing, 0), rows.masked_fill(sees_nothing, 0))

    seen = seen | (t == t[:, None])
    probabilities = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    columns = (probabilities * is_real[:, None, None, :, None]).sum(-2)
    launches.clear()
    close(column_sums(q, k, is_real, 0.2), columns)
    assert launches == ["row_logsumexp_kernel", "column_sums_kernel"]


def test_column_sums_are_the_scores_of_a_prompt(device, draw):
    """Those that H2O's steps would give its tokens if nobody left."""
    q = draw(2, 4, 37, 32)
    k = draw(2, 2, 37, 32)
    v = draw(2, 2, 37, 32)
    is_real = torch.arange(37, device=device) >= torch.tensor([0, 5], device=device)[:, None]
    _, reference = layers(H2O(heavy=20, recent=17), device, F32)
    for t in range(37):
        now = slice(t, t + 1)
        token = (x[:, :, now].double() for x in (q, k, v))
        torch_step(reference, *token, is_real[:, now], 0.2)
    wanted = torch.zeros(2, 2, 38, dtype=F64, device=device)
    slots = reference.slots
    position = torch.where(slots.position >= 0, slots.position, 37).long()
    wanted.scatter_(2, position, slots.score)
    got = column_sums(q, k, is_real, 0.2).sum(2)
    close(got[0], wanted[0, :, :37])
    close(got[1, :, 5:], wanted[1, :, :32])


# ---------------------------------------------------------------- the scan
@pytest.mark.parametrize(
    ("S", "T", "Hq", "Hkv", "R", "Dv", "by_position", "dtype"),
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
    S, T, Hq, Hkv, R, Dv, by_position, dtype, device, draw, launches
):
    of_queries = draw(1, Hq, S, R, dtype=dtype).abs()
    of_keys = draw(1, Hkv, T, R, dtype=dtype).abs()
    values = draw(1, Hkv, T, Dv, dtype=dtype)
    inputs = (of_queries, of_keys, values)
    fast = [x.clone().requires_grad_() for x in inputs]
    slow = [x.double().requires_grad_() for x in inputs]
    if by_position:
        arrived = draw(1, Hkv, T).argsort(-1)[..., :S]
        # a third of the steps brings nothing
        arrived[draw(1, Hkv, S) > 0.4] = -1
        got = lowrank_attention_by_position(*fast, arrived)
        token = arrived.clamp(min=0)
        arriving = gather_tokens(slow[1], token) * (arrived >= 0)[..., None]
        want = scan.lowrank_attention(slow[0], arriving, gather_tokens(slow[2], token))
    else:
        got = lowrank_attention(*fast)
        want = scan.lowrank_attention(*slow)
    ways = [draw(*x.shape) for x in got]
    for a, b in zip(got, want, strict=True):
        close(a, b)  # of the inputs as they were rounded; the sums are float32
    wanted = torch.autograd.grad(want, slow, [way.double() for way in ways])
    for a, b, x in zip(torch.autograd.grad(got, fast, ways), wanted, fast, strict=True):
        close(a, b, dtype)
        assert a.dtype == x.dtype
    backward = ["scan_backward_phi_kernel", "scan_backward_psi_v_kernel"]
    assert launches == ["scan_kernel", *backward]


def test_the_scan_recovers_a_policy_over_a_sequence(device, draw):
    """From eviction times, as whole sequences call it."""
    times = torch.full((1, 2, 40), NEVER, dtype=torch.int32, device=device)
    times[..., :30] = torch.arange(10, 40, device=device) + 0 * times[..., :30]
    arrived = scan.arrivals(times)
    of_queries = draw(1, 2, 40, 8).abs()
    of_keys = draw(1, 2, 40, 8).abs()
    v = draw(1, 2, 40, 32)
    numerator, denominator = lowrank_attention_by_position(of_queries, of_keys, v, arrived)
    for t in (10, 25, 39):
        gone = slice(t - 9)
        similarity = of_queries[:, :, t, None].double() @ of_keys[:, :, gone].double().mT
        close(denominator[:, :, t], similarity.sum(-1)[..., 0])
        close(numerator[:, :, t], (similarity @ v[:, :, gone].double())[:, :, 0])
    assert not numerator[:, :, :10].any()
    assert not denominator[:, :, :10].any()


# ---------------------------------------------------------------- a whole sequence
def torch_sequence(policy, q, k, v, is_real, scaling):
    """The policy along a sequence, in float64: eviction times, and attention over what it keeps."""
    q = q.double()
    k = k.double()
    if is_real is None:
        is_real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    times = simulate(policy, q, k, is_real, scaling)
    attended = scan.sparse_attention(q, k, v.double(), times, policy.budget, is_real, scaling)
    return times, Part(*attended)


def sequence_by_kernel(policy, q, k, v, is_real, scaling):
    return sequence_of_steps(policy.rule(), q, k, v, policy.budget, is_real, scaling)


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
    policy, dtype, D, Dv, Hq, Hkv, device, draw, launches
):
    """Rows as they come: whole, padded on the left, padded here and there, and shorter than the
    budget.
    """
    S = 33
    is_real = torch.ones(4, S, dtype=torch.bool, device=device)
    is_real[1, :9] = False
    is_real[2, [0, 4, 5, 11, 30, 32]] = False
    is_real[3, 7:] = False
    q = draw(4, S, Hq, D, dtype=dtype).transpose(1, 2)
    k = draw(4, S, Hkv, D, dtype=dtype).transpose(1, 2)
    v = draw(4, S, Hkv, Dv, dtype=dtype).transpose(1, 2)
    want, wanted = torch_sequence(policy, q, k, v, is_real, D**-0.5)
    times, attended = sequence_by_kernel(policy, q, k, v, is_real, D**-0.5)
    assert launches == ["sequence_kernel"]
    assert times.dtype == torch.int32
    assert torch.equal(times, want)
    assert (times[:3] <= S).any()
    assert attended.output.dtype == attended.logsumexp.dtype == F32
    close(attended.output, wanted.output, dtype)
    close(attended.logsumexp, wanted.logsumexp, dtype)


@pytest.mark.parametrize("policy", [H2O(heavy=40, recent=38), Lambda(recent=70, sinks=4)], ids=str)
def test_a_sequence_of_several_blocks_of_slots(policy, device, draw):
    q = draw(1, 2, 100, 32)
    k = draw(1, 1, 100, 32)
    v = draw(1, 1, 100, 32)
    is_real = torch.ones(1, 100, dtype=torch.bool, device=device)
    want, wanted = torch_sequence(policy, q, k, v, is_real, 0.2)
    times, attended = sequence_by_kernel(policy, q, k, v, is_real, 0.2)
    assert torch.equal(times, want)
    close(attended.output, wanted.output)
    close(attended.logsumexp, wanted.logsumexp)


def test_a_sequence_takes_the_kernel_where_it_is_asked_for(device, draw, monkeypatch):
    q = draw(1, 2, 100, 32)
    k = draw(1, 1, 100, 32)
    v = draw(1, 1, 100, 32)
    for policy in (H2O(heavy=40, recent=38), Lambda(recent=70, sinks=4)):
        monkeypatch.setenv("LESS_OPS", "torch")
        want = whole_sequence.evict(policy, q.double(), k.double(), v.double())
        monkeypatch.setenv("LESS_OPS", "triton")
        with monkeypatch.context() as patched:
            refuse_the_torch_form(patched)
            got = whole_sequence.evict(policy, q, k, v)
        assert torch.equal(got.times, want.times)
        close(got.sparse, want.sparse)
        close(got.logsumexp, want.logsumexp)


def refuse_the_torch_form(monkeypatch):
    def simulate(*args):
        pytest.fail("the torch form ran")

    monkeypatch.setattr(whole_sequence, "simulate", simulate)


def test_gradients_come_from_the_torch_form(device, draw, monkeypatch):
    monkeypatch.setenv("LESS_TRITON", "1")
    policy = H2O(heavy=2, recent=2)
    for wanted in range(3):
        qkv = [draw(1, 2, 9, 32), draw(1, 1, 9, 32), draw(1, 1, 9, 32)]
        qkv[wanted].requires_grad_()
        out = whole_sequence.less_attention(*qkv, policy)
        torch.autograd.grad(out.square().sum(), qkv[wanted])
    with torch.no_grad():
        refuse_the_torch_form(monkeypatch)
        whole_sequence.less_attention(*(x.detach() for x in qkv), policy)


def test_policies_that_one_head_of_a_bounded_cache_cannot_decide_keep_the_torch_form(
    device, draw, monkeypatch
):
    monkeypatch.setenv("LESS_TRITON", "1")
    q = draw(1, 2, 9, 32)
    k = draw(1, 1, 9, 32)
    v = draw(1, 1, 9, 32)
    rule = H2O(heavy=2, recent=2).rule()
    assert dispatch.sequence_kernels(rule, q, k, v) is ours
    for policy in (TOVA(4), H2O(2, 2, scores="full"), Full()):
        assert dispatch.sequence_kernels(policy.rule(), q, k, v) is None
    assert dispatch.sequence_kernels(rule, q.double(), k.double(), v.double()) is not ours
    for wanted in range(3):
        qkv = [q, k, v]
        qkv[wanted] = qkv[wanted].clone().requires_grad_()
        assert dispatch.sequence_kernels(rule, *qkv) is None
    monkeypatch.delenv("LESS_TRITON")
    assert dispatch.sequence_kernels(rule, q, k, v) is not ours


@pytest.mark.parametrize("policy", [TOVA(4), H2O(heavy=2, recent=2, scores="full")], ids=str)
def test_a_sequence_of_a_rule_that_the_kernel_lacks_is_that_of_torch(
    policy, device, draw, monkeypatch
):
    q = draw(1, 2, 9, 32)
    k = draw(1, 1, 9, 32)
    v = draw(1, 1, 9, 32)
    monkeypatch.setenv("LESS_TRITON", "1")
    monkeypatch.setattr(ours, "sequence_of_steps", lambda *args: pytest.fail("the kernel ran"))
    want, wanted = torch_sequence(policy, q, k, v, None, 32**-0.5)
    got = whole_sequence.evict(policy, q, k, v)
    assert torch.equal(got.times, want)
    close(got.sparse, wanted.output)


# ---------------------------------------------------------------- ahead of time
# A Llama head: its sizes, a prompt of S tokens, and slots for a budget of 400.
D = 128
R = 8
S = 48
BUDGET = 400
H2O_RULE = EvictionRule("h2o", recent=200, sinks=0)
LAMBDA_RULE = EvictionRule("lambda", recent=396, sinks=4)


def zeros(*shape, dtype=F32):
    """Of one row and two heads."""
    return torch.zeros(1, 2, *shape, dtype=dtype)


def every_kernel(dtype):
    """Calls everything once, in the form that does most."""
    token = zeros(1, D, dtype=dtype)
    prompt = zeros(S, D, dtype=dtype)
    is_real = torch.ones(1, S, dtype=torch.bool)
    slots = Slots.empty(token, token, BUDGET)
    H = zeros(R, D)
    z = zeros(R)
    parts = [read(zeros(1, R), H, z)]
    decode_step(H2O_RULE, token, token, token, slots, parts, is_real[:, :1], 0.1)
    attend_step(token, token, token, slots, parts, is_real[:, :1], 0.1)
    sequence_of_steps(H2O_RULE, prompt, prompt, prompt, BUDGET, is_real, 0.1)
    w1 = torch.zeros(2, D, 512, dtype=dtype)
    w2 = torch.zeros(2, 512, R, dtype=dtype)
    w3 = torch.zeros(2, R, R, dtype=dtype)
    scale = torch.zeros(2, 1, R, dtype=dtype)
    phi(prompt, w1, w2)
    psi(prompt, w1, w2, w3, scale, scale)
    read(zeros(S, R), H, z)
    absorb(H, z, zeros(1, R), token, zeros(1, dtype=torch.bool))
    column_sums(prompt, prompt, is_real, 0.1)
    inputs = [zeros(S, width).requires_grad_() for width in (R, R, D)]
    arrived = zeros(S, dtype=torch.int64)
    numerator, _ = lowrank_attention_by_position(*inputs, arrived)
    torch.autograd.grad(numerator.sum(), inputs)


def every_variant(dtype):
    """Calls everything that has a flag once more, in its other form."""
    token = zeros(1, D, dtype=dtype)
    prompt = zeros(S, D, dtype=dtype)
    slots = Slots.empty(token, token, BUDGET)
    decode_step(LAMBDA_RULE, token, token, token, slots, (), None, 0.1)
    attend_step(token, token, token, slots, (), None, 0.1)
    is_real = torch.ones(1, S, dtype=torch.bool)
    sequence_of_steps(LAMBDA_RULE, prompt, prompt, prompt, BUDGET, is_real, 0.1)
    inputs = [zeros(S, width).requires_grad_() for width in (R, R, D)]
    torch.autograd.grad(lowrank_attention(*inputs)[0].sum(), inputs)


TYPES = {
    F32: "*fp32",
    F16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def type_of(x):
    """What Triton calls the type of an argument."""
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype]
    return "fp32" if isinstance(x, float) else "i32"


@pytest.mark.skipif(
    INTERPRETED, reason="needs Triton's compiler, which TRITON_INTERPRET=1 replaces"
)
def test_every_kernel_compiles_ahead_of_time(monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    built = set()

    def build(kernel, grid, *, num_warps=4, num_stages=3, **arguments):
        """In place of a launch."""
        assert arguments.keys() == {parameter.name for parameter in kernel.params}
        signature = {}
        constants = {}
        attributes = {}
        for i, parameter in enumerate(kernel.params):
            x = arguments[parameter.name]
            if parameter.is_constexpr or x is None:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = x
                continue
            signature[parameter.name] = type_of(x)
            if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]  # as a launch would find
        for capability in (80, 90):
            source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert done.asm["cubin"].startswith(b"\x7fELF")
            assert done.metadata.shared <= SHARED
            built.add((kernel.__name__, capability))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    patch_launch(monkeypatch, build)
    for dtype in (F16, F32):
        every_kernel(dtype)
    every_variant(F16)
    kernels = set()
    for module in MODULES:
        kernels |= {name for name in vars(module) if name.endswith("_kernel")}
    assert len(kernels) == 12
    assert {name for name, _ in built} == kernels
    assert {name for name, capability in built if capability == 80} == kernels
    assert {name for name, capability in built if capability == 90} == kernels
