"""Perplexity, by token and by word, by document and by position, with errors over documents.

`evaluation_windows` cuts a corpus, `perplexity` scores the windows under whatever attention the
model runs.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from lesslib.data import Corpus, encode
from lesslib.util.ranks import gather, place

# tokens of a bin of `by_position`
POSITION_BIN = 64
# a token is "near" when its window held it within this many tokens before
NEAR = 64
# a token that its window did not hold before, held within the last NEAR tokens, or earlier only
RECURRENCE = ("new", "near", "far")


# ---------------------------------------------------------------- windows
@dataclass(frozen=True)
class Window:
    """Tokens of one stretch of a document, led by the beginning-of-sequence token.

    `document` is its number in the corpus; `words` begin in the tokens that are scored.
    """

    document: int
    ids: tuple[int, ...]
    words: int


def evaluation_windows(
    corpus: Corpus, tokenizer, length: int, per_document: int, limit: int
) -> list[Window]:
    """Separate windows of at most `length` tokens, spread evenly: over each document, over all.

    There are up to `per_document` of a document and up to `limit` in all. Every token is scored but
    a window's first (beginning of sequence, where the tokenizer has one). A word belongs to the
    window in which it begins. Raises ValueError when no document fills one window.
    """
    bos = encode(tokenizer, "")
    step = length - len(bos)
    windows: list[Window] = []
    longest = 0
    for number, document in enumerate(corpus.documents):
        tokens = _tokens_of(document.text, tokenizer)
        longest = max(longest, len(tokens.ids))
        # a last window of one token is left out
        starts = range(0, len(tokens.ids) - 1, step)
        for i in _spread(len(starts), per_document):
            start = starts[i]
            stop = min(start + step, len(tokens.ids))
            # without a beginning of sequence, the window's own first token is not scored
            words = tokens.words_between(start if bos else start + 1, stop)
            windows.append(Window(number, tuple(bos + tokens.ids[start:stop]), words))
    if longest < step:
        raise ValueError(
            f"corpus {corpus.name!r}: its longest document has {longest} tokens, fewer than a "
            f"window of {length}: use another"
        )
    return [windows[i] for i in _spread(len(windows), limit)]


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a text, and at which of its characters tokens and words begin.

    `token_begins` has one entry more than `ids`: the end of the text.
    """

    ids: list[int]
    token_begins: list[int]
    word_begins: np.ndarray

    def words_between(self, start: int, stop: int) -> int:
        """How many words begin in the tokens `start` to `stop` - 1."""
        ends = (self.token_begins[start], self.token_begins[stop])
        first_word, past_word = np.searchsorted(self.word_begins, ends).tolist()
        return past_word - first_word


def _tokens_of(text: str, tokenizer) -> _Tokens:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_begins = [begin for begin, _ in encoded["offset_mapping"]]
    token_begins.append(len(text))
    word_begins = np.array([match.start() for match in re.finditer(r"\S+", text)])
    return _Tokens(encoded["input_ids"], token_begins, word_begins)


def _spread(n: int, count: int) -> list[int]:
    """At most `count` of the indices 0..n-1, evenly spread, the first and the last among them."""
    return np.linspace(0, n - 1, min(count, n)).round().astype(int).tolist()


# ---------------------------------------------------------------- scores
def perplexity(model, windows: list[Window], batch: int = 8, over_ranks: bool = False) -> dict:
    """Score every window with `model`, whatever attention it runs under.

    `over_ranks`: the ranks that torchrun started share the batches, and all return the same; each
    must come here.

    Returns token_ppl and word_ppl (exp of the total loss over tokens or words; None without words),
    log_ppl (nats a token) with its standard error over documents (None for only one), the totals,
    [nll, tokens] by document and by RECURRENCE, and the mean loss by position, in bins of
    POSITION_BIN. Raises FloatingPointError for a loss that is not finite.
    """
    batches = _batches_by_length(windows, batch)
    if over_ranks:
        rank, world = place()
        # exact: of every loss all but one are zero
        losses = sum(gather(_token_losses(model, windows, batches[rank::world])))
    else:
        losses = _token_losses(model, windows, batches)
    tokens = np.array([len(window.ids) - 1 for window in windows])
    # [windows, longest - 1]: False where a shorter window was padded
    is_scored = np.arange(losses.shape[1]) < tokens[:, None]
    losses *= is_scored
    by_document = _by_document(losses, tokens, windows)
    total, count = by_document.sum(0).tolist()
    words = sum(window.words for window in windows)
    return {
        "token_ppl": math.exp(total / count),
        "word_ppl": math.exp(total / words) if words else None,
        "log_ppl": total / count,
        "log_ppl_se": _standard_error(by_document),
        "tokens": int(count),
        "words": words,
        "windows": len(windows),
        "by_document": [[round(nll, 4), int(t)] for nll, t in by_document.tolist()],
        "by_position": _by_position(losses, is_scored),
        "by_recurrence": _by_recurrence(losses, windows),
    }


