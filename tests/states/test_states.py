"""Every state: its whole-sequence form against the loop over absorb and read, its numbers, its
registry.
"""

from types import ModuleType

import pytest
import torch
from tiny_models import SHAPES, close

from lesslib.ops.blocks import NEVER, gather_tokens
from lesslib.ops.scan import arrivals
from lesslib.policies import H2O, simulate
from lesslib.states import (
    LayerKernels,
    LayerPerformer,
    Nothing,
    State,
    get_state,
    register_state,
)
from lesslib.states.low_rank import kept_at_random


def learned(Hq, Hkv, D):
    layer = LayerKernels(Hq, Hkv, D, kernel_size=3, hidden=7).double().eval()
    torch.nn.init.ones_(layer.s1)
    return layer


def random_features(Hq, Hkv, D):
    return LayerPerformer(Hq, Hkv, D, 3, torch.Generator().manual_seed(0)).double()


STATES = {"less": learned, "performer": random_features}


def loop(state, s, evicted_at):
    """`state.over_sequence` by the base class's own loop."""
    arrived = arrivals(evicted_at)
    token = arrived.clamp(min=0)
    keys = gather_tokens(s.k, token)
    values = gather_tokens(s.v, token)
    return State.over_arrivals(state, s.q, keys, values, arrived >= 0, 0.5)


@pytest.mark.parametrize("kind", STATES)
def test_the_fast_form_equals_the_loop_over_absorb_and_read(kind, sequences):
    policy = H2O(heavy=3, recent=5)
    for seed, shape in enumerate(SHAPES):
        s = sequences(**shape, seed=seed)
        state = STATES[kind](s.q.shape[1], s.k.shape[1], s.q.shape[-1])
        evicted_at = simulate(policy, s.q, s.k, s.real)
        fast = state.over_sequence(s.q, s.k, s.v, evicted_at, 0.5)
        slow = loop(state, s, evicted_at)
        close(fast.output, slow.output)
        assert torch.equal(fast.logsumexp == -torch.inf, slow.logsumexp == -torch.inf)
        is_held = fast.logsumexp > -torch.inf
        close(fast.logsumexp[is_held], slow.logsumexp[is_held])
        assert is_held.any() == (evicted_at < s.q.shape[2]).any()


def test_gradients_of_the_fast_form_equal_those_of_the_loop(sequences):
    s = sequences(S=41)
    state = learned(4, 2, 5)
    evicted_at = simulate(H2O(heavy=3, recent=5), s.q, s.k)
    gradients = []
    for form in (state.over_sequence(s.q, s.k, s.v, evicted_at, 0.5), loop(state, s, evicted_at)):
        is_held = form.logsumexp > -torch.inf
        loss = form.output.sin().sum() + form.logsumexp[is_held].sum()
        weights = [p for p in state.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(loss, weights))
    for fast, slow in zip(*gradients, strict=True):
        assert slow.abs().max() > 1e-6
        close(fast, slow)


@pytest.mark.parametrize("kind", STATES)
def test_memory_holds_the_numbers_it_says(kind, sequences):
    s = sequences()
    state = STATES[kind](4, 2, 5)
    memory = state.empty(s.k, s.v)
    held = sum(tensor[0, 0].numel() for tensor in memory.values())
    assert held == state.numbers(head_dim=5, value_dim=4)


def test_three_ways_to_hold_as_many_numbers_as_the_design_says():
    # R = 8, D = 128: LESS holds 1,032 where four exact pairs hold 1,024.
    assert LayerKernels(1, 1, 128, kernel_size=8, hidden=1).numbers(128, 128) == 1032
    assert Nothing().numbers(128, 128) == 0


def test_an_absorbed_empty_slot_leaves_no_trace(sequences):
    s = sequences()
    state = learned(4, 2, 5)
    memory = state.empty(s.k, s.v)
    state.absorb(memory, s.k, s.v, torch.zeros(s.k.shape[:3], dtype=torch.bool))
    assert all(not tensor.any() for tensor in memory.values())
    part = state.read(memory, s.q, 0.5)
    assert (part.logsumexp == -torch.inf).all()
    assert not part.output.any()


def test_states_are_found_by_name():
    assert get_state("less") is LayerKernels
    assert get_state("performer") is LayerPerformer
    with pytest.raises(ValueError, match=r"unknown state 'lass': choose from less, performer"):
        get_state("lass")


def test_a_name_belongs_to_one_class():
    with pytest.raises(ValueError, match=r"'less' is registered already \(LayerKernels\)"):

        @register_state
        class Other(State):
            name = "less"

    assert get_state("less") is LayerKernels


def test_a_token_that_never_leaves_never_arrives(sequences):
    s = sequences()
    state = learned(4, 2, 5)
    stays = torch.full(s.k.shape[:3], NEVER, dtype=torch.int32)
    assert (state.over_sequence(s.q, s.k, s.v, stays, 0.5).logsumexp == -torch.inf).all()


def test_a_part_far_below_the_smallest_normal_number_stays_finite(sequences):
    s = sequences(B=1, Hq=1, Hkv=1, S=6, D=16, Dv=4)
    state = LayerPerformer(1, 1, 16, 8, torch.Generator().manual_seed(0))
    keys = s.k.float()
    keys = keys / keys.norm(dim=-1, keepdim=True) * torch.linspace(31, 40, 6)[:, None]
    memory = state.empty(keys, s.v.float())
    state.absorb(memory, keys, s.v.float(), torch.ones(1, 1, 6, dtype=torch.bool))
    queries = s.q.float()
    read = state.read(memory, queries, 0.25)
    over = state.over_arrivals(
        queries, keys, s.v.float(), torch.ones(1, 1, 6, dtype=torch.bool), 0.25
    )
    for part in (read, over):
        assert part.output.isfinite().all()
        assert not part.logsumexp.isnan().any()


def test_features_of_ones_own_bring_no_kernels_of_the_base():
    class Mine(LayerKernels):
        def phi(self, q):
            return super().phi(q) + 1

    layer = Mine(2, 2, 5, kernel_size=3, hidden=7).eval()
    q = torch.randn(1, 2, 4, 5)
    without_kernels = ModuleType("kernels")
    assert torch.equal(layer.fused_phi(without_kernels, q), layer.phi(q))
    assert Mine.fused_psi is LayerKernels.fused_psi


def test_dropout_keeps_its_share_by_independent_numbers_of_the_generator():
    size = torch.Size((2, 3, 24, 401))
    cpu = torch.device("cpu")
    share = 0.7
    generator = torch.Generator().manual_seed(5)
    kept = kept_at_random(size, share, cpu, generator)
    # Their mean, and products with those of the next token, unit, head and sequence, each within
    # five standard deviations.
    bits = kept.double() - share
    variance = share * (1 - share)
    assert abs(bits.mean()) < 5 * (variance / bits.numel()) ** 0.5
    for dim in range(4):
        n = size[dim]
        products = bits.narrow(dim, 0, n - 1) * bits.narrow(dim, 1, n - 1)
        assert abs(products.mean()) < 5 * variance / products.numel() ** 0.5

    # The generator decides, and moves on.
    again = kept_at_random(size, share, cpu, torch.Generator().manual_seed(5))
    assert torch.equal(again, kept)
    assert not torch.equal(kept_at_random(size, share, cpu, generator), kept)


def test_dropout_of_next_to_nothing_and_of_next_to_all():
    size = torch.Size((3, 5))
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    assert kept_at_random(size, 1 - 1e-9, cpu, generator).all()
    assert not kept_at_random(size, 1e-9, cpu, generator).any()
