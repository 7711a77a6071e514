"""`with less(...)` on tiny random models of many architectures, in float64: stock logits, the
naive form, padding, and refusals.
"""

import pytest
import torch
import transformers as tf
from tiny_models import CONFIGS, GROUPED, WITH_GPT2, build, close, kernels_of

from lesslib import H2O, TOVA, Full, Lambda, less
from lesslib.attention.fit import model_shape
from lesslib.attention.whole_sequence import dense_attention
from lesslib.hf import attention_modules, capture, output_projection, replace_attention
from lesslib.ops.naive import naive_attention
from lesslib.states import Kernels

S, POLICY = 21, H2O(heavy=2, recent=4)


@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, S), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


# ---------------------------------------------------------------- truth, on every architecture
@pytest.mark.parametrize("name", WITH_GPT2)
def test_a_budget_of_the_whole_length_gives_stock_logits(name, models, ids):
    model = models(name)
    stock = logits(model, ids)
    for policy in (Full(), H2O(heavy=11, recent=10), Lambda(recent=40), TOVA(tokens=S)):
        with less(model, policy, kernels_of(model), mode="parallel"):
            close(logits(model, ids), stock)
    assert torch.equal(logits(model, ids), stock), "the model is as it was"


@pytest.mark.parametrize(
    "policy",
    [POLICY, H2O(heavy=2, recent=4, scores="full"), Lambda(recent=4, sinks=2), TOVA(tokens=6)],
    ids=str,
)
@pytest.mark.parametrize("name", WITH_GPT2)
def test_logits_equal_a_model_whose_attention_is_the_naive_loop(name, policy, models, ids):
    model = models(name)
    kernels = kernels_of(model)

    def naive(layer, q, k, v, real, scaling):
        return naive_attention(q, k, v, policy, None, None, real, scaling)[0]

    def naive_less(layer, q, k, v, real, scaling):
        return naive_attention(
            q, k, v, policy, kernels[layer].phi(q), kernels[layer].psi(k), real, scaling
        )[0]

    results = [logits(model, ids)]
    for attention, chosen in ((naive, None), (naive_less, kernels)):
        kernels.eval()
        with replace_attention(model, attention):
            expected = logits(model, ids)
        kernels.train()  # its dropout must not reach scoring
        with less(model, policy, chosen, mode="parallel"):
            results.append(logits(model, ids))
        close(results[-1], expected, 1e-8)
    assert (results[1] - results[0]).abs().max() > 1e-3, "eviction changes something"
    assert (results[2] - results[1]).abs().max() > 1e-3, "so do kernels"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_left_padded_row_equals_the_row_alone(name, models, ids):
    model, pad = models(name), 8
    ids[1, :pad] = 0
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for policy in (POLICY, TOVA(tokens=6), Full()):
        with less(model, policy, kernels_of(model)):
            for given in (mask, mask.bool()):
                together = logits(model, ids, attention_mask=given, position_ids=positions)
                close(together[:1], logits(model, ids[:1]), 1e-9)
                close(together[1:, pad:], logits(model, ids[1:, pad:]), 1e-9)
    stock = logits(model, ids, attention_mask=mask, position_ids=positions)
    close(together[0], stock[0])
    close(together[1, pad:], stock[1, pad:])


@pytest.mark.parametrize("name", WITH_GPT2)
def test_capture_hands_over_what_each_layer_attends(name, models, ids):
    model, seen, projected = models(name), {}, {}
    shape, stock = model_shape(model), logits(model, ids)

    def keep(layer, q, k, v, out, scaling):
        seen[layer] = (q, k, v, out, scaling)

    modules = attention_modules(model)
    hooks = []
    for i, module in modules.items() if name != "gpt2" else ():  # whose projection is not a Linear
        hooks.append(
            output_projection(module).register_forward_pre_hook(
                lambda _, args, i=i: projected.update({i: args[0]})
            )
        )
    with capture(model, keep):
        close(model(ids).logits, stock)
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == sorted(modules) == list(range(shape["layers"]))
    for layer, (q, k, v, out, scaling) in seen.items():
        assert q.shape == out.shape == (2, shape["heads"], S, shape["head_dim"])
        assert k.shape == v.shape == (2, shape["kv_heads"], S, shape["head_dim"])
        assert not out.requires_grad
        close(out, naive_attention(q, k, v, Full(), scaling=scaling)[0])
        if projected:
            close(projected[layer], out.transpose(1, 2).flatten(2))


