"""Text that the package carries, that lies in the folder $LESS_DATA or that the hub has, each with its origin and sha256."""

import gzip
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lesslib.data import storyworld

MIN_SHARED = 80  # characters of a paragraph that make two topics "share text"
LESSONS, HELDOUT_SHARE = (
    16_000,
    0.3,
)  # texts of stories to pretrain on; the share of the carried text's characters


@dataclass(frozen=True)
class Document:
    title: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents and their provenance; `origin` is "carried", "folder" or "hub"."""

    name: str
    origin: str
    documents: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(
            "".join(f"{d.title}\0{d.text}\0" for d in self.documents).encode()
        ).hexdigest()

    def record(self) -> dict[str, object]:
        """What a manifest says of this corpus."""
        characters = sum(len(d.text) for d in self.documents)
        return {
            "name": self.name,
            "origin": self.origin,
            "documents": len(self.documents),
            "characters": characters,
            "sha256": self.sha256,
        }


def _paragraphs(text: str) -> dict[str, str]:
    """Paragraphs of `text` by their words: two that differ in white space alone are one."""
    found: dict[str, str] = {}
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", text.strip("\n"))):
        found.setdefault(" ".join(paragraph.split()), paragraph)
    return found


def _topics(heldout: bool) -> Iterator[Document]:
    """One document per group of `pydoc_data` topics that share paragraphs, so that no held-out text is also trained on."""
    from pydoc_data import topics

    groups: list[tuple[set[str], set[str]]] = []  # names, long paragraphs
    for name, text in topics.topics.items():
        shared = {key for key in _paragraphs(text) if len(key) >= MIN_SHARED}
        touching = [g for g in groups if g[1] & shared]
        groups = [g for g in groups if not g[1] & shared]
        groups.append(
            ({name}.union(*(g[0] for g in touching)), shared.union(*(g[1] for g in touching)))
        )
    texts = []
    for names, _ in groups:
        longest_first = sorted(names, key=lambda n: (-len(topics.topics[n]), n))
        parts = _paragraphs("\n\n".join(topics.topics[n] for n in longest_first))
        texts.append(Document("+".join(sorted(names)), "\n\n".join(parts.values()) + "\n"))
    # held-out groups: in the order of a hash of their name, until they make up their share; the largest group trains
    room, largest = (
        HELDOUT_SHARE * sum(len(d.text) for d in texts),
        max(texts, key=lambda d: (len(d.text), d.title)),
    )
    for d in sorted(texts, key=lambda d: hashlib.sha256(d.title.encode()).hexdigest()):
        out = d is not largest and len(d.text) <= room
        room -= len(d.text) if out else 0
        if out == heldout:
            yield d


def _rows(path: Path) -> Iterator[Document]:
    """The articles of a .txt.gz, or the {"title", "text"} lines of a .jsonl.gz. Raises ValueError for a line that is not one."""
    with gzip.open(path, "rt", encoding="utf-8") as f:
        if path.name.endswith(".txt.gz"):
            yield from _articles(f)
            return
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                if not isinstance(row["text"], str):
                    raise TypeError("its text is not a string")
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(
                    f'line {number} is not {{"title": ..., "text": ...}}: {e!r}'
                ) from e
            yield Document(str(row.get("title") or f"{path.name}:{number}"), row["text"])


def _hub(repo: str, subset: str | None, split: str, limit: int | None = None) -> Iterator[Document]:
    from datasets import load_dataset

    for i, row in enumerate(
        islice(load_dataset(repo, subset, split=split, streaming=limit is not None), limit)
    ):
        yield Document(
            row.get("title") or row.get("short_book_title") or f"{repo}:{i}", row["text"]
        )


def _articles(lines: Iterable[str]) -> Iterator[Document]:
    """WikiText: articles begin at ` = Title = `."""
    for part in re.split(r"(?m)^(?= = [^=].* = $)", "".join(lines)):
        yield Document(part.strip().split("\n")[0].strip(" ="), part.strip() + "\n")


# by name: a file of $LESS_DATA, and what stands in for it on the hub; or no file, and what the package carries
SOURCES: dict[str, tuple[str, Callable[[], Iterable[Document]]]] = {
    "stories-train": (
        "",
        lambda: (
            Document(f"story {i}", t) for i, t in enumerate(storyworld.lessons(LESSONS, seed=0))
        ),
    ),
    "stories-heldout": (
        "",
        lambda: (
            Document(f"story {i}", t)
            for i, t in enumerate(storyworld.lessons(200, seed=0, heldout=True))
        ),
    ),
    "stories-kernels": (
        "",
        lambda: (Document(f"story {i}", t) for i, t in enumerate(storyworld.lessons(300, seed=1))),
    ),
    "topics-train": ("", lambda: _topics(heldout=False)),
    "topics-heldout": ("", lambda: _topics(heldout=True)),
    "wikitext2": (
        "wikitext2_raw_test.txt.gz",
        lambda: _articles(d.text for d in _hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
    ),
    "books": ("books_heldout.jsonl.gz", lambda: _hub("emozilla/pg19", None, "test")),
    "c4": ("c4.jsonl.gz", lambda: _hub("allenai/c4", "en", "train", limit=20_000)),
    "wikipedia": (
        "wikipedia.jsonl.gz",
        lambda: _hub("wikimedia/wikipedia", "20231101.en", "train", limit=20_000),
    ),
    "novels": ("novels.jsonl.gz", lambda: _hub("emozilla/pg19", None, "train", limit=200)),
}


def hub_reachable() -> bool:
    """Whether the hub answers within five seconds; False with HF_HUB_OFFLINE. Its own client retries for most of a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of httpx, or of the hub's client when it is told to stay offline
        return False
    return True


