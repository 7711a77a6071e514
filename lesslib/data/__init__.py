"""Text: what the package carries, what lies in the folder $LESS_DATA, and what the hub has.

Every corpus is a list of `Document`s with a record of where it came from and the sha256 of its text, so that a
result can say exactly which words it was measured on.
"""
from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

MIN_SHARED = 80  # characters of a paragraph that make two topics "share text"
HELDOUT_SHARE = 0.3  # of the carried text's characters


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
        digest = hashlib.sha256()
        for d in self.documents:
            digest.update(f"{d.title}\0{d.text}\0".encode())
        return digest.hexdigest()

    def record(self) -> dict[str, object]:
        """What a manifest says of this corpus."""
        characters = sum(len(d.text) for d in self.documents)
        return {"name": self.name, "origin": self.origin, "documents": len(self.documents), "characters": characters, "sha256": self.sha256}


# ---------------------------------------------------------------- carried text: the reference prose in every CPython
def _paragraphs(text: str) -> dict[str, str]:
    """Paragraphs of `text` by their words: two that differ in white space alone are one."""
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        found.setdefault(" ".join(paragraph.split()), paragraph)
    found.pop("", None)
    return found


def _topics(heldout: bool) -> Iterator[Document]:
    """One document per group of `pydoc_data` topics: its longest topic, then whatever paragraphs the others add.

    Topics that share a paragraph are one group, so that no held-out text is also trained on.
    """
    from pydoc_data import topics

    groups: list[tuple[set[str], set[str]]] = []  # names, long paragraphs
    for name, text in topics.topics.items():
        shared = {key for key in _paragraphs(text) if len(key) >= MIN_SHARED}
        touching = [g for g in groups if g[1] & shared]
        groups = [g for g in groups if not g[1] & shared]
        groups.append(({name}.union(*(g[0] for g in touching)), shared.union(*(g[1] for g in touching))))
    texts = []
    for names, _ in groups:
        parts: dict[str, str] = {}
        for name in sorted(names, key=lambda n: (-len(topics.topics[n]), n)):
            parts = parts | {key: p for key, p in _paragraphs(topics.topics[name]).items() if key not in parts}
        texts.append(Document("+".join(sorted(names)), "\n\n".join(parts.values()) + "\n"))
    # held-out groups: in the order of a hash of their name, until they make up their share; the largest group trains
    total, taken = sum(len(d.text) for d in texts), 0
    largest = max(texts, key=lambda d: (len(d.text), d.title)).title
    for d in sorted(texts, key=lambda d: hashlib.sha256(d.title.encode()).hexdigest()):
        out = d.title != largest and taken + len(d.text) <= HELDOUT_SHARE * total
        taken += len(d.text) if out else 0
        if out == heldout:
            yield d


# ---------------------------------------------------------------- files of $LESS_DATA, and the hub in their place
def _jsonl(path: Path) -> Iterator[Document]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise ValueError(f"line {number} is not JSON: {e}") from e
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'line {number} has no "text"')
            yield Document(str(row.get("title") or f"{path.name}:{number}"), row["text"])


def _articles(text: str) -> Iterator[Document]:
    """WikiText: articles begin at ` = Title = `."""
    for part in re.split(r"(?m)^(?= = [^=].* = $)", text):
        if part.strip():
            yield Document(part.strip().splitlines()[0].strip(" ="), part.strip() + "\n")


def _wikitext(path: Path) -> Iterator[Document]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        yield from _articles(f.read())


def _hub(repo: str, subset: str | None, split: str, limit: int | None = None) -> Iterator[Document]:
    from datasets import load_dataset

    for i, row in enumerate(load_dataset(repo, subset, split=split, streaming=limit is not None)):
        if limit is not None and i >= limit:
            return
        yield Document(row.get("title") or row.get("short_book_title") or f"{repo}:{i}", row["text"])


