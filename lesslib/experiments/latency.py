"""Table 6: latency and throughput of serving, LESS beside the quicker of two full caches.

A point is a load: rows of random tokens that a model of random weights reads and writes. Loads give
every method as many rows, or, in equal memory, as many as fit into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lesslib.bench import METHODS, Load, serve
from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Experiment, Point
from lesslib.profiles import SETTINGS, get_limit
from lesslib.reporting import plots
from lesslib.reporting.paper import PAPER

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

# The two full caches that a user of transformers would pick: one grows, one is allocated at once.
FULL = ("Full, dynamic", "Full, static")
# By profile; on small machines their lengths are the paper's divided by 4 to 10.
LOADS: dict[str, list[Load]] = {}
for _profile, _settings in SETTINGS.items():
    LOADS[_profile] = [Load(**load) for load in _settings["loads"]["Table 6"]]


def loads(profile: str) -> list[Load]:
    """The loads of a profile; those of `smoke` where $LESS_LIMIT cuts it short."""
    return LOADS["smoke" if get_limit() else profile]


# ---------------------------------------------------------------------- points
class Latency(Experiment):
    name = "latency"

    def points(self) -> list[Point]:
        return [Point(str(load), asdict(load)) for load in loads(self.profile.name)]

    def models(self) -> tuple[str, ...]:
        # The weights are random.
        return ()

    def compute(self, point: Point) -> dict[str, Any]:
        return {"methods": serve(Load(**point.parameters))}


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of Table 6."""
    return Latency(profile, seed).run()


# ---------------------------------------------------------------------- ratios
class Ratios(NamedTuple):
    """How many times quicker a method is than the quicker full cache.

    `middle` is by medians of their runs, `low` by its slowest run against that one's quickest, and
    `high` the other way round.
    """

    middle: float
    low: float
    high: float


def finished(methods: dict[str, dict]) -> dict[str, dict]:
    """The methods of a load that did not run out of memory."""
    return {method: row for method, row in methods.items() if "seconds" in row}


def run_seconds(row: dict[str, Any]) -> np.ndarray:
    """Seconds of each run of a method, prompt and decoding together."""
    return np.add(row["prompt_s"], row["decode_s"])


def times_faster(methods: dict[str, dict], method: str) -> Ratios:
    """How many times sooner `method` is done with a load than the quicker full cache."""
    return _ratios(methods, method, batches=dict.fromkeys(methods, 1))


def times_the_throughput(methods: dict[str, dict], method: str) -> Ratios:
    """How many times the tokens a second of the quicker full cache `method` writes in its rows."""
    return _ratios(methods, method, batches={m: row["rows"] for m, row in methods.items()})


def _ratios(methods: dict[str, dict], method: str, batches: dict[str, int]) -> Ratios:
    """Ratios of work a second; `batches`: the work that a run of each method counts as."""
    seconds = {m: run_seconds(row) for m, row in finished(methods).items()}
    full_caches = [m for m in FULL if m in seconds]
    full = min(full_caches, key=lambda m: np.median(seconds[m]) / batches[m])
    share = batches[method] / batches[full]
    theirs = seconds[full]
    ours = seconds[method]
    return Ratios(
        middle=float(share * np.median(theirs) / np.median(ours)),
        low=float(share * min(theirs) / max(ours)),
        high=float(share * max(theirs) / min(ours)),
    )


def is_equal_memory(entry: dict) -> bool:
    """Whether a load gives every method the same memory instead of the same rows."""
    return bool(entry["parameters"]["cache_mib"])


def times_quicker(entry: dict, method: str) -> Ratios:
    """What a load measures: tokens a second in equal memory, else the seconds of a batch."""
    if is_equal_memory(entry):
        return times_the_throughput(entry["methods"], method)
    return times_faster(entry["methods"], method)


def is_comparable(entry: dict) -> bool:
    """Whether LESS and a full cache both ended their runs."""
    methods = finished(entry["methods"])
    return "LESS" in methods and any(full in methods for full in FULL)


# ---------------------------------------------------------------------- claims
def _verdict(claim: str, ratios: Ratios, more: str = "") -> Verdict:
    """Decided where the slowest of one's runs still beats the quickest of the other's."""
    numbers = f"{ratios.middle:.2f} times [{ratios.low:.2f}, {ratios.high:.2f}]{more}"
    if ratios.low <= 1 <= ratios.high:
        return Verdict(claim, None, numbers)
    return Verdict(claim, ratios.middle > 1, numbers)


