"""Compute the points of an experiment that are not recorded yet; resumable, shared by processes."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from lesslib.profiles import results_dir
from lesslib.reporting.results import cache_key, load, manifest, read_ledger
from lesslib.util.files import check_writable, write_json
from lesslib.util.progress import clear_context, minutes, progress, set_context, silence

PROCESSES = 4  # that share points, at the most: each holds a model and a batch of its own


def sweep(
    name: str,
    profile: str,
    seed: int,
    points: dict[str, dict],
    compute: Callable[..., Any],
    data: Callable[[], list[dict]],
    version: int = 1,
    share: Callable[[dict], bool] = lambda parameters: False,
    together: tuple[str, ...] = (),
) -> dict:
    """Compute the `points` (name: parameters) of an experiment that are not recorded yet, by `compute(**parameters)`; the whole file.

    Points that differ only in parameters named in `together` are computed at once: `compute` gets a list of those as `cases`, and returns
    one of values. Each is on disk as soon as it ends; those that processes may `share` come last. `data()`: records as `Corpus.record`'s.
    With $LESS_LEDGER only points noted there count; with $LESS_FROM_RESULTS none is computed, and FileNotFoundError names those missing.
    """
    path, record = results_dir(profile) / f"{name}.json", load(name, profile) or {"points": {}}
    if os.environ.get("LESS_FROM_RESULTS"):
        if missing := [
            p for p in points if record["points"].get(p, {}).get("parameters") != points[p]
        ]:
            raise FileNotFoundError(
                f"{path} does not hold {', '.join(missing)}: run once without --from-results"
            )
        return record
    sources, ledger = data(), os.environ.get("LESS_LEDGER")
    here = read_ledger(Path(ledger)) if ledger else []
    keys = {p: cache_key(parameters, seed, sources, version) for p, parameters in points.items()}
    recorded = {
        p: record["points"][p]
        for p in points
        if record["points"].get(p, {}).get("cache_key") == keys[p]
    }
    done = {
        p: entry for p, entry in recorded.items() if not ledger or f"{name}:{p}:{keys[p]}" in here
    }

    def say(at_once: int) -> None:
        seconds = [e["seconds"] for e in recorded.values()]
        left = (
            f"about {minutes(sum(seconds) / len(seconds) * (len(points) - len(done)) / at_once)} left"
            if seconds
            else ""
        )
        clear_context()
        progress(name, len(done), len(points), left)
        set_context(f"{name} {len(done)}/{len(points)}", left)

    took = {p: record["points"].get(p, {}).get("seconds", 0.0) for p in points}
    if todo := {p: points[p] for p in points if p not in done}:
        check_writable(path.parent)
    with contextlib.closing(_computed(todo, compute, share, together, say, took)) as computed:
        for point, seconds, value in computed:
            recorded[point] = done[point] = {
                "parameters": points[point],
                "cache_key": keys[point],
                "seconds": round(seconds, 2),
                **value,
            }
            write_json(
                path,
                {
                    "manifest": manifest(
                        profile, seed, sources, sum(e["seconds"] for e in done.values())
                    ),
                    "points": recorded,
                },
            )
            if ledger:
                here.append(f"{name}:{point}:{keys[point]}")
                write_json(ledger, sorted(here))
    progress(name, len(points), len(points))
    return load(name, profile) or record


def _computed(
    points: dict[str, dict],
    compute: Callable[..., Any],
    share: Callable[[dict], bool],
    together: tuple[str, ...],
    say: Callable[[int], None],
    took: dict[str, float],
) -> Generator[tuple[str, float, dict]]:
    """(point, seconds, value) of `points` as they end: here, those that one may not `share`, and then the others, by forked processes.

    There are as many as torch has threads, which they divide: small operations keep one core busy and a second one waiting. Raises
    what `compute` raises, and RuntimeError where a process died.
    """
    import torch

    groups: dict[str, list[str]] = {}
    for p in points:
        groups.setdefault(
            repr({k: v for k, v in points[p].items() if k not in together}) if together else p, []
        ).append(p)
    shared = sorted(
        (g for g in groups.values() if all(share(points[p]) for p in g)),
        key=lambda g: -sum(took[p] for p in g),
    )  # long first
    count = min(PROCESSES, torch.get_num_threads(), len(shared)) if sys.platform == "linux" else 1
    _job[:] = compute, points, together
    try:
        for group in (
            groups.values() if count < 2 else [g for g in groups.values() if g not in shared]
        ):
            say(1)
            yield from _timed(group)
        if count > 1:
            say(count)
            pool = ProcessPoolExecutor(
                count,
                multiprocessing.get_context("fork"),
                _begin,
                (torch.get_num_threads() // count,),
            )
            try:
                for future in as_completed([pool.submit(_timed, group) for group in shared]):
                    yield from future.result()
                    say(count)
            except BrokenExecutor as e:
                raise RuntimeError(
                    "a process that computed a point died; most often memory ran out: set OMP_NUM_THREADS=1"
                ) from e
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        clear_context()


def _begin(threads: int) -> None:
    """A process of `_computed` begins: it works with some `threads`, leaves the bar to its parent, and ends with it."""
    import torch

    torch.set_num_threads(threads)
    silence()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _timed(group: list[str]) -> list[tuple[str, float, dict]]:
    (compute, points, together), begun = _job, time.time()
    parameters = {k: v for k, v in points[group[0]].items() if k not in together}
    cases = [{k: v for k, v in points[p].items() if k in together} for p in group]
    values = compute(**parameters, cases=cases) if together else [compute(**parameters)]
    return [
        (p, (time.time() - begun) / len(group), value)
        for p, value in zip(group, values, strict=True)
    ]


_job: list[
    Any
] = []  # compute, points and together of the sweep under way; forked processes find them
