"""The text that the small models are trained on: the mix of corpora, what is held out, windows."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lesslib.data import Corpus, Document, encode, load_corpus
from lesslib.evaluation import Window
from lesslib.util.files import read_torch, write_torch

# shares of the windows
MIX = {"wikipedia": 0.57, "novels": 0.38, "topics-train": 0.05}
# documents never trained on, after a shuffle with seed 0
HELD_OUT = {"wikipedia": 100, "novels": 3}


def mix_with_stories(stories: float) -> dict[str, float]:
    """MIX, with a share of storyworld's stories and tasks."""
    mix = {name: (1 - stories) * share for name, share in MIX.items()}
    if stories:
        mix["stories-train"] = stories
    return mix


def split(
    corpora: dict[str, Corpus],
) -> tuple[dict[str, list[Document]], dict[str, list[Document]]]:
    """(training documents, held-out documents) per corpus.

    A corpus NAME-train has its held-out documents in NAME-heldout. Raises ValueError where holding
    out leaves nothing to train on.
    """
    train = {name: list(corpus.documents) for name, corpus in corpora.items()}
    heldout: dict[str, list[Document]] = {}
    for name in corpora:
        if name.endswith("-train"):
            topic = name.removesuffix("-train")
            heldout[topic] = list(load_corpus(f"{topic}-heldout").documents)
    rng = random.Random(0)
    for name, count in HELD_OUT.items():
        rng.shuffle(train[name])
        heldout[name] = train[name][:count]
        train[name] = train[name][count:]
        if not train[name]:
            raise ValueError(
                f"corpus {name!r} has {len(heldout[name])} documents and {count} are held out: use "
                "a whole copy of it"
            )
    return train, heldout


def token_file(folder: Path, name: str, documents: list[Document], tokenizer) -> np.ndarray:
    """uint16 tokens of all documents, by `encode`.

    Kept in `folder` under a hash of text and vocabulary. Raises ValueError for a damaged file.
    """
    texts = [document.text for document in documents]
    identity = json.dumps([tokenizer.get_vocab(), texts], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = folder / f"{name}-{digest}.pt"
    tokens = read_torch(path, "delete it, and it is made again")
    if tokens is None:
        encoded = [np.array(encode(tokenizer, text), dtype=np.uint16) for text in texts]
        tokens = torch.from_numpy(np.concatenate(encoded))
        write_torch(path, tokens)
    return tokens.numpy()


class Windows:
    """Stretches of `length` tokens, led by the beginning-of-sequence token.

    They lie inside one document where it is long enough.
    """

    def __init__(self, tokens: np.ndarray, length: int, bos: int):
        self.tokens = tokens
        self.length = length
        self.bos = bos
        # of the documents
        self.starts = np.flatnonzero(tokens == bos)
        self.ends = np.append(self.starts[1:], len(tokens))

    def at(self, position: int) -> np.ndarray:
        """The window, [length], that starts at `position`.

        It starts before it where the document or the text ends too early.
        """
        document = np.searchsorted(self.starts, position, side="right") - 1
        start = min(position, self.ends[document] - self.length)
        start = max(self.starts[document], start)
        start = min(start, len(self.tokens) - self.length)
        # the window brings its own first token
        after_first = self.tokens[start + 1 : start + self.length]
        return np.append(self.bos, after_first).astype(np.int64)

    def inside(self, count: int) -> list[Window]:
        """At most `count` windows, evenly spread, each inside one document, words not counted.

        Raises ValueError where none fits.
        """
        fitting: list[tuple[int, int]] = []  # document, start
        for document, first in enumerate(self.starts):
            past_last_start = self.ends[document] - self.length + 1
            for start in range(first, past_last_start, self.length):
                fitting.append((document, start))
        if not fitting:
            raise ValueError(
                f"no held-out document fills a window of {self.length} tokens: use longer documents"
            )
        windows = []
        for i in np.linspace(0, len(fitting) - 1, min(count, len(fitting))):
            document, start = fitting[int(i)]
            windows.append(Window(document, tuple(self.at(start).tolist()), words=0))
        return windows


@dataclass(frozen=True)
class Mixture:
    """Corpora in their shares, to draw training windows from; and what is held out of them."""

    corpora: dict[str, Corpus]
    shares: dict[str, float]
    train: dict[str, Windows]
    heldout: dict[str, Windows]

    @classmethod
    def load(cls, stories: float, folder: Path, tokenizer, length: int) -> Self:
        """The mix with a share of `stories`, as windows of `length`; token files go to `folder`."""
        shares = mix_with_stories(stories)
        corpora = {name: load_corpus(name) for name in shares}

        def windows(documents: dict[str, list[Document]]) -> dict[str, Windows]:
            by_name = {}
            for name, texts in documents.items():
                tokens = token_file(folder, name, texts, tokenizer)
                by_name[name] = Windows(tokens, length, tokenizer.bos_token_id)
            return by_name

        train, heldout = split(corpora)
        return cls(corpora, shares, windows(train), windows(heldout))

    def draw(self, batch: int, echoes: float, seed: int, step: int) -> Tensor:
        """The windows of a step, [batch, length] int64; a share of them are `echoes`."""
        # by step, so that a resumed run draws what an uninterrupted one would
        rng = np.random.default_rng((seed, step))
        names = rng.choice(list(self.shares), size=batch, p=list(self.shares.values()))
        rows = []
        for name in names:
            windows = self.train[name]
            rows.append(windows.at(int(rng.integers(len(windows.tokens)))))
        is_echo = rng.random(batch) < echoes
        for i in np.flatnonzero(is_echo):
            rows[i] = _echo(rows[i], rng)
        return torch.from_numpy(np.stack(rows))


def _echo(window: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The window's first stretch, of a random length up to a quarter, over and over."""
    length = len(window)
    stretch = window[1 : 2 + int(rng.integers(length // 4))]
    return np.append(window[0], np.resize(stretch, length - 1))
