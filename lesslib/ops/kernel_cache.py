"""Where compiled CPU kernels are kept, and whether all that models use are there.

Knows neither torch nor Numba, so that whoever starts processes may ask before they do. Numba's own
check of what it keeps sees only the file of a kernel, not those of what it calls; so a folder is
named after all sources of ops/cpu. Beside the code lies a marker for each dtype that was compiled
whole, named after all else that the code depends on: Numba and the processor.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
# of /proc/cpuinfo
PROCESSOR_FIELDS = ("model name", "flags", "CPU part", "Features")
# variables that choose the processor to compile for
NUMBA_VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: below the user's cache folder, else a temporary folder."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.glob("*.py")):
        digest.update(file.read_bytes())
    name = f"cpu-kernels-{digest.hexdigest()[:12]}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lesslib"
    if _is_writable(home / name):
        return home / name
    # Of this user alone: what lies there is run.
    shared = Path(tempfile.gettempdir()) / f"lesslib-{_user()}"
    if _is_private(shared) and _is_writable(shared / name):
        return shared / name
    return Path(tempfile.mkdtemp(prefix="lesslib-"))


def _is_writable(folder: Path) -> bool:
    """Whether files may be put into the folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _is_private(folder: Path) -> bool:
    """Whether the folder, made if need be, is this user's and nobody else may write to it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    is_open_to_others = bool(status.st_mode & 0o022)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == _user() and not is_open_to_others


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


# ---------------------------------------------------------------- what has been compiled
def is_complete(dtypes: tuple[str, ...]) -> bool:
    """Whether the kernels for models in these dtypes are compiled, for this Numba and processor."""
    return all(marker(dtype).is_file() for dtype in dtypes)


def marker(dtype: str) -> Path:
    """The empty file that says so of one dtype."""
    return cache_folder() / f"complete-{dtype}-{_target()}"


@functools.cache
def _target() -> str:
    """Digest of what the code depends on beside its sources."""
    version = importlib.metadata.version("numba") if has_numba() else None
    python = (sys.implementation.cache_tag, platform.system(), platform.machine())
    chosen = [os.environ.get(name) for name in NUMBA_VARIABLES]
    described = repr((version, python, chosen, _processor()))
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def has_numba() -> bool:
    """Whether Numba is installed; does not import it."""
    return importlib.util.find_spec("numba") is not None


def _processor() -> list[str]:
    """The lines of the system that tell one kind of processor from another."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return [platform.processor()]
    lines = {line for line in text.splitlines() if line.startswith(PROCESSOR_FIELDS)}
    return sorted(lines)


# ---------------------------------------------------------------- one process at a time
@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process is in this context on this machine."""
    if sys.platform == "win32":
        # Two processes may compile the same there, to no harm.
        yield
        return
    import fcntl

    with (cache_folder() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Not left to closing: a process that was forked meanwhile has the file open, too.
            fcntl.flock(file, fcntl.LOCK_UN)
