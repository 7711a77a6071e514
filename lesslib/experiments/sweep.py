"""Compute the points of an experiment that are not recorded yet; resumable, shared by processes."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesslib.profiles import results_dir
from lesslib.reporting.results import cache_key, load, manifest, read_ledger
from lesslib.util.files import check_writable, write_json
from lesslib.util.progress import clear_context, minutes, progress, set_context, silence

if TYPE_CHECKING:
    from lesslib.experiments.experiment import Experiment, Point

# That share points, at the most: each holds a batch of its own beside the model they share.
PROCESSES = 4

# PR_SET_PDEATHSIG of Linux's prctl: the signal that a process gets when its parent dies.
SIGNAL_OF_PARENTS_DEATH = 1

# What an entry of a record holds beside the value.
OF_THE_POINT = ("parameters", "cache_key", "seconds")

# A point with the seconds that it took and its value.
Result = tuple["Point", float, dict[str, Any]]


def sweep(experiment: Experiment) -> dict[str, Any]:
    """Compute the points of `experiment` that are not recorded yet; the whole record.

    Each is on disk as soon as it ends. With $LESS_LEDGER only points noted there count as
    recorded; with $LESS_FROM_RESULTS none is computed, and FileNotFoundError names those missing.
    """
    if os.environ.get("LESS_FROM_RESULTS"):
        return _from_results(experiment)
    book = Book(experiment)
    missing = book.missing()
    if missing:
        check_writable(book.path.parent)
    for point, seconds, value in _of_twins(experiment, missing):
        book.write(point, seconds, value)
    missing = book.missing()
    try:
        with contextlib.closing(_computed(experiment, missing, book)) as results:
            for point, seconds, value in results:
                book.write(point, seconds, value)
    finally:
        clear_context()
    progress(experiment.name, len(book.points), len(book.points))
    return load(experiment.name, experiment.profile.name) or book.record


def _from_results(experiment: Experiment) -> dict[str, Any]:
    """The record as it is. Raises FileNotFoundError naming the points that it lacks."""
    name = experiment.name
    profile = experiment.profile.name
    record = load(name, profile) or {"points": {}}
    missing = []
    for point in experiment.points():
        entry = record["points"].get(point.key, {})
        if entry.get("parameters") != point.parameters:
            missing.append(point.key)
    if missing:
        path = results_dir(profile) / f"{name}.json"
        raise FileNotFoundError(
            f"{path} does not hold {', '.join(missing)}: run once without --from-results"
        )
    return record


class Book:
    """The record of an experiment while its points are computed.

    `recorded` are the entries that are up to date, and `done` those of them that count: all, or
    with a ledger those that this machine computed itself.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.name = experiment.name
        self.profile = experiment.profile.name
        self.seed = experiment.seed
        self.path = results_dir(self.profile) / f"{self.name}.json"
        self.record = load(self.name, self.profile) or {"points": {}}
        self.points = experiment.points()
        self.sources = experiment.sources()
        self.cache_keys: dict[str, str] = {}
        for point in self.points:
            if point.key in self.cache_keys:
                raise ValueError(
                    f"{self.name}: two points are called {point.key!r}: leave one of them out"
                )
            self.cache_keys[point.key] = cache_key(
                point.parameters, self.seed, self.sources, experiment.version
            )
        ledger = os.environ.get("LESS_LEDGER")
        self.ledger_path = Path(ledger) if ledger else None
        self.ledger = read_ledger(self.ledger_path) if self.ledger_path else []
        self.recorded: dict[str, dict] = {}
        self.done: dict[str, dict] = {}
        for point in self.points:
            entry = self.record["points"].get(point.key, {})
            if entry.get("cache_key") == self.cache_keys[point.key]:
                self.recorded[point.key] = entry
                if self.ledger_path is None or self._ledger_line(point) in self.ledger:
                    self.done[point.key] = entry

    def _ledger_line(self, point: Point) -> str:
        return f"{self.name}:{point.key}:{self.cache_keys[point.key]}"

    def missing(self) -> list[Point]:
        """The points that are to be computed."""
        return [point for point in self.points if point.key not in self.done]

    def seconds_before(self, point: Point) -> float:
        """What the point took when it was last recorded, up to date or not; 0 if it never was."""
        return self.record["points"].get(point.key, {}).get("seconds", 0.0)

    def seconds_of_group_before(self, group: list[Point]) -> float:
        return sum(self.seconds_before(point) for point in group)

    def write(self, point: Point, seconds: float, value: dict[str, Any]) -> None:
        """Put a point's value on disk, and into the ledger."""
        entry = {
            "parameters": point.parameters,
            "cache_key": self.cache_keys[point.key],
            "seconds": round(seconds, 2),
            **value,
        }
        self.recorded[point.key] = entry
        self.done[point.key] = entry
        total = sum(e["seconds"] for e in self.done.values())
        stamp = manifest(self.profile, self.seed, self.sources, total)
        write_json(self.path, {"manifest": stamp, "points": self.recorded})
        if self.ledger_path:
            self.ledger.append(self._ledger_line(point))
            write_json(self.ledger_path, sorted(self.ledger))

    def say(self, processes: int) -> None:
        """Say how many points are done, and how long the others take `processes` at a time."""
        remaining = ""
        if self.recorded:
            mean = sum(e["seconds"] for e in self.recorded.values()) / len(self.recorded)
            seconds = mean * len(self.missing()) / processes
            remaining = f"about {minutes(seconds)} left"
        clear_context()
        progress(self.name, len(self.done), len(self.points), remaining)
        set_context(f"{self.name} {len(self.done)}/{len(self.points)}", remaining)


