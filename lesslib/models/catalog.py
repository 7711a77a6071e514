"""Which models there are on this machine, where they lie, and which weights they hold."""

import hashlib
import os
from pathlib import Path

from lesslib.util.paths import ASSETS

# Bytes read at either end of a weight file to tell its revision.
END_BYTES = 1 << 20


def carried_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(config.parent.name for config in ASSETS.glob("*/config.json"))


def folder_of(name: str) -> Path | None:
    """Where a model lies on this machine, None for one that only the hub has.

    It is carried, lies below $LESS_MODELS by its hub name, or `name` is the folder itself.
    """
    for place in (ASSETS, Path(os.environ.get("LESS_MODELS", "")), Path()):
        folder = place / name
        if (folder / "config.json").is_file():
            return folder
    return None


def revision_of(folder: Path) -> str:
    """12 hex digits over the size and the ends of every weight file in `folder`.

    Enough to tell two trainings apart, and quick at any size.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(END_BYTES))
            file.seek(max(0, size - END_BYTES))
            digest.update(file.read(END_BYTES))
    return digest.hexdigest()[:12]