@claim(
    "Table 6",
    "LESS generates 1.1 to 1.3 times faster than the full cache",
    paper="13B: {table6[rows][0][latency_s][0]} s to {table6[rows][0][latency_s][2]} s",
    needs=("latency",),
)
def done_before(record: dict) -> Iterator[Verdict]:
    """LESS against the quicker full cache, both with as many rows."""
    for name, entry in record["points"].items():
        if is_comparable(entry) and not is_equal_memory(entry):
            claim = f"{name}: LESS is done before the quicker full cache"
            yield _verdict(claim, times_faster(entry["methods"], "LESS"))


@claim(
    "Table 6",
    "and has up to 1.7 times its throughput",
    paper="7B: {table6[rows][1][tokens_per_s][0]} to {table6[rows][2][tokens_per_s][2]} tokens/s",
    needs=("latency",),
)
def writes_more(record: dict) -> Iterator[Verdict]:
    """LESS against the quicker full cache, each with as many rows as fit into the same memory."""
    for name, entry in record["points"].items():
        if is_comparable(entry) and is_equal_memory(entry):
            methods = finished(entry["methods"])
            most = max(methods[full]["rows"] for full in FULL if full in methods)
            yield _verdict(
                f"{name}: LESS writes more tokens a second than the quicker full cache",
                times_the_throughput(methods, "LESS"),
                f"; {methods['LESS']['rows']} rows against {most}",
            )


def verdicts(record: dict) -> Iterator[Verdict]:
    """Both claims of Table 6."""
    yield from done_before(record)
    yield from writes_more(record)


def hold_what_their_formula_says(record: dict) -> bool:
    """Whether every cache held as many bytes as its formula says, within 2%."""
    for entry in record["points"].values():
        for row in finished(entry["methods"]).values():
            if abs(row["bytes"] / row["formula_bytes"] - 1) >= 0.02:
                return False
    return True


# ---------------------------------------------------------------------- tables and figures
def table(record: dict) -> Markdown:
    """Table 6 by load and method; ratios are of tokens a second in every load."""
    columns = [
        "load",
        "method",
        "rows",
        "prompt, s",
        "decoding, s",
        "tokens/s",
        "times the quicker full",
        "ms a step",
        "floor, ms",
        "cache, MiB",
    ]
    lines = []
    for name, entry in record["points"].items():
        for method in METHODS:
            row = entry["methods"][method]
            if "out_of_memory" in row:
                measured: list[str | None] = ["out of memory", *[None] * 6]
            else:
                ratios = times_the_throughput(entry["methods"], method)
                measured = _measured(row, ratios.middle)
            lines.append([name, method, row["rows"], *measured])
    return plots.table(columns, lines)


def _measured(row: dict[str, Any], ratio: float) -> list[str | None]:
    """The cells of a method that ended its runs."""
    return [
        f"{row['prompt_s'][0]:.2f}",
        f"{min(row['decode_s']):.2f} to {max(row['decode_s']):.2f}",
        f"{row['tokens_per_s']:.0f}",
        f"{ratio:.2f}",
        f"{row['step_ms']:.2f}",
        f"{row['floor_ms']:.2f}",
        f"{row['bytes'] / 2**20:.1f}",
    ]


def print_paper() -> None:
    """Print the ratios of the paper's Table 6."""
    rows = PAPER["table6"]["rows"]
    # By row: of 13B at batch 4, of 7B at batch 24 and 64; each has the full cache, ..., LESS.
    seconds_13b = rows[0]["latency_s"]
    seconds_7b = rows[1]["latency_s"]
    times = rows[2]["tokens_per_s"][2] / rows[1]["tokens_per_s"][0]
    print(
        f"paper: {seconds_13b[0] / seconds_13b[2]:.2f} times faster (13B, batch 4),",
        f"{seconds_7b[0] / seconds_7b[2]:.2f} (7B, batch 24);",
        f"{times:.2f} times the tokens a second, batch 64 against 24",
    )


def figure(record: dict) -> Figure:
    """By load and method, how many times quicker than the quicker full cache.

    Bars are medians of the runs, whiskers the worst and the best case.
    """
    groups = {}
    for name, entry in record["points"].items():
        methods = finished(entry["methods"])
        label = name.replace(", ", "\n")
        groups[label] = {m: times_quicker(entry, m) for m in METHODS if m in methods}
    return plots.bars(
        groups,
        "times the quicker full cache",
        "seconds of a batch; in equal memory, tokens a second",
        dict.fromkeys(groups, 1.0),
    )
