"""Recorded results: one JSON file per experiment, one entry per point, resumable and never half written; and progress."""
import contextlib
import errno
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__
from .profiles import get_limit

ROOT = Path(__file__).resolve().parents[1]


def results_dir(profile: str) -> Path:
    """Where `profile`'s results lie: below $LESS_RESULTS, or the repository's results/; apart from them where $LESS_LIMIT cuts it short."""
    limit = get_limit()
    return Path(os.environ.get("LESS_RESULTS") or ROOT / "results") / (f"{profile}-limit{limit}" if limit else profile)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file by atomic rename. Raises OSError naming the path and what to do when the disk refuses."""
    path = Path(path)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
    except OSError as e:
        fix = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "make that folder writable"
        raise OSError(e.errno, f"cannot write {path} ({e.strerror}): {fix}, or set LESS_RESULTS to another folder") from e
    finally:  # nothing is left of a write that failed or was interrupted
        with contextlib.suppress(OSError):
            scratch.unlink()


def check_writable(folder: Path) -> None:
    """Raises the OSError of `write_bytes`, before anything is computed, when `folder` cannot be written."""
    write_bytes(folder / ".writable", b"?")
    (folder / ".writable").unlink()


def write_json(path: str | os.PathLike, obj: object) -> None:
    """Write JSON by atomic rename. Raises ValueError for NaN and infinity, OSError as `write_bytes` does."""
    try:
        write_bytes(path, (json.dumps(obj, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    except ValueError as e:
        raise ValueError(f"{path} is left as it was: a new value is NaN or infinite ({e}); mend what computed it") from e


def write_torch(path: str | os.PathLike, obj: object) -> None:
    import torch

    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError that names no path
    torch.save(obj, buffer)
    write_bytes(path, buffer.getvalue())


def read_torch(path: Path, fix: str, device: Any = "cpu") -> Any:
    """What `write_torch` wrote, None where there is no file. Raises ValueError for a damaged one, with its `fix`."""
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True) if path.exists() else None
    except Exception as e:  # of many types, and torch names no file
        raise ValueError(f"{path} is damaged ({type(e).__name__}): {fix}") from e


def _read(path: Path, whole: Callable[[Any], bool], fix: str) -> Any:
    """The JSON of a file, None where there is none. Raises ValueError for one that is damaged or not `whole`."""
    try:
        if whole(found := json.loads(path.read_text())):
            return found
        raise ValueError("not what belongs there")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}): {fix}") from e


def read_ledger(path: Path) -> list[str]:
    """The points that this machine computed, [] where there is no file. Raises ValueError for a damaged one."""
    return _read(path, lambda x: isinstance(x, list), "delete it to compute every point again") or []


def load(name: str, profile: str) -> dict | None:
    """The recorded file of experiment `name`, {"manifest": ..., "points": {key: entry}}, or None where there is none."""
    fix = "restore it with git checkout, or delete it to compute it again"
    return _read(results_dir(profile) / f"{name}.json", lambda x: isinstance(x, dict) and isinstance(x.get("points"), dict), fix)


def _commit() -> str:
    """HEAD, with -dirty when lesslib or the environment differ from it."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain=2", "--branch", "--", "lesslib", "environment.yml"]
    try:
        lines = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return lines[0].removeprefix("# branch.oid ") + ("" if lines[-1].startswith("#") else "-dirty")


def manifest(profile: str, seed: int, data: list[dict], seconds: float) -> dict:
    """What a reader needs to judge or repeat a result: code, versions, hardware, seed, data and time."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "profile": profile, "seed": seed, "data": data, "seconds": round(seconds, 1),
        "commit": _commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "lesslib": __version__, **versions},
        "hardware": {"cpu": cpu[1] if cpu else platform.machine(), "gpu": gpu, "memory_gib": round(memory), "cores": os.cpu_count(),
                     "threads": torch.get_num_threads()},
    }  # fmt: skip


def cache_key(parameters: dict, seed: int, data: list[dict], version: int) -> str:
    """What decides a point's value: its parameters, the seed, the data's sha256 and the experiment's version; not the source text."""
    identity = [parameters, seed, sorted(d["sha256"] for d in data), version]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def sweep(
    name: str, profile: str, seed: int, points: dict[str, dict], compute: Callable[..., dict],
    data: Callable[[], list[dict]], version: int = 1,
) -> dict:  # fmt: skip
    """Compute the `points` (name: parameters) of an experiment that are not recorded yet, by `compute(**parameters)`; the whole file.

    Each is on disk before the next begins. `data()` gives records with a sha256 (see `Corpus.record`). With $LESS_LEDGER only points
    noted there count as recorded; with $LESS_FROM_RESULTS nothing is computed, and a missing point raises FileNotFoundError.
    """
    path, record = results_dir(profile) / f"{name}.json", load(name, profile) or {"points": {}}
    if os.environ.get("LESS_FROM_RESULTS"):
        if missing := [p for p in points if record["points"].get(p, {}).get("parameters") != points[p]]:
            raise FileNotFoundError(f"{path} does not hold {', '.join(missing)}: run once without --from-results")
        return record
    sources, ledger = data(), os.environ.get("LESS_LEDGER")
    here = read_ledger(Path(ledger)) if ledger else []
    keys = {p: cache_key(parameters, seed, sources, version) for p, parameters in points.items()}
    recorded = {p: record["points"][p] for p in points if record["points"].get(p, {}).get("cache_key") == keys[p]}
    done = {p: entry for p, entry in recorded.items() if not ledger or f"{name}:{p}:{keys[p]}" in here}
    if todo := [p for p in points if p not in done]:
        check_writable(path.parent)
    for point in todo:
        seconds = [e["seconds"] for e in recorded.values()]
        left = f"about {minutes(sum(seconds) / len(seconds) * (len(points) - len(done)))} left" if seconds else ""
        progress(name, len(done), len(points), left)
        begun = time.time()
        _sweep.update(done=f"{name} {len(done)}/{len(points)}", left=left)
        try:
            value = compute(**points[point])
        finally:
            _sweep.clear()
        entry = {"parameters": points[point], "cache_key": keys[point], "seconds": round(time.time() - begun, 2), **value}
        recorded[point] = done[point] = entry
        stamp = manifest(profile, seed, sources, sum(e["seconds"] for e in done.values()))
        write_json(path, {"manifest": stamp, "points": recorded})
        if ledger:
            here.append(f"{name}:{point}:{keys[point]}")
            write_json(ledger, sorted(here))
    progress(name, len(points), len(points))
    return load(name, profile) or record


_sweep: dict[str, str] = {}  # what a loop inside a point says of the sweep under way: the points "done", and the time "left"
_began: dict[str, float] = {}  # when each loop was first heard of


def progress(label: str, done: int, total: int, left: str = "") -> None:
    """Say that a loop has done `done` of `total` steps: to the runner through the file $LESS_PROGRESS, else as a bar."""
    if file := os.environ.get("LESS_PROGRESS"):
        write_json(file, [*filter(None, [_sweep.get("done"), f"{label} {done}/{total}", left or _sweep.get("left")])])
    elif "PYTEST_VERSION" not in os.environ and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        from tqdm import tqdm

        prefix, begun = " · ".join(filter(None, [_sweep.get("done"), label])), _began.setdefault(label, time.time())
        bar = tqdm.format_meter(done, total, time.time() - begun, ncols=79, prefix=prefix) if done < total else ""
        print(f"\r{bar:<79}", end="\r", file=sys.stderr, flush=True)
        if done >= total:
            _began.pop(label)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
