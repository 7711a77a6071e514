"""Recorded results: one JSON file per experiment with a manifest, one entry per point."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lesslib import __version__
from lesslib.profiles import results_dir
from lesslib.util.files import read_json
from lesslib.util.paths import ROOT


def read_ledger(path: Path) -> list[str]:
    """The points that this machine computed, [] where there is no file.

    Raises ValueError for a damaged file.
    """
    fix = "delete it to compute every point again"
    return read_json(path, lambda x: isinstance(x, list), fix) or []


def load(name: str, profile: str) -> dict | None:
    """The record of experiment `name`, {"manifest": ..., "points": {key: entry}}.

    None where there is no file. Raises ValueError for a damaged one.
    """
    fix = "restore it with git checkout, or delete it to compute it again"
    return read_json(results_dir(profile) / f"{name}.json", _is_record, fix)


def _is_record(obj: object) -> bool:
    return isinstance(obj, dict) and isinstance(obj.get("points"), dict)


def _commit() -> str:
    """HEAD, with -dirty when lesslib or the environment differ from it."""
    status = ["git", "-C", str(ROOT), "status", "--porcelain=2", "--branch"]
    command = [*status, "--", "lesslib", "environment.yml"]
    try:
        lines = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    commit = lines[0].removeprefix("# branch.oid ")
    # Headers begin with #; a line after them is a file that differs.
    is_clean = lines[-1].startswith("#")
    return commit if is_clean else f"{commit}-dirty"


def manifest(profile: str, seed: int, data: list[dict], seconds: float) -> dict:
    """What a reader needs to judge or repeat a result.

    Code, versions, hardware, seed, data and time.
    """
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "profile": profile,
        "seed": seed,
        "data": data,
        "seconds": round(seconds, 1),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "lesslib": __version__, **versions},
        "hardware": {
            "cpu": cpu[1] if cpu else platform.machine(),
            "gpu": gpu,
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def cache_key(parameters: dict, seed: int, data: list[dict], version: int) -> str:
    """What decides a point's value, as 16 hex digits.

    Its parameters, the seed, the data's sha256 and the experiment's version; not the source text.
    """
    identity = [parameters, seed, sorted(d["sha256"] for d in data), version]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