def test_layers_with_a_window_shorter_than_the_text_keep_their_stock_attention(ids):
    windowed = build(tf.MistralConfig(**GROUPED, sliding_window=8))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for given in ({}, {"attention_mask": mask}):
        stock = logits(windowed, ids, **given)
        with less(windowed, POLICY):
            close(logits(windowed, ids, **given), stock)
            assert (logits(windowed, ids[:, :8]) - stock[:, :8]).abs().max() > 1e-3, (
                "a text within the window is evicted as usual"
            )
    mixed = build(
        tf.Qwen2Config(
            **GROUPED,
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    )
    seen = []
    with replace_attention(mixed, lambda layer, *a: seen.append(layer) or dense_attention(*a)):
        out = logits(mixed, ids)
    assert seen == [1]
    close(out, logits(mixed, ids))


def test_half_precision_models_run(ids):
    model = build(tf.LlamaConfig(**GROUPED)).bfloat16()
    kernels = kernels_of(model).float()
    with less(model, POLICY, kernels):
        out = logits(model, ids)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


# ---------------------------------------------------------------- the context gives the model back
def state_of(model):
    return (
        model.config._attn_implementation,
        [
            (m._forward_pre_hooks.copy(), m._forward_hooks.copy(), sorted(vars(m)))
            for m in model.modules()
        ],
    )


def test_the_model_is_restored_even_after_an_exception(ids):
    llama = build(tf.LlamaConfig(**GROUPED))
    before, stock = state_of(llama), logits(llama, ids)

    def failing(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replace_attention(llama, failing):
        llama(ids)
    with pytest.raises(KeyError), less(llama, POLICY):
        raise KeyError("a user's own")
    assert state_of(llama) == before
    assert torch.equal(logits(llama, ids), stock)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_implementation_of_before_comes_back(implementation, ids):
    model = build(tf.LlamaConfig(**GROUPED))
    model.set_attn_implementation(implementation)
    with less(model, POLICY):
        assert model.config._attn_implementation == "less"
    assert model.config._attn_implementation == implementation


def test_nested_use_is_refused_and_the_outer_context_survives(llama, ids):
    with less(llama, POLICY):
        expected = logits(llama, ids)
        with (
            pytest.raises(RuntimeError, match=r"already replaced: leave the first"),
            less(llama, Full()),
        ):
            pass
        assert torch.equal(logits(llama, ids), expected)
    with less(llama, Full()):
        assert (logits(llama, ids) - expected).abs().max() > 1e-3


def test_our_attention_outside_the_context_is_refused(ids):
    model = build(tf.LlamaConfig(**GROUPED))
    model.set_attn_implementation("less")
    with pytest.raises(RuntimeError, match="outside `with less"):
        model(ids)


# ---------------------------------------------------------------- refusals
def test_generation_in_parallel_mode_names_the_fix(llama, ids):
    with (
        less(llama, POLICY),
        pytest.raises(
            ValueError, match=r"mode='parallel' scores whole sequences.*generate in `with less"
        ),
    ):
        llama.generate(ids, max_new_tokens=3, do_sample=False)
    with less(llama, POLICY):
        cache = llama(ids).past_key_values
        with pytest.raises(ValueError, match="without past_key_values"):
            llama(ids[:, :4], past_key_values=cache)
    assert llama.generate(ids, max_new_tokens=3, do_sample=False).shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"policy": "h2o"}, TypeError, r"policy is a str; pass Full\(\), H2O"),
        ({"policy": H2O}, TypeError, "policy is a type"),
        ({"policy": None, "mode": "parallel"}, TypeError, "mode='parallel' needs a policy"),
        (
            {"policy": POLICY, "mode": "stream"},
            ValueError,
            "unknown mode 'stream': choose 'parallel' or 'decode'",
        ),
        ({"policy": TOVA(tokens=65)}, ValueError, "65 tokens is above the model's context of 64"),
        ({"policy": POLICY, "kernels": "pico-llama"}, TypeError, "kernels is a str"),
    ],
)
def test_wrong_arguments_are_refused_before_compute(arguments, error, says, llama):
    before = state_of(llama)
    with pytest.raises(error, match=says), less(llama, **arguments):
        pass
    assert state_of(llama) == before


