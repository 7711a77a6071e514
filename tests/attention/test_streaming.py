"""A streamed prompt: one pass over a new sequence leaves the cache as so many decode steps do."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import close, kernels_of

from lesslib import H2O, TOVA, Lambda, LessCache, less
from lesslib.attention import streaming
from lesslib.attention.layer import LessLayer
from lesslib.ops import dispatch
from lesslib.ops.blocks import gather_tokens
from lesslib.ops.naive import naive_attention
from lesslib.policies import Policy
from lesslib.states import LayerKernels, LowRank, Nothing, State

POLICIES = [H2O(3, 5), H2O(4, 0), H2O(0, 4), Lambda(3, sinks=2), Lambda(4, sinks=0), TOVA(5)]
SHAPES = [
    {"B": 2, "S": 37},
    {"B": 1, "Hq": 3, "Hkv": 1, "S": 65, "D": 3, "Dv": 7},
    {"B": 3, "S": 69, "pads": [0, 5, 66]},
    {"B": 2, "Hq": 6, "S": 12, "D": 16, "pads": [12, 4]},
]


@dataclass(frozen=True)
class Fading(Policy):
    """A policy that no kernel knows: scores fade, so they follow from no sum of rows."""

    tokens: int
    name: ClassVar[str] = "fading"
    counts: ClassVar[tuple[str, ...]] = ("tokens",)

    def observe(self, score, probabilities):
        return score / 2 + probabilities.mean(2)


class Loop(LowRank):
    """LESS's kernels in the slow form of any state: a loop over `absorb` and `read`."""

    over_arrivals = State.over_arrivals
    along_arrivals = State.along_arrivals

    def __init__(self, kernels):
        super().__init__(kernels.heads, kernels.kv_heads, kernels.head_dim, kernels.kernel_size)
        self.kernels = kernels

    def phi(self, q):
        return self.kernels.phi(q)

    def psi(self, k):
        return self.kernels.psi(k)


def kernels_for(s):
    """Untrained kernels for sequences s, scaled as if trained, so that the state weighs in."""
    generator = torch.Generator().manual_seed(1)
    kernels = LayerKernels(
        s.q.shape[1], s.k.shape[1], s.q.shape[-1], kernel_size=3, hidden=8, generator=generator
    )
    torch.nn.init.constant_(kernels.s1, 1.0)
    return kernels.double().eval()


def feed(layer, s, sizes):
    """The output of `layer` for s, fed in pieces of `sizes` tokens."""
    outputs = []
    for now in torch.arange(s.q.shape[2]).split(sizes):
        layer.armed = True
        k, v = layer.update(s.k[:, :, now], s.v[:, :, now])
        real = None if s.real is None else s.real[:, now]
        outputs.append(layer.attend(s.q[:, :, now], k, v, real, s.q.shape[-1] ** -0.5))
    return torch.cat(outputs, 2)


def assert_same_cache(got, want):
    """Slots in order of position, as those that a step takes lie elsewhere; counters and state."""
    layers = (got.slots, want.slots)
    orders = [slots.position.argsort(dim=-1, stable=True) for slots in layers]
    is_held = want.slots.position.gather(2, orders[1]) >= 0
    for name in ("position", "score"):
        a, b = (getattr(slots, name).gather(2, i) for slots, i in zip(layers, orders, strict=True))
        close(a[is_held], b[is_held])
        assert torch.equal(a < 0, b < 0) or name == "score"
    for name in ("keys", "values"):
        a, b = (
            gather_tokens(getattr(slots, name), i) for slots, i in zip(layers, orders, strict=True)
        )
        assert torch.equal(a[is_held], b[is_held])
    for slots in layers:
        assert (slots.position.gather(2, slots.free) == -1).all(), "the free slot is empty"
    assert torch.equal(got.slots.count, want.slots.count)
    assert torch.equal(got.seen, want.seen)
    assert got.memory.keys() == want.memory.keys()
    for name, tensor in got.memory.items():
        close(tensor, want.memory[name])


