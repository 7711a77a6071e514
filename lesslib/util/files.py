"""Files that are whole or not there: written by atomic rename, checked when read.

An interrupted or full disk never leaves half a file under its final name, so whoever finds a file
may trust it. Readers return None where there is no file and name one that is damaged.
"""

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
    """Write a file by atomic rename.

    Raises OSError that names the path and what to do when the disk refuses.
    """
    path = Path(path)
    # A name for this process and thread alone: several may write the same file.
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as e:
        disk_is_full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space" if disk_is_full else "make that folder writable"
        message = (
            f"cannot write {path} ({e.strerror}): {fix}, or set LESS_RESULTS to another folder"
        )
        raise OSError(e.errno, message) from e
    finally:
        # Nothing is left of a write that failed or was interrupted.
        with contextlib.suppress(OSError):
            scratch.unlink()


def check_writable(folder: Path) -> None:
    """Try to write into `folder`, before anything is computed.

    Raises the OSError of `write_bytes` when it cannot be written.
    """
    write_bytes(folder / ".writable", b"?")
    (folder / ".writable").unlink()


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write JSON with sorted keys by atomic rename.

    Raises ValueError for NaN and infinity, OSError as `write_bytes` does.
    """
    try:
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    except ValueError as e:
        raise ValueError(
            f"{path} is left as it was: a new value is NaN or infinite ({e}); mend what computed it"
        ) from e
    write_bytes(path, f"{text}\n".encode())


def read_json(path: Path, is_whole: Callable[[Any], bool], fix: str) -> Any:
    """The content of a JSON file, None where there is none.

    Raises ValueError, with its `fix`, for a file that is damaged or whose content is not whole.
    """
    try:
        content = json.loads(path.read_text())
        if not is_whole(content):
            raise ValueError("not what belongs there")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}): {fix}") from e
    return content


def write_torch(path: str | os.PathLike, content: object) -> None:
    """Write what `torch.save` can, by atomic rename; raises OSError as `write_bytes` does."""
    import torch

    # By a buffer: torch.save reports a full disk as a RuntimeError that names no path.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def read_torch(path: Path, fix: str, device: Any = "cpu") -> Any:
    """What `write_torch` wrote, its tensors on `device`; None where there is no file.

    Raises ValueError, with its `fix`, for a damaged file.
    """
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True) if path.exists() else None
    # torch raises errors of many types, none of which names the file.
    except Exception as e:
        raise ValueError(f"{path} is damaged ({type(e).__name__}): {fix}") from e
