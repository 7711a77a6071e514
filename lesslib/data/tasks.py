"""The tasks that answers are measured on, by the paper's datasets and by storyworld's stand-ins for them, as `Example`s with shots."""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lesslib.data import storyworld
from lesslib.data.corpora import file_missing, read
from lesslib.data.storyworld import Example

SHOT_SEED = 1_000_003  # of the stories that are shown as shots


def _summarise(sentences: str) -> Callable[[dict], Example]:
    def example(row: dict) -> Example:
        article, summary = (
            row.get("article") or row["document"],
            row.get("summary") or row["highlights"],
        )
        return Example(
            "summary",
            f"Article: {article}",
            f"Summarize the above article in {sentences}.",
            (summary,),
        )

    return example


def _boolq(row: dict) -> Example:
    text = f"{row['title']}\n{row['passage']}" if row.get("title") else row["passage"]
    return Example(
        "yes_no",
        text,
        f"Question: {row['question']}?\nAnswer:",
        ("yes", "no"),
        0 if row["answer"] else 1,
    )


def _mutual(row: dict) -> Example:
    return Example("reply", row["article"], "", tuple(row["options"]), "ABCD".index(row["answers"]))


# by name: a file of $LESS_DATA; repository, subset and split of the hub; and what makes an example of a row of either
DATASETS: dict[str, tuple[str, tuple[str, str | None, str], Callable[[dict], Example]]] = {
    "boolq": ("boolq.jsonl.gz", ("google/boolq", None, "validation"), _boolq),
    "mutual": ("mutual.jsonl.gz", ("tasksource/mutual", None, "validation"), _mutual),
    "cnn_dailymail": (
        "cnn_dailymail.jsonl.gz",
        ("abisee/cnn_dailymail", "3.0.0", "test"),
        _summarise("3 sentences"),
    ),
    "xsum": ("xsum.jsonl.gz", ("EdinburghNLP/xsum", None, "test"), _summarise("1 sentence")),
    "multi_news": (
        "multi_news.jsonl.gz",
        ("Awesome075/multi_news_parquet", None, "test"),
        _summarise("10 sentences"),
    ),
}


def missing(name: str) -> str | None:
    """Why dataset `name` cannot be read here, with the fix; None when it can be (or the hub may be asked)."""
    if name in storyworld.KINDS:
        return None
    if name not in DATASETS:
        return f"unknown task {name!r}: choose from {', '.join((*storyworld.KINDS, *DATASETS))}"
    return file_missing(f"task {name!r}", DATASETS[name][0])


def load_task(
    name: str, count: int, shots: int = 0, seed: int = 0, length: int = 450
) -> tuple[list[Example], list[Example]]:
    """(at most `count` examples to measure on, `shots` others to show before each) of a dataset or a kind of storyworld task.

    Stories have about `length` words, their shots the fewest and words of the training stories; real texts are cut at `length` words.
    Raises ValueError for an unknown name, too few rows or a damaged file, FileNotFoundError where the rows are not to be had.
    """
    if why := missing(name):
        raise (FileNotFoundError if name in DATASETS else ValueError)(why)
    if name in storyworld.KINDS:
        shown = storyworld.examples(name, shots, SHOT_SEED + seed, heldout=False, small=True)
        return storyworld.examples(name, count, seed, length), shown
    file, (repo, subset, split), example = DATASETS[name]

    def rows(path: Path) -> list[Example]:
        with gzip.open(path, "rt", encoding="utf-8") as f:
            return [example(json.loads(line)) for line in islice(f, count + shots)]

    def hub() -> Iterable[Example]:
        from datasets import load_dataset

        return map(
            example, islice(load_dataset(repo, subset, split=split, streaming=True), count + shots)
        )

    found = read(f"task {name!r}", file, rows, hub)
    if len(found) <= shots:
        raise ValueError(
            f"task {name!r} has {len(found)} rows, no more than the {shots} shots: use a whole copy of it, or fewer shots"
        )
    return [replace(e, text=" ".join(e.text.split(" ")[:length])) for e in found[shots:]], found[
        :shots
    ]


def task_record(name: str, count: int, shots: int, length: int) -> dict:
    """What a manifest says of a task's examples."""
    examples, shown = load_task(name, count, shots, length=length)
    origin = (
        "made" if name in storyworld.KINDS else "folder" if os.environ.get("LESS_DATA") else "hub"
    )
    digest = hashlib.sha256(repr((examples, shown)).encode()).hexdigest()
    return {"name": name, "origin": origin, "examples": len(examples), "sha256": digest}
