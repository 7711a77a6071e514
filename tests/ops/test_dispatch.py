"""Which form of an operation runs: by what is installed, what is asked for, and what is given."""

import importlib
import subprocess
import sys
import warnings

import pytest
import torch

import lesslib.ops
from lesslib import H2O, TOVA, Full, Lambda
from lesslib.attention import whole_sequence
from lesslib.attention.fit import model_shape
from lesslib.ops import dispatch, kernel_cache, triton
from lesslib.states import LayerKernels, LayerPerformer
from lesslib.util.paths import ROOT

ON_CPU = torch.zeros(2)
# neither on a CPU nor on a GPU
ELSEWHERE = torch.zeros(2, device="meta")
BOUNDED = [H2O(2, 2), H2O(2, 2, scores="full"), Lambda(recent=3, sinks=1), TOVA(4)]


@pytest.fixture(autouse=True)
def _nothing_is_asked_for(monkeypatch):
    for name in ("LESS_OPS", "LESS_TRITON"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cpu():
    """The package of CPU kernels."""
    pytest.importorskip("numba", reason="numba is not installed")
    return dispatch.cpu_kernels()


@pytest.fixture
def with_triton(monkeypatch):
    """A machine on which Triton's kernels take every tensor."""
    monkeypatch.setattr(triton, "available", lambda x: True)


@pytest.fixture
def without_numba(monkeypatch):
    """A machine without Numba; afterwards the package is as it was."""
    monkeypatch.setitem(sys.modules, "numba", None)
    # a second copy of the package is imported
    monkeypatch.setattr(lesslib.ops, "cpu", None, raising=False)
    for name in list(sys.modules):
        if name.startswith("lesslib.ops.cpu"):
            monkeypatch.delitem(sys.modules, name)
    memories = (dispatch.cpu_kernels, dispatch.warn_without_numba)
    for memory in memories:
        memory.cache_clear()
    yield
    for name in list(sys.modules):
        if name.startswith("lesslib.ops.cpu"):
            del sys.modules[name]
    for memory in memories:
        memory.cache_clear()


def qkv():
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8))
    return [torch.randn(*shape, generator=generator) for shape in shapes]


# ---------------------------------------------------------------- what is asked for
def test_on_a_cpu_its_kernels_serve_unasked(cpu):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert dispatch.kernels_for(ON_CPU.to(dtype)) is cpu
    assert dispatch.kernels_for(ELSEWHERE) is None
    assert dispatch.kernels_for(torch.zeros(2, dtype=torch.int32)) is None


def test_less_triton_asks_for_the_gpu_kernels_where_they_can_run(cpu, monkeypatch):
    monkeypatch.setenv("LESS_TRITON", "1")
    monkeypatch.setattr(triton, "available", lambda x: x.dtype == torch.float32)
    assert dispatch.kernels_for(ON_CPU) is triton
    assert dispatch.kernels_for(ON_CPU.double()) is cpu
    assert dispatch.kernels_for(ELSEWHERE.double()) is None
    monkeypatch.setenv("LESS_TRITON", "0")
    assert dispatch.kernels_for(ON_CPU) is cpu


@pytest.mark.usefixtures("with_triton")
def test_less_ops_forces_a_form(cpu, monkeypatch):
    for asked in ("0", "1"):
        monkeypatch.setenv("LESS_TRITON", asked)
        for form, kernels in (("torch", None), ("cpu", cpu), ("triton", triton)):
            monkeypatch.setenv("LESS_OPS", form)
            assert dispatch.kernels_for(ON_CPU) is kernels


def test_less_ops_of_kernels_that_cannot_serve_is_refused(cpu, monkeypatch):
    monkeypatch.setattr(triton, "available", lambda x: False)
    for form, x in (
        ("triton", ON_CPU),
        ("triton", ELSEWHERE),
        ("cpu", ELSEWHERE),
        ("cpu", torch.zeros(2, dtype=torch.int32)),
    ):
        monkeypatch.setenv("LESS_OPS", form)
        message = f"LESS_OPS={form} has no kernels for {x.dtype} on {x.device.type} here: unset it"
        with pytest.raises(RuntimeError, match=message):
            dispatch.kernels_for(x)


@pytest.mark.parametrize("name", ["numba", "CPU", "torch ", "1"])
def test_a_form_that_there_is_not_is_refused(name, monkeypatch):
    monkeypatch.setenv("LESS_OPS", name)
    with pytest.raises(ValueError, match=f"LESS_OPS='{name}': choose one of torch, cpu, triton"):
        dispatch.kernels_for(ON_CPU)


def test_an_empty_less_ops_asks_for_nothing(cpu, monkeypatch):
    monkeypatch.setenv("LESS_OPS", "")
    assert dispatch.kernels_for(ON_CPU) is cpu


# ---------------------------------------------------------------- what is given
@pytest.mark.parametrize("policy", BOUNDED, ids=str)
def test_gradients_take_the_torch_form(policy, cpu):
    rule = policy.rule()
    assert dispatch.sequence_kernels(rule, *qkv()) is cpu
    for wanted in range(3):
        tensors = qkv()
        tensors[wanted].requires_grad_()
        assert dispatch.sequence_kernels(rule, *tensors) is None
        with torch.no_grad():
            assert dispatch.sequence_kernels(rule, *tensors) is cpu


