"""What serving costs (paper, Tables 6 and 8): latency, throughput and bytes of a prompt and what is
written after it, by method, and the parts of a decode step: `python -m lesslib.serving --help`.

All methods of a load run in one process, in turn, so that a machine's slow moments meet all alike
and every ratio is of one run.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path

import torch

from lesslib.bench.breakdown import PARTS, Clock, parts
from lesslib.bench.latency import RUNS, WARM_UP, serve
from lesslib.bench.load import Load
from lesslib.bench.served_model import METHODS
from lesslib.bench.shapes import MODELS
from lesslib.util.command_line import options
from lesslib.util.files import write_json
from lesslib.util.hardware import keep_memory

__all__ = ["METHODS", "PARTS", "WARM_UP", "Clock", "Load", "main", "parts", "serve"]


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lesslib.serving", description=__doc__)
    options(
        parser,
        model=("pico", "shape of a random model", MODELS),
        prompt=(512, "tokens read"),
        generate=(512, "tokens written after them"),
        batch=(0, "rows at once"),
        cache_mib=(0, "instead: as many rows as each method's cache fits into so many MiB"),
        fraction=(0.05, "H2O's budget as a share of prompt + generate"),
        hidden=(128, "width of the kernels; the paper's is 512"),
        compiled=(False, "decode steps through torch.compile, on a GPU as CUDA graphs"),
        runs=(RUNS, "after a few tokens that warm up"),
        methods=(METHODS, "ratios are of the first", METHODS),
        parts=(False, "the parts of a step (Table 8) instead"),
    )
    parser.add_argument("--out", type=Path, help="also write JSON there")
    return parser


def print_rows(rows: dict[str, dict]) -> None:
    """A line of each method's numbers, those with a fraction beside their ratio to the first's."""
    first = next(iter(rows.values()))
    for method, row in rows.items():
        cells = []
        for name, value in row.items():
            cell = f"{name} {value}"
            if isinstance(value, float) and first.get(name):
                cell += f" ({value / first[name]:.2f})"
            cells.append(cell)
        print(f"{method:>14}: {', '.join(cells)}")


def main(argv: list[str] | None = None) -> None:
    """`python -m lesslib.serving`."""
    parser = command_line()
    arguments = parser.parse_args(argv)
    keep_memory()
    try:
        load = Load(**{setting.name: getattr(arguments, setting.name) for setting in fields(Load)})
        if arguments.parts:
            rows = parts(load)
        else:
            rows = serve(load, tuple(arguments.methods), arguments.runs)
    except ValueError as error:
        parser.error(str(error))
    print(f"{load}; {torch.get_num_threads()} threads, torch {torch.__version__}")
    print_rows(rows)
    if arguments.out:
        write_json(arguments.out, {"load": asdict(load), "methods": rows})
