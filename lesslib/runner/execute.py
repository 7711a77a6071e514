"""Execute a notebook with papermill; write its outputs back, or tell why it failed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lesslib.runner.notebook import Notebook
from lesslib.util.files import write_bytes
from lesslib.util.paths import ROOT

# not inherited: the runner sets its own, and the kernel is this interpreter
PER_RUN = ("LESS_LEDGER", "LESS_FROM_RESULTS", "LESS_PROGRESS", "JUPYTER_PATH")
FOLDERS = ("LESS_DATA", "LESS_RESULTS", "LESS_MODELS")


def environment(profile: str, **more: str) -> dict[str, str]:
    """The environment of kernels, and `more`.

    It has absolute folders, this copy of lesslib, and this interpreter as the kernel python3.
    """
    variables = {name: value for name, value in os.environ.items() if name not in PER_RUN}
    for name in FOLDERS:
        if variables.get(name):
            variables[name] = os.path.abspath(variables[name])
    # At the long default, threads that share a busy core wait for each other for seconds.
    variables.setdefault("GOMP_SPINCOUNT", "1000")
    paths = [str(ROOT)]
    if variables.get("PYTHONPATH"):
        paths.append(variables["PYTHONPATH"])
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    variables["LESS_PROFILE"] = profile
    variables["JUPYTER_PREFER_ENV_PATH"] = "1"
    return variables | more


def execute(notebook: Notebook, out: Path, parameters: dict[str, Any]) -> Any:
    """The executed notebook, also written to `out`. Raises papermill's and nbclient's errors."""
    # Imported here: a call that runs nothing should not wait for them.
    import papermill
    from traitlets.config import Config

    out.parent.mkdir(parents=True, exist_ok=True)
    return papermill.execute_notebook(
        notebook.path,
        out,
        parameters,
        kernel_name="python3",
        language="python",
        cwd=ROOT,
        progress_bar=False,
        record_timing=False,
        coalesce_streams=True,
        shutdown_kernel="immediate",
        config=Config({"KernelManager": {"transport_encryption": "auto"}}),
    )


def verdicts_of(executed: Any) -> list[str]:
    """The lines that the verdict cells of an executed notebook printed."""
    text = ""
    for cell in executed.cells:
        if "nbval-check-output" in cell.metadata.get("tags", []):
            text += "".join(o.text for o in cell.outputs if o.output_type == "stream")
    return text.splitlines()


def write_back(notebook: Notebook, executed: Any, profile: str, path: Path) -> None:
    """Write a notebook with its outputs to `path`, without times and other traces of a machine."""
    import nbformat

    for cell in executed.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    written = {"executed": notebook.sha256, "profile": profile}
    executed.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "lesslib": vars(notebook.declares) | written,
        }
    )
    write_bytes(path, (nbformat.writes(executed).rstrip("\n") + "\n").encode())


def failure_report(error: Exception, out: Path, rerun: str) -> str:
    """What a person needs: the cell, its error, the file to open and the command to run again."""
    number, source = last_begun_cell(out)
    shown = "".join(f"    | {line}\n" for line in source.splitlines())
    # errors of a cell carry the name and the value of what was raised in the kernel
    name = getattr(error, "ename", type(error).__name__)
    value = getattr(error, "evalue", error)
    hint = ""
    if type(error).__name__ == "DeadKernelError":
        hint = " (most often: memory ran out)"
    return (
        f"FAILED  {out.stem}, cell In [{number or ' '}]\n"
        f"{shown}"
        f"error   {name}: {value}{hint}\n"
        f"open    {out}\n"
        f"rerun   {rerun}"
    )


def last_begun_cell(out: Path) -> tuple[int | None, str]:
    """(execution count, source) of the last code cell that papermill began, (None, "") for none."""
    if not out.is_file():
        return None, ""
    begun = []
    for cell in json.loads(out.read_text("utf-8"))["cells"]:
        is_code = cell["cell_type"] == "code"
        if is_code and cell["metadata"].get("papermill", {}).get("start_time"):
            begun.append(cell)
    if not begun:
        return None, ""
    return begun[-1]["execution_count"], "".join(begun[-1]["source"])