def _batches_by_length(windows: list[Window], batch: int) -> list[np.ndarray]:
    """Indices of the windows, the longest first, `batch` at a time."""
    longest_first = np.argsort([-len(window.ids) for window in windows], kind="stable")
    return np.array_split(longest_first, range(batch, len(windows), batch))


@torch.no_grad()
def _token_losses(model, windows: list[Window], batches: list[np.ndarray]) -> np.ndarray:
    """Losses (nats) of every token but the first, [windows, longest - 1].

    Windows of no batch have zeros. Shorter ones are padded on the right, where attention is causal
    and needs no mask; their rows go on with losses that mean nothing.
    """
    longest = max(len(window.ids) for window in windows)
    losses = np.zeros((len(windows), longest - 1))
    for rows in batches:
        sequences = [torch.tensor(windows[i].ids) for i in rows]
        ids = pad_sequence(sequences, batch_first=True).to(model.device)  # [B, S]
        # [B S, V]: on CPU quicker than with classes in the middle
        logits = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
        following = ids.roll(-1, 1).flatten()
        loss = F.cross_entropy(logits, following, reduction="none").view_as(ids)
        # nothing follows the last token
        loss = loss[:, :-1]
        if not loss.isfinite().all():
            raise FloatingPointError(
                f"losses are not finite in {model.dtype}: load the model in float32, or check its "
                "weights"
            )
        losses[rows, : loss.shape[1]] = loss.double().cpu().numpy()
    return losses


def _by_document(losses: np.ndarray, tokens: np.ndarray, windows: list[Window]) -> np.ndarray:
    """[documents, (nll, tokens)]."""
    document = np.array([window.document for window in windows])
    totals = []
    for number in np.unique(document):
        is_of_it = document == number
        totals.append((losses[is_of_it].sum(), tokens[is_of_it].sum()))
    return np.array(totals)


def _standard_error(by_document: np.ndarray) -> float | None:
    """Of the mean loss over documents, as of a ratio of totals; None for only one."""
    n = len(by_document)
    if n == 1:
        return None
    total, count = by_document.sum(0).tolist()
    residuals = by_document @ (1, -total / count)
    return math.sqrt(n / (n - 1) * (residuals**2).sum()) / count


def _by_position(losses: np.ndarray, is_scored: np.ndarray) -> list[float]:
    """The mean loss by bins of POSITION_BIN tokens."""
    bins = np.arange(0, losses.shape[1], POSITION_BIN)
    totals = np.add.reduceat(losses.sum(0), bins)
    counts = np.add.reduceat(is_scored.sum(0), bins)
    return (totals / counts).round(5).tolist()


def _by_recurrence(losses: np.ndarray, windows: list[Window]) -> dict[str, list[float]]:
    """By name of RECURRENCE, [nll, tokens]."""
    kinds = np.full(losses.shape, -1)
    for row, window in zip(kinds, windows, strict=True):
        row[: len(window.ids) - 1] = recurrence(window.ids)
    by_kind = {}
    for i, name in enumerate(RECURRENCE):
        is_kind = kinds == i
        by_kind[name] = [round(losses[is_kind].sum(), 4), int(is_kind.sum())]
    return by_kind


def recurrence(ids: tuple[int, ...]) -> list[int]:
    """Index into RECURRENCE of each token but the first."""
    last_position: dict[int, int] = {}
    kinds = []
    for position, token in enumerate(ids):
        if token not in last_position:
            kind = "new"
        elif position - last_position[token] <= NEAR:
            kind = "near"
        else:
            kind = "far"
        kinds.append(RECURRENCE.index(kind))
        last_position[token] = position
    return kinds[1:]
