"""Recorded results in, pictures and tables out. Nothing here computes: every number comes from a result's JSON."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import groupby
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lesslib.evaluation import gap_closed
from lesslib.evaluation.perplexity import POSITION_BIN
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
BLUES = ("#9ecae1", "#3182bd", "#08306b")  # LESS trained at growing budgets
MARKS = {"Full": "", "Baseline": "o", "Baseline+": "s", "Performer": "x"}


def colour(method: str, order: list[str]) -> str:
    return (
        COLOURS.get(method)
        or BLUES[[m for m in order if m.startswith("LESS")].index(method) % len(BLUES)]
    )


def axes(columns: int, width: float = 4.6, height: float = 3.3) -> tuple[Figure, Any]:
    """A figure of `columns` panels side by side, each `width` x `height` inches, and the list of its axes."""
    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "figure.dpi": 100,
            "savefig.dpi": 150,
        }
    )
    figure, panels = plt.subplots(
        1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained"
    )
    return figure, panels[0]


def save(figure: Figure, profile: str, name: str) -> Figure:
    """Write results/<profile>/figures/<name>.png and hand the figure back, closed, so that a notebook shows it once."""
    image = io.BytesIO()
    figure.savefig(image, metadata={"Software": None})
    write_bytes(results_dir(profile) / "figures" / f"{name}.png", image.getvalue())
    plt.close(figure)
    return figure


def table(columns: list[str], rows: list[list[Any]]) -> Any:
    """A Markdown table for a notebook; floats with three significant decimals, None as an empty cell's dash."""
    from IPython.display import Markdown

    show = lambda x: "–" if x is None else f"{x:.3f}" if isinstance(x, float) else str(x)  # noqa: E731, RUF001
    lines = [columns, ["---"] * len(columns), *([show(x) for x in row] for row in rows)]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


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


def by_position(full: dict, rows: dict[str, dict], title: str) -> Figure:
    """What each method loses against the full cache along the context: the one picture of the effect."""
    centres = [POSITION_BIN * (i + 0.5) for i in range(len(full["by_position"]))]
    panel = {
        m: (centres, np.subtract(row["by_position"], full["by_position"]))
        for m, row in ({"Full": full} | rows).items()
    }
    return curves(
        {title: panel}, "position in the context", "nats a token above the full cache", width=6
    )


def bars(
    groups: dict[str, dict[str, Any]], ylabel: str, title: str, lines: dict[str, float]
) -> Figure:
    """By group and method, bars of (value, low, high), and each group's dotted line."""
    figure, (panel,) = axes(1, width=3.6 + 1.2 * len(groups))
    methods = list(next(iter(groups.values())))
    for i, row in enumerate(groups.values()):
        for method, (value, low, high) in row.items():
            j, width = methods.index(method), 0.8 / len(methods)
            x = i + width * (j + 0.5) - 0.4
            panel.bar(
                x,
                value,
                0.875 * width,
                color=colour(method, methods),
                label=method if i == 0 else None,
            )
            panel.errorbar(
                x, value, [[value - low], [high - value]], color="black", lw=0.8, capsize=2
            )
    for i, label in enumerate(groups):
        panel.hlines(lines[label], i - 0.45, i + 0.45, color="black", lw=0.8, ls=":")
    panel.set(xticks=range(len(groups)), xticklabels=list(groups), ylabel=ylabel, title=title)
    figure.legend(fontsize=8, loc="outside right center")
    return figure


def gaps(groups: dict[str, tuple[dict, dict[str, dict]]], title: str) -> Figure:
    """Share of the gap each method closes; `groups` maps a label to (Full, rows by method with Baseline among them)."""
    shares = {
        label: {
            m: gap_closed(full, rows["Baseline"], row) for m, row in rows.items() if m != "Baseline"
        }
        for label, (full, rows) in groups.items()
    }
    figure = bars(shares, "share of the gap closed", title, dict.fromkeys(groups, 0.5))
    figure.axes[0].set_ylim(bottom=min(-0.1, max(-0.5, figure.axes[0].get_ylim()[0])))
    return figure


