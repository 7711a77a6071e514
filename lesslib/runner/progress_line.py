"""Show how far a running notebook is, in the words that `progress` leaves in a file."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lesslib.util.progress import minutes

# between two lines where there is no terminal
QUIET_SECONDS = 30.0
TERMINAL_SECONDS = 0.5
CLEAR_LINE = "\r\033[K"


@contextlib.contextmanager
def watching(head: str, file: Path) -> Iterator[None]:
    """Show `head` and the words in `file` for as long as the context lasts.

    On a terminal that is one line which renews itself, elsewhere a line now and then.
    """
    file.unlink(missing_ok=True)
    stop = threading.Event()
    thread = threading.Thread(target=show_until, args=(stop, head, file), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        print(CLEAR_LINE if sys.stdout.isatty() else "", end="", flush=True)


def show_until(stop: threading.Event, head: str, file: Path) -> None:
    """Print the line again and again until `stop` is set."""
    begun = time.time()
    on_terminal = sys.stdout.isatty()
    while not stop.is_set():
        words = [head, minutes(time.time() - begun)]
        # there may be no file yet
        with contextlib.suppress(OSError, ValueError):
            words += json.loads(file.read_text())
        line = " · ".join(words)
        if on_terminal:
            columns = shutil.get_terminal_size().columns
            print(f"{CLEAR_LINE}{line[: columns - 1]}", end="", flush=True)
        else:
            print(line, flush=True)
        stop.wait(TERMINAL_SECONDS if on_terminal else QUIET_SECONDS)
