"""Decode steps in the CPU kernels: against the spec in float64, and against the torch form."""

import copy

import pytest
import torch

from lesslib import H2O, TOVA, Lambda
from lesslib.attention.layer import LessLayer
from lesslib.ops import dispatch
from lesslib.ops.blocks import gather_tokens
from lesslib.ops.merge import Part, merge
from lesslib.ops.naive import naive_attention
from lesslib.ops.slots import Slots
from lesslib.policies import Policy
from lesslib.states import LayerKernels, Nothing

pytest.importorskip("numba", reason="numba is not installed: the torch forms serve")
F32 = torch.float32
F64 = torch.float64
F16 = torch.float16
BF16 = torch.bfloat16


class Newest(Policy):
    """A policy that no kernel knows: once slots are full, the newest token goes at once."""

    name = "newest"
    budget = 6

    def priority(self, score, position, now):
        return -position.to(score.dtype)


POLICIES = [H2O(3, 5), H2O(4, 0), H2O(0, 4), Lambda(5, sinks=2), Lambda(4, sinks=0), TOVA(7)]


def learned(heads, kv_heads, D, R=3, hidden=7):
    """Kernels whose state weighs in, as if trained."""
    kernels = LayerKernels(
        heads, kv_heads, D, R, hidden, generator=torch.Generator().manual_seed(1)
    )
    for scale in (kernels.s1, kernels.s2):
        torch.nn.init.uniform_(scale.data, -2, 2, generator=torch.Generator().manual_seed(1))
    return kernels.eval().requires_grad_(False)


def layer_of(policy, state=None):
    return LessLayer(policy, Nothing() if state is None else state, None)


def step(layer, q, k, v, is_real, scaling):
    layer.armed = True
    layer.update(k, v)
    return layer.attend(q, k, v, is_real, scaling)


def steps(layer, q, k, v, real, scaling):
    """All tokens, one at a time: output [B, Hq, S, Dv] and the positions held after each."""
    outputs = []
    positions = []
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        is_real = None if real is None else real[:, now]
        outputs.append(step(layer, q[:, :, now], k[:, :, now], v[:, :, now], is_real, scaling))
        positions.append(layer.slots.position.clone())
    return torch.cat(outputs, 2), torch.stack(positions)


def by_form(form, monkeypatch, layer, *arguments):
    monkeypatch.setenv("LESS_OPS", form)
    return steps(layer, *arguments)


