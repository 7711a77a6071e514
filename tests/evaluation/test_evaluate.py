"""Perplexity: what is counted, that batches and padding change nothing, and its errors."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lesslib import H2O, TOVA, Lambda, less
from lesslib.attention.fit import model_shape
from lesslib.data import Corpus, Document
from lesslib.evaluation import Window, evaluation_windows, gap_closed, perplexity
from lesslib.evaluation.perplexity import POSITION_BIN
from lesslib.models import load_model
from lesslib.states import Kernels


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("pico-llama", "cpu")[1]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(0)
    lengths = [150, 7, 61, 150, 2, 33, 99]
    return [
        Window(i // 2, (0, *rng.integers(1, 97, n - 1).tolist()), n // 2)
        for i, n in enumerate(lengths)
    ]


class NoBos:
    """A tokenizer without a beginning-of-sequence token, as Falcon's."""

    bos_token_id = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)


TEXT = (
    " A café's   naïve “quotes” \u2013 un-believable words,\n\n"
    "\tand supercalifragilistic 東京 lines.\n"
) * 9


def corpus(*texts):
    return Corpus("some", "folder", tuple(Document(str(i), t) for i, t in enumerate(texts)))


# ---------------------------------------------------------------- windows
@pytest.mark.parametrize("length", [8, 33, 64])
def test_windows_that_cover_a_document_hold_its_tokens_and_its_words_once(tokenizer, length):
    windows = evaluation_windows(corpus(TEXT), tokenizer, length, 10_000, 10_000)
    ids = list(itertools.chain(*(w.ids[1:] for w in windows)))
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == whole[: len(ids)]
    assert len(whole) - len(ids) <= 1  # a last window of one token is left out
    assert sum(w.words for w in windows) == len(TEXT.split())
    assert all(w.ids[0] == tokenizer.bos_token_id and len(w.ids) <= length for w in windows)


def test_without_a_first_token_neither_its_loss_nor_its_word_counts(tokenizer):
    text = "a b c d e f g h"  # a token and a word each
    with_bos, without = (
        evaluation_windows(corpus(text), t, 4, 10, 10) for t in (tokenizer, NoBos(tokenizer))
    )
    assert [(len(w.ids) - 1, w.words) for w in with_bos] == [(3, 3), (3, 3), (2, 2)]
    assert [(len(w.ids) - 1, w.words) for w in without] == [(3, 3), (3, 3)]


def test_windows_are_spread_over_documents_and_limited(tokenizer):
    windows = evaluation_windows(corpus(TEXT, "short text", TEXT), tokenizer, 16, 3, 100)
    assert [w.document for w in windows] == [0, 0, 0, 1, 2, 2, 2]
    every = evaluation_windows(corpus(TEXT), tokenizer, 16, 10_000, 10_000)
    assert [windows[0].ids, windows[2].ids] == [every[0].ids, every[-1].ids]
    assert len({windows[i].ids for i in range(3)}) == 3
    assert {
        w.document
        for w in evaluation_windows(corpus(TEXT, "short text", TEXT), tokenizer, 16, 3, 3)
    } == {0, 1, 2}


def test_a_corpus_shorter_than_a_window_is_refused(tokenizer):
    with pytest.raises(
        ValueError,
        match=r"'some': its longest document has \d+ tokens, fewer than a window of 1024",
    ):
        evaluation_windows(corpus("too short", "also"), tokenizer, 1024, 8, 8)


# ---------------------------------------------------------------- perplexity
def reference(model, window):
    """Losses of one window, [n], by the textbook."""
    ids = torch.tensor([window.ids])
    with torch.no_grad():
        return F.cross_entropy(
            model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"
        ).numpy()


