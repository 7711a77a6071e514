"""Perplexity, by token and by word, by document and by position, with errors over documents."""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from lesslib.data import Corpus, encode
from lesslib.util.ranks import gather, place

POSITION_BIN = 64
RECURRENCE = (
    "new",
    "near",
    "far",
)  # a token that its window did not hold before, held within the last NEAR tokens, or earlier only
NEAR = 64


@dataclass(frozen=True)
class Window:
    """Tokens of one stretch of a document, led by the beginning-of-sequence token; `words` begin in the tokens that are scored."""

    document: int
    ids: tuple[int, ...]
    words: int


def evaluation_windows(
    corpus: Corpus, tokenizer, length: int, per_document: int, limit: int
) -> list[Window]:
    """Separate windows of at most `length` tokens: up to `per_document` spread evenly over each document, up to `limit` in all.

    Every token is scored but a window's first (beginning of sequence, where the tokenizer has one). A word belongs to the window
    in which it begins. Raises ValueError when no document fills one window.
    """
    bos, windows, longest = encode(tokenizer, ""), list[Window](), 0
    step = length - len(bos)
    for number, document in enumerate(corpus.documents):
        encoded = tokenizer(
            document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, begins = (
            encoded["input_ids"],
            [begin for begin, _ in encoded["offset_mapping"]] + [len(document.text)],
        )
        words = np.array([m.start() for m in re.finditer(r"\S+", document.text)])
        longest = max(longest, len(ids))
        starts = range(0, len(ids) - 1, step)  # a last window of one token is left out
        for i in _spread(len(starts), per_document):
            start, stop = starts[i], min(starts[i] + step, len(ids))
            first, past = np.searchsorted(
                words, (begins[start if bos else start + 1], begins[stop])
            ).tolist()
            windows.append(Window(number, tuple(bos + ids[start:stop]), past - first))
    if longest < step:
        raise ValueError(
            f"corpus {corpus.name!r}: its longest document has {longest} tokens, fewer than a window of {length}: use another"
        )
    return [windows[i] for i in _spread(len(windows), limit)]


def _spread(n: int, count: int) -> list[int]:
    """At most `count` of the indices 0..n-1, evenly spread, the first and the last among them."""
    return np.linspace(0, n - 1, min(count, n)).round().astype(int).tolist()


def recurrence(ids: tuple[int, ...]) -> list[int]:
    """Index into RECURRENCE of each token but the first."""
    last: dict[int, int] = {}
    kinds = []
    for t, token in enumerate(ids):
        distance = t - last.get(token, t)
        kinds.append((distance > 0) + (distance > NEAR))
        last[token] = t
    return kinds[1:]


@torch.no_grad()
def perplexity(model, windows: list[Window], batch: int = 8, over_ranks: bool = False) -> dict:
    """Score every window with `model`, whatever attention it runs under; shorter ones are padded on the right.

    `over_ranks`: the ranks that torchrun started share the batches, and all return the same; each must come here.

    Returns token_ppl and word_ppl (exp of the total loss over tokens or words; None without words), log_ppl (nats a token) with its
    standard error over documents (None for only one), the totals, [nll, tokens] by document and by RECURRENCE, and the mean loss by
    position, in bins of POSITION_BIN. Raises FloatingPointError for a loss that is not finite.
    """
    losses = np.zeros((len(windows), max(len(w.ids) for w in windows) - 1))
    batches = np.array_split(
        np.argsort([-len(w.ids) for w in windows], kind="stable"), range(batch, len(windows), batch)
    )
    for rows in batches[place()[0] :: place()[1]] if over_ranks else batches:
        ids = pad_sequence([torch.tensor(windows[i].ids) for i in rows], batch_first=True).to(
            model.device
        )
        logits = (
            model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
        )  # on CPU quicker than with classes in the middle
        loss = F.cross_entropy(logits, ids.roll(-1, 1).flatten(), reduction="none").view_as(ids)[
            :, :-1
        ]
        if not loss.isfinite().all():
            raise FloatingPointError(
                f"losses are not finite in {model.dtype}: load the model in float32, or check its weights"
            )
        losses[rows, : loss.shape[1]] = loss.double().cpu().numpy()
    losses = (
        sum(gather(losses)) if over_ranks else losses
    )  # exact: of every loss all but one are zero
    tokens, owner, words = np.array([(len(w.ids) - 1, w.document, w.words) for w in windows]).T
    scored = np.arange(losses.shape[1]) < tokens[:, None]
    losses *= scored
    by_document = np.array(
        [(losses[owner == d].sum(), tokens[owner == d].sum()) for d in np.unique(owner)]
    )
    n, (total, count) = len(by_document), by_document.sum(0).tolist()
    residuals = by_document @ (1, -total / count)
    bins = np.arange(0, losses.shape[1], POSITION_BIN)
    by_position = np.add.reduceat(losses.sum(0), bins) / np.add.reduceat(scored.sum(0), bins)
    kinds = np.full(losses.shape, -1)
    for row, w in zip(kinds, windows, strict=True):
        row[: len(w.ids) - 1] = recurrence(w.ids)
    by_recurrence = {
        name: [round(losses[kinds == i].sum(), 4), int((kinds == i).sum())]
        for i, name in enumerate(RECURRENCE)
    }
    return {
        "token_ppl": math.exp(total / count),
        "word_ppl": math.exp(total / words.sum()) if words.any() else None,
        "log_ppl": total / count,
        "log_ppl_se": math.sqrt(n / (n - 1) * (residuals**2).sum()) / count if n > 1 else None,
        "tokens": int(count),
        "words": int(words.sum()),
        "windows": len(windows),
        "by_document": [[round(nll, 4), int(t)] for nll, t in by_document.tolist()],
        "by_position": by_position.round(5).tolist(),
        "by_recurrence": by_recurrence,
    }


def gap_closed(full: dict, baseline: dict, method: dict) -> tuple[float, float, float]:
    """The share of the gap in log perplexity between `baseline` and `full` that `method` closes, with a 95% interval.

    The interval is a bootstrap over documents, the same of all three in a resample. Raises ValueError for results on different
    windows, or where the baseline loses nothing.
    """
    by_document = np.array(
        [result["by_document"] for result in (full, baseline, method)]
    )  # [3, documents, (nll, tokens)]
    sums, tokens = by_document[..., 0], by_document[..., 1]
    if (tokens != tokens[0]).any():
        raise ValueError(
            "the three results were not measured on the same windows: compute them again together"
        )
    if sums[0].sum() == sums[1].sum():
        raise ValueError(
            "the baseline loses nothing to the full cache, so there is no gap to close: use a smaller budget"
        )
    draws = np.random.default_rng(0).integers(0, sums.shape[1], (2000, sums.shape[1]))
    totals = np.concatenate(
        [sums.sum(1)[:, None], sums[:, draws].sum(2)], 1
    )  # of the data, then of the resamples
    totals = totals[
        :, totals[0] != totals[1]
    ]  # a resample of short documents alone may have no gap
    share = (totals[1] - totals[2]) / (totals[1] - totals[0])
    low, high = np.quantile(share[1:], [0.025, 0.975])
    return float(share[0]), float(low), float(high)
