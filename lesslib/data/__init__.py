"""Text and tasks."""

from lesslib.data.corpora import (
    SOURCES,
    Corpus,
    Document,
    encode,
    file_missing,
    hub_reachable,
    load_corpus,
    missing,
    read,
    training_windows,
)

__all__ = [
    "SOURCES",
    "Corpus",
    "Document",
    "encode",
    "file_missing",
    "hub_reachable",
    "load_corpus",
    "missing",
    "read",
    "training_windows",
]
