"""Say how far a long loop is: to the runner by a file, else as a bar.

A loop calls `progress`. A sweep over points sets the context that loops inside a point say beside
their own steps; its worker processes are silenced, for their parent speaks.
"""

import os
import sys
import time
from dataclasses import dataclass

from lesslib.util.files import write_json


@dataclass
class Context:
    """The sweep around a loop, in words: how much of it is done and what time remains."""

    done: str = ""
    remaining: str = ""
    is_silent: bool = False


_context = Context()

# When each loop was first heard of, by its label.
_start_times: dict[str, float] = {}


def set_context(done: str, remaining: str) -> None:
    """From now on loops say `done` before their own steps, and `remaining` where they know none."""
    _context.done = done
    _context.remaining = remaining


def clear_context() -> None:
    """From now on loops speak of themselves alone."""
    set_context("", "")


def silence() -> None:
    """From now on nothing in this process speaks of progress; its parent does."""
    _context.is_silent = True


def progress(label: str, done: int, total: int, remaining: str = "") -> None:
    """Say that a loop has done `done` of `total` steps, and how long it still takes, if known.

    To the runner by the file $LESS_PROGRESS, else as a bar in a terminal or notebook. Under
    torchrun only rank 0 speaks.
    """
    if _context.is_silent or os.environ.get("RANK", "") not in ("", "0"):
        return
    file = os.environ.get("LESS_PROGRESS")
    if file:
        words = [_context.done, f"{label} {done}/{total}", remaining or _context.remaining]
        write_json(file, [word for word in words if word])
    elif _can_draw():
        _draw_bar(label, done, total)


def minutes(seconds: float) -> str:
    """`seconds` in words: "42 s" below a minute, then "1.5 min"."""
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _can_draw() -> bool:
    """Whether someone watches: a terminal or a notebook, outside of tests."""
    if "PYTEST_VERSION" in os.environ:
        return False
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _draw_bar(label: str, done: int, total: int) -> None:
    """Redraw the bar of a loop in its line; a loop that is done clears the line."""
    from tqdm import tqdm

    start_time = _start_times.setdefault(label, time.time())
    bar = ""
    if done < total:
        prefix = f"{_context.done} · {label}" if _context.done else label
        seconds = time.time() - start_time
        bar = tqdm.format_meter(done, total, seconds, ncols=79, prefix=prefix)
    print(f"\r{bar:<79}", end="\r", file=sys.stderr, flush=True)
    if done >= total:
        _start_times.pop(label)
