"""What a benchmark records: results/benchmarks/<name>.json, an entry for every load.

An entry is on disk as soon as its load ends, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

from typing import Any

from lesslib.profiles import results_dir
from lesslib.reporting.results import load, manifest
from lesslib.util.files import write_json

# beside the folders of the profiles
FOLDER = "benchmarks"

# of a manifest: what must be as it was for an entry to stand for a measurement of today
SAME = ("hardware", "versions")


class BenchmarkRecord:
    """The entries of one benchmark by key, each with its own manifest."""

    def __init__(self, name: str):
        self.name = name
        self.path = results_dir(FOLDER) / f"{name}.json"
        # of now, but for the seconds
        self.manifest = manifest(FOLDER, seed=0, data=[], seconds=0)

    def entries(self) -> dict[str, dict]:
        """What is on disk. Raises ValueError for a damaged file."""
        record = load(self.name, FOLDER) or {"points": {}}
        return record["points"]

    def finished(self, key: str, parameters: dict[str, Any]) -> dict | None:
        """The entry `key`, if it is of these `parameters`, this hardware and these versions.

        Of whichever commit: an entry says its own.
        """
        entry = self.entries().get(key)
        if entry is None or entry["parameters"] != parameters:
            return None
        if any(entry["manifest"][part] != self.manifest[part] for part in SAME):
            return None
        return entry

    def write(
        self, key: str, parameters: dict[str, Any], seconds: float, value: dict[str, Any]
    ) -> dict:
        """Record `value` under `key`, with the `seconds` that measuring it took; the entry."""
        entry = {
            **value,
            "parameters": parameters,
            "manifest": manifest(FOLDER, seed=0, data=[], seconds=seconds),
        }
        # read again, as another process may have written others
        write_json(self.path, {"points": self.entries() | {key: entry}})
        return entry


def where(entry: dict) -> str:
    """Processor, threads and versions of an entry, in words."""
    hardware = entry["manifest"]["hardware"]
    versions = entry["manifest"]["versions"]
    device = hardware["gpu"] or hardware["cpu"]
    return (
        f"{device}, {hardware['threads']} threads, torch {versions['torch']},"
        f" transformers {versions['transformers']}"
    )


def when(entry: dict) -> str:
    """Day and commit of an entry, in words."""
    stamp = entry["manifest"]
    return f"{stamp['date'][:10]}, commit {stamp['commit'][:12]}"
