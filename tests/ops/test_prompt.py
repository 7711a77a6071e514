"""Several tokens at once: blocks of rows, of a prompt or a later turn, against whole rows."""

import math

import pytest
import torch
import torch.nn.functional as F

from lesslib import H2O, TOVA, Lambda
from lesslib.attention.prompt import Candidates, attend_candidates, attend_prompt
from lesslib.ops import blocks
from lesslib.ops.blocks import dense_logsumexp, gather_tokens
from lesslib.states.low_rank import TILE_NUMBERS, LayerKernels

F64 = torch.float64


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=F64):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    return normal


def whole_rows(q, keys, is_token, scaling):
    """Logits [B, Hq, S, M] of the last S candidates' queries; a token not seen is -inf."""
    S, M = q.shape[2], keys.shape[2]
    groups = q.shape[1] // keys.shape[1]
    logits = q.double() @ keys.double().repeat_interleave(groups, 1).mT * scaling
    j = torch.arange(M)
    t = torch.arange(M - S, M)[:, None]
    is_seen = (j <= t) & is_token.repeat_interleave(groups, 1)[:, :, None] | (j == t)
    return logits.masked_fill(~is_seen, -math.inf)


# old slots, new tokens, D, Dv, query heads, KV heads, padding of each row
CASES = [
    (0, 1, 5, 5, 2, 2, (0,)),
    (0, 150, 5, 7, 4, 2, (0, 9)),
    (0, 64, 64, 64, 9, 3, (0, 64)),
    (21, 100, 80, 80, 6, 3, (0, 0)),
    (21, 7, 16, 16, 3, 1, (0,)),
]


@pytest.mark.parametrize("buffer", [1, 2**20], ids=["a head at a time", "all heads"])
@pytest.mark.parametrize(("old", "S", "D", "Dv", "Hq", "Hkv", "pads"), CASES)
def test_blocks_of_rows_equal_whole_rows(old, S, D, Dv, Hq, Hkv, pads, buffer, draw, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BUFFER", buffer)
    B, M = len(pads), old + S
    q = draw(B, S, Hq, D).transpose(1, 2)
    keys = draw(B, Hkv, M, D)
    values = draw(B, Hkv, M, Dv)
    real = torch.arange(S) >= torch.tensor(pads)[:, None]
    position = torch.arange(M, dtype=torch.int32).repeat(B, Hkv, 1)
    # an empty slot, which differs from head to head
    for h in range(Hkv if old else 0):
        position[:, h, 3 + h] = -1
    position[..., old:].masked_fill_(~real[:, None], -1)
    candidates = Candidates(keys, values, position, draw(B, Hkv, M))
    rows = whole_rows(q, keys, position >= 0, 0.3)
    probabilities = rows.softmax(-1)
    groups = Hq // Hkv
    for policy in (H2O(2, 2), TOVA(4), Lambda(2, 2)):
        attended = attend_candidates(policy, q, candidates, real, 0.3)
        expected = probabilities @ values.repeat_interleave(groups, 1)
        torch.testing.assert_close(attended.part.output, expected)
        torch.testing.assert_close(attended.part.logsumexp, rows.logsumexp(-1))
        is_observed = real.clone()
        if policy.name == "tova":
            is_observed[:, :-1] = False
        if policy.name == "lambda":
            is_observed[:] = False
        columns = (probabilities * is_observed[:, None, :, None]).sum(2)
        torch.testing.assert_close(attended.columns, columns.unflatten(1, (Hkv, groups)))


@pytest.mark.parametrize("policy", [H2O(2, 2), TOVA(4), Lambda(2, 2)], ids=str)
def test_a_prompt_is_attended_once_and_observed_as_its_policy_asks(policy, draw):
    q = draw(2, 4, 90, 8)
    k = draw(2, 2, 90, 8)
    v = draw(2, 2, 90, 8)
    real = torch.arange(90) >= torch.tensor([0, 11])[:, None]
    position = torch.where(real, real.cumsum(1) - 1, -1)[:, None].expand(2, 2, 90)
    prompt = Candidates(k, v, position, k.new_zeros(2, 2, 90))
    output, columns = attend_prompt(policy, q, prompt, real, 0.3)
    attended = attend_candidates(policy, q, prompt, real, 0.3)
    torch.testing.assert_close(output, attended.part.output)
    torch.testing.assert_close(columns, attended.columns)


def test_a_public_models_prompt_is_dense_attention_in_float32(draw):
    """9 query and 3 KV heads of 64: outputs of torch's SDPA, log-sum-exps of its CPU kernel."""
    q = 1.5 * draw(1, 9, 700, 64, dtype=torch.float32)
    k = draw(1, 3, 700, 64, dtype=torch.float32)
    v = draw(1, 3, 700, 64, dtype=torch.float32)
    real = torch.ones(1, 700, dtype=torch.bool)
    position = torch.arange(700).expand(1, 3, 700)
    prompt = Candidates(k, v, position, torch.zeros(1, 3, 700))
    attended = attend_candidates(H2O(2, 2), q, prompt, real, 0.125)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (attended.part.output - expected).abs().max() < 1e-5
    rows = whole_rows(q, k, position >= 0, 0.125)
    assert (attended.part.logsumexp - rows.logsumexp(-1)).abs().max() < 1e-5
    columns = rows.softmax(-1).sum(2).unflatten(1, (3, 3))
    assert (attended.columns - columns).abs().max() < 1e-4
    logsumexp = dense_logsumexp(q, k, real, 0.125)
    assert (logsumexp.flatten(1, 2) - rows.logsumexp(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(dtype, draw):
    q = draw(1, 2, 70, 16, dtype=dtype)
    k = draw(1, 1, 70, 16, dtype=dtype)
    got = dense_logsumexp(q, k, torch.ones(1, 70, dtype=torch.bool), 0.3)
    assert got.dtype == torch.float32
    rows = whole_rows(q, k, torch.ones(1, 1, 70, dtype=torch.bool), 0.3).logsumexp(-1)
    assert (got.flatten(1, 2) - rows).abs().max() < 1e-5


def test_dense_logsumexps_of_padded_rows(draw):
    q = draw(2, 4, 130, 8)
    k = draw(2, 2, 130, 8)
    real = torch.arange(130) >= torch.tensor([0, 70])[:, None]
    rows = whole_rows(q, k, real[:, None].expand(2, 2, 130), 0.3).logsumexp(-1)
    torch.testing.assert_close(dense_logsumexp(q, k, real, 0.3).flatten(1, 2), rows)


def test_rows_are_gathered_whole_from_any_layout(draw):
    index = draw(2, 3, 11).argsort(-1)[..., :4]
    by_head = draw(2, 3, 11, 5)
    by_token = draw(2, 11, 3, 5).transpose(1, 2)
    for x in (by_head, by_token):
        assert torch.equal(
            gather_tokens(x, index), x.gather(2, index[..., None].expand(2, 3, 4, 5))
        )


def test_features_of_many_tokens_come_in_tiles(draw):
    layer = LayerKernels(2, 2, 4, kernel_size=3, hidden=600)
    layer = layer.double().eval()
    S = 2 * TILE_NUMBERS // (2 * 600) + 5
    x = draw(1, 2, S, 4)
    with torch.no_grad():
        expected = F.gelu(F.gelu(x @ layer.phi_w1) @ layer.phi_w2).abs()
        torch.testing.assert_close(layer.phi(x), expected)
