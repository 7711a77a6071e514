"""`python -m lesslib.bench loads`: whole loads beside what a user would pick, and recorded.

A load is a prompt and the answer to it. Full caches that grow, that are allocated at once, and
that are compiled as well; the policy alone; LESS. All hold the same budget at any length. Methods
take turns in one process, replicate by replicate, so that a machine's slow moments meet all alike.
Open `measure_load` for one load, `print_load` for its table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import psutil
import torch

from lesslib.bench.latency import WARM_UP, Measurements, run_rows_that_fit, summary
from lesslib.bench.load import Load, Loads
from lesslib.bench.record import BenchmarkRecord, when, where
from lesslib.bench.served_model import FULL, FULL_DYNAMIC, LESS_STREAMING, ServedModel
from lesslib.bench.timing import DEVICE, copy_bandwidth
from lesslib.util.progress import clear_context, minutes, progress, set_context

# what a user would pick, beside ours
METHODS = (*FULL, "Baseline", "Baseline+", "LESS", LESS_STREAMING)
LENGTHS = ("512+128", "2048+256", "8192+256")
MODELS = ("pico", "12x768", "smollm2-135m")
# tokens of the prompts that warm up, and tell how long the whole load will take
SHORT_PROMPT = 256
# times that a method reads one of them, besides once to warm up
TIMED_WARM_UPS = 3


@dataclass(frozen=True)
class LoadsCase(Loads):
    """What `loads` measures; a load that would take more than `limit` minutes is left out."""

    limit: float = 60


# ---------------------------------------------------------------------- how long it will take
def work(served: ServedModel, method: str, tokens: int) -> int:
    """Multiply-adds of a prompt of `tokens` in one row, nearly: weights, and attention.

    In a streaming prompt each query attends what the policy holds, otherwise all before it.
    """
    shape = served.shape
    weights = served.weight_bytes(FULL_DYNAMIC) // served.model.dtype.itemsize
    is_bounded = method == LESS_STREAMING
    attended = min(tokens, served.load.budget) if is_bounded else tokens
    attention = 2 * shape["layers"] * shape["heads"] * shape["head_dim"] * attended
    return tokens * (weights + attention)


def expected_seconds(
    served: ServedModel, method: str, took: dict[str, float], bandwidth: float
) -> float:
    """Seconds of a run of `method`, from what a short prompt and `WARM_UP` tokens `took`."""
    load = served.load
    short = min(SHORT_PROMPT, load.prompt)
    prompt = took["prompt"] * work(served, method, load.prompt) / work(served, method, short)
    step = took["decode"] / (WARM_UP - 1)
    if method == FULL_DYNAMIC:
        # it had few tokens; with many, each step copies them all, then reads them
        step += 3 * load.batch * served.row_bytes(method) / bandwidth
    return prompt + (load.generate - 1) * step


def missing_memory(served: ServedModel, methods: tuple[str, ...]) -> str:
    """What the caches lack of a CPU's memory, in words; "" where they fit.

    A cache that grows holds what it had while it copies it.
    """
    largest = max(served.load.batch * served.row_bytes(method) for method in methods)
    available = psutil.virtual_memory().available
    if DEVICE.type == "cuda" or 2 * largest < available:
        return ""
    return f"needs {2 * largest / 2**30:.0f} GiB, and {available / 2**30:.0f} are free"


# ---------------------------------------------------------------------- one load
class LoadTooLarge(Exception):
    """A load that is left out, and why."""


def measure_load(case: LoadsCase, load: Load) -> dict[str, dict]:
    """By method what `latency.summary` says of it, plus `full_over`, see `with_ratios`.

    Raises LoadTooLarge where it would take more memory than there is, or longer than the limit.
    """
    # no load starts with what an earlier one compiled
    torch._dynamo.reset()
    served = ServedModel(load)
    lacks = missing_memory(served, case.methods)
    if lacks:
        raise LoadTooLarge(lacks)
    bandwidth = copy_bandwidth()
    seconds = warm_up(served, case.methods, bandwidth)
    if case.runs * seconds > 60 * case.limit:
        expected = minutes(case.runs * seconds)
        raise LoadTooLarge(f"would take some {expected}, and the limit is {case.limit:g} min")
    print(f"{load}: some {minutes(case.runs * seconds)}", flush=True)
    measured = {method: Measurements(load.batch) for method in case.methods}
    for run in range(case.runs):
        for i, method in enumerate(case.methods):
            runs_left = case.runs - run - i / len(case.methods)
            done = run * len(case.methods) + i
            progress("runs", done, case.runs * len(case.methods), minutes(runs_left * seconds))
            took = run_rows_that_fit(served, method, load.generate, measured[method])
            if took is not None:
                measured[method].add(took)
        # the best of all moments: a floor is what the machine could do
        bandwidth = max(bandwidth, copy_bandwidth())
    progress("runs", 1, 1)
    rows = {method: summary(served, method, measured[method], bandwidth) for method in measured}
    return with_ratios(rows)


def warm_up(served: ServedModel, methods: tuple[str, ...], bandwidth: float) -> float:
    """Run every method on a short prompt; the seconds that a run of all of them will take.

    The first of its runs compiles what is compiled. Of the others the quickest counts: a slow
    moment should leave out no load.
    """
    ids = served.random_prompt(served.load.batch)[:, :SHORT_PROMPT]
    expected = 0.0
    for i, method in enumerate(methods):
        progress("warming up", i, len(methods))
        served.answer(method, ids, WARM_UP)
        seconds = []
        for _ in range(TIMED_WARM_UPS):
            took = served.answer(method, ids, WARM_UP)
            seconds.append(expected_seconds(served, method, took, bandwidth))
        expected += min(seconds)
    progress("warming up", len(methods), len(methods))
    return expected


def total_seconds(row: dict) -> list[float]:
    """Seconds of each run of a method, prompt and answer together."""
    return [
        prompt + decode for prompt, decode in zip(row["prompt_s"], row["decode_s"], strict=True)
    ]


def quicker_full(rows: dict[str, dict]) -> float | None:
    """Median seconds of the quickest full cache; None where there is none."""
    seconds = [
        row["seconds"] for method, row in rows.items() if method in FULL and "seconds" in row
    ]
    return min(seconds, default=None)


def with_ratios(rows: dict[str, dict]) -> dict[str, dict]:
    """The rows, each with how many times sooner than the quickest full cache it is done.

    `full_over`: by medians; where no full cache ran, there is none.
    """
    full = quicker_full(rows)
    if full is None:
        return rows
    for row in rows.values():
        if "seconds" in row:
            row["full_over"] = round(full / row["seconds"], 3)
    return rows


# ---------------------------------------------------------------------- all loads
def measured_loads(case: LoadsCase, fresh: bool) -> Iterator[tuple[Load, dict]]:
    """Every load with its entry, as soon as it is recorded; `fresh`: also those that were before.

    A load that is left out is said to be.
    """
    record = BenchmarkRecord("loads")
    loads = case.each()
    for i, load in enumerate(loads):
        set_context(f"load {i + 1} of {len(loads)}, {load}", "")
        parameters = asdict(load) | {"methods": list(case.methods), "runs": case.runs}
        entry = None if fresh else record.finished(str(load), parameters)
        if entry is None:
            begun = time.perf_counter()
            try:
                rows = measure_load(case, load)
            except LoadTooLarge as reason:
                print(f"{load}: left out, {reason}\n", flush=True)
                continue
            entry = record.write(
                str(load), parameters, time.perf_counter() - begun, {"methods": rows}
            )
        yield load, entry
    clear_context()


def spread(values: list[float]) -> str:
    """Median, and (smallest to largest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


Columns = tuple[tuple[str, int], ...]
# title and width of each
COLUMNS: Columns = (
    ("method", 15),
    ("prompt, s", 24),
    ("answer, s", 24),
    ("both, s", 24),
    ("full / it", 10),
    ("ms a step", 10),
    ("floor, ms", 10),
    ("times floor", 12),
    ("MiB", 9),
)


def print_cells(cells: list[str], columns: Columns) -> None:
    """A line of a table, its cells set right; it may end early."""
    print("".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, columns, strict=False)))


