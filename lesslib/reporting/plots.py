"""Pictures and tables under one name: `from lesslib.reporting import plots`.

What is common to many experiments lies in `style`, `charts` and `tables`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lesslib.reporting.charts import bars, by_position, curves, gaps, mean_bars, stacked
from lesslib.reporting.style import BLUES, COLOURS, axes, colour, save
from lesslib.reporting.tables import table, verdict_table

__all__ = [
    "BLUES",
    "COLOURS",
    "axes",
    "bars",
    "by_position",
    "cells",
    "colour",
    "curves",
    "gaps",
    "mean_bars",
    "save",
    "stacked",
    "table",
    "verdict_table",
]


def cells(record: dict, prefix: str, order: Callable | None = None) -> dict[str, dict]:
    """Points of a record whose name is `prefix`/method, by method in the order of the paper's tables, or as recorded with order=list."""
    found = {
        name[len(prefix) + 1 :]: p
        for name, p in record["points"].items()
        if name.startswith(prefix + "/")
    }
    of_paper = lambda m: (
        (list(COLOURS).index(m), 0.0) if m in COLOURS else (len(COLOURS), float(m[6:-2]))
    )  # noqa: E731
    return {m: found[m] for m in (order(found) if order else sorted(found, key=of_paper))}


def low_rank_residuals(record: dict) -> Figure:
    figure, (left, right) = axes(2)
    layers = record["points"]["singular values"]["layers"]
    for i, layer in layers.items():
        shade = 0.35 + 0.65 * (int(i) + 1) / len(layers)
        for what, tint in (("full", COLOURS["Full"]), ("residual", "#3182bd")):
            left.semilogy(
                range(1, len(layer[what]) + 1),
                layer[what],
                color=tint,
                alpha=shade,
                label=what if i == "0" else None,
            )
    left.set(
        xlabel="index",
        ylabel="singular value / largest of full",
        title="outputs and top-12.5% residuals, by layer",
    )
    left.legend()
    points = sorted(
        (x["fraction"], x["rank"], p["token_ppl"])
        for p in record["points"].values()
        if "rank" in (x := p["parameters"])
    )
    for (fraction, series), tint in zip(
        groupby(points, key=lambda point: point[0]), BLUES, strict=False
    ):
        _, ranks, ppl = zip(*series, strict=True)
        right.plot(ranks, ppl, "o-", color=tint, label=f"top {fraction:.1%}")
    right.axhline(
        record["points"]["full"]["token_ppl"], color=COLOURS["Full"], ls="--", label="full"
    )
    right.set(
        xlabel="rank of the residual that is added back",
        ylabel="token perplexity",
        title="top-k caching, recovered",
    )
    right.legend()
    return figure


def training_curves(record: dict) -> Figure:
    points = record["points"]
    figure, panels = axes(len(points), width=3.1, height=2.9)
    for panel, (name, point) in zip(panels, points.items(), strict=True):
        for i, layer in point["layers"].items():
            line = panel.plot(layer["validation"], marker=".", label=f"layer {i}")[0]
            panel.axhline(layer["baseline_plus"], color=line.get_color(), ls=":", lw=1)
        panel.set(xlabel="epoch", title=name, ylim=(0, 1.05))
    panels[0].set_ylabel("validation error / sparse error")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title="dotted: Baseline+",
        fontsize=8,
        loc="outside right center",
    )
    return figure


def training_speed(record: dict) -> Figure:
    figure, (left, right) = axes(2)
    for scheme, tint in (("stepwise", COLOURS["Baseline"]), ("ours", BLUES[1])):
        rows = sorted(
            (p["parameters"]["length"], p)
            for p in record["points"].values()
            if p["parameters"]["scheme"] == scheme
        )
        for panel, key in ((left, "seconds_epoch"), (right, "peak_mib")):
            panel.loglog(
                [n for n, _ in rows],
                [p[key] for _, p in rows],
                "o-",
                color=tint,
                label=scheme,
                base=2,
            )
    left.set(
        xlabel="tokens a window",
        ylabel=f"seconds an epoch of {rows[0][1]['parameters']['sequences']} windows",
        title="time",
    )
    right.set(xlabel="tokens a window", ylabel="peak memory above the start, MiB", title="memory")
    left.legend()
    return figure


def cache_bytes(record: dict) -> Figure:
    """What each method's cache holds while a text is read token by token."""
    rows = {
        m: tuple(np.array(point["bytes"]).T / [[1], [1024]])
        for m, point in cells(record, "bytes").items()
    }
    return curves(
        {"H2O at 5%: keys, values, scores and state": rows},
        "tokens seen",
        "KiB held by the cache",
        width=6.2,
    )


def evicted_text(record: dict, width: int = 110) -> Figure:
    """The prompt of each policy's point, every token shaded by the share of heads that no longer hold it."""
    texts = cells(record, "evicted", order=list)
    placed: dict[str, list[tuple[int, int, str, float]]] = {}
    for policy, point in texts.items():
        row = column = 0
        placed[policy] = []
        for token, gone in zip(point["tokens"], point["gone"], strict=True):
            shown = "".join(c if c.isprintable() else "¶" for c in token)
            if column + len(shown) > width:
                row, column = row + 1, 0
            placed[policy].append((row, column, shown, gone))
            column += len(shown)
    size, rows = 6.5, [1 + max(row for row, *_ in p) for p in placed.values()]
    inches = (
        width * 0.602 * size / 72 + 0.2,
        sum(rows) * 0.15 + 0.35 * len(rows),
    )  # 0.602: a monospaced character's width over its size
    figure, panels = plt.subplots(
        len(placed),
        1,
        figsize=inches,
        height_ratios=rows,
        squeeze=False,
        layout="constrained",
        dpi=100,
    )
    for panel, (policy, tokens), height in zip(panels[:, 0], placed.items(), rows, strict=True):
        for row, column, shown, gone in tokens:
            panel.add_patch(
                Rectangle(
                    (column, row), len(shown), 1, color=plt.get_cmap("Reds")(0.6 * gone), lw=0
                )
            )
            panel.text(
                column, row + 0.72, shown, family="monospace", fontsize=size, parse_math=False
            )
        panel.set(xlim=(0, width), ylim=(height, 0))
        panel.set_axis_off()
        panel.set_title(
            f"{policy}: white is held by every head, dark red by none", fontsize=8, loc="left"
        )
    return figure
