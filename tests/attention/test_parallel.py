"""LESS over a whole sequence: the fast form against the naive loop, dense attention, and exact
sums. All in float64 but where said.
"""

import math

import pytest
import torch
from tiny_models import SHAPES, close, retained
from torch.utils._python_dispatch import TorchDispatchMode

from lesslib import H2O, TOVA, Full, Lambda
from lesslib.attention.whole_sequence import (
    Evicted,
    dense_attention,
    evict,
    less_attention,
    recover,
)
from lesslib.ops.blocks import NEVER
from lesslib.ops.merge import Part, merge, part_of_sums
from lesslib.ops.naive import naive_attention
from lesslib.ops.scan import arrivals, lowrank_attention, sparse_attention
from lesslib.states import LayerKernels, LowRank

SPARSE = [
    H2O(heavy=3, recent=8),
    H2O(heavy=4, recent=0),
    H2O(heavy=2, recent=3, scores="full"),
    Lambda(recent=3, sinks=2),
    Lambda(recent=4, sinks=0),
    TOVA(tokens=5),
]


class Zero(LowRank):
    """Kernels whose features are 0."""

    def __init__(self):
        super().__init__(heads=4, kv_heads=2, head_dim=5, kernel_size=3)

    def phi(self, q):
        return q.new_zeros(*q.shape[:-1], 3)

    psi = phi


# ---------------------------------------------------------------- the readable spec
@pytest.mark.parametrize("policy", [*SPARSE, Full()], ids=str)
def test_whole_sequence_form_equals_the_naive_loop(policy, sequences):
    for seed, shape in enumerate(SHAPES):
        s = sequences(**shape, seed=seed)
        evicted = evict(policy, s.q, s.k, s.v, s.real)
        sparse, times = naive_attention(s.q, s.k, s.v, policy, real=s.real)
        assert torch.equal(evicted.times, times), shape
        close(evicted.sparse, sparse)
        less, times = naive_attention(s.q, s.k, s.v, policy, s.phi, s.psi, s.real)
        assert torch.equal(evicted.times, times), shape
        close(recover(evicted, s.phi, s.psi, s.v), less)


@pytest.mark.parametrize("policy", SPARSE, ids=str)
def test_gradients_of_the_scan_equal_those_of_the_naive_loop(policy, sequences):
    s = sequences(S=66, pads=[0, 21])
    s.phi.requires_grad_()
    s.psi.requires_grad_()
    weight = torch.randn_like(s.q[..., :4])
    fast = recover(evict(policy, s.q, s.k, s.v, s.real), s.phi, s.psi, s.v)
    slow = naive_attention(s.q, s.k, s.v, policy, s.phi, s.psi, s.real)[0]
    expected = torch.autograd.grad((slow.sin() * weight).sum(), (s.phi, s.psi))
    for got, want in zip(
        torch.autograd.grad((fast.sin() * weight).sum(), (s.phi, s.psi)), expected, strict=True
    ):
        assert want.abs().max() > 1e-3
        close(got, want)


# ---------------------------------------------------------------- limits
@pytest.mark.parametrize("pads", [None, [0, 30]])
@pytest.mark.parametrize(
    "policy",
    [H2O(20, 17), H2O(30, 20, scores="full"), Lambda(recent=40), TOVA(37), Full()],
    ids=str,
)
def test_a_budget_of_the_whole_length_is_dense_attention(policy, pads, sequences):
    s = sequences(S=37, pads=pads)
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    if pads:
        mask = (mask & s.real[:, None, None]) | torch.eye(37, dtype=torch.bool)
    logits = s.q @ s.k.repeat_interleave(2, 1).transpose(-1, -2) / 5**0.5
    expected = logits.masked_fill(~mask, -math.inf).softmax(-1) @ s.v.repeat_interleave(2, 1)
    kernels = LayerKernels(4, 2, 5, 3, 8).double().eval()
    close(dense_attention(s.q, s.k, s.v, s.real), expected)
    close(less_attention(s.q, s.k, s.v, policy, kernels, s.real), expected)
    close(evict(policy, s.q, s.k, s.v, s.real).sparse, expected)
    just_short = {
        "h2o": H2O(heavy=20, recent=16),
        "lambda": Lambda(recent=32),
        "tova": TOVA(36),
        "full": Full(),
    }[policy.name]
    close(
        less_attention(s.q, s.k, s.v, just_short, kernels, s.real), expected
    )  # the last query still sees 36 slots and itself


@pytest.mark.parametrize("policy", SPARSE, ids=str)
def test_kernels_at_zero_are_eviction_alone(policy, sequences):
    s = sequences(S=70, pads=[0, 9])
    evicted = evict(policy, s.q, s.k, s.v, s.real)
    for phi, psi in ((s.phi * 0, s.psi), (s.phi, s.psi * 0)):
        assert torch.equal(recover(evicted, phi, psi, s.v), evicted.sparse)
    assert torch.equal(
        less_attention(s.q, s.k, s.v, policy, Zero(), s.real),
        less_attention(s.q, s.k, s.v, policy, None, s.real),
    )


