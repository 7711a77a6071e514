"""Say how far a long loop is: to the runner by a file, else as a bar."""

import os
import sys
import time

from lesslib.util.files import write_json

_sweep: dict[
    str, str
] = {}  # what a loop inside a point says of the sweep under way: the points "done", and the time "left"
_began: dict[str, float] = {}  # when each loop was first heard of


def progress(label: str, done: int, total: int, left: str = "") -> None:
    """Say that a loop has done `done` of `total` steps: to the runner by the file $LESS_PROGRESS, else as a bar; rank 0 alone does."""
    if "silent" in _sweep or os.environ.get("RANK", "") not in ("", "0"):
        return
    if file := os.environ.get("LESS_PROGRESS"):
        write_json(
            file,
            [
                *filter(
                    None,
                    [_sweep.get("done"), f"{label} {done}/{total}", left or _sweep.get("left")],
                )
            ],
        )
    elif "PYTEST_VERSION" not in os.environ and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        from tqdm import tqdm

        prefix, begun = (
            " · ".join(filter(None, [_sweep.get("done"), label])),
            _began.setdefault(label, time.time()),
        )
        bar = (
            tqdm.format_meter(done, total, time.time() - begun, ncols=79, prefix=prefix)
            if done < total
            else ""
        )
        print(f"\r{bar:<79}", end="\r", file=sys.stderr, flush=True)
        if done >= total:
            _began.pop(label)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