def print_load(load: Load, entry: dict) -> None:
    """A line of each method: medians of its runs, and the smallest and the largest.

    "full / it": the quickest full cache's seconds over its own.
    """
    print(f"{load}, kernels {load.hidden} wide; {where(entry)}; {when(entry)}")
    print_cells([title for title, _ in COLUMNS], COLUMNS)
    # JSON has lost their order
    for method in entry["parameters"]["methods"]:
        print_cells([method, *cells_of(entry["methods"][method])], COLUMNS)
    print(flush=True)


def cells_of(row: dict) -> list[str]:
    """What `print_load` shows of a method."""
    if "out_of_memory" in row:
        return ["out of memory"]
    return [
        spread(row["prompt_s"]),
        spread(row["decode_s"]),
        spread(total_seconds(row)),
        f"{row['full_over']:.2f}" if "full_over" in row else "",
        f"{row['step_ms']:.2f}",
        f"{row['floor_ms']:.2f}",
        f"{row['step_ms'] / row['floor_ms']:.2f}",
        f"{row['bytes'] / 2**20:.1f}",
    ]


def compare_loads(case: LoadsCase, fresh: bool) -> None:
    """Measure what is not recorded yet; a table of every load. Raises ValueError for bad words."""
    for load, entry in measured_loads(case, fresh):
        print_load(load, entry)
    print(f"recorded in {BenchmarkRecord('loads').path}")
