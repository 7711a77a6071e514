"""The tasks that answers are measured on, as `Example`s with shots, and `load_task`.

They are the paper's datasets (DATASETS; a file of $LESS_DATA or the hub) and storyworld's
stand-ins for them. To add a dataset, write a function from its row to an `Example`.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from lesslib.data import storyworld
from lesslib.data.hub import HubDataset, file_missing, read
from lesslib.data.storyworld import Example

# of the stories that are shown as shots
SHOT_SEED = 1_000_003


@dataclass(frozen=True)
class Dataset:
    """A file of $LESS_DATA, the hub's dataset that stands in, and what makes a row an example."""

    file: str
    hub: HubDataset
    example: Callable[[dict], Example]


def load_task(
    name: str, count: int, shots: int = 0, seed: int = 0, length: int = 450
) -> tuple[list[Example], list[Example]]:
    """(at most `count` examples to measure on, `shots` others to show before each) of a task.

    `name` is a dataset or a kind of storyworld task. Stories have about `length` words, their shots
    the fewest and words of the training stories; real texts are cut at `length` words.

    Raises ValueError for an unknown name, too few rows or a damaged file, FileNotFoundError where
    the rows are not to be had.
    """
    reason = missing(name)
    if reason is not None:
        raise (FileNotFoundError if name in DATASETS else ValueError)(reason)
    if name in storyworld.KINDS:
        shown = storyworld.examples(name, shots, SHOT_SEED + seed, heldout=False, small=True)
        return storyworld.examples(name, count, seed, length), shown
    rows = _dataset_examples(name, count + shots)
    if len(rows) <= shots:
        raise ValueError(
            f"task {name!r} has {len(rows)} rows, no more than the {shots} shots: use a whole copy "
            "of it, or fewer shots"
        )
    measured = [_shortened(example, length) for example in rows[shots:]]
    return measured, rows[:shots]


def missing(name: str) -> str | None:
    """Why task `name` cannot be read on this machine, with the fix.

    None when it can be (or the hub may be asked).
    """
    if name in storyworld.KINDS:
        return None
    if name not in DATASETS:
        return f"unknown task {name!r}: choose from {', '.join((*storyworld.KINDS, *DATASETS))}"
    return file_missing(f"task {name!r}", DATASETS[name].file)


def task_record(name: str, count: int, shots: int, length: int) -> dict:
    """What a manifest says of a task's examples."""
    examples, shown = load_task(name, count, shots, length=length)
    if name in storyworld.KINDS:
        origin = "made"
    elif os.environ.get("LESS_DATA"):
        origin = "folder"
    else:
        origin = "hub"
    digest = hashlib.sha256(repr((examples, shown)).encode()).hexdigest()
    return {"name": name, "origin": origin, "examples": len(examples), "sha256": digest}


def _dataset_examples(name: str, count: int) -> list[Example]:
    """The first `count` rows of a dataset, as examples."""
    dataset = DATASETS[name]

    def from_file(path: Path) -> list[Example]:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [dataset.example(json.loads(line)) for line in islice(lines, count)]

    def from_hub() -> Iterable[Example]:
        return map(dataset.example, dataset.hub.first_rows(count))

    return read(f"task {name!r}", dataset.file, from_file, from_hub)


def _shortened(example: Example, length: int) -> Example:
    """The example with the first `length` words of its text."""
    words = example.text.split(" ")
    return replace(example, text=" ".join(words[:length]))


# ---------------------------------------------------------------- rows of the paper's datasets
def _summary_in(sentences: str) -> Callable[[dict], Example]:
    """What makes an example of an article with its summary in so many `sentences`."""

    def example(row: dict) -> Example:
        article = row.get("article") or row["document"]
        summary = row.get("summary") or row["highlights"]
        lead = f"Summarize the above article in {sentences}."
        return Example("summary", f"Article: {article}", lead, (summary,))

    return example


def _boolq(row: dict) -> Example:
    text = row["passage"]
    if row.get("title"):
        text = f"{row['title']}\n{text}"
    lead = f"Question: {row['question']}?\nAnswer:"
    return Example("yes_no", text, lead, ("yes", "no"), 0 if row["answer"] else 1)


def _mutual(row: dict) -> Example:
    return Example("reply", row["article"], "", tuple(row["options"]), "ABCD".index(row["answers"]))


DATASETS: dict[str, Dataset] = {
    "boolq": Dataset("boolq.jsonl.gz", HubDataset("google/boolq", None, "validation"), _boolq),
    "mutual": Dataset(
        "mutual.jsonl.gz", HubDataset("tasksource/mutual", None, "validation"), _mutual
    ),
    "cnn_dailymail": Dataset(
        "cnn_dailymail.jsonl.gz",
        HubDataset("abisee/cnn_dailymail", "3.0.0", "test"),
        _summary_in("3 sentences"),
    ),
    "xsum": Dataset(
        "xsum.jsonl.gz", HubDataset("EdinburghNLP/xsum", None, "test"), _summary_in("1 sentence")
    ),
    "multi_news": Dataset(
        "multi_news.jsonl.gz",
        HubDataset("Awesome075/multi_news_parquet", None, "test"),
        _summary_in("10 sentences"),
    ),
}
