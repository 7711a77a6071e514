"""Which runs of notebooks this machine remembers, so that what is up to date is left alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lesslib.profiles import results_dir
from lesslib.runner.notebook import Notebook
from lesslib.util.files import write_json
from lesslib.util.paths import ROOT

TO_RUN = "to run"
UP_TO_DATE = "up to date"
DONE = "done"
FAILED = "FAILED"
PACKAGE = ROOT / "lesslib"
# the experiment that trains a profile's kernels: forgetting it forgets them
KERNEL_TRAINING = "training_kernels"


@dataclass
class Outcome:
    """How the last run of a notebook went, as a list shows it."""

    state: str = TO_RUN
    seconds: float = 0.0
    # the lines that its verdict cells printed
    verdicts: list[str] = field(default_factory=list)


class RunLog:
    """results/<profile>/.run.json: a stamp of the last run of each notebook on this machine.

    A stamp holds the `key` of that run, its seconds and verdicts, and the result `files` it left.
    """

    def __init__(self, profile: str, seed: int) -> None:
        self.home = results_dir(profile).absolute()
        self.key = key_of_a_run(profile, seed)
        self.stamps: dict[str, dict[str, Any]] = {}
        # no file, or one that was damaged: everything is run again
        with contextlib.suppress(OSError, ValueError):
            self.stamps |= json.loads(self.path.read_text())

    @property
    def path(self) -> Path:
        return self.home / ".run.json"

    @property
    def ledger(self) -> Path:
        """The list of the points that this machine computed."""
        return self.home / ".ledger.json"

    def is_up_to_date(self, notebook: Notebook) -> bool:
        """Whether it was run as it stands, and every file that was there then still is."""
        stamp = self.stamps.get(notebook.name)
        if stamp is None or stamp["key"] != [notebook.sha256, self.key]:
            return False
        return all((self.home / file).is_file() for file in stamp["files"])

    def last_outcome(self, notebook: Notebook) -> Outcome:
        """Seconds and verdicts of its last run, as far as there was one."""
        stamp = self.stamps.get(notebook.name, {"seconds": 0.0, "verdicts": []})
        return Outcome(seconds=stamp["seconds"], verdicts=stamp["verdicts"])

    def add(self, notebook: Notebook, outcome: Outcome) -> None:
        """Stamp a notebook that has been run."""
        results = sorted(path.name for path in self.home.glob("[!.]*.json"))
        self.stamps[notebook.name] = {
            "key": [notebook.sha256, self.key],
            "seconds": outcome.seconds,
            "verdicts": outcome.verdicts,
            "files": [f"notebooks/{notebook.path.name}", *results],
        }
        write_json(self.path, self.stamps)

    def forget(self, notebooks: list[Notebook]) -> None:
        """Drop their stamps and the points of their experiments; kernels, if they train them."""
        # Imported here: nothing but --fresh needs it, and other calls should answer at once.
        from lesslib.reporting.results import read_ledger

        experiments: set[str] = set()
        for notebook in notebooks:
            self.stamps.pop(notebook.name, None)
            experiments |= set(notebook.declares.experiments)
        write_json(self.path, self.stamps)
        # an entry of the ledger reads experiment:point:cache key
        points = read_ledger(self.ledger)
        if points:
            kept = [point for point in points if point.split(":")[0] not in experiments]
            write_json(self.ledger, kept)
        if KERNEL_TRAINING in experiments:
            kernels = self.home / "kernels"
            shutil.rmtree(kernels, ignore_errors=True)
            # An empty folder: from now on this profile's own kernels are trained and used.
            kernels.mkdir(parents=True, exist_ok=True)


def key_of_a_run(profile: str, seed: int) -> str:
    """Digest of all that decides what notebooks compute, but for their own code."""
    folder = os.environ.get("LESS_DATA")
    texts = []
    if folder:
        texts = [(path.name, path.stat().st_size) for path in sorted(Path(folder).glob("*.gz"))]
    code = []
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and path.suffix not in (".pyc", ".tmp"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            code.append((str(path.relative_to(PACKAGE)), digest))
    return hashlib.sha256(repr((profile, seed, folder, texts, code)).encode()).hexdigest()
