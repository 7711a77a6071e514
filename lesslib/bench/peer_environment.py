"""An environment of its own for a peer: what it needs in other versions than ours stays there.

It lies in the user's cache folder, is made once, and is made again after an interruption.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from lesslib.util.files import write_json

PEER = "kvpress"
VERSION = "0.5.5"
# What it imports, by name: it is installed without its requirements, which would bring another
# build of torch than the one that runs here. Transformers is the newest that it takes.
NEEDS = (
    "transformers==5.2.0",
    "safetensors==0.8.0",
    "numpy==2.4.6",
    "accelerate<2",
    "cachetools<6",
    "datasets",
    "fire<0.7",
    "requests",
)
# lines of pip's that are shown where it fails
LAST_LINES = 5


class PeerMissing(Exception):
    """The peer cannot be installed here, and why."""


def torch_version() -> str:
    """The version of torch here, without the name of its build."""
    return torch.__version__.split("+")[0]


def folder() -> Path:
    """Where the environment lies."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    name = f"{PEER}-{VERSION}-torch-{torch_version()}-{python}"
    return Path(home) / "lesslib" / "peers" / name


def python_of(environment: Path) -> Path:
    """The interpreter of an environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def peer_python() -> Path:
    """The interpreter of the peer's environment, which is made where it is missing.

    Raises PeerMissing where it cannot be.
    """
    environment = folder()
    python = python_of(environment)
    # written last
    mark = environment / "ready.json"
    if mark.is_file():
        return python
    print(f"installing {PEER} {VERSION} into {environment}", flush=True)
    shutil.rmtree(environment, ignore_errors=True)
    try:
        environment.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PeerMissing(f"cannot write {environment} ({error.strerror})") from error
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([sys.executable, "-m", "venv", str(environment)])
    run([*pip, f"torch=={torch_version()}", *NEEDS])
    run([*pip, "--no-deps", f"{PEER}=={VERSION}"])
    run([str(python), "-c", f"import {PEER}"])
    write_json(mark, {PEER: VERSION, "torch": torch_version(), "needs": list(NEEDS)})
    return python


def run(command: list[str]) -> None:
    """Run `command`. Raises PeerMissing with its last lines where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise PeerMissing(f"{' '.join(command)}: {error.strerror}") from error
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-LAST_LINES:]
        raise PeerMissing("\n".join([f"{' '.join(command)} failed:", *last]))