def test_gradients_reach_what_needs_them(cpu):
    tensors = qkv()
    tensors[2].requires_grad_()
    out = whole_sequence.less_attention(*tensors, H2O(2, 2))
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[2])
    assert gradient.abs().sum() > 0


def test_a_policy_without_a_rule_keeps_the_torch_form(cpu, monkeypatch):
    assert dispatch.sequence_kernels(Full().rule(), *qkv()) is None
    # and so does one whose rule no kernel knows
    monkeypatch.setattr(cpu, "SEQUENCE_RULES", frozenset({"h2o"}))
    assert dispatch.sequence_kernels(TOVA(4).rule(), *qkv()) is None
    assert dispatch.sequence_kernels(H2O(2, 2).rule(), *qkv()) is cpu


@pytest.mark.parametrize("policy", BOUNDED, ids=str)
def test_a_sequence_takes_the_kernel_unless_torch_is_forced(policy, cpu, monkeypatch):
    def refuse(*args):
        pytest.fail("the other form ran")

    with monkeypatch.context() as patched:
        patched.setattr(whole_sequence, "simulate", refuse)
        got = whole_sequence.evict(policy, *qkv())
    monkeypatch.setenv("LESS_OPS", "torch")
    monkeypatch.setattr(cpu, "sequence_of_steps", refuse)
    want = whole_sequence.evict(policy, *qkv())
    assert torch.equal(got.times, want.times)
    torch.testing.assert_close(got.sparse, want.sparse, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.logsumexp, want.logsumexp, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- Numba
@pytest.mark.usefixtures("without_numba")
def test_without_numba_the_torch_forms_serve_and_one_line_says_so_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert dispatch.kernels_for(ELSEWHERE) is None
        assert said == []
        for _ in range(3):
            assert dispatch.kernels_for(ON_CPU) is None
        evicted = whole_sequence.evict(H2O(2, 2), *qkv())
    assert evicted.sparse.isfinite().all()
    assert [(w.category, str(w.message)) for w in said] == [
        (
            RuntimeWarning,
            "Numba is not installed: using the slower torch forms (pip install numba)",
        )
    ]


@pytest.mark.usefixtures("without_numba")
def test_without_numba_forced_kernels_are_refused_and_torch_is_not_warned_of(monkeypatch):
    monkeypatch.setenv("LESS_OPS", "cpu")
    with pytest.raises(RuntimeError, match=r"LESS_OPS=cpu has no kernels for torch.float32 on cpu"):
        dispatch.kernels_for(ON_CPU)
    monkeypatch.setenv("LESS_OPS", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.kernels_for(ON_CPU) is None


def test_without_numba_the_fixture_above_imports_another_copy(cpu, request):
    request.getfixturevalue("without_numba")
    without = importlib.import_module("lesslib.ops.cpu")
    assert without is not cpu
    assert without.common.numba is None
    assert not kernel_cache.has_numba()
    assert not without.available(ON_CPU)


IMPORTS = """
import sys
import lesslib
from lesslib import H2O, LessCache, less
from lesslib.ops import dispatch, kernel_cache
from lesslib.runner import main
assert kernel_cache.has_numba()
assert main.main(["--list"]) == 0
assert "torch" in sys.modules
print("numba" in sys.modules)
import torch
assert dispatch.kernels_for(torch.zeros(2)) is dispatch.cpu_kernels()
print("numba" in sys.modules)
"""


@pytest.mark.usefixtures("cpu")
def test_numba_is_imported_with_the_first_kernel_and_not_before():
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["False", "True"]


def test_a_forced_form_refuses_a_policy_whose_sequence_it_has_no_kernel_for(cpu, monkeypatch):
    q = torch.randn(1, 2, 9, 4)
    monkeypatch.setenv("LESS_OPS", "cpu")
    with pytest.raises(RuntimeError, match="LESS_OPS=cpu has no kernel of a whole sequence"):
        dispatch.sequence_kernels(None, q, q, q)


def test_chosen_says_which_form_runs_every_operation(cpu, llama, monkeypatch):
    policy = H2O(2, 2)
    kernels = LayerKernels.for_model(model_shape(llama), kernel_size=3, hidden=8)
    forms = lesslib.ops.chosen(llama, policy, kernels)
    torch_alone = {"a sequence's state"}
    assert {name for name, form in forms.items() if form == "torch"} == torch_alone
    assert set(forms.values()) == {"torch", "cpu"}
    monkeypatch.setenv("LESS_OPS", "torch")
    assert set(lesslib.ops.chosen(llama, policy, kernels).values()) == {"torch"}
    monkeypatch.delenv("LESS_OPS")
    performer = LayerPerformer.for_model(
        model_shape(llama), kernel_size=3, generator=torch.Generator()
    )
    forms = lesslib.ops.chosen(llama, policy, performer)
    assert (forms["phi"], forms["read"]) == ("torch", "cpu")
    with pytest.raises(AttributeError, match="chose"):
        lesslib.ops.chose  # noqa: B018
