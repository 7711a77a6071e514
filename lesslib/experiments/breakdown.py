"""Table 8: the parts of a decode step, and what a step of LESS costs beyond one of Baseline+."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from lesslib.attention.fit import cache_bytes
from lesslib.bench import METHODS, PARTS, Load, parts
from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Experiment, Point
from lesslib.experiments.sizes import layer_weights
from lesslib.policies import H2O
from lesslib.profiles import SETTINGS, get_limit
from lesslib.reporting import plots
from lesslib.reporting.paper import PAPER

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

# The paper's: how much more time a step of LESS takes than one of Baseline+.
OVERHEAD = 0.175
LOADS = {profile: Load(**settings["loads"]["Table 8"]) for profile, settings in SETTINGS.items()}


def load_of(profile: str) -> Load:
    """The load of a profile; that of `smoke` where $LESS_LIMIT cuts it short."""
    return LOADS["smoke" if get_limit() else profile]


# ---------------------------------------------------------------------- points
class Breakdown(Experiment):
    name = "breakdown"

    def points(self) -> list[Point]:
        load = load_of(self.profile.name)
        return [Point(str(load), asdict(load))]

    def models(self) -> tuple[str, ...]:
        # The weights are random.
        return ()

    def compute(self, point: Point) -> dict[str, Any]:
        return {"methods": parts(Load(**point.parameters))}


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of Table 8."""
    return Breakdown(profile, seed).run()


def methods_of(record: dict) -> tuple[str, dict[str, dict]]:
    """(the load of a record, what was measured by method, in the order of tables)."""
    name, entry = next(iter(record["points"].items()))
    return name, {m: entry["methods"][m] for m in METHODS if m in entry["methods"]}


def parts_of(row: dict[str, float]) -> dict[str, float]:
    """Milliseconds by part, of those that a method has."""
    return {part: row[f"{part}_ms"] for part in PARTS if f"{part}_ms" in row}


# ---------------------------------------------------------------------- claims
@claim(
    "Table 8",
    "It costs 17.5% more time a step than Baseline+",
    paper="{table8[Baseline+][5]} ms to {table8[LESS (5%)][5]} ms",
    needs=("breakdown",),
)
def verdicts(record: dict) -> Iterator[Verdict]:
    """What a step of LESS costs beyond one of Baseline+, with nothing inside it watched."""
    for name, entry in record["points"].items():
        less = entry["methods"]["LESS"]["unobserved_ms"]
        plus = entry["methods"]["Baseline+"]["unobserved_ms"]
        over = less / plus - 1
        yield Verdict(
            f"{name}: a step of LESS takes at most {OVERHEAD:.1%} more time than one of Baseline+",
            over <= OVERHEAD,
            f"{over:+.1%}",
        )


# ---------------------------------------------------------------------- tables and figures
def table(record: dict) -> Markdown:
    """Milliseconds a step by method and part; a dash where a method has no such part.

    They are of the torch forms: kernels do several parts in one piece. Where kernels served, a last
    column has the whole step in them.
    """
    _, methods = methods_of(record)
    columns = {
        "decoding": "decoding",
        "eviction": "eviction",
        "kernels": "kernels (eqs 1, 2)",
        "synthesis": "synthesis (eq 3)",
        "update": "update (eqs 4, 5)",
        "total": "sum",
        "unobserved": "unobserved",
    }
    if any("fused_ms" in row for row in methods.values()):
        columns["fused"] = "in fused kernels"
    lines = []
    for method, row in methods.items():
        lines.append([method, *(row.get(f"{part}_ms") for part in columns)])
    return plots.table(["method", *columns.values()], lines)


def figure(record: dict) -> Figure:
    """The parts of a step by method, one after another."""
    name, methods = methods_of(record)
    rows = {method: parts_of(row) for method, row in methods.items()}
    return plots.stacked(rows, "ms a step", name)


def print_paper() -> None:
    """Print the parts of a step of LESS in the paper's Table 8."""
    table8 = PAPER["table8"]
    print("paper, ms:")
    for part, ms in zip(table8["columns"], table8["LESS (5%)"], strict=True):
        print(f"  {part} {ms}")


def memory_table(tokens: int = 4096, slots: int = 204, R: int = 8) -> Markdown:
    """What a row of `tokens` holds, by the formula, in the paper's models in half precision.

    H2O has so many `slots`, Baseline+ R / 2 more; all rows share the kernels.
    """
    dtype = torch.float16
    lines = []
    for name, model in PAPER["models"].items():
        key_and_value = 2 * model["kv_heads"] * model["head_dim"] * dtype.itemsize
        full = model["layers"] * key_and_value * tokens
        baseline = cache_bytes(model, H2O.from_budget(slots), 0, 1, dtype)
        plus = cache_bytes(model, H2O.from_budget(slots + R // 2), 0, 1, dtype)
        less = cache_bytes(model, H2O.from_budget(slots), R, 1, dtype)
        kernels = model["layers"] * layer_weights(model, R=R) * dtype.itemsize
        mib = [f"{held / 2**20:,.1f}" for held in (full, baseline, plus, less, kernels)]
        lines.append([name, *mib, f"{full / less:.1f}", f"{kernels / (full - less):.2f}"])
    columns = ["model, MiB", "full", "Baseline", "Baseline+", "LESS", "kernels"]
    return plots.table([*columns, "full / LESS", "rows that pay for the kernels"], lines)