def mean_bars(
    groups: dict[str, dict[str, list[float]]], ylabel: str, title: str, chance: dict[str, float]
) -> Figure:
    """Bars of the means of scores by example, with two standard errors either way, and chance as a dotted line."""
    ends = {
        label: {
            m: np.mean(x) + 2 * np.std(x) / len(x) ** 0.5 * np.array([0.0, -1.0, 1.0])
            for m, x in rows.items()
        }
        for label, rows in groups.items()
    }
    return bars(ends, ylabel, title, chance)


def stacked(rows: dict[str, dict[str, float]], xlabel: str, title: str) -> Figure:
    """A bar by method, of parts in their order, with their sum."""
    figure, (panel,) = axes(1, width=7, height=0.6 * len(rows) + 1.2)
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    for i, row in enumerate(rows.values()):
        left = 0.0
        for part, value in row.items():
            tint = f"C{parts.index(part)}"
            panel.barh(
                i,
                value,
                left=left,
                color=tint,
                label=part if part not in panel.get_legend_handles_labels()[1] else None,
            )
            left += value
        panel.text(left, i, f" {left:.2f}", va="center")
    panel.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=xlabel, title=title)
    panel.invert_yaxis()
    figure.legend(fontsize=8, loc="outside right center")
    return figure


def curves(
    panels: dict[str, dict[str, tuple[Any, Any]]],
    xlabel: str,
    ylabel: str,
    log2: bool = False,
    width: float = 4.2,
) -> Figure:
    """By panel and method, a line through (x, y)."""
    figure, drawn = axes(len(panels), width)
    for panel, (title, rows) in zip(drawn, panels.items(), strict=True):
        for method, (x, y) in rows.items():
            mark = {"marker": MARKS.get(method, "^"), "markevery": max(1, len(x) // 8), "ms": 4}
            panel.plot(
                x,
                y,
                color=colour(method, list(rows)),
                ls="--" if method == "Full" else "-",
                label=method,
                **mark,
            )
        panel.set(xlabel=xlabel, title=title)
        panel.set_xscale("log", base=2) if log2 else panel.xaxis.get_major_locator().set_params(
            integer=True
        )
    drawn[0].set_ylabel(ylabel)
    drawn[0].legend(fontsize=8)
    return figure


def attention_maps(record: dict) -> Figure:
    """One head's attention by case (rows): original, sparse, LESS; brighter is heavier, on one logarithmic scale a row."""
    figure, panels = plt.subplots(
        len(record["points"]),
        3,
        figsize=(8, 2.8 * len(record["points"])),
        squeeze=False,
        layout="constrained",
    )
    for row, (case, point) in zip(panels, record["points"].items(), strict=True):
        for panel, label in zip(row, ("original", "sparse", "LESS"), strict=True):
            shown = panel.imshow(
                np.log10(np.array(point["maps"][label]) + 1e-4), cmap="magma", vmin=-4, vmax=-0.5
            )
            panel.set(title=f"{case}: {label}", xticks=[], yticks=[], xlabel="key", ylabel="query")
        figure.colorbar(shown, ax=row, label="log10 of the weight")
    return figure


def scoreboard(rows: list[tuple[str, list[str]]], columns: list[str]) -> Figure:
    """(claim, its status by column), coloured: green holds, yellow in part, red fails, blue is undecided."""
    tint = {
        "holds": "#7fbf7b",
        "FAILS": "#d6604d",
        "not measured": "#dddddd",
        "undecided": "#c9d7ea",
    }
    figure, (panel,) = axes(1, width=10.5, height=0.26 * len(rows) + 0.5)
    colours, widths = (
        [["w", *(tint.get(s, "#f1d769") for s in found)] for _, found in rows],
        [0.53, *[0.47 / len(columns)] * len(columns)],
    )
    cells = panel.table(
        [[claim, *found] for claim, found in rows],
        colours,
        "left",
        widths,
        colLabels=["claim", *columns],
        loc="center",
    )
    for cell in cells.get_celld().values():
        cell.PAD = 0.02  # of its width
    cells.auto_set_font_size(False)
    cells.scale(1, 1.25)
    panel.set_axis_off()
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
