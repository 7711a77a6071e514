"""What a claim of the paper is, and the verdict that recorded results give on it.

A claim stands as a decorator above the function that decides it, in the file of its experiment:

    @claim("Table 2", "LESS < Baseline+ < Baseline", paper="...", needs=("language_modeling",))
    def order_of_methods(record: dict) -> Iterator[Verdict]: ...

The scoreboard shows the claims of all experiments in the paper's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lesslib.reporting.paper import PAPER

WORDS = {True: "holds", False: "FAILS", None: "undecided"}


@dataclass(frozen=True)
class Verdict:
    """A claim, whether the recorded numbers bear it out, and those numbers.

    `holds` is None where the numbers are noise, or where the full cache itself fails at the task.
    """

    claim: str
    holds: bool | None
    numbers: str

    @property
    def word(self) -> str:
        return WORDS[self.holds]

    def __str__(self) -> str:
        return f"{self.word}: {self.claim}"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: where it stands, in which words, and what decides it here.

    `paper`: its numbers there. `needs`: names of the records that `decide` takes, in order.
    """

    where: str
    text: str
    paper: str
    needs: tuple[str, ...]
    decide: Callable[..., Iterable[Verdict]]


# By the module that makes them, in the order in which they stand there.
CLAIMS: dict[str, list[Claim]] = {}

Decide = Callable[..., Iterable[Verdict]]


def claim(where: str, text: str, paper: str, needs: tuple[str, ...]) -> Callable[[Decide], Decide]:
    """Decorator of a function from records to verdicts: registers the claim that it decides.

    `paper` may name cells of assets/paper.json: "{table2[WikiText][Full][0]}".
    """

    def register(decide: Decide) -> Decide:
        made = Claim(where, text, paper.format(**PAPER), needs, decide)
        CLAIMS.setdefault(decide.__module__, []).append(made)
        return decide

    return register


def claims_of(module: str) -> list[Claim]:
    """The claims that stand in the file of an experiment, by its name: "language_modeling"."""
    return CLAIMS[f"{__package__}.{module}"]