def test_perplexity_is_the_textbook_sum_over_tokens_words_documents_and_positions(model, windows):
    out = perplexity(model, windows, batch=3)
    losses = [reference(model, w) for w in windows]
    nll = sum(x.sum() for x in losses)
    tokens = sum(map(len, losses))
    words = sum(w.words for w in windows)
    assert (out["tokens"], out["words"], out["windows"]) == (tokens, words, len(windows))
    assert out["log_ppl"] == pytest.approx(nll / tokens, rel=1e-6)
    assert out["token_ppl"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert out["word_ppl"] == pytest.approx(math.exp(nll / words), rel=1e-5)
    by_document = np.zeros((4, 2))
    for x, w in zip(losses, windows, strict=True):
        by_document[w.document] += (x.sum(), len(x))
    np.testing.assert_allclose(np.array(out["by_document"]), by_document, atol=1e-3)
    for b, value in enumerate(out["by_position"]):
        inside = np.concatenate([x[b * POSITION_BIN : (b + 1) * POSITION_BIN] for x in losses])
        assert value == pytest.approx(inside.mean(), abs=1e-4)
    assert len(out["by_position"]) == 3  # positions 0-63, 64-127, 128-148
    kinds = {"new": [], "near": [], "far": []}
    for w, x in zip(windows, losses, strict=True):
        for t in range(1, len(w.ids)):
            where = [j for j in range(t) if w.ids[j] == w.ids[t]]
            if not where:
                kind = "new"
            elif t - where[-1] <= 64:
                kind = "near"
            else:
                kind = "far"
            kinds[kind].append(x[t - 1])
    assert all(len(x) > 20 for x in kinds.values())
    for name, x in kinds.items():
        assert out["by_recurrence"][name] == [pytest.approx(sum(x), abs=1e-2), len(x)]


def test_the_standard_error_is_that_of_the_mean_over_documents(model, windows):
    long = [w for w in windows if len(w.ids) == 150]
    same = [Window(d, w.ids, w.words) for d, w in enumerate(long)]
    means = [reference(model, w).mean() for w in same]
    assert perplexity(model, same)["log_ppl_se"] == pytest.approx(
        np.std(means, ddof=1) / math.sqrt(len(means)), rel=1e-5
    )
    assert perplexity(model, same[:1])["log_ppl_se"] is None


@pytest.mark.parametrize(
    "policy", [None, H2O(4, 4), H2O(4, 4, scores="full"), Lambda(recent=4), TOVA(8)], ids=str
)
@pytest.mark.parametrize("with_kernels", [False, True])
def test_padding_and_batches_change_nothing(model, windows, policy, with_kernels):
    def score(batch):
        if policy is None:
            return perplexity(model, windows, batch)
        kernels = Kernels.new(model_shape(model), 4, 8).double().eval() if with_kernels else None
        if kernels is not None:
            for layer in kernels.layers:
                torch.nn.init.ones_(layer.s1)  # of a size that matters
        with less(model, policy, kernels, mode="parallel"):
            return perplexity(model, windows, batch)

    alone, together = score(1), score(len(windows))
    for name in ("log_ppl", "by_document", "by_position"):
        np.testing.assert_allclose(alone[name], together[name], rtol=1e-5, atol=2e-4)
    if policy is not None:  # and the policy did act
        assert abs(alone["log_ppl"] - perplexity(model, windows)["log_ppl"]) > 1e-3


def test_losses_that_are_not_finite_are_refused(model, windows):
    broken = LlamaForCausalLM(model.config)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        perplexity(broken, windows)


# ---------------------------------------------------------------- the share of the gap
def test_the_share_of_the_gap_and_its_interval():
    tokens = np.array([50, 120, 80, 200, 90])
    rng = np.random.default_rng(1)
    full = 3.0 * tokens
    gap = rng.uniform(0.1, 0.5, 5) * tokens
    results = [
        {"by_document": np.stack([full + share * gap, tokens], 1).tolist()}
        for share in (0.0, 1.0, 0.25)
    ]
    assert gap_closed(*results) == pytest.approx((0.75, 0.75, 0.75))
    noisy = {"by_document": np.stack([full + rng.uniform(0, 0.6, 5) * gap, tokens], 1).tolist()}
    share, low, high = gap_closed(results[0], results[1], noisy)
    assert low < share < high
    assert share == pytest.approx(
        1 - (np.array(noisy["by_document"])[:, 0] - full).sum() / gap.sum()
    )


def test_a_resample_without_a_gap_is_left_out_of_the_interval():
    full, baseline, method = (
        {"by_document": [[30.0, 10], [30.0 + x, 10]]} for x in (0.0, 2.0, 1.0)
    )
    assert gap_closed(full, baseline, method) == pytest.approx((0.5, 0.5, 0.5))


def test_gaps_that_cannot_be_measured_are_refused():
    one = {"by_document": [[30.0, 10], [20.0, 5]]}
    other = {"by_document": [[30.0, 10], [20.0, 6]]}
    with pytest.raises(ValueError, match="not measured on the same windows"):
        gap_closed(one, other, one)
    with pytest.raises(ValueError, match="no gap to close"):
        gap_closed(one, one, one)
