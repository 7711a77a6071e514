"""All claims of the paper, each with what the recorded results of every profile say to it.

A claim stands under `@claim` in the file of its experiment, above the function that decides it;
here they are put in the paper's order and decided. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lesslib.experiments.claims import WORDS, Claim, Verdict, claims_of
from lesslib.reporting import plots
from lesslib.reporting.results import load

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

# The files whose claims are shown, in the order of the paper's tables and figures.
EXPERIMENTS = (
    "low_rank_residuals",
    "language_modeling",
    "sparse_policies",
    "classification",
    "summarization",
    "attention_maps",
    "kernel_size",
    "prompt_length",
    "sizes",
    "latency",
    "breakdown",
)
NOT_MEASURED = "not measured"
# How a status counts verdicts of several kinds.
COUNTED = {WORDS[True]: "hold", WORDS[False]: "fail", WORDS[None]: "open"}
TINTS = {
    WORDS[True]: "#7fbf7b",
    WORDS[False]: "#d6604d",
    WORDS[None]: "#c9d7ea",
    NOT_MEASURED: "#dddddd",
}
TINT_OF_SEVERAL = "#f1d769"


# ---------------------------------------------------------------------- claims and verdicts
def claim_list() -> list[Claim]:
    """Every claim, in the order of the paper's tables and figures."""
    claims = []
    for name in EXPERIMENTS:
        claims += claims_of(name)
    return claims


def verdicts(claim: Claim, profile: str) -> list[Verdict]:
    """What the recorded results of `profile` say to a claim; nothing where a record is missing."""
    records = [load(name, profile) for name in claim.needs]
    if None in records:
        return []
    return list(claim.decide(*records))


def status(verdicts: Iterable[Verdict]) -> str:
    """The verdicts on one claim in a few words: "holds", or "1 hold, 1 fail"."""
    words = [verdict.word for verdict in verdicts]
    if not words:
        return NOT_MEASURED
    if len(set(words)) == 1:
        return words[0]
    counts = []
    for word, short in COUNTED.items():
        if word in words:
            counts.append(f"{words.count(word)} {short}")
    return ", ".join(counts)


@dataclass(frozen=True)
class Line:
    """A line of the scoreboard: a claim, and the verdicts on it by profile."""

    claim: Claim
    verdicts: dict[str, list[Verdict]]

    def statuses(self) -> list[str]:
        """By profile: the verdicts in a few words."""
        return [status(verdicts) for verdicts in self.verdicts.values()]


def read(profiles: Iterable[str]) -> list[Line]:
    """The scoreboard, from the recorded results of these profiles."""
    profiles = list(profiles)
    lines = []
    for claim in claim_list():
        lines.append(Line(claim, {profile: verdicts(claim, profile) for profile in profiles}))
    return lines


# ---------------------------------------------------------------------- tables and figures
def table(lines: list[Line]) -> Markdown:
    """Where each claim stands, its words, the paper's numbers, and its status by profile."""
    rows = []
    for line in lines:
        rows.append([line.claim.where, line.claim.text, line.claim.paper, *line.statuses()])
    return plots.table(["where", "claim", "paper", *lines[0].verdicts], rows)


def numbers_table(lines: list[Line], profile: str) -> Markdown:
    """Every verdict of one profile, with the numbers behind it."""
    rows = []
    for line in lines:
        for verdict in line.verdicts[profile]:
            rows.append([line.claim.where, str(verdict), verdict.numbers])
    return plots.table(["where", "verdict", "numbers"], rows)


def failing_table(lines: list[Line]) -> Markdown:
    """Every verdict that fails, by profile."""
    rows = []
    for profile in lines[0].verdicts:
        for line in lines:
            for verdict in line.verdicts[profile]:
                if verdict.holds is False:
                    rows.append([profile, line.claim.where, verdict.claim, verdict.numbers])
    return plots.table(["profile", "where", "fails", "numbers"], rows)


def figure(lines: list[Line]) -> Figure:
    """The scoreboard as a picture: a row a claim, a column a profile."""
    rows = [(f"{line.claim.where}: {line.claim.text}", line.statuses()) for line in lines]
    return board(rows, list(lines[0].verdicts))


def board(rows: list[tuple[str, list[str]]], columns: list[str]) -> Figure:
    """(claim, its status by column), coloured.

    Green holds, yellow in part, red fails, blue is undecided.
    """
    figure, (panel,) = plots.axes(1, width=10.5, height=0.26 * len(rows) + 0.5)
    texts = []
    tints = []
    for claim, statuses in rows:
        texts.append([claim, *statuses])
        tints.append(["w", *(TINTS.get(status, TINT_OF_SEVERAL) for status in statuses)])
    widths = [0.53, *[0.47 / len(columns)] * len(columns)]
    cells = panel.table(
        texts,
        cellColours=tints,
        cellLoc="left",
        colWidths=widths,
        colLabels=["claim", *columns],
        loc="center",
    )
    for cell in cells.get_celld().values():
        # The space before the text, as a share of the cell's width.
        cell.PAD = 0.02
    cells.auto_set_font_size(False)
    cells.scale(1, 1.25)
    panel.set_axis_off()
    return figure
