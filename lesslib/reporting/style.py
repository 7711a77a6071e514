"""What all pictures share: colours and marks of methods, empty axes, how a figure is saved.

A method has one colour in every figure. Methods without one of their own are rows of LESS: they get
blues, the darker the later they come.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lesslib.profiles import results_dir
from lesslib.util.files import write_bytes

COLOURS = {
    "Full": "#222222",
    "Full, dynamic": "#222222",
    "Full, static": "#777777",
    "Baseline": "#c23b22",
    "Baseline+": "#e39a2d",
    "Performer": "#8c8c8c",
}
# Of LESS, trained at growing budgets.
BLUES = ("#9ecae1", "#3182bd", "#08306b")

MARKERS = {"Full": "", "Baseline": "o", "Baseline+": "s", "Performer": "x"}
MARKER_OF_LESS = "^"

RC_PARAMS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
}


def colour(method: str, methods: Iterable[str]) -> str:
    """The colour of a method among all `methods` of a figure."""
    if method in COLOURS:
        return COLOURS[method]
    rows_of_less = [m for m in methods if m not in COLOURS]
    return BLUES[rows_of_less.index(method) % len(BLUES)]


def marker(method: str) -> str:
    """The mark of a method on a curve."""
    return MARKERS.get(method, MARKER_OF_LESS)


def axes(columns: int, width: float = 4.6, height: float = 3.3) -> tuple[Figure, Any]:
    """A figure of panels side by side, each `width` x `height` inches, and the list of its axes."""
    plt.rcParams.update(RC_PARAMS)
    figure, panels = plt.subplots(
        1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained"
    )
    return figure, panels[0]


def save(figure: Figure, profile: str, name: str) -> Figure:
    """Write results/<profile>/figures/<name>.png and return the figure, closed.

    A closed figure is shown once in a notebook: as the value of its cell.
    """
    image = io.BytesIO()
    figure.savefig(image, metadata={"Software": None})
    write_bytes(results_dir(profile) / "figures" / f"{name}.png", image.getvalue())
    plt.close(figure)
    return figure
