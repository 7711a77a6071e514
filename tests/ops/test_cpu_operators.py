"""Steps that torch.compile traces: the CPU kernels are operators in the graph."""

import pytest
import torch
import transformers as tf
from tiny_models import close, kernels_of
from torch._dynamo.testing import CompileCounterWithBackend

from lesslib import H2O, TOVA, Lambda, LessCache, less

pytest.importorskip("numba", reason="numba is not installed")

from lesslib.ops import dispatch
from lesslib.ops.cpu import operators

POLICIES = [H2O(3, 5), Lambda(3, sinks=2), TOVA(5)]
PROMPT = 9


@pytest.fixture(autouse=True)
def _nothing_is_compiled_nor_asked_for(monkeypatch):
    for name in ("LESS_OPS", "LESS_TRITON"):
        monkeypatch.delenv(name, raising=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, 24), generator=torch.Generator().manual_seed(0))


def decoded(model, step, cache, ids):
    """Logits of single tokens after a prompt, which is not compiled."""
    outputs = []
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        for t in range(PROMPT, ids.shape[1]):
            outputs.append(step(ids[:, t : t + 1].clone(), past_key_values=cache).logits)
    return torch.cat(outputs, 1)


def operators_called(graph):
    return {str(node.target) for node in graph.graph.nodes if "lesslib" in str(node.target)}


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_equals_an_eager_one(backend, policy, with_state, llama, ids):
    if backend == "inductor" and not (with_state and policy == POLICIES[0]):
        pytest.skip("takes long: once is enough")
    kernels = kernels_of(llama) if with_state else None
    caches = [LessCache(llama, policy, kernels) for _ in range(2)]
    frames = CompileCounterWithBackend(backend)
    with less(llama), torch._dynamo.config.patch(error_on_recompile=True):
        want = decoded(llama, llama, caches[0], ids)
        got = decoded(llama, torch.compile(llama, backend=frames, fullgraph=True), caches[1], ids)
    assert frames.frame_count == 1
    names = {"decode_step", "read", "absorb", "phi", "psi"} if with_state else {"decode_step"}
    assert operators_called(frames.graphs[0]) == {f"lesslib.{name}.default" for name in names}
    close(got, want, 1e-5)
    for one, other in zip(*(cache.less_layers() for cache in caches), strict=True):
        for name, tensor in one.tensors().items():
            close(other.tensors()[name], tensor, 1e-5)


def test_what_an_operator_changes_is_seen_by_what_follows(llama, ids):
    """In one graph a step's slots and state are read before it and after it."""
    cache = LessCache(llama, POLICIES[0], kernels_of(llama))
    with torch.no_grad(), less(llama):
        llama(ids[:, :PROMPT], past_key_values=cache)
    layer = cache.less_layers()[0]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, heads, 1, 6, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )

    def step(q, k, v):
        before = layer.memory["z"].sum() + layer.slots.score.sum()
        out = layer.attend(q, k, v, None, 1.0)
        return out, before, layer.memory["z"].sum() + layer.slots.score.sum()

    state = {name: x.clone() for name, x in layer.tensors().items()}
    want = step(q, k, v)
    assert want[1] != want[2]
    for name, x in layer.tensors().items():
        x.copy_(state[name])
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(q, k, v)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_generate_with_a_compiled_step_says_the_same(llama, ids):
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    config = tf.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    kernels = kernels_of(llama)
    with less(llama):
        caches = [LessCache(llama, POLICIES[0], kernels) for _ in range(2)]
        want = llama.generate(ids, past_key_values=caches[0], **arguments)
        got = llama.generate(ids, past_key_values=caches[1], compile_config=config, **arguments)
    assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_less_ops_governs_traced_steps(llama, ids, monkeypatch):
    for form, has_operators in (("torch", False), ("cpu", True), ("", True)):
        monkeypatch.setenv("LESS_OPS", form)
        torch._dynamo.reset()
        frames = CompileCounterWithBackend("aot_eager")
        with less(llama):
            step = torch.compile(llama, backend=frames, fullgraph=True)
            decoded(llama, step, LessCache(llama, POLICIES[0]), ids[:, : PROMPT + 2])
        assert bool(operators_called(frames.graphs[0])) is has_operators


def test_forced_triton_refuses_a_traced_step(monkeypatch):
    monkeypatch.setenv("LESS_OPS", "triton")
    with pytest.raises(RuntimeError, match="LESS_OPS=triton has no kernels for a step that"):
        dispatch.traces_cpu_kernels("cpu", torch.float32)


def test_forced_cpu_kernels_refuse_what_they_do_not_take(monkeypatch):
    monkeypatch.setenv("LESS_OPS", "cpu")
    with pytest.raises(RuntimeError, match=r"LESS_OPS=cpu has no kernels for torch\.int32"):
        dispatch.traces_cpu_kernels("cpu", torch.int32)


def test_every_kernel_of_a_step_is_an_operator_too():
    for name in operators.__all__:
        assert hasattr(dispatch.cpu_kernels(), name)
