"""The carried prose: Python's documentation topics, split into text to train on and text held out.

Topics that share a paragraph go to the same side, so that no held-out text is also trained on. The
split is computed from whatever topics this version of Python has.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lesslib.data.documents import Document

# characters of a paragraph that make two topics "share text"
MIN_SHARED = 80
# the share of the characters that is held out
HELDOUT_SHARE = 0.3


@dataclass
class _Group:
    """Topics that share paragraphs, directly or through others."""

    names: set[str]
    long_paragraphs: set[str]


def split_topics(heldout: bool) -> Iterator[Document]:
    """The held-out documents, or those to train on: one document per group of topics."""
    documents = _documents()
    largest = max(documents, key=lambda d: (len(d.text), d.title))
    room = HELDOUT_SHARE * sum(len(d.text) for d in documents)
    # in the order of a hash of their name, until they make up their share; the largest trains
    for document in sorted(documents, key=_hash_of_title):
        is_heldout = document is not largest and len(document.text) <= room
        if is_heldout:
            room -= len(document.text)
        if is_heldout == heldout:
            yield document


def _hash_of_title(document: Document) -> str:
    return hashlib.sha256(document.title.encode()).hexdigest()


def _documents() -> list[Document]:
    """One document per group, its longest topic first, without repeated paragraphs."""
    from pydoc_data import topics

    documents = []
    for group in _groups(topics.topics):
        longest_first = sorted(group.names, key=lambda name: (-len(topics.topics[name]), name))
        text = "\n\n".join(topics.topics[name] for name in longest_first)
        paragraphs = _paragraphs(text).values()
        title = "+".join(sorted(group.names))
        documents.append(Document(title, "\n\n".join(paragraphs) + "\n"))
    return documents


def _groups(texts: dict[str, str]) -> list[_Group]:
    """The texts by name, joined wherever two share a paragraph of MIN_SHARED characters."""
    groups: list[_Group] = []
    for name, text in texts.items():
        long_paragraphs = {words for words in _paragraphs(text) if len(words) >= MIN_SHARED}
        joined = _Group({name}, set(long_paragraphs))
        untouched = []
        for group in groups:
            if group.long_paragraphs & long_paragraphs:
                joined.names |= group.names
                joined.long_paragraphs |= group.long_paragraphs
            else:
                untouched.append(group)
        groups = [*untouched, joined]
    return groups


def _paragraphs(text: str) -> dict[str, str]:
    """Paragraphs of `text` by their words: two that differ in white space alone are one."""
    by_words: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if paragraph.strip():
            words = " ".join(paragraph.split())
            by_words.setdefault(words, paragraph)
    return by_words