@pytest.mark.parametrize("policy", SPARSE, ids=str)
def test_perfect_features_recover_dense_attention(policy, sequences):
    """One-hot keys with phi(q_t)_j = exp(logit of t, j): then phi psi^T is the softmax kernel,
    and nothing is lost by eviction.
    """
    s = sequences(B=1, Hq=4, Hkv=2, S=40)
    phi = (s.q @ s.k.repeat_interleave(2, 1).transpose(-1, -2) / 5**0.5).exp()
    psi = torch.eye(40, dtype=torch.float64).expand(1, 2, 40, 40)
    close(recover(evict(policy, s.q, s.k, s.v), phi, psi, s.v), dense_attention(s.q, s.k, s.v))


# ---------------------------------------------------------------- the state
@pytest.mark.parametrize("policy", SPARSE, ids=str)
def test_the_state_is_the_exact_sum_over_the_evicted_set(policy, sequences):
    s = sequences(B=2, Hq=2, Hkv=2, S=133, pads=[0, 13])
    times = evict(policy, s.q, s.k, s.v, s.real).times
    gone = (
        times[:, :, None, :] <= torch.arange(133)[:, None]
    ).double()  # [B, H, t, j]: j was absorbed before query t
    H, z = torch.einsum("bhtj,bhjr,bhjd->bhtrd", gone, s.psi, s.v), gone @ s.psi
    arrived = arrivals(times)
    arriving, values = (
        x.gather(2, arrived.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[-1]))
        for x in (s.psi, s.v)
    )
    for r in range(3):
        one = torch.eye(3, dtype=torch.float64)[r].expand(
            2, 2, 133, 3
        )  # phi = e_r reads row r of H and z
        numerator, denominator = lowrank_attention(
            one, arriving * (arrived >= 0)[..., None], values
        )
        close(numerator, H[..., r, :])
        close(denominator, z[..., r])


@pytest.mark.parametrize("policy", SPARSE, ids=str)
def test_arrivals_invert_eviction_times_and_retained_counts_the_kept(policy, sequences):
    s = sequences(S=90, pads=[0, 17])
    times, t = evict(policy, s.q, s.k, s.v, s.real).times, torch.arange(90)
    arrived = arrivals(times)
    for b, h, j in (times < 90).nonzero().tolist():
        assert arrived[b, h, times[b, h, j]] == j
    assert (arrived >= 0).sum() == (times < 90).sum()
    keep = (t < t[:, None]) & (
        t[:, None] < times[:, :, None]
    )  # [B, H, t, j]: older than t, kept at t
    assert torch.equal(retained(times), keep.sum(-1))
    assert torch.equal(retained(times, s.real), (keep & s.real[:, None, None]).sum(-1))
    assert retained(times, s.real).max() == policy.budget
    assert torch.equal(retained(torch.full_like(times, NEVER)), t.expand_as(times))


# ---------------------------------------------------------------- scale
def merged(sparse, logsumexp, numerator, denominator):
    return merge(Part(sparse, logsumexp), part_of_sums(numerator, denominator))


def test_merge_survives_logits_of_any_size(sequences):
    s = sequences()
    sparse, numerator, denominator = s.q[..., :4], s.q[..., 1:], s.phi[..., 0] + 0.1
    for lse, expected in ((1000.0, sparse), (-1000.0, numerator / denominator[..., None])):
        close(merged(sparse, torch.full_like(denominator, lse), numerator, denominator), expected)
    assert torch.equal(
        merged(sparse, torch.full_like(denominator, -1000.0), numerator * 0, denominator * 0),
        sparse,
    )
    lse = s.phi[..., 1]
    expected = (numerator + lse.exp()[..., None] * sparse) / (denominator + lse.exp())[..., None]
    for shift in (0.0, -600.0, 600.0):
        scale = math.exp(shift)
        close(merged(sparse, lse + shift, numerator * scale, denominator * scale), expected)


def test_float32_merge_has_no_floor(sequences):
    """Weights far below 1e-6, where floors of peers would bite, still mix in their true
    proportion.
    """
    lse, tiny = torch.tensor([-70.0]), torch.tensor([math.exp(-70.0)])
    out = merged(torch.ones(1, 2), lse, 3 * tiny.expand(1, 2), tiny)
    torch.testing.assert_close(out, torch.full((1, 2), 2.0))


