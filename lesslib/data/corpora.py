"""The corpora by name, and `load_corpus`.

A corpus is carried by the package, lies as a file in the folder $LESS_DATA, or is fetched from the
hub. To add one, give it a line in SOURCES.
"""

import gzip
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lesslib.data import storyworld
from lesslib.data.documents import Corpus, Document
from lesslib.data.hub import HubDataset, file_missing, read
from lesslib.data.topics import split_topics

# texts of stories to pretrain on
LESSONS = 16_000


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from: a `file` of $LESS_DATA, and `documents` that stand in for it.

    They are what the hub has; for a corpus without a file, what the package carries.
    """

    file: str | None
    documents: Callable[[], Iterable[Document]]


def load_corpus(name: str) -> Corpus:
    """Corpus `name`, with its origin.

    Raises ValueError for an unknown name or a damaged or empty file, FileNotFoundError where the
    text is not to be had.
    """
    reason = missing(name)
    if reason is not None:
        raise (FileNotFoundError if name in SOURCES else ValueError)(reason)
    source = SOURCES[name]
    if source.file is None:
        return Corpus(name, "carried", tuple(source.documents()))
    rows = read(f"corpus {name!r}", source.file, _file_documents, source.documents)
    documents = tuple(d for d in rows if d.text.strip())
    folder = os.environ.get("LESS_DATA")
    if not documents:
        place = Path(folder) / source.file if folder else "the hub"
        raise ValueError(f"corpus {name!r}: {place} holds no text; put a whole copy there")
    return Corpus(name, "folder" if folder else "hub", documents)


def missing(name: str) -> str | None:
    """Why corpus `name` cannot be read on this machine, with the fix.

    None when it can be (or the hub may be asked).
    """
    if name not in SOURCES:
        return f"unknown corpus {name!r}: choose from {', '.join(SOURCES)}"
    file = SOURCES[name].file
    if file is None:
        return None
    return file_missing(f"corpus {name!r}", file)


# ---------------------------------------------------------------- carried by the package
def _stories(texts: Iterable[str]) -> Iterator[Document]:
    for i, text in enumerate(texts):
        yield Document(f"story {i}", text)


def _training_stories() -> Iterator[Document]:
    return _stories(storyworld.lessons(LESSONS, seed=0))


def _heldout_stories() -> Iterator[Document]:
    return _stories(storyworld.lessons(200, seed=0, heldout=True))


def _kernel_stories() -> Iterator[Document]:
    return _stories(storyworld.lessons(300, seed=1))


def _training_topics() -> Iterator[Document]:
    return split_topics(heldout=False)


def _heldout_topics() -> Iterator[Document]:
    return split_topics(heldout=True)


# ---------------------------------------------------------------- files of $LESS_DATA
def _file_documents(path: Path) -> Iterator[Document]:
    """The articles of a .txt.gz, or the {"title", "text"} lines of a .jsonl.gz.

    Raises ValueError for a line that is not one.
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        if path.name.endswith(".txt.gz"):
            yield from _articles(lines)
            return
        for number, line in enumerate(lines, start=1):
            yield _line_document(line, number, path.name)


def _line_document(line: str, number: int, file: str) -> Document:
    """The document of a line of JSON; without a title it is called by its place in the file."""
    try:
        row = json.loads(line)
        if not isinstance(row["text"], str):
            raise TypeError("its text is not a string")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'line {number} is not {{"title": ..., "text": ...}}: {e!r}') from e
    return Document(str(row.get("title") or f"{file}:{number}"), row["text"])


def _articles(lines: Iterable[str]) -> Iterator[Document]:
    """WikiText: articles begin at ` = Title = `."""
    for article in re.split(r"(?m)^(?= = [^=].* = $)", "".join(lines)):
        title = article.strip().split("\n")[0].strip(" =")
        yield Document(title, article.strip() + "\n")


# ---------------------------------------------------------------- what the hub has
WIKITEXT = HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
C4 = HubDataset("allenai/c4", "en", "train")
WIKIPEDIA = HubDataset("wikimedia/wikipedia", "20231101.en", "train")
BOOKS = HubDataset("emozilla/pg19", None, "test")
NOVELS = HubDataset("emozilla/pg19", None, "train")


def _row_documents(rows: Iterable[dict], repo: str) -> Iterator[Document]:
    """Rows of the hub as documents; without a title one is called by its place in `repo`."""
    for i, row in enumerate(rows):
        title = row.get("title") or row.get("short_book_title") or f"{repo}:{i}"
        yield Document(title, row["text"])


def _hub_wikitext() -> Iterator[Document]:
    return _articles(row["text"] for row in WIKITEXT.all_rows())


def _hub_books() -> Iterator[Document]:
    return _row_documents(BOOKS.all_rows(), BOOKS.repo)


def _hub_c4() -> Iterator[Document]:
    return _row_documents(C4.first_rows(20_000), C4.repo)


def _hub_wikipedia() -> Iterator[Document]:
    return _row_documents(WIKIPEDIA.first_rows(20_000), WIKIPEDIA.repo)


def _hub_novels() -> Iterator[Document]:
    return _row_documents(NOVELS.first_rows(200), NOVELS.repo)


SOURCES: dict[str, Source] = {
    "stories-train": Source(None, _training_stories),
    "stories-heldout": Source(None, _heldout_stories),
    "stories-kernels": Source(None, _kernel_stories),
    "topics-train": Source(None, _training_topics),
    "topics-heldout": Source(None, _heldout_topics),
    "wikitext2": Source("wikitext2_raw_test.txt.gz", _hub_wikitext),
    "books": Source("books_heldout.jsonl.gz", _hub_books),
    "c4": Source("c4.jsonl.gz", _hub_c4),
    "wikipedia": Source("wikipedia.jsonl.gz", _hub_wikipedia),
    "novels": Source("novels.jsonl.gz", _hub_novels),
}
