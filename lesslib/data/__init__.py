"""Text and tasks: corpora by name, the tasks that answers are measured on, a world of stories.

Import corpora and windows from this package (`from lesslib.data import load_corpus`), tasks from
`lesslib.data.tasks`, the stories from `lesslib.data.storyworld`. Open `corpora.py` first: its table
SOURCES lists every text and where it comes from.
"""

from lesslib.data.corpora import SOURCES, Source, load_corpus, missing
from lesslib.data.documents import Corpus, Document
from lesslib.data.hub import file_missing, hub_reachable, read
from lesslib.data.windows import encode, training_windows

__all__ = [
    "SOURCES",
    "Corpus",
    "Document",
    "Source",
    "encode",
    "file_missing",
    "hub_reachable",
    "load_corpus",
    "missing",
    "read",
    "training_windows",
]
