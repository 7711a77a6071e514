"""Text from outside the package: a file of the folder $LESS_DATA, else the Hugging Face hub.

Everything that can go wrong there is said in one sentence with its fix.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset of the hub."""

    repo: str
    subset: str | None
    split: str

    def all_rows(self) -> Iterable[dict[str, Any]]:
        """Every row, downloaded whole and kept in the hub's cache."""
        from datasets import load_dataset

        return load_dataset(self.repo, self.subset, split=self.split)

    def first_rows(self, count: int) -> Iterable[dict[str, Any]]:
        """At most `count` rows, without a download of the others."""
        from datasets import load_dataset

        rows = load_dataset(self.repo, self.subset, split=self.split, streaming=True)
        return islice(rows, count)


def hub_reachable() -> bool:
    """Whether the hub answers within five seconds; False with HF_HUB_OFFLINE.

    The hub's own client would retry for most of a minute.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of httpx, or of the hub's client when it is told to stay offline
        return False
    return True


def file_missing(label: str, file: str) -> str | None:
    """Why `file` cannot be read from $LESS_DATA and the hub cannot stand in, with the fix.

    `label` says what the file holds. None when it can be read (or the hub may be asked).
    """
    folder = os.environ.get("LESS_DATA")
    if not folder:
        if hub_reachable():
            return None
        fix = f"set LESS_DATA to a folder with {file}, or connect"
        return f"{label}: the hub cannot be reached; {fix}"
    if (Path(folder) / file).is_file():
        return None
    fix = "put it there, or unset LESS_DATA to use the hub"
    return f"{label}: {file} is not in $LESS_DATA={folder}; {fix}"


def read(
    label: str,
    file: str,
    from_file: Callable[[Path], Iterable[Any]],
    from_hub: Callable[[], Iterable[Any]],
) -> list[Any]:
    """What `from_file` reads in `file` of $LESS_DATA, else, without that folder, `from_hub`.

    Raises ValueError for a damaged file, FileNotFoundError where the hub fails.
    """
    folder = os.environ.get("LESS_DATA")
    if folder:
        path = Path(folder) / file
        try:
            return list(from_file(path))
        except Exception as e:  # of gzip, zlib, UTF-8, JSON or a row that lacks a field
            fix = "copy it again, or unset LESS_DATA to use the hub"
            raise ValueError(f"{label}: {path} is damaged ({e!r}); {fix}") from e
    try:
        return list(from_hub())
    except Exception as e:  # of the hub's clients
        fix = f"set LESS_DATA to a folder with {file}"
        raise FileNotFoundError(f"{label}: the hub failed ({e!r}); {fix}") from e
