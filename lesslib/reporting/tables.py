"""Tables for notebooks, and which points of a record are their rows.

Tables are Markdown rather than pandas' HTML: long claims wrap instead of being cut off, there is no
column of row numbers, and the same rows give the same bytes in a committed notebook.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from IPython.display import Markdown


class Verdict(Protocol):
    """What a table shows of a claim's verdict."""

    claim: str
    numbers: str

    @property
    def word(self) -> str: ...


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Markdown:
    """A Markdown table for a notebook: floats with three decimals, None as a dash."""
    from IPython.display import Markdown

    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append([cell(value) for value in row])
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def cell(value: Any) -> str:
    """A value as a cell of a table shows it."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


def verdict_table(verdicts: Iterable[Verdict]) -> Markdown:
    """Each claim, whether it holds, and by which numbers."""
    rows = [[verdict.claim, verdict.word, verdict.numbers] for verdict in verdicts]
    return table(["claim", "holds here", "numbers"], rows)