@pytest.mark.parametrize("form", ["cpu", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_one_pass_leaves_what_so_many_steps_leave(policy, shape, form, sequences, monkeypatch):
    if form == "cpu":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv("LESS_OPS", form)
    # Blocks of a few queries.
    monkeypatch.setattr(streaming, "WEIGHTS", 200)
    s = sequences(**shape)
    S = s.q.shape[2]
    for state in (Nothing(), kernels_for(s), Loop(kernels_for(s))):
        in_one, by_steps = LessLayer(policy, state, 1), LessLayer(policy, state, None)
        close(feed(in_one, s, [S]), feed(by_steps, s, [1] * S))
        assert_same_cache(in_one, by_steps)


def test_the_prompt_sees_what_the_naive_loop_sees(sequences):
    s = sequences(S=40, pads=[0, 7])
    kernels = kernels_for(s)
    phi, psi = kernels.phi(s.q), kernels.psi(s.k)
    for policy in POLICIES:
        layer = LessLayer(policy, kernels, 1)
        want, times = naive_attention(s.q, s.k, s.v, policy, phi, psi, s.real)
        close(feed(layer, s, [40]), want)
        left = (times <= 40)[..., None]
        close(layer.memory["z"], (psi * left).sum(2))
        close(layer.memory["H"], (psi * left).mT @ s.v)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("sizes", [[5, 32], [20, 1, 16], [3, 30, 4]], ids=str)
def test_a_prompt_goes_on_where_another_ended(policy, sizes, sequences):
    """Longer than the budget at first, or shorter: later pieces, and single tokens, are steps."""
    s = sequences(S=37, pads=[0, 7])
    kernels = kernels_for(s)
    in_pieces, by_steps = LessLayer(policy, kernels, 1), LessLayer(policy, kernels, None)
    close(feed(in_pieces, s, sizes), feed(by_steps, s, [1] * 37))
    assert_same_cache(in_pieces, by_steps)


def test_a_policy_without_a_rule_takes_steps(sequences, monkeypatch):
    s = sequences(S=37, pads=[0, 7])
    kernels = kernels_for(s)
    in_one, by_steps = LessLayer(Fading(5), kernels, 1), LessLayer(Fading(5), kernels, None)
    want = feed(by_steps, s, [1] * 37)
    monkeypatch.setattr(LessLayer, "_sequence", None)
    close(feed(in_one, s, [37]), want)
    assert_same_cache(in_one, by_steps)


def test_a_long_prompt_takes_the_kernel_of_a_sequence_and_no_step(sequences, monkeypatch):
    pytest.importorskip("numba", reason="numba is not installed")
    s = sequences(S=37)
    calls = []
    kernel = dispatch.cpu_kernels().sequence_of_steps
    monkeypatch.setattr(
        dispatch.cpu_kernels(), "sequence_of_steps", lambda *a: calls.append(1) or kernel(*a)
    )
    monkeypatch.setattr(LessLayer, "_step", None)
    for policy in POLICIES:
        feed(LessLayer(policy, kernels_for(s), 1), s, [37])
    assert len(calls) == len(POLICIES)


@pytest.mark.parametrize("budget", [37, 38, 60])
def test_a_prompt_that_fits_attends_all_of_itself(budget, sequences):
    s = sequences(S=37, pads=[0, 7])
    for policy in (H2O.from_budget(budget), TOVA(budget), Lambda.from_budget(budget)):
        streamed, dense = (LessLayer(policy, kernels_for(s), chunk) for chunk in (1, None))
        assert torch.equal(feed(streamed, s, [37]), feed(dense, s, [37]))
        assert_same_cache(streamed, dense)


def test_at_the_shapes_of_smollm2_all_forms_agree_in_float32(monkeypatch):
    pytest.importorskip("numba", reason="numba is not installed")
    generator = torch.Generator().manual_seed(0)
    S = 300
    q, k, v = (torch.randn(2, heads, S, 64, generator=generator) for heads in (9, 3, 3))
    kernels = LayerKernels(9, 3, 64, hidden=32, generator=generator).eval()
    torch.nn.init.constant_(kernels.s1, 1.0)
    for policy in (H2O(25, 25), Lambda(46), TOVA(50)):
        layers = {}
        outputs = {}
        for form in ("cpu", "torch"):
            monkeypatch.setenv("LESS_OPS", form)
            layer = LessLayer(policy, kernels, 1)
            layer.armed = True
            layer.update(k, v)
            outputs[form] = layer.attend(q, k, v, None, 0.125)
            layers[form] = layer
        close(outputs["cpu"], outputs["torch"], 1e-5)
        assert torch.equal(layers["cpu"].slots.position, layers["torch"].slots.position)
        close(layers["cpu"].slots.score, layers["torch"].slots.score, 1e-4)
        for name in ("H", "z"):
            got, want = layers["cpu"].memory[name], layers["torch"].memory[name]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_half_precision_is_kept_in_the_slots(sequences):
    s = sequences(S=37)
    for name in ("q", "k", "v"):
        setattr(s, name, getattr(s, name).bfloat16())
    layer = LessLayer(H2O(3, 5), kernels_for(s).bfloat16(), 1)
    out = feed(layer, s, [37])
    assert out.dtype == layer.slots.keys.dtype == torch.bfloat16
    assert layer.slots.score.dtype == layer.memory["H"].dtype == torch.float32
    assert out.isfinite().all()
    assert layer.memory["H"].isfinite().all()


@pytest.mark.parametrize("policy", [H2O(3, 5), Lambda(3, sinks=2), TOVA(5)], ids=str)
@pytest.mark.parametrize("name", ["llama-grouped", "falcon-7b", "gemma3"])
def test_a_model_that_streams_its_prompt_goes_on_as_one_that_decoded_it(name, policy, models):
    model = models(name)
    ids = torch.randint(3, 61, (2, 33), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    outputs = {}
    # With gradients on: the cache is for inference, and takes keys that need none.
    model.requires_grad_(False)
    for sizes in ([27, 1, 1, 4], [1] * 33):
        cache = LessCache(model, policy, kernels_of(model), prefill="streaming")
        assert all(layer.chunk == 1 for layer in cache.less_layers())
        logits = []
        start = 0
        with less(model):
            for size in sizes:
                now = slice(start, start + size)
                start += size
                out = model(
                    ids[:, now],
                    attention_mask=mask[:, :start],
                    past_key_values=cache,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, now],
                )
                logits.append(out.logits)
        outputs[len(sizes)] = torch.cat(logits, 1)
    is_real = mask.bool()
    close(outputs[4][is_real], outputs[33][is_real])


def test_a_padded_row_streams_as_the_row_alone(llama):
    ids = torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    with torch.no_grad(), less(llama):
        for policy in (H2O(3, 5), TOVA(5)):
            caches = [
                LessCache(llama, policy, kernels_of(llama), prefill="streaming") for _ in range(2)
            ]
            tokens = llama.generate(
                ids,
                attention_mask=mask,
                past_key_values=caches[0],
                max_new_tokens=6,
                do_sample=False,
            )
            alone = llama.generate(
                ids[1:, 11:], past_key_values=caches[1], max_new_tokens=6, do_sample=False
            )
            assert torch.equal(tokens[1, -6:], alone[0, -6:])