def test_kernels_that_do_not_fit_are_refused(llama, monkeypatch):
    shape = model_shape(llama)
    for field, value in (("layers", 3), ("heads", 8), ("kv_heads", 4), ("head_dim", 8)):
        other, says = (
            Kernels.new(shape | {field: value}, 3, 8),
            f"{field} is {value} in the kernels and {shape[field]} in the model",
        )
        with pytest.raises(ValueError, match=says), less(llama, POLICY, other):
            pass
    foreign, broken = kernels_of(llama), kernels_of(llama)
    monkeypatch.setattr(llama, "less_identity", {"model": "mine", "revision": "abc"}, raising=False)
    foreign.header |= {"model": "mine", "revision": "xyz"}
    with (
        pytest.raises(ValueError, match="revision is xyz in the kernels and abc in the model"),
        less(llama, POLICY, foreign),
    ):
        pass
    with torch.no_grad():
        broken[1].s1[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"), less(llama, POLICY, broken):
        pass


def test_models_outside_the_interface_are_refused():
    small = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pair = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    outside = [
        tf.BloomForCausalLM(tf.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2)),
        tf.BertModel(tf.BertConfig(**small, intermediate_size=16)),
        torch.nn.Linear(2, 2),
        tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        ),
        tf.BartForConditionalGeneration(
            tf.BartConfig(vocab_size=61, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **pair)
        ),
    ]
    for model in outside:
        with (
            pytest.raises(
                TypeError, match=rf"{type(model).__name__} is not a decoder on .*such as Llama"
            ),
            less(model, POLICY),
        ):
            pass


def test_soft_capping_and_sinks_are_refused(ids):
    gemma2 = build(tf.Gemma2Config(**GROUPED, head_dim=8))
    with (
        less(gemma2, POLICY),
        pytest.raises(NotImplementedError, match=r"soft-capping \(softcap\) of Gemma2Attention"),
    ):
        gemma2(ids)
    oss = build(tf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1))
    with (
        less(oss, POLICY),
        pytest.raises(NotImplementedError, match=r"sinks \(s_aux\) of GptOssAttention"),
    ):
        oss(ids)


def test_masks_that_are_not_padding_are_refused(models, ids):
    packed = torch.arange(S).remainder(10).expand(2, S)
    for name in ("llama", "mistral"):  # mistral asks for a windowed mask, llama for a plain one
        with (
            less(models(name), POLICY),
            pytest.raises(NotImplementedError, match="one sequence per row"),
        ):
            models(name)(ids, position_ids=packed, use_cache=False)
    square = torch.ones(2, 1, S, S, dtype=torch.bool).tril()
    with less(models("llama"), POLICY), pytest.raises(ValueError, match="pass a 2D mask"):
        models("llama")(ids, attention_mask=square)


def test_attention_dropout_is_refused(ids):
    model = build(tf.LlamaConfig(**GROUPED, attention_dropout=0.1)).train()
    with less(model, POLICY), pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model(ids)


def test_a_missing_output_projection_is_named(models):
    module = attention_modules(models("gpt2"))[0]
    with pytest.raises(TypeError, match="GPT2Attention has no output projection"):
        output_projection(module)
