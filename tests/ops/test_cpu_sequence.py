"""The CPU kernel of a sequence's steps: the naive form in float64, the torch form in float32."""

import pytest
import torch

from lesslib import H2O, TOVA, Lambda
from lesslib.attention.whole_sequence import evict
from lesslib.ops import dispatch
from lesslib.ops.blocks import NEVER
from lesslib.ops.naive import naive_attention
from lesslib.policies import simulate

pytest.importorskip("numba", reason="Numba is not installed")

POLICIES = [
    H2O(3, 4),
    H2O(1, 6),
    H2O(5, 0),
    H2O(3, 4, scores="full"),
    Lambda(recent=5, sinks=2),
    Lambda(recent=6, sinks=0),
    TOVA(7),
]
# B, Hq, Hkv, S, D, Dv
SHAPES = [(2, 4, 2, 37, 5, 4), (1, 3, 3, 23, 7, 9), (3, 6, 1, 41, 16, 16)]


def run(policy, q, k, v, real=None, scaling=None):
    """The kernel's eviction times and part, whatever the environment says."""
    kernels = dispatch.cpu_kernels()
    if real is None:
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
    if scaling is None:
        scaling = q.shape[-1] ** -0.5
    return kernels.sequence_of_steps(policy.rule(), q, k, v, policy.budget, real, scaling)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_padded", [False, True])
def test_every_rule_equals_the_naive_form(policy, shape, is_padded, sequences):
    B, Hq, Hkv, S, D, Dv = shape
    pads = [5 * row for row in range(B)] if is_padded else None
    s = sequences(B, Hq, Hkv, S, D, Dv, pads=pads)
    times, part = run(policy, s.q, s.k, s.v, s.real)
    output, naive_times = naive_attention(s.q, s.k, s.v, policy, real=s.real)
    assert (naive_times < NEVER).sum() > B * Hkv
    assert torch.equal(times, naive_times)
    torch.testing.assert_close(part.output, output, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_padding_on_the_right_changes_no_real_token(policy, sequences):
    s = sequences(S=30)
    real = torch.arange(30) < torch.tensor([30, 21])[:, None]
    times, part = run(policy, s.q, s.k, s.v, real)
    alone_times, alone = run(policy, s.q[1:, :, :21], s.k[1:, :, :21], s.v[1:, :, :21])
    assert torch.equal(times[1:, :, :21], alone_times)
    torch.testing.assert_close(part.output[1:, :, :21], alone.output)
    assert (times[1, :, 21:] == NEVER).all()


@pytest.mark.parametrize(
    "policy",
    [H2O(25, 25), H2O(25, 25, scores="full"), Lambda(recent=46), TOVA(50)],
    ids=str,
)
def test_float32_equals_the_torch_form_at_the_shapes_of_a_model(policy, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q = 1.5 * torch.randn(2, 9, 300, 64, generator=generator)
    k = torch.randn(2, 3, 300, 64, generator=generator)
    v = torch.randn(2, 3, 300, 64, generator=generator)
    real = torch.arange(300) >= torch.tensor([[0], [17]])
    times, part = run(policy, q, k, v, real)
    monkeypatch.setenv("LESS_OPS", "torch")
    reference = evict(policy, q, k, v, real)
    assert torch.equal(times, reference.times)
    torch.testing.assert_close(part.output, reference.sparse, rtol=0, atol=1e-5)
    torch.testing.assert_close(part.logsumexp, reference.logsumexp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype, sequences):
    s = sequences()
    q, k, v = s.q.to(dtype), s.k.to(dtype), s.v.to(dtype)
    times, part = run(H2O(3, 4), q, k, v)
    wide_times, wide = run(H2O(3, 4), q.float(), k.float(), v.float())
    assert part.output.dtype == torch.float32
    assert torch.equal(times, wide_times)
    torch.testing.assert_close(part.output, wide.output, rtol=0, atol=1e-6)


def test_among_equal_scores_the_oldest_leaves():
    # All logits are equal, so a token has gained more the longer it is there: the newest of those
    # that may leave goes. Scores of two tokens are equal only where both saw the same queries.
    q = torch.zeros(1, 1, 8, 4)
    k = torch.randn(1, 1, 8, 4)
    v = torch.randn(1, 1, 8, 4)
    for policy in (H2O(2, 2), TOVA(3)):
        times, _ = run(policy, q, k, v)
        assert torch.equal(times, simulate(policy, q, k))


def test_threads_change_no_bit(sequences):
    s = sequences(B=3, Hq=4, Hkv=4)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(run(H2O(3, 4), s.q, s.k, s.v))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].output, results[1][1].output)


def test_what_is_not_a_number_reaches_the_output(sequences):
    s = sequences()
    q = s.q.float()
    q[0, 1, 20, 3] = torch.nan
    _, part = run(Lambda(recent=5, sinks=2), q, s.k.float(), s.v.float())
    is_nan = part.output.isnan().any(-1)
    assert is_nan.nonzero().tolist() == [[0, 1, 20]]


def test_evict_takes_the_kernel_on_a_cpu(sequences, monkeypatch):
    s = sequences()
    calls = []
    kernels = dispatch.cpu_kernels()

    def spy(*arguments):
        calls.append(arguments)
        return original(*arguments)

    original = kernels.sequence_of_steps
    monkeypatch.setattr(kernels, "sequence_of_steps", spy)
    evict(H2O(3, 4), s.q, s.k, s.v)
    assert len(calls) == 1
    evict(H2O(3, 4), s.q.requires_grad_(), s.k, s.v)
    assert len(calls) == 1
