"""Policies: the online step, the eviction times it gives, and what a wrong budget is told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import retained

from lesslib import H2O, TOVA, Full, Lambda
from lesslib.ops.blocks import NEVER
from lesslib.ops.naive import naive_attention
from lesslib.policies import budget_of, get_policy, simulate, simulation

ALL = [
    H2O(heavy=3, recent=8),
    H2O(heavy=0, recent=4),
    H2O(heavy=4, recent=0),
    H2O(heavy=3, recent=8, scores="full"),
    Lambda(recent=3, sinks=2),
    Lambda(recent=4, sinks=0),
    TOVA(tokens=5),
    Full(),
]
SHAPES = [
    {"B": 1, "Hq": 1, "Hkv": 1, "S": 7},
    {"B": 2, "Hq": 4, "Hkv": 2, "S": 37},
    {"B": 1, "Hq": 6, "Hkv": 1, "S": 70, "D": 3},
    {"B": 3, "Hq": 2, "Hkv": 2, "S": 65},
    {"B": 1, "Hq": 3, "Hkv": 3, "S": 131, "D": 2},
    {"B": 3, "Hq": 4, "Hkv": 2, "S": 69, "pads": [0, 5, 66]},
]


def naive_times(policy, s):
    return naive_attention(s.q, s.k, s.v, policy, real=s.real)[1]


# ---------------------------------------------------------------- simulate against the readable
# spec
@pytest.mark.parametrize("policy", ALL, ids=str)
def test_eviction_times_equal_the_naive_loop(policy, sequences):
    for seed, shape in enumerate(SHAPES):
        s = sequences(**shape, seed=seed)
        assert torch.equal(simulate(policy, s.q, s.k, s.real), naive_times(policy, s)), shape


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_padding_anywhere_is_neither_scored_nor_kept(policy, sequences):
    s = sequences(B=3, S=67, seed=3)
    s.real = torch.rand(3, 67) < 0.7
    s.real[0, 40:] = False  # right padding
    times = simulate(policy, s.q, s.k, s.real)
    assert torch.equal(times, naive_times(policy, s))
    assert (times[~s.real[:, None].expand_as(times)] == NEVER).all()


@pytest.mark.parametrize(("seed", "heavy", "recent"), [(45, 4, 22), (52, 6, 35), (103, 2, 21)])
def test_scores_survive_a_block_that_begins_with_unused_slots(seed, heavy, recent):
    torch.manual_seed(seed)
    q, k = torch.randn(2, 2, 260, 4).double() * 3, torch.randn(2, 2, 260, 4).double()
    real = torch.rand(2, 260) < torch.rand(())
    real[:, 0] = (
        True  # then padding between tokens leaves slots unused when the second block begins
    )
    policy = H2O(heavy=heavy, recent=recent)
    assert torch.equal(simulate(policy, q, k, real), naive_attention(q, k, k, policy, real=real)[1])


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_block_size_changes_nothing(policy, sequences, monkeypatch):
    s = sequences(S=50, pads=[0, 9])
    expected = simulate(policy, s.q, s.k, s.real)
    for block in (1, 3, 50):
        monkeypatch.setattr(simulation, "BLOCK", block)
        assert torch.equal(simulate(policy, s.q, s.k, s.real), expected)


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_among_equals_the_oldest_leaves(policy, sequences):
    s = sequences(S=30)
    far = torch.arange(30) % 3 > 0
    s.q, s.k = (
        torch.ones_like(s.q),
        torch.where(far[:, None], -1e4, 0.0).expand_as(s.k).double(),
    )  # weights of exactly 0, in both forms
    assert torch.equal(simulate(policy, s.q, s.k), naive_times(policy, s))
    if isinstance(policy, TOVA):
        assert simulate(policy, torch.zeros_like(s.q), s.k)[0, 0, :25].tolist() == list(
            range(6, 31)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", ALL, ids=str)
def test_scores_of_half_precision_inputs_are_float32(policy, dtype, sequences):
    s = sequences(S=300)
    q, k = s.q.to(dtype), s.k.to(dtype)
    assert torch.equal(simulate(policy, q, k), simulate(policy, q.float(), k.float()))


def test_lambda_times_in_closed_form(sequences):
    s, j = sequences(S=90), torch.arange(90)
    leaves = torch.where((j >= 4) & (j + 7 < 90), j + 7 + 1, NEVER)
    assert torch.equal(simulate(Lambda(recent=7), s.q, s.k), leaves.int().expand(2, 2, 90))


def test_h2o_keeps_the_heavy_hitter_that_lambda_drops():
    k = torch.zeros(1, 1, 40, 1, dtype=torch.float64)
    k[0, 0, 5] = 3.0
    q = torch.ones_like(k)
    assert simulate(H2O(heavy=2, recent=6), q, k)[0, 0, 5] == NEVER
    assert simulate(Lambda(recent=6, sinks=2), q, k)[0, 0, 5] == 12


def test_a_key_value_head_scores_by_the_sum_over_its_query_heads(sequences):
    s, policy = sequences(Hq=4, Hkv=2, S=60), H2O(heavy=3, recent=8)
    times = simulate(policy, s.q, s.k)
    assert torch.equal(simulate(policy, s.q[:, [1, 0, 3, 2]], s.k), times), (
        "the order within a group does not matter"
    )
    assert not torch.equal(simulate(policy, s.q[:, [2, 1, 0, 3]], s.k), times), (
        "whose group a head belongs to does"
    )
    repeated = simulate(policy, s.q, s.k.repeat_interleave(2, 1))
    assert not torch.equal(repeated[:, ::2], times), "nor is it the first head's score alone"


def test_tova_averages_over_all_heads_so_that_heads_agree(sequences):
    s = sequences(Hq=6, Hkv=3, S=60)
    times = simulate(TOVA(tokens=6), s.q, s.k)
    assert torch.equal(times, times[:, :1].expand_as(times))
    assert not torch.equal(times, simulate(TOVA(tokens=6), s.q[:, :3], s.k)), (
        "all query heads count"
    )


# ---------------------------------------------------------------- properties
@st.composite
def cases(draw):
    counts = st.integers(0, 6)
    kind, a, b = (
        draw(st.sampled_from(("h2o", "full", "lambda", "tova"))),
        draw(counts),
        draw(counts),
    )
    a = max(a, 2 - b)
    policy = {
        "h2o": lambda: H2O(heavy=a, recent=b),
        "full": lambda: H2O(heavy=a, recent=b, scores="full"),
        "lambda": lambda: Lambda(recent=max(a, 1), sinks=b + 1),
        "tova": lambda: TOVA(tokens=a + b),
    }[kind]()
    S = draw(st.integers(1, 90))
    Hkv = draw(st.integers(1, 3))
    shape = {"Hkv": Hkv, "Hq": Hkv * draw(st.integers(1, 3)), "S": S, "D": draw(st.integers(1, 6))}
    shape |= {
        "pads": [0, draw(st.integers(0, S))],
        "seed": draw(st.integers(0, 99)),
        "spread": draw(st.sampled_from((0.0, 1.0, 9.0))),
    }
    return policy, shape


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_every_policy_keeps_its_promises(case, sequences):
    policy, shape = case
    s = sequences(**shape)
    times = simulate(policy, s.q, s.k, s.real).long()
    S, position = shape["S"], s.real.long().cumsum(-1) - 1
    t, gone = torch.arange(S), times < NEVER
    kept_after = (
        (t[:, None] >= t) & (times[..., None, :] > t[:, None] + 1) & s.real[:, None, None]
    ).sum(-1)  # after query t
    assert (kept_after <= policy.budget).all(), "the budget is never exceeded"
    assert torch.equal(
        kept_after, (position + 1).clamp(max=policy.budget)[:, None].expand_as(kept_after)
    ), "nor left unused"
    leaving = torch.zeros(*times.shape[:2], S + 2, dtype=torch.long).scatter_add_(
        -1, times.clamp(max=S + 1), gone.long()
    )[..., 1 : S + 1]
    overflows = s.real & (position >= policy.budget)
    assert torch.equal(leaving, overflows[:, None].expand_as(leaving).long()), (
        "exactly one leaves at each step once full, none before"
    )
    assert (gone <= s.real[:, None]).all(), "padding holds no slot"
    age = (
        position[:, None].expand_as(times).gather(-1, (times - 1).clamp(max=S - 1))
        - position[:, None]
    )
    assert (age[gone] >= getattr(policy, "recent", 0)).all(), "recent tokens stay"
    assert not gone[(position < getattr(policy, "sinks", 0))[:, None].expand_as(gone)].any(), (
        "sinks stay"
    )
    assert (retained(times, s.real) <= policy.budget).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), empty=st.integers(0, 5), kind=st.sampled_from(ALL[:-1]))
def test_a_victim_is_never_an_empty_slot(seed, empty, kind):
    generator = torch.Generator().manual_seed(seed)
    position = torch.randperm(20, generator=generator)[: kind.budget + 1].expand(1, 2, -1).clone()
    position[0, 0, :empty] = -1
    score = torch.rand(position.shape, generator=generator) + 1.0
    victim = kind.victim(score, position, position.amax(-1, keepdim=True))
    may_go = (position[0, 0] >= 0) & (
        kind.priority(score, position, position.amax(-1, keepdim=True))[0, 0] < float("inf")
    )
    if may_go.any():
        assert position[0, 0, victim[0, 0]] >= 0


# ---------------------------------------------------------------- budgets and bad input
def test_budgets_from_fractions():
    assert H2O.from_fraction(0.05, 1024) == H2O(heavy=25, recent=25)  # 51.2, rounded down to even
    assert H2O.from_fraction(0.02, 1024).budget == 20
    assert Lambda.from_fraction(0.05, 1024) == Lambda(recent=46, sinks=4)
    assert TOVA.from_fraction(0.1, 1024) == TOVA(tokens=102)
    assert TOVA.from_fraction(1, 2048).budget == 2048
    assert budget_of(0.29, 100) == 28  # 0.29 * 100 is 28.999999999999996 in floats
    assert Full().budget is None


@pytest.mark.parametrize(
    "policy", [H2O(heavy=5, recent=7, scores="full"), Lambda(recent=7), TOVA(tokens=9)], ids=str
)
def test_baseline_plus_has_that_many_more_slots_of_the_same_policy(policy):
    more = policy.plus(5)
    assert more.budget == policy.budget + 5
    assert type(more) is type(policy)
    assert getattr(more, "scores", None) == getattr(policy, "scores", None)
    assert getattr(more, "sinks", None) == getattr(policy, "sinks", None)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: H2O(heavy=1, recent=0), "at least 2"),
        (lambda: H2O(heavy=-1, recent=9), r"heavy=-1.*at least 0"),
        (lambda: H2O(heavy=1.5, recent=9), r"heavy=1\.5.*whole number"),
        (lambda: H2O(heavy=True, recent=9), "heavy=True"),
        (lambda: H2O(heavy=4, recent=4, scores="rows"), "'cache' or 'full'"),
        (lambda: TOVA(tokens=1), "at least 2"),
        (lambda: Lambda(recent=0, sinks=8), "larger than the sinks"),
        (lambda: Lambda.from_budget(4), "at least 5"),
        (lambda: Lambda.from_fraction(0.05, 64), "sinks"),
        (lambda: H2O.from_fraction(-0.05, 1024), r"-0\.05.*\(0, 1\]"),
        (lambda: H2O.from_fraction(0, 1024), r"\(0, 1\]"),
        (lambda: H2O.from_fraction(5, 1024), r"5 must lie in \(0, 1\].*5%"),
        (lambda: H2O.from_fraction(float("nan"), 1024), "nan must lie"),
        (lambda: H2O.from_fraction("5%", 1024), "'5%' must lie"),
        (lambda: H2O.from_fraction(0.001, 1024), r"1\.0 tokens.*larger fraction"),
        (lambda: Full.from_fraction(0.05, 1024), r"write Full\(\)"),
        (lambda: Full().plus(4), "no budget"),
        (
            lambda: H2O(heavy=600, recent=600).check(1024),
            "1200 tokens is above the model's context of 1024",
        ),
        (lambda: get_policy("h20"), "unknown policy 'h20': choose from full, h2o, lambda, tova"),
        (lambda: get_policy(None), "unknown policy None"),
    ],
)
def test_bad_input_gets_one_clear_error(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_policies_are_found_by_name_in_any_case():
    assert [get_policy(n) for n in ("full", "H2O", "Lambda", "TOVA")] == [Full, H2O, Lambda, TOVA]


def test_a_step_of_ones_own_inherits_no_shortcut(sequences):
    class EveryFourth(Lambda):
        def priority(self, score, position, now):
            return super().priority(score, position, now).masked_fill(position % 4 == 0, 1e9)

    class Unchanged(Lambda):
        pass

    s = sequences(S=40)
    policy = EveryFourth(recent=6, sinks=1)
    real = torch.ones(2, 40, dtype=torch.bool)
    assert torch.equal(
        simulate(policy, s.q, s.k), simulation.simulate_steps(policy, s.q, s.k, real, 0.4)
    )
    assert policy.rule() is None
    assert Unchanged(recent=6).rule() == Lambda(recent=6).rule()


def test_names_are_found_in_any_case(monkeypatch):
    from lesslib.policies import POLICIES, register_policy

    monkeypatch.setattr("lesslib.policies.registry.POLICIES", dict(POLICIES))

    @register_policy
    class Snap(TOVA):
        name = "SnapKV"

    assert get_policy("SnapKV") is get_policy("snapkv") is Snap