def _hub_wikitext() -> Iterator[Document]:
    return _articles("".join(d.text for d in _hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test")))


@dataclass(frozen=True)
class Source:
    carried: Callable[[], Iterable[Document]] | None = None
    file: str | None = None
    read: Callable[[Path], Iterable[Document]] = _jsonl
    hub: Callable[[], Iterable[Document]] | None = None


SOURCES: dict[str, Source] = {
    "topics-train": Source(carried=lambda: _topics(heldout=False)),
    "topics-heldout": Source(carried=lambda: _topics(heldout=True)),
    "wikitext2": Source(file="wikitext2_raw_test.txt.gz", read=_wikitext, hub=_hub_wikitext),
    "books": Source(file="books_heldout.jsonl.gz", hub=lambda: _hub("emozilla/pg19", None, "test")),
    "c4": Source(file="c4.jsonl.gz", hub=lambda: _hub("allenai/c4", "en", "train", limit=20_000)),
    "wikipedia": Source(file="wikipedia.jsonl.gz", hub=lambda: _hub("wikimedia/wikipedia", "20231101.en", "train", limit=20_000)),
    "novels": Source(file="novels.jsonl.gz", hub=lambda: _hub("emozilla/pg19", None, "train", limit=200)),
}


def hub_reachable() -> bool:
    """Whether the hub answers within five seconds; False with HF_HUB_OFFLINE. Its own client retries for most of a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of httpx, or of the hub's client when it is told to stay offline
        return False
    return True


def missing(name: str) -> str | None:
    """Why corpus `name` cannot be read here, with the fix; None when it can be (or the hub may be asked)."""
    if name not in SOURCES:
        return f"unknown corpus {name!r}: choose from {', '.join(SOURCES)}"
    source = SOURCES[name]
    if source.carried is not None:
        return None
    folder = os.environ.get("LESS_DATA")
    if folder and not (Path(folder) / str(source.file)).is_file():
        return f"corpus {name!r}: {source.file} is not in $LESS_DATA={folder}; put it there, or unset LESS_DATA to use the hub"
    if not folder and not hub_reachable():
        return f"corpus {name!r}: the hub cannot be reached; set LESS_DATA to a folder with {source.file}, or connect"
    return None


def load_corpus(name: str) -> Corpus:
    """Load corpus `name` from the package, from `$LESS_DATA`, or from the hub.

    Raises ValueError for an unknown name and for a file that is damaged or empty, FileNotFoundError where the text is not
    to be had; both name the file and what to do.
    """
    if (why := missing(name)) is not None:
        raise (FileNotFoundError if name in SOURCES else ValueError)(why)
    source, folder = SOURCES[name], os.environ.get("LESS_DATA")
    if source.carried is not None:
        origin, where, found = "carried", "pydoc_data.topics", tuple(source.carried())
    elif folder:
        origin, path = "folder", Path(folder) / str(source.file)
        where = str(path)
        try:
            found = tuple(source.read(path))
        except (OSError, EOFError, zlib.error, ValueError) as e:  # not gzip, cut short, damaged inside, not UTF-8 or not JSON
            raise ValueError(f"corpus {name!r}: {path} is damaged ({e}); copy it again, or unset LESS_DATA to use the hub") from e
    else:
        assert source.hub is not None
        origin, where = "hub", "the hub's rows"
        try:
            found = tuple(source.hub())
        except Exception as e:
            what = f"corpus {name!r} could not be fetched from the hub ({type(e).__name__}: {e})"
            raise FileNotFoundError(f"{what}; set LESS_DATA to a folder with {source.file}") from e
    found = tuple(d for d in found if d.text.strip())
    if not found:
        raise ValueError(f"corpus {name!r}: {where} holds no text; put a whole copy there")
    return Corpus(name, origin, found)


# ---------------------------------------------------------------- tokens
def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, led by the beginning-of-sequence token when the tokenizer has one."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [bos + ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def training_windows(corpora: list[Corpus], tokenizer, length: int, count: int, seed: int) -> torch.Tensor:
    """`count` windows of `length` tokens for training kernels, [count, length] int64, corpora in equal shares.

    Documents are shuffled and joined, and windows do not overlap; each window starts with the beginning-of-sequence
    token when there is one. Raises ValueError when the text is shorter than one window, or holds fewer than `count`.
    """
    share, rows = -(-count // len(corpora)), []
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = length - len(bos)
    for corpus in corpora:
        documents = list(corpus.documents)
        random.Random(seed).shuffle(documents)
        stream: list[int] = []
        for d in documents:
            ids = encode(tokenizer, [d.text])[0]
            stream += ids if len(stream) % step else ids[len(bos) :]  # a window brings its own first token
            if len(stream) >= share * step:
                break
        if len(stream) < step:
            raise ValueError(f"corpus {corpus.name!r} holds {len(stream)} tokens, fewer than one window of {length}: use a longer text")
        rows += [bos + stream[i : i + step] for i in range(0, min(len(stream) - step + 1, share * step), step)]
    if len(rows) < count:
        names = "+".join(c.name for c in corpora)
        raise ValueError(f"{names}: {len(rows)} windows of {length} tokens to be had, {count} asked for; ask for fewer sequences")
    random.Random(seed).shuffle(rows)
    return torch.tensor(rows[:count])
