"""The bounded decode cache against the naive loop, the whole-sequence form and dense attention;
float64 but where said.
"""

import copy
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    GROUPED,
    SHAPES,
    SIZES,
    WITH_HYBRID,
    build,
    close,
    kernels_of,
    parameter_count,
)
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface

from lesslib import H2O, TOVA, Full, Lambda, LessCache, less
from lesslib.attention.fit import cache_bytes, model_shape
from lesslib.attention.layer import LessLayer
from lesslib.attention.whole_sequence import evict, recover
from lesslib.hf import fill, replace_attention
from lesslib.models import load_kernels, load_model
from lesslib.ops.naive import naive_attention
from lesslib.states import Kernels, LowRank, Nothing
from lesslib.util.paths import ROOT

S = 33
POLICIES = [
    H2O(heavy=3, recent=5),
    H2O(heavy=4, recent=0),
    Lambda(recent=3, sinks=2),
    Lambda(recent=4, sinks=0),
    TOVA(tokens=5),
]


class Given(LowRank):
    """Kernels whose features of a token are those of `sequences`, found by its query or key."""

    def __init__(self, s):
        super().__init__(s.q.shape[1], s.k.shape[1], s.q.shape[-1], s.phi.shape[-1])
        self.s = s

    def _look_up(self, x, tokens, features):
        # x [B, H, n, D], or [1, H, B * n, D] as `over_batch` gives it; every token is told by its
        # vector
        B = len(tokens)
        rows = x.transpose(0, 1).flatten(1, 2).unflatten(1, (B, -1)).transpose(0, 1)  # [B, H, n, D]
        index = (rows[:, :, :, None] == tokens[:, :, None]).all(-1).int().argmax(-1)
        found = features.gather(2, index[..., None].expand(*index.shape, features.shape[-1]))
        return found if len(x) == B else found.transpose(0, 1).flatten(1, 2)[None]

    def phi(self, q):
        return self._look_up(q, self.s.q, self.s.phi)

    def psi(self, k):
        return self._look_up(k, self.s.k, self.s.psi)


def layer_for(policy, s=None, chunk=None):
    return LessLayer(policy, Nothing() if s is None else Given(s), chunk)


def feed(layer, s, sizes):
    """The output of `layer` for s, fed in pieces of `sizes` tokens."""
    outputs, start = [], 0
    for size in sizes:
        piece = slice(start, start + size)
        layer.armed = True
        k, v = layer.update(s.k[:, :, piece], s.v[:, :, piece])
        outputs.append(
            layer.attend(
                s.q[:, :, piece],
                k,
                v,
                None if s.real is None else s.real[:, piece],
                s.q.shape[-1] ** -0.5,
            )
        )
        start += size
    assert start == s.q.shape[2]
    return torch.cat(outputs, 2)


def positions_evicted(layer, times, real):
    """The tokens that are evicted at the end by `times`, as `LessCache.evicted` counts: [B, Hkv,
    T] from the first real token.
    """
    B, Hkv, S = times.shape
    T, result = (
        int(layer.slots.count.max()),
        torch.zeros(B, Hkv, int(layer.slots.count.max()), dtype=torch.bool),
    )
    for b in range(B):
        first = 0 if real is None else int((~real[b]).sum())
        result[b, :, : S - first] = times[b, :, first:] <= S
    assert result.shape[-1] == T
    return result