@pytest.mark.parametrize("policy", SPARSE, ids=str)
@pytest.mark.parametrize("shift", [-600.0, 600.0])
def test_shifting_the_logits_changes_nothing(policy, shift, sequences):
    """exp of a row shifted by 1000 overflows; eviction, sparse attention and the mix with an
    equally scaled phi do not move.
    """
    s = sequences(S=70, D=4)
    q, k = (torch.cat([x, torch.ones_like(x[..., :1])], -1) for x in (s.q, s.k))
    far = k.clone()
    far[..., -1] += shift / 0.5  # the logits, with scaling 0.5, move by `shift`
    near, moved = (evict(policy, q, keys, s.v, scaling=0.5) for keys in (k, far))
    assert torch.equal(moved.times, near.times)
    close(moved.sparse, near.sparse)
    close(moved.logsumexp, near.logsumexp + shift)
    close(recover(moved, s.phi * math.exp(shift), s.psi, s.v), recover(near, s.phi, s.psi, s.v))


# ---------------------------------------------------------------- batches, padding, precision,
# memory
@pytest.mark.parametrize("policy", [*SPARSE, Full()], ids=str)
def test_a_batch_row_equals_the_row_alone_padded_or_not(policy, sequences):
    pads = [0, 7, 65, 68]
    s = sequences(B=4, S=69, pads=pads)
    kernels = LayerKernels(4, 2, 5, 3, 8).double().eval()
    with torch.no_grad():
        torch.nn.init.ones_(kernels.s1)
        together = less_attention(s.q, s.k, s.v, policy, kernels, s.real)
        assert (together - less_attention(s.q, s.k, s.v, policy, None, s.real)).abs().max() > (
            0.01 if policy.budget else -1
        )
        for b, pad in enumerate(pads):
            alone = less_attention(
                *(x[b : b + 1, :, pad:] for x in (s.q, s.k, s.v)), policy, kernels
            )
            close(together[b : b + 1, :, pad:], alone)
            assert torch.equal(together[b, :, :pad], s.v[b, :, :pad].repeat_interleave(2, 0)), (
                "a padded query attends itself"
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out_float32_between(dtype, sequences):
    s = sequences(S=200)
    q, k, v = (x.to(dtype) for x in (s.q, s.k, s.v))
    policy, kernels = H2O(heavy=3, recent=8), LayerKernels(4, 2, 5, 3, 8).eval()
    half, single = evict(policy, q, k, v), evict(policy, q.float(), k.float(), v.float())
    assert half.sparse.dtype == half.logsumexp.dtype == torch.float32
    assert all(
        torch.equal(getattr(half, name), getattr(single, name))
        for name in ("times", "sparse", "logsumexp")
    )
    for chosen in (policy, Full()):
        out = less_attention(q, k, v, chosen, kernels)
        assert out.dtype == dtype
        torch.testing.assert_close(
            out.float(),
            less_attention(q.float(), k.float(), v.float(), chosen, kernels),
            atol=0.03,
            rtol=0.03,
        )


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return out


@pytest.mark.parametrize("policy", [SPARSE[0], SPARSE[2], TOVA(tokens=5)], ids=str)
def test_no_tensor_grows_with_the_square_of_the_length(policy, sequences):
    sizes = []
    for S in (512, 1024):
        s = sequences(B=1, Hq=1, Hkv=1, S=S)
        with Largest() as largest:
            recover(evict(policy, s.q, s.k, s.v), s.phi, s.psi, s.v)
        sizes.append(largest.size)
    assert sizes[1] <= 2.01 * sizes[0]


def test_the_sparse_form_takes_any_eviction_times(sequences):
    """It relies on times alone, not on a policy having made them: random ones, at most one a step
    and C kept, against a dense mask.
    """
    s = sequences(B=1, Hq=2, Hkv=2, S=100)
    times, t = torch.full((1, 2, 100), NEVER, dtype=torch.int32), torch.arange(100)
    for h in range(2):
        kept: list[int] = []
        for step in range(100):
            kept.append(step)
            if len(kept) > 6:
                times[0, h, kept.pop(int(torch.randint(len(kept), ())))] = step + 1
    keep = (t <= t[:, None]) & (t[:, None] < times[:, :, None])
    logits = (s.q @ s.k.transpose(-1, -2) * 0.3).masked_fill(~keep, -math.inf)
    sparse, logsumexp = sparse_attention(
        s.q, s.k, s.v, times, 6, torch.ones(1, 100, dtype=torch.bool), 0.3
    )
    close(sparse, logits.softmax(-1) @ s.v)
    close(logsumexp, logits.logsumexp(-1))
    scores = torch.where(
        keep, logits.exp(), (s.phi @ s.psi.transpose(-1, -2)) * (t <= t[:, None])
    )  # the paper's picture, S x S
    close(
        recover(Evicted(times, sparse, logsumexp), s.phi, s.psi, s.v),
        scores @ s.v / scores.sum(-1, keepdim=True),
    )