def _of_twins(experiment: Experiment, points: list[Point]) -> Iterator[Result]:
    """Results of those points that another experiment has already computed: see
    `Experiment.twin`.
    """
    books: dict[str, Book] = {}
    for point in points:
        twin = experiment.twin(point)
        if twin is None:
            continue
        name = twin.experiment.name
        if name not in books:
            books[name] = Book(twin.experiment)
        entry = books[name].done.get(twin.key)
        if entry is not None:
            value = {name: x for name, x in entry.items() if name not in OF_THE_POINT}
            yield point, entry["seconds"], value


# ---------------------------------------------------------------------- computing
def _computed(experiment: Experiment, points: list[Point], book: Book) -> Generator[Result]:
    """Results as they end: first, in this process, of points that may not be shared."""
    import torch

    groups = _groups(experiment, points)
    shared = [group for group in groups if _may_be_shared(experiment, group)]
    for group in shared:
        for point in group:
            experiment.prepare(point)
    processes = 1
    if sys.platform == "linux":
        processes = min(PROCESSES, torch.get_num_threads(), len(shared))
    if processes < 2:
        shared = []
    for group in groups:
        if group not in shared:
            book.say(1)
            yield from compute_group(experiment, group)
    if shared:
        # The longest first, so that no process works on alone at the end; never timed, the largest.
        shared.sort(key=len, reverse=True)
        shared.sort(key=book.seconds_of_group_before, reverse=True)
        yield from _by_processes(experiment, shared, processes, book)


def _groups(experiment: Experiment, points: list[Point]) -> list[list[Point]]:
    """Points that are computed at once: those that differ only in parameters of `together`."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        common = point.key
        if experiment.together:
            common = repr(
                {k: v for k, v in point.parameters.items() if k not in experiment.together}
            )
        groups.setdefault(common, []).append(point)
    return list(groups.values())


def _may_be_shared(experiment: Experiment, group: list[Point]) -> bool:
    """Whether processes may share the points of a group; on a GPU, one process has it."""
    import torch

    if torch.cuda.is_available():
        return False
    return all(experiment.may_be_shared(point) for point in group)


def _by_processes(
    experiment: Experiment, groups: list[list[Point]], processes: int, book: Book
) -> Generator[Result]:
    """Results of groups that forked processes share, as they end.

    The processes share the loaded model's memory and divide torch's threads: small operations keep
    one core busy and a second one waiting. Raises what `compute` raises, and RuntimeError where a
    process died.
    """
    import torch

    from lesslib.ops import dispatch

    book.say(processes)
    # Once here instead of in every process, for each sweep anew.
    dispatch.cpu_kernels()
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin_process,
        initargs=(torch.get_num_threads() // processes,),
    )
    try:
        futures = [pool.submit(compute_group, experiment, group) for group in groups]
        for future in as_completed(futures):
            yield from future.result()
            book.say(processes)
    except BrokenExecutor as error:
        raise RuntimeError(
            "a process that computed a point died; most often memory ran out: set OMP_NUM_THREADS=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process(threads: int) -> None:
    """A process begins: it works with `threads`, leaves the bar to its parent and ends with it."""
    import torch

    torch.set_num_threads(threads)
    silence()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ctypes.CDLL(None).prctl(SIGNAL_OF_PARENTS_DEATH, signal.SIGKILL)


def compute_group(experiment: Experiment, group: list[Point]) -> list[Result]:
    """The results of points that are computed at once, each with its share of the time."""
    start_time = time.time()
    values = experiment.compute_together(group)
    seconds = (time.time() - start_time) / len(group)
    return [(point, seconds, value) for point, value in zip(group, values, strict=True)]
