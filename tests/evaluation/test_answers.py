"""Answers: likelihoods against a plain loop, texts against generate, prompts that fit.

And ROUGE, and paired intervals.
"""

import contextlib

import numpy as np
import pytest
import torch

from lesslib import H2O, Full, Lambda, LessCache, less
from lesslib.data import encode
from lesslib.data.storyworld import examples
from lesslib.evaluation import (
    Decoding,
    continuations,
    option_scores,
    paired,
    prompts,
    rouge,
)
from lesslib.models import load_kernels, load_model


@pytest.fixture(scope="module")
def pico():
    return load_model("pico-llama", "cpu", torch.float64)


@pytest.mark.parametrize("evicting", [False, True])
@pytest.mark.parametrize("name", ["pico-llama", "pico-falcon"])
def test_likelihoods_equal_a_plain_loop(name, evicting):
    model, tokenizer = load_model(name, "cpu", torch.float64)
    prompt_ids = [encode(tokenizer, "The name of the town is" + " far away" * n) for n in (1, 30)]
    options = [("yes", "no"), ("a lamp on the hill", "a lamp")]
    context = less(model, H2O(heavy=6, recent=6), None) if evicting else contextlib.nullcontext()
    with context, torch.no_grad():
        got = option_scores(model, tokenizer, prompt_ids, options, batch=2)
        for prompt, chosen, scores in zip(prompt_ids, options, got, strict=True):
            for option, score in zip(chosen, scores, strict=True):
                ids = tokenizer(" " + option, add_special_tokens=False)["input_ids"]
                output = model(torch.tensor([prompt + ids]), use_cache=False)
                logits = output.logits[0].float().log_softmax(-1)
                expected = sum(logits[len(prompt) - 1 + i, t].item() for i, t in enumerate(ids))
                assert score == pytest.approx(expected, abs=1e-4)


def test_texts_equal_generate_row_by_row(pico):
    model, tokenizer = pico
    story = (
        "Once there was a man who had three sons, and the eldest of them went to the town to buy "
        "a horse. On the road he met"
    )
    beginnings = ("The river rose and the people of the valley", story)
    prompt_ids = [encode(tokenizer, text) for text in beginnings]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    kernels = load_kernels("pico-llama", "h2o", 0.05)
    policy = H2O(heavy=2, recent=2)
    methods = [(Full(), None), (policy, None), (policy.plus(4), None), (policy, kernels)]
    together = continuations(model, tokenizer, prompt_ids, Decoding(12, batch=2), methods)
    assert together == [
        [continuations(model, tokenizer, [a], Decoding(12), [m])[0][0] for a in prompt_ids]
        for m in methods
    ]
    for (chosen, used), texts in zip(methods, together, strict=True):
        for prompt, text in zip(prompt_ids, texts, strict=True):
            full, ids = chosen.budget is None, torch.tensor([prompt])
            cache = None if full else LessCache(model, chosen, used)
            settings = {
                "attention_mask": torch.ones_like(ids),
                "max_new_tokens": 12,
                "do_sample": False,
                "eos_token_id": newline,
            }
            with contextlib.nullcontext() if full else less(model):
                plain = model.generate(ids, past_key_values=cache, **settings)
            expected = tokenizer.decode(plain[0, len(prompt) :], skip_special_tokens=True)
            assert text == expected.strip().split("\n")[0]
    assert len({tuple(texts) for texts in together}) > 1
    assert all("\n" not in text for texts in together for text in texts)
    first = [tokenizer.decode(encode(tokenizer, text)[1:2]).strip() for text in together[3]]
    assert continuations(model, tokenizer, prompt_ids, Decoding(1), methods) == [first] * 4


def test_a_text_ends_with_its_line_even_where_that_is_its_first_token(pico, monkeypatch):
    model, tokenizer = pico
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]

    def generate(ids, attention_mask, past_key_values, max_new_tokens, **settings):
        if ids.shape[1] == 3:  # the prompts
            model(ids, attention_mask=attention_mask, past_key_values=past_key_values)
            return torch.cat([ids, torch.tensor([[405], [newline]])], 1)
        return torch.cat(
            [ids, torch.tensor([[400, newline, 401], [402, 403, 404]])[:, :max_new_tokens]], 1
        )

    monkeypatch.setattr(model, "generate", generate)
    assert continuations(model, tokenizer, [[1, 50, 51], [1, 52]], Decoding(4))[0] == [
        tokenizer.decode([405, 400]).strip(),
        "",
    ]


def test_policies_of_two_classes_cannot_be_read_together(pico):
    model, tokenizer = pico
    with pytest.raises(ValueError, match=r"Lambda.*cannot take 5 from one of H2O"):
        continuations(
            model,
            tokenizer,
            [[1, 50, 51, 52, 53]],
            Decoding(4),
            [(H2O(heavy=2, recent=2), None), (Lambda(recent=2, sinks=2), None)],
        )


def test_sampling_depends_on_the_seed_alone(pico):
    model, tokenizer = pico
    prompt_ids = [encode(tokenizer, "The river rose and")]
    a, b, c = (
        continuations(model, tokenizer, prompt_ids, Decoding(12, temperature=1.0, seed=s))[0][0]
        for s in (0, 0, 1)
    )
    assert a == b != c


def test_prompts_drop_shots_before_text_and_text_before_the_question(pico):
    tokenizer = pico[1]
    measured = examples("yes_no", 1)
    shots = examples("yes_no", 3, heldout=False, small=True)
    whole = prompts(measured, shots, tokenizer, 10_000)[0]
    assert tokenizer.decode(whole[1:]) == "\n\n".join(
        [*(s.shown(answer=True) for s in shots), measured[0].shown()]
    )
    alone = encode(tokenizer, measured[0].shown())
    assert prompts(measured, shots, tokenizer, len(alone))[0] == alone
    cut = prompts(measured, shots, tokenizer, 200)[0]
    assert 190 <= len(cut) <= 200
    assert tokenizer.decode(cut).endswith(measured[0].lead)
    assert (
        tokenizer.decode(prompts(measured, [], tokenizer, 200, text=False)[0][1:])
        == measured[0].lead
    )
    with pytest.raises(ValueError, match="does not fit into 5: use a model with a longer context"):
        prompts(measured, shots, tokenizer, 5)


def test_rouge_of_known_pairs():
    scores = rouge(
        ["the cat sat", "", "lamps burn here"], ["the cat ran", "a word", "lamp burning here"]
    )
    assert scores["rouge1"] == pytest.approx([66.667, 0, 100], abs=1e-3)
    assert scores["rouge2"] == pytest.approx([50, 0, 100], abs=1e-3)
    assert scores["rougeL"] == pytest.approx([66.667, 0, 100], abs=1e-3)


def test_paired_interval_is_of_the_differences():
    rng = np.random.default_rng(0)
    a = rng.normal(50, 20, 200)
    b = a - 1 + rng.normal(0, 0.5, 200)
    mean, low, high = paired(list(a), list(b))
    assert 0.8 < low < mean < high < 1.2
    assert mean == pytest.approx(np.mean(a - b))
    with pytest.raises(ValueError, match="2 and 1 examples cannot be paired"):
        paired([1.0, 2.0], [1.0])
