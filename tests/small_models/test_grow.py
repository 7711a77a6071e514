"""A Falcon grown out of a Llama: turning heads keeps attention, it begins as the Llama.

And its heads become one.
"""

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lesslib.zoo import grow
from lesslib.zoo.grow import grown_falcon, merge_heads, multi_query, turned


@pytest.fixture
def llama():
    """A random Llama whose residual stream has mean 0, and whose MLPs give 0.

    With mean 0, Falcon's layer norms equal its RMS norms.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=32,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    ).eval()
    embeddings = model.get_input_embeddings().weight.data
    # not quite: inputs must span all dimensions
    embeddings -= (1 - 1e-5) * embeddings.mean(1, keepdim=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data -= layer.self_attn.o_proj.weight.data.mean(0)
        layer.mlp.down_proj.weight.data.zero_()
        layer.input_layernorm.weight.data.uniform_(0.5, 2)
        layer.post_attention_layernorm.weight.data.uniform_(0.5, 2)
    return model


def windows(seed=1):
    return [
        torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(seed + i))
        for i in range(3)
    ]


def attention(Wq, Wk, Wv, Wo, x):
    """Causal attention with RoPE over x [S, E], [S, E]."""
    D = Wq.shape[1]
    config = LlamaConfig(hidden_size=D * len(Wq), num_attention_heads=len(Wq), head_dim=D)
    cos, sin = LlamaRotaryEmbedding(config).double()(x, torch.arange(len(x))[None])
    q, k, v = (torch.einsum("se,hde->hsd", x, W)[None] for W in (Wq, Wk, Wv))
    q, k = apply_rotary_pos_emb(q, k, cos.double(), sin.double())
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0]
    return torch.einsum("hsd,ohd->so", out, Wo)


@pytest.mark.parametrize("rank", [0, 1])
def test_turned_heads_attend_alike(rank):
    torch.manual_seed(rank)
    E, H, D = 20, 3, 4
    Wq, Wk, Wv = (torch.randn(H, D, E, dtype=torch.float64) for _ in range(3))
    Wo, x = torch.randn(E, H, D, dtype=torch.float64), torch.randn(200, E, dtype=torch.float64)
    *new, key_shares, value_shares = turned(Wq, Wk, Wv, Wo, x, rank)
    assert (attention(*new, x[:30]) - attention(Wq, Wk, Wv, Wo, x[:30])).abs().max() < 1e-9
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(new, (Wq, Wk, Wv, Wo), strict=True))
    Wo[:, 1] *= 2
    Wq[2] *= 3
    if rank == 0:  # with one head much louder, the common direction becomes its own
        *_, keys, values = turned(Wq, Wk, Wv, Wo, x, rank)
        assert values[1] / value_shares[1] == pytest.approx(4)
        assert keys[2] / key_shares[2] > 2.9


def test_heads_that_are_one_already_but_for_a_turn_meet():
    """Keys and values become equal.

    They differ by a rotation and a scale for each frequency, and by an invertible map.
    """
    torch.manual_seed(0)
    E, H, D = 20, 3, 4
    base, x = torch.randn(D, E, dtype=torch.float64), torch.randn(300, E, dtype=torch.float64)
    pair = torch.complex(base[: D // 2], base[D // 2 :])
    factors = torch.polar(
        torch.rand(H, D // 2, 1, dtype=torch.float64) + 0.5,
        6 * torch.rand(H, D // 2, 1, dtype=torch.float64),
    )
    Wk = torch.cat([(factors * pair).real, (factors * pair).imag], 1)
    Wv = torch.randn(H, D, D, dtype=torch.float64) @ base
    Wq, Wo = torch.randn(H, D, E, dtype=torch.float64), torch.randn(E, H, D, dtype=torch.float64)
    _, keys, values, *_ = turned(Wq, Wk, Wv, Wo, x, 0)
    assert (keys - keys[:1]).abs().max() < 1e-9
    assert (values - values[:1]).abs().max() < 1e-9


def test_each_layer_gets_its_own(llama, monkeypatch):
    """MLP i learns what MLP i of the Llama gives.

    The attention beside it begins with the next directions, read through its norm.
    """
    fits = []
    monkeypatch.setattr(grow, "fit_mlp", lambda *fit: fits.append(fit))
    for layer in llama.model.layers:
        layer.mlp.down_proj.weight.data.normal_()
    falcon, acts = grown_falcon(llama, windows(), seed=0), grow.activations(llama, windows())
    for i, layer in enumerate(llama.model.layers):
        falcon_mlp, llama_mlp, x, y = fits[i]
        odd, a = falcon.transformer.h[2 * i + 1], layer.self_attn
        assert falcon_mlp is odd.mlp
        assert llama_mlp is layer.mlp
        assert torch.equal(y, layer.mlp(x))
        assert torch.equal(x, acts["in", i])
        Wq, Wk, Wv = (
            p.weight.detach().double().unflatten(0, (3, 8)) for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        wanted = turned(
            Wq,
            Wk,
            Wv,
            a.o_proj.weight.detach().double().unflatten(1, (3, 8)),
            acts["x", i][::4].double(),
            1,
        )
        seen = (
            odd.self_attention.query_key_value.weight
            * odd.input_layernorm.weight
            / layer.input_layernorm.weight
        )
        torch.testing.assert_close(
            seen.unflatten(0, (3, 3, 8)), torch.stack(wanted[:3], 1).float(), rtol=1e-3, atol=1e-4
        )
        assert torch.equal(odd.input_layernorm.weight, layer.post_attention_layernorm.weight)


def test_it_begins_as_the_llama_and_ends_multi_query(llama, monkeypatch):
    monkeypatch.setattr(grow, "FIT", 2)
    falcon = grown_falcon(llama, windows(), seed=0).eval()
    ids = windows(9)[0]
    with torch.no_grad():
        wanted, got = (model(input_ids=ids, use_cache=False).logits for model in (llama, falcon))
        assert (wanted - got).abs().max() < 1e-4 * wanted.abs().max()
        with pytest.raises(ValueError, match="apart: merge them all the way first"):
            multi_query(falcon)
        merge_heads(falcon, 0.5)
        # they differed
        halfway = falcon(input_ids=ids, use_cache=False).logits
        assert (halfway - wanted).abs().max() > 1e-2
        merge_heads(falcon, 1.0)
        weight = falcon.transformer.h[1].self_attention.query_key_value.weight
        # of a key
        kept = weight.data[8, 0].clone()
        weight.data[8, 0] = torch.nan
        with pytest.raises(ValueError, match="nan apart"):
            multi_query(falcon)
        weight.data[8, 0] = kept
        one = multi_query(falcon).eval()
        assert one.config.multi_query
        assert one.num_parameters() < falcon.num_parameters()
        merged, single = (m(input_ids=ids, use_cache=False).logits for m in (falcon, one))
        assert (single - merged).abs().max() < 1e-4


def test_heads_move_by_their_shares(llama, monkeypatch):
    monkeypatch.setattr(grow, "FIT", 2)
    falcon = grown_falcon(llama, windows(), seed=0)
    attention = falcon.transformer.h[1].self_attention
    # head, query/key/value
    before = attention.query_key_value.weight.detach().unflatten(0, (3, 3, 8)).clone()
    merge_heads(falcon, 0.25)
    after = attention.query_key_value.weight.detach().unflatten(0, (3, 3, 8))
    assert torch.equal(after[:, 0], before[:, 0])
    for which in (0, 1):
        assert attention.shares[which].sum() == pytest.approx(1)
        shared = (attention.shares[which][:, None, None] * before[:, 1 + which]).sum(0)
        assert torch.allclose(
            after[:, 1 + which], 0.75 * before[:, 1 + which] + 0.25 * shared, atol=1e-6
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [("tie_word_embeddings", False), ("num_key_value_heads", 1), ("attention_bias", True)],
)
def test_what_a_falcon_cannot_have_is_refused(llama, field, value):
    setattr(llama.config, field, value)
    with pytest.raises(
        ValueError, match=f"no Falcon grows out of this model: it has {field}={value}, not"
    ):
        grown_falcon(llama, windows(), seed=0)


def test_rotary_positions_come_along(llama, monkeypatch):
    monkeypatch.setattr(grow, "FIT", 2)
    llama.config.rope_parameters["rope_theta"] = 500.0
    assert grown_falcon(llama, windows(), seed=0).config.rope_parameters["rope_theta"] == 500.0
    llama.config.rope_parameters["rope_type"] = "yarn"
    with pytest.raises(ValueError, match="its rotary positions are scaled"):
        grown_falcon(llama, windows(), seed=0)


def test_a_gelu_mlp_learns_of_a_swiglu_one_what_no_linear_map_gives(llama):
    torch.manual_seed(0)
    llama_mlp = llama.model.layers[0].mlp
    llama_mlp.down_proj.weight.data.normal_(std=0.3)
    x = torch.randn(4096, 24)
    with torch.no_grad():
        y = llama_mlp(x)
    config = FalconConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, ffn_hidden_size=24
    )
    falcon_mlp = FalconForCausalLM(config).transformer.h[0].mlp
    grow.fit_mlp(falcon_mlp, llama_mlp, x, y)
    with torch.no_grad():
        linear = y - x @ torch.linalg.lstsq(x, y).solution
        assert (falcon_mlp(x) - y).square().mean() < 0.8 * linear.square().mean()
