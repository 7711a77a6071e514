"""What the runner can do: list, run and forget notebooks, run the tests, open JupyterLab."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lesslib.runner.execute import (
    environment,
    execute,
    failure_report,
    verdicts_of,
    write_back,
)
from lesslib.runner.kernels import OF_NOTEBOOKS, OF_TESTS, prepare_kernels
from lesslib.runner.notebook import Notebook
from lesslib.runner.plan import Plan, Refusal
from lesslib.runner.progress_line import watching
from lesslib.runner.run_log import DONE, FAILED, Outcome
from lesslib.util.paths import ROOT
from lesslib.util.progress import minutes

NBVAL = ["--nbval-lax", "--nbval-current-env"]
# By file, for the cells of a notebook have an order; tests/conftest.py has the longest files begin
# first.
PROCESSES = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
PROGRESS = ".progress.json"
# what a shell says of a program that Ctrl-C ended
INTERRUPTED = 130


def run_tests(folder: Path, further: list[str]) -> int:
    """--test: pytest on tests/ and, under `smoke`, on the verdict cells of the notebooks."""
    notebooks = [str(path) for path in sorted(folder.glob("*.ipynb"))]
    command = [sys.executable, "-m", "pytest", "tests", *notebooks]
    command += [*NBVAL, *PROCESSES, *further]
    with tempfile.TemporaryDirectory() as results:
        variables = environment("smoke", LESS_RESULTS=results)
        prepare_kernels(OF_TESTS, variables)
        return subprocess.call(command, cwd=ROOT, env=variables)


def open_lab(folder: Path, profile: str, further: list[str]) -> int:
    """--lab: JupyterLab on the notebooks, under a profile."""
    command = [sys.executable, "-m", "jupyterlab", str(folder)]
    command += ["--KernelManager.transport_encryption=auto", *further]
    return subprocess.call(command, cwd=ROOT, env=environment(profile))


def forget_computed(plan: Plan) -> None:
    """--fresh: forget what this machine computed for the chosen notebooks.

    Raises Refusal where the list of computed points is damaged.
    """
    try:
        plan.run_log.forget(plan.chosen)
    except ValueError as error:
        raise Refusal([str(error)]) from error
    for notebook in plan.chosen:
        plan.outcomes[notebook.name] = Outcome()


def list_notebooks(plan: Plan) -> int:
    """--list: the chosen notebooks, what would be run, and how long it took the last time."""
    print_table(plan, with_verdicts=False)
    return 0


def run_notebooks(plan: Plan) -> int:
    """Run what has to be run, and show how it went; the exit code."""
    try:
        run_all(plan)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: every finished point is kept, {plan.command} goes on from there",
            file=sys.stderr,
        )
        return INTERRUPTED
    print_table(plan, with_verdicts=True)
    failed = [n.number for n in plan.chosen if plan.outcomes[n.name].state == FAILED]
    if failed:
        numbers = ", ".join(failed)
        print(f"\nfailed: {numbers}. After the repair, {plan.command} goes on from there.")
        return 1
    return 0


def print_table(plan: Plan, with_verdicts: bool) -> None:
    """A line for each chosen notebook, and the verdicts of its last run below."""
    table = []
    for notebook in plan.chosen:
        outcome = plan.outcomes[notebook.name]
        took = minutes(outcome.seconds) if outcome.seconds else ""
        row = (notebook.number, notebook.title, notebook.paper_item, outcome.state, took)
        table.append(row)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for notebook, row in zip(plan.chosen, table, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
        if with_verdicts:
            for verdict in plan.outcomes[notebook.name].verdicts:
                print(f"      {verdict}")


def run_all(plan: Plan) -> None:
    """Execute the notebooks that have to be run, up to a failure; note how each one went."""
    home = plan.run_log.home
    variables = environment(plan.profile.name, LESS_PROGRESS=str(home / PROGRESS))
    if plan.options.from_results:
        variables["LESS_FROM_RESULTS"] = "1"
    else:
        variables["LESS_LEDGER"] = str(plan.run_log.ledger)
    if plan.options.seed:
        # The package carries the kernels of seed 0; with a folder here, those are not used.
        (home / "kernels").mkdir(exist_ok=True)
    # Kernels inherit the environment of this process.
    os.environ.clear()
    os.environ.update(variables)
    if plan.todo and not plan.options.from_results:
        prepare_kernels(OF_NOTEBOOKS, variables)
    if plan.todo:
        # Imported here: a call that runs nothing should not wait for it.
        from lesslib.runner import forked

        forked.fork_kernels()
    for place, notebook in enumerate(plan.todo, 1):
        head = f"[{place}/{len(plan.todo)}] {notebook.number} {notebook.title}"
        outcome = run_one(plan, notebook, head)
        plan.outcomes[notebook.name] = outcome
        if outcome.state == FAILED and not plan.options.keep_going:
            break


def run_one(plan: Plan, notebook: Notebook, head: str) -> Outcome:
    """Execute a notebook and stamp it, or tell why it failed; `head` stands before its progress."""
    home = plan.run_log.home
    options = plan.options
    out = home / "notebooks" / notebook.path.name
    parameters = {"profile": plan.profile.name, "seed": options.seed}
    if options.refresh:
        # It runs as it stands: papermill would add a cell for parameters.
        parameters = {}
    begun = time.time()
    try:
        with watching(head, home / PROGRESS):
            executed = execute(notebook, out, parameters)
    # of papermill, of nbclient, or of a disk that refuses
    except Exception as error:
        rerun = f"{plan.command} --only {notebook.number}"
        print(failure_report(error, out, rerun), flush=True)
        return Outcome(FAILED, time.time() - begun)
    outcome = Outcome(DONE, time.time() - begun, verdicts_of(executed))
    if options.refresh:
        folder = notebook.path.parent if plan.profile.name == "tiny" else home / "executed"
        write_back(notebook, executed, plan.profile.name, folder / notebook.path.name)
    if not options.from_results:
        plan.run_log.add(notebook, outcome)
    return outcome
