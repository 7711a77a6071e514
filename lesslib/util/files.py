"""Files that are whole or not there: written by atomic rename, checked when read."""

import contextlib
import errno
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
        fix = (
            "free some space"
            if e.errno in (errno.ENOSPC, errno.EDQUOT)
            else "make that folder writable"
        )
        raise OSError(
            e.errno,
            f"cannot write {path} ({e.strerror}): {fix}, or set LESS_RESULTS to another folder",
        ) from e
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
        write_bytes(
            path, (json.dumps(obj, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
        )
    except ValueError as e:
        raise ValueError(
            f"{path} is left as it was: a new value is NaN or infinite ({e}); mend what computed it"
        ) from e


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
