"""A policy and a state that users write in one file each decode, score and get a row, with no
other change.
"""

from pathlib import Path

import every_second
import pytest
import running_mean
import torch
from tiny_models import CONFIGS, build, close

from lesslib import LessCache, less
from lesslib.models import cache_bytes, model_shape
from lesslib.policies import get_policy
from lesslib.states import get_state
from lesslib.util.paths import ROOT

FILES = [Path(every_second.__file__), Path(running_mean.__file__)]


@pytest.fixture(scope="module")
def model():
    return build(CONFIGS["llama-grouped"]())


@pytest.fixture
def policy():
    return get_policy("every-second").from_budget(7)


@pytest.fixture
def state(model):
    return get_state("running-mean").for_model(model_shape(model)).double()


def padded_batch(lengths, S):
    """Token ids [B, S] padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (len(lengths), S), generator=generator)
    mask = torch.arange(S) >= S - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_is_short(file):
    assert len(file.read_text().splitlines()) <= 60


def test_no_file_of_lesslib_knows_their_names():
    names = ("every-second", "EverySecond", "every_second", "running-mean", "RunningMean")
    for path in (ROOT / "lesslib").rglob("*.py"):
        text = path.read_text()
        assert [name for name in names if name in text] == [], path


def test_the_policy_keeps_the_newest_even_positions(model, policy, state):
    ids, mask = padded_batch([30, 30], 30)
    cache = LessCache(model, policy, state)
    with torch.no_grad(), less(model):
        for t in range(30):
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
    position = cache.less_layers()[0].slots.position
    kept = position[0, 0][position[0, 0] >= 0].sort().values
    assert kept.tolist() == [16, 18, 20, 22, 24, 26, 28]


@torch.no_grad()
def test_scoring_a_sequence_equals_decoding_it_token_by_token(model, policy, state):
    ids, mask = padded_batch([26, 17], 26)
    with less(model, policy, state):
        scored = model(ids, attention_mask=mask).logits
    with less(model, policy):
        forgotten = model(ids, attention_mask=mask).logits
    cache = LessCache(model, policy, state)
    steps = []
    with less(model):
        for t in range(ids.shape[1]):
            now = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
            steps.append(now.logits)
    is_real = mask.bool()
    close(torch.cat(steps, 1)[is_real], scored[is_real])
    # The state weighs in.
    assert (scored - forgotten)[is_real].abs().max() > 1e-3


@torch.no_grad()
def test_generate_takes_batches_padded_on_the_left(model, policy, state):
    lengths = [19, 11]
    ids, mask = padded_batch(lengths, 19)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with less(model):
        cache = LessCache(model, policy, state)
        together = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
        for row, length in enumerate(lengths):
            alone = model.generate(
                ids[row : row + 1, -length:],
                attention_mask=mask[row : row + 1, -length:],
                past_key_values=LessCache(model, policy, state),
                **settings,
            )
            assert torch.equal(together[row, -12:], alone[0, -12:])
    assert cache.evicted(0).any()


@torch.no_grad()
def test_bytes_are_those_of_the_formula_at_every_length(model, policy, state):
    cache = LessCache(model, policy, state)
    expected = cache_bytes(model_shape(model), policy, state, batch=2, dtype=torch.float64)
    ids, mask = padded_batch([40, 40], 40)
    with less(model):
        for start, stop in ((0, 20), (20, 21), (21, 40)):
            now = slice(start, stop)
            model(ids[:, now], attention_mask=mask[:, :stop], past_key_values=cache)
            assert cache.nbytes() == expected
    shape = model_shape(model)
    numbers = state.numbers(shape["head_dim"], shape["head_dim"])
    heads = shape["layers"] * shape["kv_heads"] * 2
    assert cache.report()["state"] == heads * numbers * torch.float64.itemsize
