"""Perplexity, by token and by word, by document and by position, with errors over documents."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .data import Corpus, encode

POSITION_BIN = 64


@dataclass(frozen=True)
class Window:
    """Tokens of one stretch of a document, led by the beginning-of-sequence token; `words` counts its words by whitespace."""

    document: int
    ids: tuple[int, ...]
    words: int


def evaluation_windows(corpus: Corpus, tokenizer, length: int, per_document: int, limit: int) -> list[Window]:
    """Non-overlapping windows of at most `length` tokens: up to `per_document` spread evenly over each document, up to `limit` in all.

    Raises ValueError when no document fills one window.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step, windows, longest = length - len(bos), [], 0
    for number, document in enumerate(corpus.documents):
        ids = encode(tokenizer, [document.text])[0][len(bos) :]
        longest = max(longest, len(ids))
        starts = list(range(0, len(ids), step))
        chosen = np.unique(np.linspace(0, len(starts) - 1, min(per_document, len(starts))).round().astype(int))
        for i in chosen:
            part = ids[starts[i] : starts[i] + step]
            if len(part) > 1:
                windows.append(Window(number, tuple(bos + part), len(tokenizer.decode(part).split())))
    if longest < step:
        raise ValueError(f"corpus {corpus.name!r}: its longest document has {longest} tokens, fewer than one window of {length}; use longer documents")
    keep = np.unique(np.linspace(0, len(windows) - 1, min(limit, len(windows))).round().astype(int))
    return [windows[i] for i in keep]


@torch.no_grad()
def perplexity(model, windows: list[Window], batch: int = 8) -> dict:
    """Score every window with `model`, whatever attention it runs under, and sum up.

    Returns token_ppl and word_ppl (exp of the total negative log-likelihood over tokens or words), log_ppl (nats a
    token) with its standard error over documents, the totals, and the sums by document and by position that
    `gap_closed` and the figures need. Longer windows first; shorter ones are padded on the right, which causal models ignore.
    """
    documents = sorted({w.document for w in windows})
    nll, tokens, words = (dict.fromkeys(documents, 0.0) for _ in range(3))
    longest = max(len(w.ids) for w in windows)
    position_nll, position_count = np.zeros(longest), np.zeros(longest)
    order = sorted(windows, key=lambda w: -len(w.ids))
    for i in range(0, len(order), batch):
        rows = order[i : i + batch]
        ids = torch.zeros(len(rows), len(rows[0].ids), dtype=torch.long)
        for r, w in enumerate(rows):
            ids[r, : len(w.ids)] = torch.tensor(w.ids)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(model.device), reduction="none").double().cpu().numpy()
        if not np.isfinite(loss).all():
            raise FloatingPointError("the model's losses are not finite: check the weights' dtype")
        for row, w in zip(loss, rows, strict=True):
            n = len(w.ids) - 1
            nll[w.document] += float(row[:n].sum())
            tokens[w.document] += n
            words[w.document] += w.words
            position_nll[:n] += row[:n]
            position_count[:n] += 1
    total, count = sum(nll.values()), sum(tokens.values())
    log_ppl = total / count
    spread = [nll[d] - log_ppl * tokens[d] for d in documents]
    n = len(documents)
    error = math.sqrt(n / (n - 1) * sum(s * s for s in spread)) / count if n > 1 else 0.0
    edges = range(0, longest - 1, POSITION_BIN)
    return {
        "token_ppl": math.exp(log_ppl),
        "word_ppl": math.exp(total / max(1.0, sum(words.values()))),
        "log_ppl": log_ppl,
        "log_ppl_se": error,
        "tokens": int(count),
        "words": int(sum(words.values())),
        "windows": len(windows),
        "by_document": [[round(nll[d], 4), int(tokens[d])] for d in documents],
        "by_position": [round(float(position_nll[a : a + POSITION_BIN].sum() / position_count[a : a + POSITION_BIN].sum()), 5) for a in edges],
    }


def gap_closed(full: dict, baseline: dict, method: dict, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """The share of the gap in log perplexity between `baseline` and `full` that `method` closes, with a 95% interval.

    The interval is a paired bootstrap over documents: every resample takes the same documents of all three.
    """
    sums = np.array([[row[0] for row in result["by_document"]] for result in (full, baseline, method)])
    draws = np.random.default_rng(seed).integers(0, sums.shape[1], (samples, sums.shape[1]))
    share = lambda s: (s[1] - s[2]) / (s[1] - s[0])  # noqa: E731 (tokens are the same in all three and cancel)
    low, high = np.quantile(share(sums[:, draws].sum(-1)), [0.025, 0.975])
    return float(share(sums.sum(-1))), float(low), float(high)
