"""Table 6: latency, throughput and bytes of a load, by method.

All methods of a load run in one process, in turn, so that a machine's slow moments meet all alike
and every ratio is of one run.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import torch

from lesslib.bench.load import Load
from lesslib.bench.served_model import METHODS, ServedModel
from lesslib.bench.timing import copy_bandwidth
from lesslib.util.progress import progress

# tokens written before anything is timed
WARM_UP = 8
# times that everything is timed
RUNS = 3


@dataclass
class Measurements:
    """What the runs of one method with `rows` rows took; all starts anew with fewer rows."""

    rows: int
    prompt_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    held_bytes: float = 0
    out_of_memory: bool = False

    def add(self, took: dict[str, float]) -> None:
        self.prompt_s.append(round(took["prompt"], 4))
        self.decode_s.append(round(took["decode"], 4))
        self.held_bytes = took["bytes"]

    def restart(self, rows: int) -> None:
        self.rows = rows
        self.prompt_s = []
        self.decode_s = []


def serve(load: Load, methods: tuple[str, ...] = METHODS, runs: int = RUNS) -> dict[str, dict]:
    """By method, what serving `load` takes; see `summary` for the fields and their units.

    A method that runs out of a GPU's memory starts again with an eighth of its rows less under a
    load that gives `cache_mib`; under others, and where no row fits, it has
    {"rows", "out_of_memory": True} instead.
    """
    served = ServedModel(load)
    bandwidth = copy_bandwidth()
    measured = {method: Measurements(served.rows(method)) for method in methods}
    for run in range(runs + 1):
        is_warm_up = run == 0
        generate = min(WARM_UP, load.generate) if is_warm_up else load.generate
        for i, method in enumerate(methods):
            progress("runs", run * len(methods) + i, (runs + 1) * len(methods))
            took = run_rows_that_fit(served, method, generate, measured[method])
            if took is not None and not is_warm_up:
                measured[method].add(took)
    progress("runs", 1, 1)
    return {method: summary(served, method, measured[method], bandwidth) for method in methods}


def run_rows_that_fit(
    served: ServedModel, method: str, generate: int, measured: Measurements
) -> dict[str, float] | None:
    """`ServedModel.run` with as many of the rows as a GPU's memory holds; None where none fits."""
    while not measured.out_of_memory:
        try:
            return served.run(method, generate, measured.rows)
        except torch.OutOfMemoryError:
            pass
        # not within `except`, where the error's traceback still holds the tensors of the run
        torch.cuda.empty_cache()
        fewer = measured.rows * 7 // 8
        if served.load.cache_mib and fewer:
            measured.restart(fewer)
        else:
            measured.out_of_memory = True
    return None


def summary(served: ServedModel, method: str, measured: Measurements, bandwidth: float) -> dict:
    """What is recorded of one method.

    `rows`; seconds of every run's prompt and decoding (`prompt_s`, `decode_s`) and the median of
    their sums (`seconds`); tokens a second; milliseconds a step; bytes held and by the formula;
    and `floor_ms`, what reading one step's weights and cache takes at the `bandwidth` of a copy.
    """
    if measured.out_of_memory:
        return {"rows": measured.rows, "out_of_memory": True}
    row = {
        "rows": measured.rows,
        "prompt_s": measured.prompt_s,
        "decode_s": measured.decode_s,
    }
    if not measured.decode_s:
        return row
    generate = served.load.generate
    totals = [
        prompt + decode for prompt, decode in zip(measured.prompt_s, measured.decode_s, strict=True)
    ]
    seconds = statistics.median(totals)
    step_seconds = statistics.median(measured.decode_s) / (generate - 1)
    formula_bytes = measured.rows * served.row_bytes(method)
    floor_seconds = (served.weight_bytes(method) + formula_bytes) / bandwidth
    return row | {
        "bytes": measured.held_bytes,
        "seconds": round(seconds, 4),
        "tokens_per_s": round(measured.rows * generate / seconds, 2),
        "step_ms": round(1000 * step_seconds, 4),
        "formula_bytes": round(formula_bytes),
        "floor_ms": round(1000 * floor_seconds, 4),
    }