def file_missing(what: str, file: str) -> str | None:
    """Why `file`, which holds `what`, cannot be read from $LESS_DATA and the hub cannot stand in, with the fix; else None."""
    folder = os.environ.get("LESS_DATA")
    if folder and not (Path(folder) / file).is_file():
        return f"{what}: {file} is not in $LESS_DATA={folder}; put it there, or unset LESS_DATA to use the hub"
    if not folder and not hub_reachable():
        return (
            f"{what}: the hub cannot be reached; set LESS_DATA to a folder with {file}, or connect"
        )
    return None


def missing(name: str) -> str | None:
    """Why corpus `name` cannot be read here, with the fix; None when it can be (or the hub may be asked)."""
    if name not in SOURCES:
        return f"unknown corpus {name!r}: choose from {', '.join(SOURCES)}"
    return file_missing(f"corpus {name!r}", file) if (file := SOURCES[name][0]) else None


def read(
    what: str, file: str, rows: Callable[[Path], Iterable[Any]], hub: Callable[[], Iterable[Any]]
) -> list[Any]:
    """The `rows` of `file` in $LESS_DATA, else what the `hub` has. ValueError for a damaged file, FileNotFoundError where the hub fails."""
    folder = os.environ.get("LESS_DATA")
    path = Path(folder or "") / file
    try:
        return list(rows(path) if folder else hub())
    except (
        Exception
    ) as e:  # of gzip, zlib, UTF-8, JSON or a row that lacks a field; or of the hub's clients
        if folder:
            raise ValueError(
                f"{what}: {path} is damaged ({e!r}); copy it again, or unset LESS_DATA to use the hub"
            ) from e
        raise FileNotFoundError(
            f"{what}: the hub failed ({e!r}); set LESS_DATA to a folder with {file}"
        ) from e


def load_corpus(name: str) -> Corpus:
    """Corpus `name`. ValueError for an unknown name or a damaged or empty file, FileNotFoundError where the text is not to be had."""
    if why := missing(name):
        raise (FileNotFoundError if name in SOURCES else ValueError)(why)
    (file, stand_in), folder = SOURCES[name], os.environ.get("LESS_DATA")
    if not file:
        return Corpus(name, "carried", tuple(stand_in()))
    found = tuple(d for d in read(f"corpus {name!r}", file, _rows, stand_in) if d.text.strip())
    if not found:
        raise ValueError(
            f"corpus {name!r}: {Path(folder) / file if folder else 'the hub'} holds no text; put a whole copy there"
        )
    return Corpus(name, "folder" if folder else "hub", found)


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of `text`, led by the beginning-of-sequence token when the tokenizer has one."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(text, add_special_tokens=False)["input_ids"]


def training_windows(
    corpora: list[Corpus], tokenizer, length: int, count: int, seed: int
) -> torch.Tensor:
    """[count, length] int64 windows for training, corpora in equal shares: documents shuffled, joined and cut, each led as in `encode`.

    Raises ValueError when a text is shorter than one window, or all hold fewer than `count`.
    """
    share, rows, bos = -(-count // len(corpora)), [], encode(tokenizer, "")
    step = length - len(bos)
    for corpus in corpora:
        documents, stream = list(corpus.documents), list[int]()
        random.Random(seed).shuffle(documents)
        for d in documents:
            ids = encode(tokenizer, d.text)
            stream += (
                ids if len(stream) % step else ids[len(bos) :]
            )  # a window brings its own first token
            if len(stream) >= share * step:
                break
        if len(stream) < step:
            raise ValueError(
                f"corpus {corpus.name!r} holds {len(stream)} tokens, fewer than one window of {length}: use a longer text"
            )
        rows += [
            bos + stream[i : i + step]
            for i in range(0, min(len(stream) - step + 1, share * step), step)
        ]
    if len(rows) < count:
        raise ValueError(
            f"{count} windows of {length} tokens asked for, the corpora hold {len(rows)}: ask for fewer sequences"
        )
    random.Random(seed).shuffle(rows)
    return torch.tensor(rows[:count])
