"""Recorded results: one JSON file per experiment, one entry per point, resumable and never half written; and progress."""
from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__

ROOT = Path(__file__).resolve().parents[1]


def results_dir(profile: str) -> Path:
    """Where `profile`'s results lie: below $LESS_RESULTS, or the repository's results/."""
    return Path(os.environ.get("LESS_RESULTS") or ROOT / "results") / profile


# ---------------------------------------------------------------- files: written whole or not at all
def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file by atomic rename. Raises OSError naming the path and what to do when the disk refuses."""
    path = Path(path)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as e:
        fix = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "make that folder writable"
        raise OSError(e.errno, f"cannot write {path} ({e.strerror}): {fix}, or set LESS_RESULTS to another folder") from e


def check_writable(folder: Path) -> None:
    """Raises the OSError of `write_bytes`, before anything is computed, when `folder` cannot be written."""
    write_bytes(folder / ".writable", b"?")
    (folder / ".writable").unlink()


def write_json(path: str | os.PathLike, obj: object) -> None:
    """Write JSON by atomic rename. Raises ValueError for NaN and infinity, OSError as `write_bytes` does."""
    try:
        text = json.dumps(obj, indent=1, sort_keys=True, allow_nan=False)
    except ValueError as e:
        raise ValueError(f"{path} is left as it was: a new value is NaN or infinite ({e}); mend what computed it") from e
    write_bytes(path, (text + "\n").encode())


def write_torch(path: str | os.PathLike, obj: object) -> None:
    import torch

    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError that names no path
    torch.save(obj, buffer)
    write_bytes(path, buffer.getvalue())


def load(name: str, profile: str) -> dict | None:
    """The recorded file of experiment `name`, {"manifest": ..., "points": {key: entry}}, or None where there is none."""
    path = results_dir(profile) / f"{name}.json"
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or not isinstance(record.get("points"), dict):
            raise ValueError("no points in it")
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}): restore it with git checkout, or delete it to compute it again") from e


# ---------------------------------------------------------------- where a result comes from
def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()


def _commit() -> str:
    """HEAD, with -dirty when lesslib or the environment differ from it."""
    try:
        return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain", "--", "lesslib", "environment.yml") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def manifest(profile: str, seed: int, data: list[dict], seconds: float) -> dict:
    """What a reader needs to judge or repeat a result: code, versions, hardware, seed, data and time."""
    import torch

    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "profile": profile, "seed": seed, "data": data, "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "lesslib": __version__, **versions},
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory_gib": round(memory), "gpu": gpu},
    }  # fmt: skip


# ---------------------------------------------------------------- a sweep: points that are computed once
def cache_key(parameters: dict, seed: int, data: list[dict], version: int) -> str:
    """What decides a point's value: its parameters, the seed, the data's sha256 and the experiment's version; not the source text."""
    identity = [parameters, seed, sorted(d["sha256"] for d in data), version]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def sweep(
    name: str, profile: str, seed: int, points: dict[str, dict], compute: Callable[..., dict],
    data: Callable[[], list[dict]], version: int = 1,
) -> dict:  # fmt: skip
    """Compute the points of experiment `name` that are not recorded yet, one `compute(**parameters)` each; returns the whole file.

    `points` maps a point's name to its parameters (JSON values). Every finished point is on disk before the next begins, so an
    interrupted sweep resumes. `data()` gives corpus records (see `Corpus.record`) and others with a sha256. Recorded points count as
    done; when $LESS_LEDGER names a file (as `python -m lesslib.run` does), only those do that this machine computed and noted there.
    With $LESS_FROM_RESULTS set nothing is computed or loaded, and a point that is not recorded raises FileNotFoundError.
    """
    path, record = results_dir(profile) / f"{name}.json", load(name, profile) or {"points": {}}
    if os.environ.get("LESS_FROM_RESULTS"):
        if missing := [p for p in points if record["points"].get(p, {}).get("parameters") != points[p]]:
            raise FileNotFoundError(f"{path} does not hold {', '.join(missing)}: run once without --from-results")
        return record
    data_records = data()
    ledger = Path(os.environ["LESS_LEDGER"]) if "LESS_LEDGER" in os.environ else None
    here = set(json.loads(ledger.read_text())) if ledger and ledger.is_file() else set()
    keys = {point: cache_key(parameters, seed, data_records, version) for point, parameters in points.items()}
    recorded = {p: record["points"][p] for p in points if record["points"].get(p, {}).get("cache_key") == keys[p]}
    done = {p: entry for p, entry in recorded.items() if ledger is None or f"{name}:{p}:{keys[p]}" in here}
    if len(done) < len(points):
        check_writable(path.parent)
    times = {p: record["points"].get(p, {}).get("seconds") for p in points}
    for point in [p for p in points if p not in done]:
        left = [times[p] for p in points if p not in done]
        known = [t for t in left if t is not None] or [t for p, t in times.items() if p in done and t is not None]
        seconds_left = sum(known) / len(known) * len(left) if known else None
        begun = time.time()
        with _point({"name": name, "done": len(done), "total": len(points), "point": point, "seconds_left": seconds_left}):
            value = compute(**points[point])
        times[point] = round(time.time() - begun, 2)
        done[point] = {"parameters": points[point], "cache_key": keys[point], "seconds": times[point], **value}
        stamp = manifest(profile, seed, data_records, sum(e["seconds"] for e in done.values()))
        write_json(path, {"manifest": stamp, "points": {p: done.get(p) or recorded[p] for p in points if p in done or p in recorded}})
        if ledger is not None:
            here.add(f"{name}:{point}:{keys[point]}")
            write_json(ledger, sorted(here))
    _show({"name": name, "done": len(points), "total": len(points)})
    return load(name, profile) or record


# ---------------------------------------------------------------- progress: a file for the runner, a bar for a person
_sweep: dict[str, Any] | None = None  # the point under way, which the loops inside it belong to
_bars: dict[str, Any] = {}


@contextlib.contextmanager
def _point(state: dict[str, Any]) -> Iterator[None]:
    global _sweep
    _sweep = state
    _show(state)
    try:
        yield
    finally:
        _sweep = None


def progress(label: str, done: int, total: int) -> None:
    """Say that a loop has done `done` of `total` steps: to the runner through the file $LESS_PROGRESS, else as a bar."""
    _show({"name": label, "done": done, "total": total} if _sweep is None else {**_sweep, "inside": label, "inside_points": [done, total]})


def _show(state: dict[str, Any]) -> None:
    if file := os.environ.get("LESS_PROGRESS"):
        return write_json(file, state)
    if "PYTEST_VERSION" in os.environ or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return None
    from tqdm import tqdm

    name = state.get("inside", state["name"])
    done, total = state.get("inside_points", (state["done"], state["total"]))
    if name not in _bars:
        _bars[name] = tqdm(total=total, desc=name, leave=False)
    _bars[name].n = done
    _bars[name].refresh()
    if done >= total:
        _bars.pop(name).close()
    return None