def drawn(B, Hq, Hkv, S, D, Dv, dtype=F32):
    """q, k and v, in which later keys weigh more, so that heavy hitters keep changing."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    q = normal(B, S, Hq, D).transpose(1, 2)
    k = normal(B, Hkv, S, D)
    v = normal(B, Hkv, S, Dv)
    q[..., 0] = D**0.5
    k[..., 0] = 6 * torch.rand(B, Hkv, S, generator=generator, dtype=F64) * torch.linspace(0, 1, S)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= tolerance


# ---------------------------------------------------------------- the spec
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(
    ("shape", "pads"),
    [((1, 1, 1, 1, 1, 1), None), ((2, 4, 2, 37, 5, 4), None), ((3, 3, 1, 30, 19, 7), [0, 5, 28])],
    ids=str,
)
def test_steps_equal_the_spec(policy, shape, pads, monkeypatch):
    _, Hq, Hkv, S, D, _ = shape
    q, k, v = drawn(*shape, dtype=F64)
    real = None if pads is None else torch.arange(S) >= torch.tensor(pads)[:, None]
    state = learned(Hq, Hkv, D).double()
    monkeypatch.setattr(dispatch, "step_kernels", counted(dispatch.step_kernels))
    for kernels in (None, state):
        phi = None if kernels is None else kernels.phi(q)
        psi = None if kernels is None else kernels.psi(k)
        want, _ = naive_attention(q, k, v, policy, phi, psi, real)
        got, _ = by_form("cpu", monkeypatch, layer_of(policy, kernels), q, k, v, real, D**-0.5)
        close(got, want, 1e-10)
    assert dispatch.step_kernels.gave == {dispatch.cpu_kernels()}


def counted(function):
    """`function`, with the set `gave` of all that it returned."""

    def watched(*arguments):
        result = function(*arguments)
        watched.gave.add(result)
        return result

    watched.gave = set()
    return watched


# ---------------------------------------------------------------- the torch form
@pytest.mark.parametrize("policy", [H2O(15, 15), Lambda(26), TOVA(30), Newest()], ids=str)
@pytest.mark.parametrize("B", [1, 2])
def test_steps_equal_the_torch_form_at_a_public_models_shape(policy, B, monkeypatch):
    q, k, v = drawn(B, 9, 3, 150, 64, 64)
    real = torch.arange(150) >= torch.tensor([9, 0])[:B, None]
    for state in (None, learned(9, 3, 64, R=8, hidden=128)):
        layers = [layer_of(policy, state) for _ in range(2)]
        want, held = by_form("torch", monkeypatch, layers[0], q, k, v, real, 0.125)
        got, held_by_kernels = by_form("cpu", monkeypatch, layers[1], q, k, v, real, 0.125)
        assert torch.equal(held_by_kernels, held)
        close(got, want, 1e-5)
        for name, tensor in layers[1].tensors().items():
            expected = layers[0].tensors()[name]
            if tensor.is_floating_point():
                close(tensor, expected, 2e-5 * max(1, expected.abs().max()))
            else:
                assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("policy", [H2O(3, 5), Lambda(6), TOVA(8), Newest()], ids=str)
def test_half_precision_is_summed_in_float32(dtype, policy, monkeypatch):
    q, k, v = drawn(2, 4, 2, 40, 21, 16, dtype)
    state = learned(4, 2, 21)
    real = torch.arange(40) >= torch.tensor([0, 3])[:, None]
    exact = (layer_of(policy, copy.deepcopy(state).double()), q.double(), k.double(), v.double())
    want, held = by_form("torch", monkeypatch, *exact, real, 0.2)
    layer = layer_of(policy, state)
    got, held_by_kernels = by_form("cpu", monkeypatch, layer, q, k, v, real, 0.2)
    assert got.dtype == layer.slots.keys.dtype == dtype
    assert layer.slots.score.dtype == F32
    assert torch.equal(held_by_kernels, held)
    # of the output's own rounding
    close(got, want, 2 * torch.finfo(dtype).eps * want.abs().max())


# ---------------------------------------------------------------- the corners
def slots_in_no_order(order, dtype=F32, B=2, Hkv=2, D=8):
    """Full slots that hold positions `order` - 1, the one of -1 is free."""
    k = torch.zeros(B, Hkv, 1, D, dtype=dtype)
    slots = Slots.empty(k, k, len(order) - 1)
    slots.position.copy_(order.int() - 1)
    slots.free.copy_((order == 0).int().argmax().expand_as(slots.free))
    slots.count.fill_(len(order) - 1)
    return slots


@pytest.mark.parametrize("policy", [H2O(40, 30), TOVA(70)], ids=str)
@pytest.mark.parametrize("is_reversed", [False, True])
def test_equal_scores_let_the_lowest_position_leave(policy, is_reversed):
    order = torch.randperm(71, generator=torch.Generator().manual_seed(0))
    if is_reversed:
        order = torch.arange(70, -1, -1)
    slots = slots_in_no_order(order)
    zeros = torch.zeros(2, 2, 1, 8)
    for oldest in range(3):
        slots.score.zero_()
        cpu = dispatch.cpu_kernels()
        cpu.decode_step(policy.rule(), zeros, zeros, zeros, slots, (), None, 0.5)
        leaver = (order == oldest + 1).int().argmax()
        assert torch.equal(slots.free, leaver.expand_as(slots.free))


def test_a_row_of_nothing_but_padding_stays_empty(monkeypatch):
    q, k, v = drawn(2, 4, 2, 6, 8, 8)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1] = False
    for policy in (H2O(2, 2), Lambda(2, sinks=1), TOVA(3), Newest()):
        layer = layer_of(policy, learned(4, 2, 8))
        got, _ = by_form("cpu", monkeypatch, layer, q, k, v, real, 0.3)
        close(got[1], v[1].repeat_interleave(2, 0), 1e-6)
        assert (layer.slots.position[1] == -1).all()
        assert layer.slots.count.tolist() == [6, 0]
        assert not layer.memory["z"][1].any()
        assert not layer.slots.score[1].any()


@pytest.mark.parametrize("n_parts", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_step_merges_its_parts(n_parts, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    cpu = dispatch.cpu_kernels()
    slots = slots_in_no_order(torch.arange(9), dtype)
    slots.keys.copy_(draw(2, 2, 9, 8))
    slots.values.copy_(draw(2, 2, 9, 8))
    q, k, v = draw(2, 4, 1, 8), draw(2, 2, 1, 8), draw(2, 2, 1, 8)
    parts = []
    for number in range(n_parts):
        part = Part(draw(2, 4, 1, 8), draw(2, 4, 1) + 1)
        # heads 0: one part holds nothing; heads 1: none of them holds anything
        part.logsumexp[:, 0] = -torch.inf if number == 0 else 0.5
        part.logsumexp[:, 1] = -torch.inf
        parts.append(part)
    twin = copy.deepcopy(slots)
    alone = cpu.attend_step(q, k, v, copy.deepcopy(slots), (), None, 0.5)
    twin.keys.scatter_(2, twin.free[..., None].expand(-1, -1, -1, 8), k)
    logits = q.unflatten(1, (2, 2))[..., 0, :] @ twin.keys.mT * 0.5
    total = logits.logsumexp(-1).flatten(1, 2)[..., None]
    want = merge(Part(alone.output, total), *parts)
    attended = cpu.attend_step(q, k, v, copy.deepcopy(slots), parts, None, 0.5)
    close(attended.output, want, 1e-6)
    # over the slots alone, whatever the parts
    close(attended.probabilities, logits.softmax(-1), 1e-6)
    for policy in (H2O(4, 4), Lambda(6, sinks=2), TOVA(8)):
        done = cpu.decode_step(policy.rule(), q, k, v, copy.deepcopy(slots), parts, None, 0.5)
        close(done.output, want, 1e-6)


def test_a_step_gives_what_left():
    q, k, v = drawn(2, 4, 2, 12, 8, 6)
    cpu = dispatch.cpu_kernels()
    for policy in (H2O(3, 2), Lambda(4, sinks=1), TOVA(5)):
        slots = Slots.empty(k, v, 5)
        for t in range(12):
            now = slice(t, t + 1)
            token = (q[:, :, now], k[:, :, now], v[:, :, now])
            done = cpu.decode_step(policy.rule(), *token, slots, (), None, 0.3)
            assert torch.equal(done.key, gather_tokens(slots.keys, slots.free))
            assert torch.equal(done.value, gather_tokens(slots.values, slots.free))
            assert (done.is_held == (t >= 5)).all()


def test_huge_logits_give_the_highest_one_everything(monkeypatch):
    q, k, v = drawn(1, 2, 1, 9, 8, 4)
    for scaling in (1e4, 1e9):
        forms = [
            by_form(form, monkeypatch, layer_of(TOVA(8)), q, k, v, None, scaling)[0]
            for form in ("torch", "cpu")
        ]
        close(*forms, 1e-6)


# ---------------------------------------------------------------- a cache's own changes
def test_slots_that_were_copied_cleared_or_chosen_go_on_by_themselves(monkeypatch):
    q, k, v = drawn(3, 4, 2, 30, 8, 8)
    state = learned(4, 2, 8)

    def changed(form):
        """What a layer gives through all that a cache may do to it, by one form."""
        monkeypatch.setenv("LESS_OPS", form)
        layer = layer_of(H2O(3, 3), state)
        outputs = [steps(layer, q[:, :, :9], k[:, :, :9], v[:, :, :9], None, 0.3)[0]]
        twin = copy.deepcopy(layer, {id(state): state})
        for part in (slice(9, 14), slice(14, 19)):
            for one in (layer, twin):
                x = (y[:, :, part].flip(2) if one is twin else y[:, :, part] for y in (q, k, v))
                outputs.append(steps(one, *x, None, 0.3)[0])
        layer.reorder_cache(torch.tensor([2, 0, 0]))
        outputs.append(steps(layer, q[:, :, 19:22], k[:, :, 19:22], v[:, :, 19:22], None, 0.3)[0])
        layer.batch_select_indices(torch.tensor([1, 2]))
        rest = slice(22, 26)
        outputs.append(steps(layer, q[1:, :, rest], k[1:, :, rest], v[1:, :, rest], None, 0.3)[0])
        layer.reset()
        rest = slice(26, 30)
        outputs.append(steps(layer, q[1:, :, rest], k[1:, :, rest], v[1:, :, rest], None, 0.3)[0])
        return outputs

    for want, got in zip(changed("torch"), changed("cpu"), strict=True):
        close(got, want, 1e-5)
