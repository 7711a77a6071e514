"""Reading a record, the dict of a recorded JSON file: {"manifest": ..., "points": {key: entry}}.

Keys are paths such as "corpus/5%/LESS (5%)": a group, then the label of a method. The group of
Full is the corpus or task alone, for its value does not depend on a budget.
"""

from __future__ import annotations

from collections.abc import Iterable

from lesslib.experiments.method import Method
from lesslib.reporting.results import load

FULL = "Full"
PLUS = "Baseline+"


def rows(record: dict, group: str, methods: Iterable[Method]) -> dict[str, dict]:
    """Entries of the points `group`/label by label, in the order of `methods`.

    Methods that are not recorded are left out.
    """
    entries = {}
    for method in methods:
        entry = record["points"].get(f"{group}/{method.label}")
        if entry is not None:
            entries[method.label] = entry
    return entries


def groups(record: dict) -> dict[str, dict[str, dict]]:
    """Entries by group, then by label, of the groups that have Baseline+ among their rows.

    Each gets the rows of its corpus or task as well: Full, and what was asked without a text.
    """
    by_group: dict[str, dict[str, dict]] = {}
    for key, entry in record["points"].items():
        group, _, label = key.rpartition("/")
        by_group.setdefault(group, {})[label] = entry
    complete = {}
    for group, entries in by_group.items():
        if PLUS in entries:
            of_corpus = by_group.get(group.split("/")[0], {})
            complete[group] = of_corpus | entries
    return complete


def corpora_of(record: dict) -> list[str]:
    """The corpora or tasks of a record, as its keys begin, in their order."""
    return list(dict.fromkeys(key.split("/")[0] for key in record["points"]))


def load_or_empty(name: str, profile: str) -> dict:
    """The record of experiment `name` in another profile, without points where there is none."""
    return load(name, profile) or {"points": {}}
