"""The forms of picture that several experiments draw: bars, stacked bars and curves.

Each takes plain values by group and method, in the order in which they are drawn. None of them
knows an experiment; those that do lie in the experiment's file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lesslib.evaluation import gap_closed
from lesslib.evaluation.perplexity import POSITION_BIN
from lesslib.reporting.style import axes, colour, marker

# A value, and the two ends of its whisker.
Interval = Sequence[float] | np.ndarray
# Share of a group's place on the axis that its bars fill, and of a bar's place that the bar fills.
GROUP_WIDTH = 0.8
BAR_WIDTH = 0.875
# Marks on a curve, at the most about so many.
MARKS_ON_A_CURVE = 8


def bars(
    groups: Mapping[str, Mapping[str, Interval]],
    ylabel: str,
    title: str,
    lines: Mapping[str, float],
) -> Figure:
    """By group and method, a bar of (value, low, high); and each group's dotted line.

    All groups have the methods of the first, or some of them.
    """
    figure, (panel,) = axes(1, width=3.6 + 1.2 * len(groups))
    methods = list(next(iter(groups.values())))
    width = GROUP_WIDTH / len(methods)
    for i, rows in enumerate(groups.values()):
        for method, (value, low, high) in rows.items():
            x = i + width * (methods.index(method) + 0.5) - GROUP_WIDTH / 2
            # The legend has one entry a method: the first group's.
            label = method if i == 0 else None
            tint = colour(method, methods)
            panel.bar(x, value, BAR_WIDTH * width, color=tint, label=label)
            whisker = [[value - low], [high - value]]
            panel.errorbar(x, value, whisker, color="black", lw=0.8, capsize=2)
    for i, group in enumerate(groups):
        panel.hlines(lines[group], i - 0.45, i + 0.45, color="black", lw=0.8, ls=":")
    panel.set(xticks=range(len(groups)), xticklabels=list(groups), ylabel=ylabel, title=title)
    figure.legend(fontsize=8, loc="outside right center")
    return figure


def mean_bars(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    ylabel: str,
    title: str,
    chance: Mapping[str, float],
) -> Figure:
    """By group and method, the mean of scores by example, two standard errors either way.

    `chance` is each group's dotted line.
    """
    means: dict[str, dict[str, Interval]] = {}
    for group, rows in groups.items():
        means[group] = {method: mean_and_ends(scores) for method, scores in rows.items()}
    return bars(means, ylabel, title, chance)


def mean_and_ends(scores: Sequence[float]) -> np.ndarray:
    """(mean, two standard errors below it, two above it)."""
    two_errors = 2 * np.std(scores) / len(scores) ** 0.5
    return np.mean(scores) + two_errors * np.array([0.0, -1.0, 1.0])


def gaps(groups: Mapping[str, tuple[dict, Mapping[str, dict]]], title: str) -> Figure:
    """The share of the gap between Baseline and Full that each other method closes.

    `groups`: label -> (the point of Full, points by method with Baseline among them).
    """
    shares: dict[str, dict[str, Interval]] = {}
    for label, (full, rows) in groups.items():
        baseline = rows["Baseline"]
        others = {method: row for method, row in rows.items() if method != "Baseline"}
        shares[label] = {m: gap_closed(full, baseline, row) for m, row in others.items()}
    figure = bars(shares, "share of the gap closed", title, dict.fromkeys(groups, 0.5))
    # What closes far less than nothing is cut off below, so that the others can be told apart.
    panel = figure.axes[0]
    lowest = panel.get_ylim()[0]
    panel.set_ylim(bottom=min(-0.1, max(-0.5, lowest)))
    return figure


def stacked(rows: Mapping[str, Mapping[str, float]], xlabel: str, title: str) -> Figure:
    """By method, a horizontal bar of parts in their order, with their sum at its end."""
    figure, (panel,) = axes(1, width=7, height=0.6 * len(rows) + 1.2)
    # Part -> its colour, in the order in which the parts are met.
    tints: dict[str, str] = {}
    for i, row in enumerate(rows.values()):
        total = 0.0
        for part, value in row.items():
            # The legend has one entry a part: the first bar's.
            label = None if part in tints else part
            tint = tints.setdefault(part, f"C{len(tints)}")
            panel.barh(i, value, left=total, color=tint, label=label)
            total += value
        panel.text(total, i, f" {total:.2f}", va="center")
    panel.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=xlabel, title=title)
    panel.invert_yaxis()
    figure.legend(fontsize=8, loc="outside right center")
    return figure


def curves(
    panels: Mapping[str, Mapping[str, tuple[Any, Any]]],
    xlabel: str,
    ylabel: str,
    log2: bool = False,
    width: float = 4.2,
) -> Figure:
    """By panel and method, a line through (x, y); `log2`: of x."""
    figure, drawn = axes(len(panels), width)
    for panel, (title, rows) in zip(drawn, panels.items(), strict=True):
        for method, (x, y) in rows.items():
            panel.plot(
                x,
                y,
                color=colour(method, rows),
                ls="--" if method == "Full" else "-",
                label=method,
                marker=marker(method),
                markevery=max(1, len(x) // MARKS_ON_A_CURVE),
                ms=4,
            )
        panel.set(xlabel=xlabel, title=title)
        if log2:
            panel.set_xscale("log", base=2)
        else:
            panel.xaxis.get_major_locator().set_params(integer=True)
    drawn[0].set_ylabel(ylabel)
    drawn[0].legend(fontsize=8)
    return figure


def by_position(full: dict, rows: Mapping[str, dict], title: str) -> Figure:
    """What each method loses against the full cache along the context.

    The one picture of the effect: `full` and the `rows` by method are points of perplexity.
    """
    losses = np.array(full["by_position"])
    centres = [POSITION_BIN * (i + 0.5) for i in range(len(losses))]
    panel = {}
    for method, row in ({"Full": full} | dict(rows)).items():
        panel[method] = (centres, np.subtract(row["by_position"], losses))
    ylabel = "nats a token above the full cache"
    return curves({title: panel}, "position in the context", ylabel, width=6)
