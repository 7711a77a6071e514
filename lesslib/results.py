"""Recorded results: one JSON file per experiment, one entry per point, resumable and never half written; and progress."""
import contextlib
import ctypes
import errno
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
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


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def manifest(profile: str, seed: int, data: list[dict], seconds: float) -> dict:
    """What a reader needs to judge or repeat a result: code, versions, hardware, seed, data and time."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "profile": profile, "seed": seed, "data": data, "seconds": round(seconds, 1),
        "commit": _commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "lesslib": __version__, **versions},
        "hardware": {"cpu": cpu[1] if cpu else platform.machine(), "gpu": gpu, "memory_gib": round(physical_memory() / 2**30),
                     "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }  # fmt: skip


def cache_key(parameters: dict, seed: int, data: list[dict], version: int) -> str:
    """What decides a point's value: its parameters, the seed, the data's sha256 and the experiment's version; not the source text."""
    identity = [parameters, seed, sorted(d["sha256"] for d in data), version]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


PROCESSES = 4  # that share points, at the most: each holds a model and a batch of its own


def sweep(
    name: str, profile: str, seed: int, points: dict[str, dict], compute: Callable[..., Any], data: Callable[[], list[dict]],
    version: int = 1, share: Callable[[dict], bool] = lambda parameters: False, together: tuple[str, ...] = (),
) -> dict:  # fmt: skip
    """Compute the `points` (name: parameters) of an experiment that are not recorded yet, by `compute(**parameters)`; the whole file.

    Points that differ only in parameters named in `together` are computed at once: `compute` gets a list of those as `cases`, and returns
    one of values. Each is on disk as soon as it ends; those that processes may `share` come last. `data()`: records as `Corpus.record`'s.
    With $LESS_LEDGER only points noted there count; with $LESS_FROM_RESULTS none is computed, and FileNotFoundError names those missing.
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

    def say(at_once: int) -> None:
        seconds = [e["seconds"] for e in recorded.values()]
        left = f"about {minutes(sum(seconds) / len(seconds) * (len(points) - len(done)) / at_once)} left" if seconds else ""
        _sweep.clear()
        progress(name, len(done), len(points), left)
        _sweep.update(done=f"{name} {len(done)}/{len(points)}", left=left)

    took = {p: record["points"].get(p, {}).get("seconds", 0.0) for p in points}
    if todo := {p: points[p] for p in points if p not in done}:
        check_writable(path.parent)
    with contextlib.closing(_computed(todo, compute, share, together, say, took)) as computed:
        for point, seconds, value in computed:
            recorded[point] = done[point] = {"parameters": points[point], "cache_key": keys[point], "seconds": round(seconds, 2), **value}
            write_json(path, {"manifest": manifest(profile, seed, sources, sum(e["seconds"] for e in done.values())), "points": recorded})
            if ledger:
                here.append(f"{name}:{point}:{keys[point]}")
                write_json(ledger, sorted(here))
    progress(name, len(points), len(points))
    return load(name, profile) or record


def _computed(
    points: dict[str, dict], compute: Callable[..., Any], share: Callable[[dict], bool], together: tuple[str, ...],
    say: Callable[[int], None], took: dict[str, float],
) -> Generator[tuple[str, float, dict]]:  # fmt: skip
    """(point, seconds, value) of `points` as they end: here, those that one may not `share`, and then the others, by forked processes.

    There are as many as torch has threads, which they divide: small operations keep one core busy and a second one waiting. Raises
    what `compute` raises, and RuntimeError where a process died.
    """
    import torch

    groups: dict[str, list[str]] = {}
    for p in points:
        groups.setdefault(repr({k: v for k, v in points[p].items() if k not in together}) if together else p, []).append(p)
    shared = sorted((g for g in groups.values() if all(share(points[p]) for p in g)), key=lambda g: -sum(took[p] for p in g))  # long first
    count = min(PROCESSES, torch.get_num_threads(), len(shared)) if sys.platform == "linux" else 1
    _job[:] = compute, points, together
    try:
        for group in groups.values() if count < 2 else [g for g in groups.values() if g not in shared]:
            say(1)
            yield from _timed(group)
        if count > 1:
            say(count)
            pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _begin, (torch.get_num_threads() // count,))
            try:
                for future in as_completed([pool.submit(_timed, group) for group in shared]):
                    yield from future.result()
                    say(count)
            except BrokenExecutor as e:
                raise RuntimeError("a process that computed a point died; most often memory ran out: set OMP_NUM_THREADS=1") from e
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        _sweep.clear()


def _begin(threads: int) -> None:
    """A process of `_computed` begins: it works with some `threads`, leaves the bar to its parent, and ends with it."""
    import torch

    torch.set_num_threads(threads)
    _sweep["silent"] = os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _timed(group: list[str]) -> list[tuple[str, float, dict]]:
    (compute, points, together), begun = _job, time.time()
    parameters = {k: v for k, v in points[group[0]].items() if k not in together}
    cases = [{k: v for k, v in points[p].items() if k in together} for p in group]
    values = compute(**parameters, cases=cases) if together else [compute(**parameters)]
    return [(p, (time.time() - begun) / len(group), value) for p, value in zip(group, values, strict=True)]


_job: list[Any] = []  # compute, points and together of the sweep under way; forked processes find them
_sweep: dict[str, str] = {}  # what a loop inside a point says of the sweep under way: the points "done", and the time "left"
_began: dict[str, float] = {}  # when each loop was first heard of


def progress(label: str, done: int, total: int, left: str = "") -> None:
    """Say that a loop has done `done` of `total` steps: to the runner by the file $LESS_PROGRESS, else as a bar; rank 0 alone does."""
    if "silent" in _sweep or os.environ.get("RANK", "") not in ("", "0"):
        return
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