# ---------------------------------------------------------------- truth, one layer
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_naive_loop_equals_the_cache_step_by_step_and_the_whole_sequence_form(policy, sequences):
    for seed, shape in enumerate(SHAPES):
        s = sequences(**shape, seed=seed)
        for kernels in (None, s):
            phi, psi = (None, None) if kernels is None else (s.phi, s.psi)
            naive, times = naive_attention(s.q, s.k, s.v, policy, phi, psi, s.real)
            layer = layer_for(policy, kernels)
            out = feed(layer, s, [1] * s.q.shape[2])
            evicted = evict(policy, s.q, s.k, s.v, s.real)
            close(out, naive)
            close(out, evicted.sparse if kernels is None else recover(evicted, s.phi, s.psi, s.v))
            cache = LessCache.__new__(LessCache)
            cache.layers = [layer]
            assert torch.equal(cache.evicted(0), positions_evicted(layer, times, s.real)), shape


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_state_is_the_sum_over_the_evicted_set(policy, sequences):
    for pads, sizes in (
        (None, [1] * 40),
        ([0, 7], [1] * 40),
        (None, [17, 1, 1, 9, 1, 11]),
        ([0, 7], [23, 1, 2, 14]),
    ):
        s = sequences(S=40, pads=pads)
        layer = layer_for(policy, s)
        feed(layer, s, sizes)
        cache = LessCache.__new__(LessCache)
        cache.layers = [layer]
        gone = cache.evicted(0)
        assert int(gone.sum()) == int((layer.slots.count - policy.budget).clamp(min=0).sum()) * 2
        for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
            first = 0 if pads is None else pads[b]
            mine = gone[b, h, : 40 - first].nonzero()[:, 0] + first
            close(layer.memory["H"][b, h], s.psi[b, h, mine].T @ s.v[b, h, mine])
            close(layer.memory["z"][b, h], s.psi[b, h, mine].sum(0))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_prompt_attends_densely_and_is_evicted_once(policy, sequences):
    """The paper's prefill: dense rows, their column sums (H2O) or last row (TOVA), then the
    budget's worth of tokens stay.
    """
    for pads in (None, [0, 9]):
        s = sequences(S=150, pads=pads)
        layer = layer_for(policy, s)
        out = feed(layer, s, [150])
        for b in range(2):
            first = 0 if pads is None else pads[b]
            q, k = s.q[b, :, first:], s.k[b, :, first:]
            rows = (
                q @ k.repeat_interleave(2, 0).mT * 5**-0.5
                + torch.full((150 - first,) * 2, -math.inf).triu(1)
            ).softmax(-1)
            close(out[b, :, first:], rows @ s.v[b, :, first:].repeat_interleave(2, 0))
            score = rows.sum(1).unflatten(0, (2, 2)).sum(1)
            for h in range(2):
                token = torch.arange(150 - first)
                if isinstance(policy, H2O):
                    kept = {*range(150 - first - policy.recent, 150 - first)}
                    kept |= {
                        int(j)
                        for j in score[h, : 150 - first - policy.recent].topk(policy.heavy).indices
                    }
                elif isinstance(policy, Lambda):
                    kept = {*range(policy.sinks), *range(150 - first - policy.recent, 150 - first)}
                else:
                    kept = {int(j) for j in rows[:, -1].mean(0).topk(policy.tokens).indices}
                slots = layer.slots.position[b, h]
                assert {int(p) for p in slots if p >= 0} == kept
                for i, p in enumerate(slots):
                    if p >= 0:
                        close(layer.keys[b, h, i], k[h, p])
                        close(layer.values[b, h, i], s.v[b, h, first + p])
                        if isinstance(policy, H2O):
                            close(layer.slots.score[b, h, i], score[h, p])
                assert len(token) > policy.budget


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_later_turn_attends_slots_state_and_itself_and_is_evicted_once(policy, sequences):
    """Several tokens, more than a block of queries, on a cache that is not empty, against a plain
    loop over queries.
    """
    first, turn = 18, 100
    s = sequences(S=first + turn, pads=[0, 4])
    layer = layer_for(policy, s)
    feed(
        layer,
        SimpleNamespace(
            q=s.q[:, :, :first], k=s.k[:, :, :first], v=s.v[:, :, :first], real=s.real[:, :first]
        ),
        [first],
    )
    held = [t.clone() for t in layer.tensors().values()]
    later = SimpleNamespace(
        q=s.q[:, :, first:], k=s.k[:, :, first:], v=s.v[:, :, first:], real=s.real[:, first:]
    )
    out = feed(layer, later, [turn])
    keys, values, position, score, _, count, H, z = held
    for b in range(2):
        rows: dict[tuple[int, int], list] = {}  # of query heads, by key-value head and query
        for h, t in itertools.product(range(4), range(turn)):
            alive = position[b, h // 2] >= 0
            k = torch.cat([keys[b, h // 2][alive], later.k[b, h // 2, : t + 1]])
            v = torch.cat([values[b, h // 2][alive], later.v[b, h // 2, : t + 1]])
            weights, phi = (later.q[b, h, t] @ k.T * 5**-0.5).exp(), s.phi[b, h, first + t]
            close(
                out[b, h, t],
                (weights @ v + phi @ H[b, h // 2]) / (weights.sum() + phi @ z[b, h // 2]),
            )
            rows.setdefault((h // 2, t), []).append(weights / weights.sum())
        for g in range(2):
            alive = position[b, g] >= 0
            places = [*position[b, g][alive].tolist(), *range(int(count[b]), int(count[b]) + turn)]
            total = torch.cat([score[b, g][alive], torch.zeros(turn, dtype=torch.float64)])
            for t in range(turn):
                for row in rows[g, t]:
                    total[: len(row)] += row
            if isinstance(policy, TOVA):  # every head holds the same tokens
                total = torch.stack(rows[0, turn - 1] + rows[1, turn - 1]).mean(0)
            newest = places[-1]
            if isinstance(policy, Lambda):
                safe = [p < policy.sinks or p > newest - policy.recent for p in places]
            else:
                safe = [isinstance(policy, H2O) and p > newest - policy.recent for p in places]
            best = sorted(
                range(len(places)),
                key=lambda i: (
                    safe[i],
                    float(total[i]) if policy.needs_probabilities else 0.0,
                    places[i],
                ),
            )
            kept = {places[i]: float(total[i]) for i in best[-policy.budget :]}
            mine = {
                int(p): float(x)
                for p, x in zip(layer.slots.position[b, g], layer.slots.score[b, g], strict=True)
                if p >= 0
            }
            assert set(mine) == set(kept)
            if isinstance(policy, H2O):
                assert mine == pytest.approx(kept, abs=1e-10)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_streaming_one_token_at_a_time_is_decoding(policy, sequences):
    s = sequences(S=40, pads=[0, 7])
    by_steps, streamed = layer_for(policy, s), layer_for(policy, s, chunk=1)
    close(feed(streamed, s, [40]), feed(by_steps, s, [1] * 40))
    close(streamed.memory["H"], by_steps.memory["H"])
    close(streamed.memory["z"], by_steps.memory["z"])
    assert torch.equal(
        streamed.slots.position.sort(-1).values, by_steps.slots.position.sort(-1).values
    )


@given(
    st.integers(0, 10_000),
    st.integers(2, 9),
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(1, 20),
)
@settings(max_examples=40, deadline=None)
def test_whatever_the_pieces_the_cache_holds_its_budget_and_every_token_once(
    seed, budget, sizes, chunk
):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    q, k, v = (
        torch.randn(2, heads, total, 3, generator=generator, dtype=torch.float64)
        for heads in (2, 1, 1)
    )
    for policy in (H2O.from_budget(budget), TOVA(budget), Lambda(recent=budget - 1, sinks=1)):
        layer = LessLayer(policy, Nothing(), chunk)
        start = 0
        for size in sizes:
            piece = slice(start, start + size)
            layer.armed = True
            layer.update(k[:, :, piece], v[:, :, piece])
            assert (
                layer.attend(q[:, :, piece], k[:, :, piece], v[:, :, piece], None, 1.0)
                .isfinite()
                .all()
            )
            start += size
            for b in range(2):
                held = sorted(int(p) for p in layer.slots.position[b, 0] if p >= 0)
                assert len(held) == len(set(held)) == min(budget, start)
                assert held[-1] == start - 1 or isinstance(policy, TOVA)
                for slot, p in enumerate(layer.slots.position[b, 0]):
                    if p >= 0:
                        assert torch.equal(layer.keys[b, 0, slot], k[b, 0, p]), (
                            "a slot holds the token that its position says"
                        )


# ---------------------------------------------------------------- truth, whole models
@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, S), generator=torch.Generator().manual_seed(1))


def generate(model, ids, cache, new, **more):
    """What `model` says next, greedily and without stopping, on `cache`."""
    with less(model):
        return model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=new,
            **{"do_sample": False, "eos_token_id": None} | more,
        )


@torch.no_grad()
def run(model, cache, ids, sizes, **kwargs):
    """Logits of `model` on `cache`, fed in pieces of `sizes` tokens."""
    with less(model):
        mask, result, end = kwargs.pop("attention_mask", None), [], 0
        for size in sizes:
            start, end = end, end + size
            given = (
                {}
                if mask is None
                else {
                    "attention_mask": mask[:, :end],
                    "position_ids": positions(mask)[:, start:end],
                }
            )
            result.append(model(ids[:, start:end], past_key_values=cache, **given, **kwargs).logits)
    return torch.cat(result, 1)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", WITH_HYBRID)
def test_decoding_equals_scoring_on_every_architecture(name, models, ids):
    model = models(name)
    if (
        name == "gemma3"
    ):  # its sliding layers score with their window, which the whole-sequence form keeps too
        assert [type(layer).__name__ for layer in LessCache(model, POLICIES[0]).layers][
            1
        ] == "LessLayer"
    for policy in (POLICIES[0], Lambda(recent=3, sinks=2), TOVA(tokens=5)):
        for kernels in (None, kernels_of(model)):
            with torch.no_grad(), less(model, policy, kernels):
                scored = model(ids, use_cache=False).logits
            close(run(model, LessCache(model, policy, kernels), ids, [1] * S), scored)


@pytest.mark.parametrize("name", WITH_HYBRID)
def test_a_budget_of_the_whole_length_is_dense_attention_and_generates_the_same(name, models, ids):
    model = models(name)
    with torch.no_grad():
        stock, tokens = (
            model(ids).logits,
            model.generate(ids[:, :9], max_new_tokens=12, do_sample=False),
        )
    for prefill in ("dense", "streaming"):
        cache = LessCache(
            model, H2O(heavy=20, recent=20), kernels_of(model), prefill=prefill, chunk=5
        )
        close(run(model, cache, ids, [12, 1, 1, 9, 10]), stock)
        cache.reset()
        with less(model):
            assert torch.equal(
                model.generate(
                    ids[:, :9], past_key_values=cache, max_new_tokens=12, do_sample=False
                ),
                tokens,
            )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock), "the model is as it was"


@pytest.mark.parametrize("name", WITH_HYBRID)
def test_a_left_padded_row_equals_the_row_alone(name, models, ids):
    model, pad = models(name), 8
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    for policy in (POLICIES[0], TOVA(tokens=5)):
        for sizes in ([14] + [1] * (S - 14), [14, 1, 1, 10, 1, 6], [5, 6] + [1] * (S - 11)):
            kernels = kernels_of(model)
            together = run(
                model, LessCache(model, policy, kernels), ids, sizes, attention_mask=mask
            )
            close(together[:1], run(model, LessCache(model, policy, kernels), ids[:1], sizes))
            alone, skip = [], pad
            for size in sizes:  # the same cuts, without the padding
                alone.append(max(0, size - skip))
                skip = max(0, skip - size)
            close(
                together[1:, pad:],
                run(
                    model, LessCache(model, policy, kernels), ids[1:, pad:], [n for n in alone if n]
                ),
            )


def greedy(model, policy, kernels, ids, new):
    """Greedy decoding by the naive loop over the whole sequence, from a prompt of one token (so
    that no prefill differs).
    """

    def attention(layer, q, k, v, real, scaling):
        features = (
            (None, None) if kernels is None else (kernels[layer].phi(q), kernels[layer].psi(k))
        )
        return naive_attention(q, k, v, policy, *features, real, scaling)[0]

    with torch.no_grad(), replace_attention(model, attention):
        for _ in range(new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("name", ["llama-grouped", "falcon-7b", "falcon-40b", "gpt-neox"])
def test_greedy_generation_equals_a_naive_greedy_loop_token_for_token(name, models, ids):
    model = models(name)
    for policy in (POLICIES[0], TOVA(tokens=5)):
        kernels = kernels_of(model)
        expected = greedy(model, policy, kernels, ids[:, :1], 24)
        assert torch.equal(
            generate(model, ids[:, :1], LessCache(model, policy, kernels), 24), expected
        )


@pytest.mark.parametrize("name", ["gemma3", "falcon-7b"])
def test_reset_forgets_everything_on_other_architectures_too(name, models, ids):
    model = models(name)
    cache = LessCache(model, POLICIES[0], kernels_of(model))
    first = run(model, cache, ids, [12, 1, 1, 9, 10])
    cache.reset()
    close(run(model, cache, ids, [12, 1, 1, 9, 10]), first, 0)


def test_pico_falcon_with_its_kernels_generates_what_a_naive_greedy_loop_does():
    model, tokenizer = load_model("pico-falcon", "cpu", torch.float64)
    kernels, policy = (
        load_kernels("pico-falcon", "h2o", 0.05).double(),
        H2O.from_fraction(0.05, 1024),
    )
    ids = tokenizer(
        "It was the best of times, it was the worst of times, it was the age of wisdom, "
        "it was the age of foolishness. " * 2,
        return_tensors="pt",
    ).input_ids
    assert ids.shape[1] > policy.budget
    by_steps = LessCache(
        model, policy, kernels, prefill="streaming", chunk=1
    )  # the prompt too, as the naive loop reads it
    assert torch.equal(generate(model, ids, by_steps, 20), greedy(model, policy, kernels, ids, 20))
    assert by_steps.layers[0].memory["H"].abs().sum() > 0


def test_a_second_call_after_reset_equals_the_first_also_with_another_batch(llama, ids):
    cache = LessCache(llama, POLICIES[0], kernels_of(llama))
    first = run(llama, cache, ids, [12, 1, 1, 9, 10])
    address = cache.layers[0].keys.data_ptr()
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert cache.evicted(0).numel() == 0
    close(run(llama, cache, ids, [12, 1, 1, 9, 10]), first, 0)
    assert cache.layers[0].keys.data_ptr() == address
    cache.reset()
    close(run(llama, cache, ids[:1], [12, 1, 1, 9, 10]), first[:1], 1e-12)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", ["llama-grouped", "gemma3"])
def test_a_cache_that_is_filled_is_one_that_read_the_prompt(name, policy, models, ids):
    model, mask = models(name), torch.ones_like(ids)
    mask[1, :7] = 0
    kernels = kernels_of(model)
    reader = LessCache(model, type(policy).from_budget(model_shape(model)["context"]))
    run(model, reader, ids, [20], attention_mask=mask)
    for used in (kernels, None):
        filled, own = (LessCache(model, policy, used) for _ in range(2))
        fill(filled, reader)
        run(model, own, ids, [20], attention_mask=mask)
        for mine, its in zip(filled.less_layers(), own.less_layers(), strict=True):
            for a, b in zip(mine.tensors().values(), its.tensors().values(), strict=True):
                close(a, b)
            assert int(mine.seen) == int(its.seen) == 20
        given = {"attention_mask": mask, "position_ids": positions(mask)[:, 20:]}
        with torch.no_grad(), less(model):
            a, b = (
                model(ids[:, 20:], past_key_values=cache, **given).logits for cache in (filled, own)
            )
        close(a, b)
    assert int(reader.get_seq_length()) == 20


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [12, 1, 1]], ids=str)
def test_tokens_that_a_reader_took_one_by_one_are_filled_too(sizes, llama, ids):
    """A token that comes alone takes another slot than the tokens of a prompt."""
    kernels = kernels_of(llama)
    policy = POLICIES[0]
    n = sum(sizes)
    reader = LessCache(llama, type(policy).from_budget(model_shape(llama)["context"]))
    run(llama, reader, ids, sizes)
    filled = LessCache(llama, policy, kernels)
    fill(filled, reader)
    by_steps = LessCache(llama, policy, kernels)
    run(llama, by_steps, ids, [n])
    assert int(filled.get_seq_length()) == n
    with torch.no_grad(), less(llama):
        after_filling = llama(ids[:, n:], past_key_values=filled).logits
        after_reading = llama(ids[:, n:], past_key_values=by_steps).logits
    close(after_filling, after_reading)


def test_a_cache_is_filled_only_where_that_is_the_same_as_reading(llama, models, ids):
    whole = H2O.from_budget(S)
    reader, short, used = (
        LessCache(llama, whole),
        LessCache(llama, POLICIES[0]),
        LessCache(llama, POLICIES[0]),
    )
    for cache in (reader, short, used):
        run(llama, cache, ids, [20])
    for cache, source in (
        (used, reader),
        (LessCache(llama, TOVA(tokens=5)), reader),
        (LessCache(llama, POLICIES[0]), short),
        (LessCache(models("mistral"), POLICIES[0]), reader),
    ):
        with pytest.raises(
            ValueError,
            match=r"cannot take 20 from one of H2O.*give an empty one of the same model and class",
        ):
            fill(cache, source)
    reader.running = True  # as an interrupted call leaves it
    with pytest.raises(ValueError, match="cannot take 20"):
        fill(LessCache(llama, POLICIES[0]), reader)


def test_a_chat_turn_goes_on_where_the_last_ended(llama, ids):
    """generate, then generate again with the grown history, equals the same calls of the model by
    hand.
    """
    kernels, policy = kernels_of(llama), POLICIES[0]
    cache, by_hand = (LessCache(llama, policy, kernels) for _ in range(2))
    history = torch.cat([generate(llama, ids[:, :10], cache, 5), ids[:, 10:20]], 1)
    again = generate(llama, history, cache, 6, return_dict_in_generate=True, output_logits=True)
    tokens = again.sequences
    logits = run(llama, by_hand, tokens, [10, 1, 1, 1, 1, 11, 1, 1, 1, 1, 1, 1])
    close(torch.stack(again.logits, 1), logits[:, 24:30].float(), 1e-5)


def test_beams_follow_their_histories(llama, ids):
    """Every beam's score is that of its own tokens fed to a fresh cache."""
    kernels, policy = kernels_of(llama), POLICIES[0]
    beams = {
        "num_beams": 4,
        "num_return_sequences": 4,
        "length_penalty": 0.0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    out = generate(llama, ids[:, :10], LessCache(llama, policy, kernels), 15, **beams)
    assert len({tuple(row.tolist()) for row in out.sequences}) == 8
    logits = run(llama, LessCache(llama, policy, kernels), out.sequences, [10] + [1] * 15)
    log_probabilities = (
        logits[:, 9:-1].log_softmax(-1).gather(2, out.sequences[:, 10:, None]).sum((1, 2))
    )
    close(log_probabilities.float(), out.sequences_scores.float(), 1e-4)


def test_rows_can_be_chosen_repeated_and_copied(llama, ids):
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    kernels, policy = kernels_of(llama), POLICIES[0]

    def begun():
        cache = LessCache(llama, policy, kernels)
        run(llama, cache, ids, [20], attention_mask=mask)
        return cache

    @torch.no_grad()
    def go_on(cache, rows):
        given = {"attention_mask": mask[rows], "position_ids": positions(mask)[rows, 20:]}
        with less(llama):
            return llama(ids[rows, 20:], past_key_values=cache, **given).logits

    expected = go_on(begun(), [0, 1])
    for change, rows in (
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([False, True])), [1]),
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    ):
        cache = begun()
        change(cache)
        close(go_on(cache, rows), expected[rows])
    cache = begun()
    twin = copy.deepcopy(cache)
    close(go_on(cache, [0, 1]), expected)
    close(go_on(twin, [0, 1]), expected)
    assert twin.layers[0].state is cache.layers[0].state
    for change in (
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([1])),
    ):
        change(LessCache(llama, policy))  # before the first token there is nothing to do


def test_sampling_depends_on_the_seed_alone(llama, ids):
    cache, tokens = LessCache(llama, POLICIES[0], kernels_of(llama)), []
    for seed in (0, 0, 1):
        cache.reset()
        torch.manual_seed(seed)
        tokens.append(generate(llama, ids, cache, 20, do_sample=True, temperature=2.0))
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_a_row_that_stops_early_leaves_the_others_as_they_were(llama, ids):
    """The end token of row 0 is one that it says after a few tokens; row 1 goes on as if alone."""
    kernels = kernels_of(llama)
    free = generate(llama, ids, LessCache(llama, POLICIES[0], kernels), 16)
    new = free[:, S:]
    stop = next(int(t) for t in new[0] if t not in new[1])
    stopped = generate(
        llama, ids, LessCache(llama, POLICIES[0], kernels), 16, eos_token_id=stop, pad_token_id=0
    )
    at = int((new[0] == stop).nonzero()[0])
    assert at < 15
    assert torch.equal(stopped[0, S : S + at + 1], new[0, : at + 1])
    assert (stopped[0, S + at + 1 :] == 0).all()
    assert torch.equal(stopped[1], free[1])


def test_a_left_padded_batch_generates_what_its_rows_generate_alone(llama, ids):
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    kernels = kernels_of(llama)
    for more in ({}, {"prefill_chunk_size": 7}):
        together, *alone = (
            generate(
                llama, rows, LessCache(llama, POLICIES[0], kernels), 16, attention_mask=real, **more
            )[:, rows.shape[1] :]
            for rows, real in ((ids, mask), (ids[:1], mask[:1]), (ids[1:, 9:], mask[1:, 9:]))
        )
        assert torch.equal(together[0], alone[0][0])
        if not more:  # cut into chunks, the padded row is cut elsewhere
            assert torch.equal(together[1], alone[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_keeps_scores_and_state_wide(dtype, models, ids):
    model = models("qwen2")
    kernels = kernels_of(model)
    wide = run(model, LessCache(model, POLICIES[0], kernels), ids, [12] + [1] * (S - 12))
    cast = build(WITH_HYBRID["qwen2"]()).to(dtype)
    cache = LessCache(cast, POLICIES[0], kernels_of(cast).float())
    out = run(cast, cache, ids, [12] + [1] * (S - 12))
    layer = cache.layers[0]
    assert out.dtype == layer.keys.dtype == layer.values.dtype == dtype
    assert (
        layer.memory["H"].dtype
        == layer.memory["z"].dtype
        == layer.slots.score.dtype
        == torch.float32
    )
    allowed = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}[dtype]
    assert (out.double() - wide).abs().median() < allowed * wide.abs().median()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_of_half_precision_serve_a_wider_model(dtype, models, ids):
    model = models("llama-grouped")
    sizes = [12] + [1] * (S - 12)
    wide, none = (
        run(model, LessCache(model, POLICIES[0], k), ids, sizes) for k in (kernels_of(model), None)
    )
    cache = LessCache(model, POLICIES[0], kernels_of(model).to(dtype))
    out = run(model, cache, ids, sizes)
    assert out.dtype == cache.layers[0].memory["H"].dtype == wide.dtype
    allowed = {torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]  # of what the state adds
    assert (out - wide)[:, 12:].abs().mean() < allowed * (wide - none)[:, 12:].abs().mean()


# ---------------------------------------------------------------- bytes
@pytest.mark.parametrize("name", ["llama", "llama-grouped", "falcon-7b"])
def test_bytes_equal_the_formula_and_do_not_grow(name, models, ids):
    model = models(name)
    for kernels in (None, kernels_of(model)):
        cache = LessCache(model, POLICIES[0], kernels)
        assert cache.nbytes() == 0
        expected = cache_bytes(
            model_shape(model), POLICIES[0], 0 if kernels is None else 3, 2, torch.float64
        )
        for sizes in ([1] * 5, [S - 5], [1] * 4):
            run(model, cache, ids[:, : sum(sizes)], sizes)
            assert cache.nbytes() == expected
        report, shape = cache.report(), model_shape(model)
        assert report["tokens"] == S + 4
        assert (
            report["full"]
            == (S + 4) * 2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"] * 2 * 8
        )
        assert (
            report["cache"]
            == report["slots"] + report["bookkeeping"] + report["state"] + report["sliding"]
        )
        assert (
            report["slots"]
            == 9 * 2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"] * 2 * 8
        )
        assert report["kernels"] == (0 if kernels is None else 8 * parameter_count(kernels))


# ---------------------------------------------------------------- compiled
@pytest.mark.parametrize(
    ("name", "backend", "atol"),
    [
        ("llama-grouped", "aot_eager", 1e-8),
        ("falcon-7b", "aot_eager", 1e-8),
        # Llama's norms are in float32, where inductor rounds otherwise: the stock model moves by
        # 1e-5 too.
        ("llama-grouped", "inductor", 1e-4),
    ],
)
def test_one_compiled_frame_over_many_decode_steps(name, backend, atol, models, ids):
    model = models(name)
    kernels = kernels_of(model)
    caches = [LessCache(model, POLICIES[0], kernels) for _ in range(2)]
    eager = run(model, caches[0], ids[:, :9].repeat(1, 9), [9] + [1] * 70)
    torch._dynamo.reset()
    frames = CompileCounterWithBackend(backend)
    with torch.no_grad(), less(model), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, backend=frames, fullgraph=True)
        outs = [model(ids[:, :9], past_key_values=caches[1]).logits]
        tokens = ids[:, :9].repeat(1, 9)
        for t in range(9, 9 + 64):
            outs.append(compiled(tokens[:, t : t + 1].clone(), past_key_values=caches[1]).logits)
    assert frames.frame_count == 1
    close(torch.cat(outs, 1), eager[:, : 9 + 64], atol)


def test_generate_compiles_its_own_decode_step(llama, ids):
    kernels = kernels_of(llama)
    arguments = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with less(llama):
        eager = llama.generate(
            ids, past_key_values=LessCache(llama, POLICIES[0], kernels), **arguments
        )
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = tf.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        config._compile_all_devices = True
        got = llama.generate(
            ids,
            past_key_values=LessCache(llama, POLICIES[0], kernels),
            compile_config=config,
            **arguments,
        )
    assert torch.equal(got, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---------------------------------------------------------------- wrong use
def refused(exception, match):
    return pytest.raises(exception, match=match)


def test_a_cache_outside_the_context_is_refused(llama, ids):
    for run_it in (
        lambda c: llama.generate(ids, past_key_values=c, max_new_tokens=2),
        lambda c: llama(ids, past_key_values=c),
    ):
        with refused(RuntimeError, r"outside `with less\(model\)`: wrap the call"):
            run_it(LessCache(llama, POLICIES[0]))
    cache = LessCache(llama, POLICIES[0])
    with (
        torch.no_grad(),
        less(llama, POLICIES[0]),
        refused(RuntimeError, r"outside `with less\(model\)`"),
    ):
        llama(ids, past_key_values=cache)  # the whole-sequence context is not the one
    run(llama, cache, ids, [S])
    with torch.no_grad(), refused(RuntimeError, "outside"):
        llama(ids[:, :1], past_key_values=cache)  # nor does an earlier visit open it


def test_the_context_without_a_cache_is_refused(llama, ids):
    with less(llama):
        with refused(
            ValueError, r"needs past_key_values=LessCache\(model, ...\), not DynamicCache"
        ):
            llama.generate(ids, max_new_tokens=2)
        with refused(ValueError, r"not NoneType; to score whole sequences"):
            llama(ids, use_cache=False)
        with refused(ValueError, "not StaticCache"):
            llama.generate(ids, max_new_tokens=2, cache_implementation="static")
    assert llama.config._attn_implementation != "less_cache"


def test_another_models_cache_is_refused(llama, models, ids):
    with less(llama), refused(ValueError, "made for another model: make one with"):
        llama.generate(
            ids,
            past_key_values=LessCache(build(WITH_HYBRID["llama-grouped"]()), POLICIES[0]),
            max_new_tokens=2,
        )


def test_rollback_and_assisted_decoding_are_refused(llama, ids):
    cache = LessCache(llama, POLICIES[0])
    with refused(
        NotImplementedError,
        "evicted tokens cannot be brought back, so LessCache does no assisted decoding",
    ):
        cache.crop(1)
    with less(llama), refused(NotImplementedError, "no assisted decoding"):
        llama.generate(
            ids[:1],
            past_key_values=cache,
            assistant_model=build(WITH_HYBRID["llama"]()),
            max_new_tokens=4,
        )
    with less(llama), refused(NotImplementedError, "no assisted decoding"):
        llama.generate(ids[:1], past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=4)


def test_sinks_of_sliding_layers_are_refused_too(ids):
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6}
    model = build(
        tf.GptOssConfig(**GROUPED, **kinds, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    )
    sliding = model.model.layers[1].self_attn
    with torch.no_grad(), less(model), refused(NotImplementedError, r"attention sinks \(s_aux\)"):
        AttentionInterface()["less_cache"](
            sliding, *(torch.randn(1, 2, 9, 8) for _ in range(3)), None, s_aux=sliding.sinks
        )


def test_a_call_that_stopped_midway_is_noticed(models, ids):
    model = build(WITH_HYBRID["llama-grouped"]())
    cache, expected = (
        LessCache(model, POLICIES[0]),
        run(model, LessCache(model, POLICIES[0]), ids, [20, 13]),
    )
    run(model, cache, ids, [20])
    interrupt = model.model.layers[1].mlp.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        run(model, cache, ids[:, 20:], [13])
    interrupt.remove()
    with refused(
        RuntimeError, r"stopped midway and left this LessCache half written: call its reset\(\)"
    ):
        run(model, cache, ids[:, 20:], [13])
    cache.reset()
    close(run(model, cache, ids, [20, 13]), expected)


def test_kernels_that_could_be_trained_leave_no_graph_behind(ids):
    model = build(WITH_HYBRID["llama-grouped"]()).requires_grad_(False)
    cache = LessCache(model, POLICIES[0], kernels_of(model))
    with less(model):
        for t in range(12):
            model(ids[:, t : t + 1], past_key_values=cache)
    assert all(
        layer.memory["H"].abs().sum() > 0 and not layer.memory["H"].requires_grad
        for layer in cache.less_layers()
    )


def test_soft_capping_and_sinks_are_refused(ids):
    capped = build(tf.Gemma2Config(**GROUPED, head_dim=8, layer_types=["full_attention"] * 2))
    sinks = build(
        tf.GptOssConfig(
            **GROUPED,
            head_dim=8,
            layer_types=["full_attention"] * 2,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    )
    for model, match in (
        (capped, r"logit soft-capping \(softcap\)"),
        (sinks, r"attention sinks \(s_aux\)"),
    ):
        with (
            torch.no_grad(),
            less(model),
            refused(NotImplementedError, match + ".*use a model without it"),
        ):
            model(ids, past_key_values=LessCache(model, POLICIES[0]))


def test_policies_and_kernels_that_do_not_fit_are_refused(llama):
    wrong = Kernels.new(model_shape(llama) | {"kv_heads": 4}, 3, 8)
    for exception, match, arguments in (
        (ValueError, r"Full\(\) has no bound", (Full(),)),
        (ValueError, "full rows need every key", (H2O(2, 2, scores="full"),)),
        (ValueError, "65 tokens is above the model's context of 64", (TOVA(65),)),
        (TypeError, "policy is a str", ("h2o",)),
        (ValueError, "kv_heads is 4 in the kernels and 2 in the model", (TOVA(5), wrong)),
        (TypeError, "kernels is a dict", (TOVA(5), {})),
        (ValueError, "prefill 'sparse': choose 'dense' or 'streaming'", (TOVA(5), None, "sparse")),
        (ValueError, "chunk=0 must be a whole number", (TOVA(5), None, "streaming", 0)),
    ):
        with refused(exception, match):
            LessCache(llama, *arguments)
    with refused(ValueError, "the budget must be larger than the sinks, at least 5 tokens"):
        Lambda.from_budget(4)
    with (
        refused(ValueError, "mode='decode' takes no policy"),
        less(llama, POLICIES[0], mode="decode"),
    ):
        pass
    with refused(TypeError, "mode='parallel' needs a policy"), less(llama, mode="parallel"):
        pass


def test_models_whose_layers_cannot_be_bounded_are_refused():
    window = build(tf.MistralConfig(**GROUPED, sliding_window=8))
    with refused(
        ValueError,
        "every layer of MistralForCausalLM has a sliding window, so its cache is bounded already",
    ):
        LessCache(window, POLICIES[0])
    hybrid = tf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])
    with refused(NotImplementedError, "only attention layers"):
        LessCache(build(hybrid), POLICIES[0])
    alibi = build(tf.FalconConfig(**SIZES, alibi=True))
    with less(alibi), refused(NotImplementedError, "Falcon with alibi is not implemented"):
        alibi.generate(
            torch.ones(1, 3, dtype=torch.long),
            past_key_values=LessCache(alibi, POLICIES[0]),
            max_new_tokens=1,
        )
    bloom = build(tf.BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4))
    with (
        refused(
            TypeError, "BloomForCausalLM is not a decoder on .*; lesslib works with.*Llama.*Falcon"
        ),
        less(bloom),
    ):
        pass


def test_padding_on_the_right_gradients_and_a_changed_batch_are_refused(llama, ids):
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    with torch.no_grad(), less(llama):
        with refused(ValueError, "padding follows a real token: pad on the left"):
            llama(ids, attention_mask=mask, past_key_values=LessCache(llama, POLICIES[0]))
        cache = LessCache(llama, POLICIES[0])
        llama(ids, past_key_values=cache)
        with refused(
            ValueError,
            r"holds 2 rows of torch.float64 on cpu and was given 1 rows.*call reset\(\), or make"
            r" a new cache",
        ):
            llama(ids[:1, :1], past_key_values=cache)
    with less(llama), refused(RuntimeError, r"LessCache is for inference.*torch.no_grad\(\)"):
        llama(ids, past_key_values=LessCache(llama, POLICIES[0]))
    with refused(ValueError, "has seen no token yet"):
        LessCache(llama, POLICIES[0]).evicted(0)


def test_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec("\n".join(blocks[:2]), {})  # LESS on your own model: scoring, then generating
    assert "torch.Size([1, 301, 4096])" in capsys.readouterr().out
