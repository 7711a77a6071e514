"""Token ids of texts, and the windows that models and kernels are trained on."""

import random

import torch

from lesslib.data.documents import Corpus


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of `text`, led by the beginning-of-sequence token when the tokenizer has one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is None:
        return ids
    return [tokenizer.bos_token_id, *ids]


def training_windows(
    corpora: list[Corpus], tokenizer, length: int, count: int, seed: int
) -> torch.Tensor:
    """[count, length] int64 windows for training, corpora in equal shares.

    Documents are shuffled by `seed`, joined and cut; each window is led as in `encode`. Raises
    ValueError when a text is shorter than one window, or all hold fewer than `count`.
    """
    bos = encode(tokenizer, "")
    # new tokens of a window: its first one may be the beginning of sequence
    step = length - len(bos)
    share = -(-count // len(corpora))  # rounded up
    rows: list[list[int]] = []
    for corpus in corpora:
        stream = _shuffled_stream(corpus, tokenizer, share, step, seed)
        if len(stream) < step:
            raise ValueError(
                f"corpus {corpus.name!r} holds {len(stream)} tokens, fewer than one window of "
                f"{length}: use a longer text"
            )
        end = min(len(stream) - step + 1, share * step)
        for start in range(0, end, step):
            rows.append(bos + stream[start : start + step])
    if len(rows) < count:
        raise ValueError(
            f"{count} windows of {length} tokens asked for, the corpora hold {len(rows)}: ask for "
            "fewer sequences"
        )
    random.Random(seed).shuffle(rows)
    return torch.tensor(rows[:count])


def _shuffled_stream(corpus: Corpus, tokenizer, share: int, step: int, seed: int) -> list[int]:
    """Token ids of shuffled documents, enough for `share` windows of `step` tokens if it can be."""
    documents = list(corpus.documents)
    random.Random(seed).shuffle(documents)
    bos_length = len(encode(tokenizer, ""))
    stream: list[int] = []
    for document in documents:
        ids = encode(tokenizer, document.text)
        # a document that begins a window needs no mark of its own: the window brings one
        begins_window = len(stream) % step == 0
        stream += ids[bos_length:] if begins_window else ids
        if len(stream) >= share * step:
            break
    return stream
