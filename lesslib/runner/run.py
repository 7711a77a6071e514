"""Run the notebooks. One that is up to date is left alone, one that was interrupted resumes, and what would fail later for
want of data, a model, disk or memory is said before anything is computed."""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lesslib.profiles import (
    PROFILES,
    Profile,
    get_limit,
    get_profile,
    get_tasks,
    results_dir,
    roles,
)
from lesslib.reporting.results import read_ledger
from lesslib.util.files import check_writable, write_bytes, write_json
from lesslib.util.paths import ROOT
from lesslib.util.progress import minutes

NOTEBOOKS = ROOT / "notebooks"
QUIET_SECONDS = 30.0  # between two lines of progress where there is no terminal


class Notebook:
    """A file of notebooks/: number, title and paper item from its first line, code, the notebooks whose files it reads; how it went."""

    def __init__(self, path: Path) -> None:
        node = json.loads(path.read_text("utf-8"))
        self.path, self.name, self.number = path, path.stem, path.stem.split("_")[0]
        self.needs: list[str] = node["metadata"].get("lesslib", {}).get("needs", [])
        heading = "".join(node["cells"][0]["source"]).split("\n")[0]
        self.title, _, self.item = (
            heading.removeprefix(f"# {self.number} · ").removesuffix(")").partition(" (")
        )
        self.cells = [
            ("".join(c["source"]), c["metadata"].get("tags", []))
            for c in node["cells"]
            if c["cell_type"] == "code"
        ]
        self.sha256 = hashlib.sha256(json.dumps(self.cells).encode()).hexdigest()
        self.state, self.seconds, self.verdicts = "to run", 0.0, list[str]()

    def problem(self) -> str | None:
        """What is wrong with its `parameters` cell; papermill would only warn, and run with the notebook's own values."""
        sources = [source for source, tags in self.cells if "parameters" in tags]
        names = {
            n.id
            for n in ast.walk(ast.parse("\n".join(sources)))
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        if len(sources) == 1 and names == {"profile", "seed"}:
            return None
        return f"{self.path.name}: {len(sources)} parameters cells set {sorted(names)}; tag one, which sets profile and seed, no more"


class Record:
    """results/<profile>/.run.json, by notebook: the key of its last run on this machine, seconds, verdicts, result files it left."""

    def __init__(self, profile: str, seed: int) -> None:
        self.home, self.stamps = results_dir(profile).absolute(), dict[str, dict]()
        with contextlib.suppress(OSError, ValueError):
            self.stamps |= json.loads((self.home / ".run.json").read_text())
        data, package = os.environ.get("LESS_DATA"), ROOT / "lesslib"
        texts = (
            [(p.name, p.stat().st_size) for p in sorted(Path(data).glob("*.gz"))] if data else []
        )
        files = sorted(
            p for p in package.rglob("*") if p.is_file() and p.suffix not in (".pyc", ".tmp")
        )
        code = [
            (str(p.relative_to(package)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files
        ]
        self.key = hashlib.sha256(
            repr((profile, seed, data, texts, code)).encode()
        ).hexdigest()  # all but a notebook's own code

    def up_to_date(self, notebook: Notebook) -> bool:
        stamp = self.stamps.get(notebook.name, {"key": None, "files": []})
        return stamp["key"] == [notebook.sha256, self.key] and all(
            (self.home / f).is_file() for f in stamp["files"]
        )

    def add(self, n: Notebook) -> None:
        files = [f"notebooks/{n.path.name}", *sorted(p.name for p in self.home.glob("[!.]*.json"))]
        self.stamps[n.name] = {
            "key": [n.sha256, self.key],
            "seconds": n.seconds,
            "verdicts": n.verdicts,
            "files": files,
        }
        write_json(self.home / ".run.json", self.stamps)

    def forget(self, notebooks: list[Notebook]) -> None:
        """--fresh: drop their stamps, the points of the experiments that they call, and train the kernels anew if they train them."""
        for notebook in notebooks:
            self.stamps.pop(notebook.name, None)
        write_json(self.home / ".run.json", self.stamps)
        calls = re.compile(r"(?:experiments|downstream|serving)\.(\w+)\(")
        experiments = tuple(
            e for n in notebooks for source, _ in n.cells for e in calls.findall(source)
        )
        if points := read_ledger(ledger := self.home / ".ledger.json"):
            write_json(
                ledger, [point for point in points if not point.startswith(experiments)]
            )  # "summarization" has a record by model
        if "training_kernels" in experiments:
            shutil.rmtree(self.home / "kernels", ignore_errors=True)
            (self.home / "kernels").mkdir(
                parents=True, exist_ok=True
            )  # from now on this profile's own are trained and used


def preflight(
    profile: Profile, record: Record, todo: list[Notebook], compute: bool
) -> Iterator[str]:
    """Every reason why running `todo` would fail, each with its fix."""
    home = record.home
    try:
        check_writable(home)
        if compute and (free := shutil.disk_usage(home).free / 2**30) < profile.disk_gib:
            yield f"{home}: {free:.1f} GiB free, profile {profile.name} needs {profile.disk_gib:g}; free some, or set LESS_RESULTS"
    except OSError as e:
        yield e.strerror or str(e)
    if lacking := [
        p
        for p in ("torch", "transformers", "papermill", "ipykernel", "matplotlib")
        if importlib.util.find_spec(p) is None
    ]:
        yield f"{sys.executable} lacks {', '.join(lacking)}; install what environment.yml lists, or unset LESS_PYTHON"
    if not compute and not any(home.glob("[!.]*.json")):
        yield f"{home} holds no recorded results; run once without --from-results"
    if lacking or not compute:
        return
    there = {name.split("_")[0] for name in record.stamps} | {n.number for n in todo}
    for n in todo if not profile.quick else []:  # quick profiles use the kernels in the package
        yield from (
            f"{n.name} reads what {other} computes; run --only {other},{n.number}"
            for other in n.needs
            if other not in there
        )
    folders = ((name, os.environ.get(name)) for name in ("LESS_DATA", "LESS_MODELS"))
    yield from (
        f"{name}={f} is not a folder; correct it, or unset it to use the hub"
        for name, f in folders
        if f and not Path(f).is_dir()
    )
    import torch  # here: the answer "up to date" needs none of these
    from huggingface_hub import HfApi, try_to_load_from_cache

    from lesslib.data import hub_reachable, missing, tasks
    from lesslib.models import folder_of

    gpu = (
        torch.cuda.get_device_properties(0).total_memory / 2**30
        if profile.gpu_gib and torch.cuda.is_available()
        else 0.0
    )
    if gpu < profile.gpu_gib:
        yield f"profile {profile.name} needs a GPU of {profile.gpu_gib:g} GiB, here: {gpu:.0f}; use --profile wild or tiny"
    code = "".join(source for n in todo for source, _ in n.cells)
    if "serving." in code and "experiments." not in code and "downstream." not in code:
        return  # random weights, random tokens
    yield from filter(None, map(missing, dict.fromkeys(profile.evaluation + profile.training)))
    if "downstream." in code:
        t = get_tasks(profile.name)
        yield from filter(
            None, map(tasks.missing, [x[0] for x in t.classification] + [x[0] for x in t.summaries])
        )
    readers, of_text = roles(profile.name, tasks=True), roles(profile.name)["falcon"]
    used = [
        m
        for role, m in readers.items()
        if f'"{role}", seed' in code or (role == "llama" and "downstream." in code)
    ]
    for model in dict.fromkeys(
        [profile.model, *used, *[of_text] * ("multi_query(" in code or "attention_maps(" in code)]
    ):
        if folder_of(model) or isinstance(try_to_load_from_cache(model, "config.json"), str):
            continue
        try:
            if hub_reachable():
                HfApi().auth_check(model)
            else:
                yield f"model {model!r}: not on this machine, and no hub; connect, or set LESS_MODELS to a folder that holds it"
        except Exception as e:  # of the hub's client: gated, not found, no token
            yield f"model {model!r}: {str(e).strip().splitlines()[0]}; accept its licence on the hub and log in with `hf auth login`"


@contextlib.contextmanager
def watching(head: str, file: Path) -> Iterator[None]:
    """Show `head` and the words that `progress` writes to `file`: on a terminal in a line that renews itself, else a line now and then."""
    file.unlink(missing_ok=True)
    stop, terminal, begun = threading.Event(), sys.stdout.isatty(), time.time()

    def show() -> None:
        while not stop.is_set():
            words = [head, minutes(time.time() - begun)]
            with contextlib.suppress(OSError, ValueError):
                words += json.loads(file.read_text())
            line = " · ".join(words)
            print(
                f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}"
                if terminal
                else f"{line}\n",
                end="",
                flush=True,
            )
            stop.wait(0.5 if terminal else QUIET_SECONDS)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        print("\r\033[K" if terminal else "", end="", flush=True)


def environment(profile: str, **more: str) -> dict[str, str]:
    """For kernels: absolute folders, this copy of lesslib, and this interpreter under the kernel name python3."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LESS_LEDGER", "LESS_FROM_RESULTS", "LESS_PROGRESS", "JUPYTER_PATH")
    }
    env |= {
        name: os.path.abspath(env[name])
        for name in ("LESS_DATA", "LESS_RESULTS", "LESS_MODELS")
        if env.get(name)
    }
    env.setdefault(
        "GOMP_SPINCOUNT", "1000"
    )  # at the long default, threads that share a busy core wait for each other for seconds
    path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return (
        env | {"LESS_PROFILE": profile, "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"} | more
    )


def execute(notebook: Notebook, out: Path, parameters: dict[str, Any]) -> Any:
    """The executed notebook, which is also written to `out`. Raises papermill's and nbclient's errors."""
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


def write_back(notebook: Notebook, executed: Any, profile: str, path: Path) -> None:
    """--refresh: write the notebook with its outputs to `path`, without times and other traces of this machine."""
    import nbformat

    for cell in executed.cells:
        cell.metadata = nbformat.from_dict(
            {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
        )
    executed.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "lesslib": {"needs": notebook.needs, "executed": notebook.sha256, "profile": profile},
        }
    )
    write_bytes(path, (nbformat.writes(executed).rstrip("\n") + "\n").encode())


def failure(error: Exception, out: Path, rerun: str) -> str:
    """What a person needs: the cell, its error, the file to open and the command to run again."""
    cells = json.loads(out.read_text("utf-8"))["cells"] if out.is_file() else []
    begun = [
        c
        for c in cells
        if c["cell_type"] == "code" and c["metadata"].get("papermill", {}).get("start_time")
    ]
    number, source = (
        (begun[-1]["execution_count"], "".join(begun[-1]["source"])) if begun else (None, "")
    )
    hint = " (most often: memory ran out)" if type(error).__name__ == "DeadKernelError" else ""
    what = (
        f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}{hint}"
    )
    shown = "".join(f"    | {line}\n" for line in source.splitlines())
    return f"FAILED  {out.stem}, cell In [{number or ' '}]\n{shown}error   {what}\nopen    {out}\nrerun   {rerun}"


def show(notebooks: list[Notebook]) -> None:
    table = [
        (n.number, n.title, n.item, n.state, minutes(n.seconds) if n.seconds else "")
        for n in notebooks
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for n, cells in zip(notebooks, table, strict=True):
        print("  ".join(map(str.ljust, cells, widths)).rstrip(), *n.verdicts, sep="\n      ")


def run(
    profile: str, record: Record, todo: list[Notebook], options: argparse.Namespace, command: str
) -> None:
    """Execute `todo`, and note in each notebook that was reached how it went."""
    progress, ledger = (
        record.home / ".progress.json",
        {"LESS_LEDGER": str(record.home / ".ledger.json")},
    )
    env = environment(
        profile,
        LESS_PROGRESS=str(progress),
        **({"LESS_FROM_RESULTS": "1"} if options.from_results else ledger),
    )
    if options.seed:
        (record.home / "kernels").mkdir(exist_ok=True)  # the package carries those of seed 0
    os.environ.clear()  # kernels inherit this process's environment
    os.environ.update(env)
    for i, n in enumerate(todo, 1):
        begun, out = time.time(), record.home / "notebooks" / n.path.name
        try:
            with watching(f"[{i}/{len(todo)}] {n.number} {n.title}", progress):
                executed = execute(
                    n, out, {} if options.refresh else {"profile": profile, "seed": options.seed}
                )
        except Exception as e:  # of papermill, of nbclient, or of a disk that refuses
            print(failure(e, out, f"{command} --only {n.number}"), flush=True)
            n.state, n.seconds, n.verdicts = "FAILED", time.time() - begun, []
            if not options.keep_going:
                break
            continue
        checked = [c for c in executed.cells if "nbval-check-output" in c.metadata.get("tags", [])]
        n.verdicts = "".join(
            o.text for c in checked for o in c.outputs if o.output_type == "stream"
        ).splitlines()
        n.state, n.seconds = "done", time.time() - begun
        if options.refresh:
            write_back(
                n,
                executed,
                profile,
                n.path if profile == "tiny" else record.home / "executed" / n.path.name,
            )
        if not options.from_results:
            record.add(n)


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("./run_all.sh", description=__doc__, allow_abbrev=False)
    p.add_argument("--profile", help=f"{', '.join(PROFILES)} (default: $LESS_PROFILE, or tiny)")
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    p.add_argument(
        "--limit",
        metavar="N",
        help="try a profile out: at most N windows, examples and epochs; results/PROFILE-limitN",
    )
    p.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="03",
        help="these notebooks; may be repeated, or a list with commas",
    )
    either = p.add_mutually_exclusive_group()
    either.add_argument(
        "--fresh", action="store_true", help="compute again what was computed on this machine"
    )
    either.add_argument(
        "--from-results",
        action="store_true",
        help="redraw figures and tables from the recorded results, without compute",
    )
    p.add_argument("--keep-going", action="store_true", help="go on after a notebook that fails")
    p.add_argument(
        "--refresh",
        action="store_true",
        help="also write notebooks with outputs: to notebooks/, or results/PROFILE/executed",
    )
    p.add_argument("--list", action="store_true", help="show the notebooks and what would be run")
    p.add_argument(
        "--test",
        action="store_true",
        help="run the tests, on up to 4 cores; further arguments go to pytest",
    )
    p.add_argument(
        "--lab",
        action="store_true",
        help="open JupyterLab on the notebooks; further arguments go to it",
    )
    o, extra = p.parse_known_args(arguments)
    if extra and not (o.test or o.lab):
        p.error(f"unknown argument {extra[0]}")
    if o.refresh and o.seed:
        p.error("--refresh takes the notebooks' own seed, 0")
    os.environ["LESS_LIMIT"] = "" if o.test else o.limit or os.environ.get("LESS_LIMIT", "")
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    if o.test:  # pytest on tests/ and, under `smoke`, on the verdict cells of the notebooks
        how = [
            "--nbval-lax",
            "--nbval-current-env",
            "-n",
            "auto",
            "--maxprocesses",
            "4",
            "--dist",
            "loadfile",
        ]  # by file: cells in order
        command = [sys.executable, "-m", "pytest", "tests", *map(str, paths), *how, *extra]
        with tempfile.TemporaryDirectory() as folder:
            return subprocess.call(command, cwd=ROOT, env=environment("smoke", LESS_RESULTS=folder))
    notebooks = {n.number: n for n in map(Notebook, paths)}
    wanted = [w for only in o.only for w in only.split(",") if w]
    chosen = [n for number, n in notebooks.items() if number in wanted or not wanted]
    problems = [
        f"--only {w}: no such notebook; there are {', '.join(notebooks)}"
        for w in wanted
        if w not in notebooks
    ]
    problems += [why for n in chosen if (why := n.problem()) is not None]
    try:
        profile = get_profile(o.profile)
        record = Record(profile.name, o.seed)
        todo = [
            n for n in chosen if o.fresh or o.from_results or o.refresh or not record.up_to_date(n)
        ]
        problems += (
            preflight(profile, record, todo, not o.from_results)
            if todo and not (o.list or o.lab)
            else []
        )
        if o.fresh and not (o.list or o.lab or problems):
            record.forget(chosen)
    except ValueError as e:
        problems.append(str(e))
    if problems:
        print("\n  - ".join(["nothing was run:", *problems]), file=sys.stderr)
        return 2
    if o.lab:
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            str(NOTEBOOKS),
            "--KernelManager.transport_encryption=auto",
            *extra,
        ]
        return subprocess.call(command, cwd=ROOT, env=environment(profile.name))
    given = {
        "--from-results": o.from_results,
        "--refresh": o.refresh,
        f"--seed {o.seed}": o.seed,
        f"--limit {get_limit()}": get_limit(),
    }
    again = " ".join(
        ["./run_all.sh", "--profile", profile.name, *(flag for flag, on in given.items() if on)]
    )
    for n in chosen:
        n.state = "to run" if n in todo else "up to date"
        if stamp := record.stamps.get(n.name):
            n.seconds, n.verdicts = stamp["seconds"], [] if o.list else stamp["verdicts"]
    try:
        if not o.list:
            run(profile.name, record, todo, o, again)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: every finished point is kept, {again} goes on from there",
            file=sys.stderr,
        )
        return 130
    show(chosen)
    if failed := [n.number for n in chosen if n.state == "FAILED"]:
        print(f"\nfailed: {', '.join(failed)}. After the repair, {again} goes on from there.")
    return 1 if failed else 0
