"""The runner and run_all.sh: what is run or left alone, what is said when something is wrong."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Callable
from multiprocessing import get_start_method
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from packaging.requirements import Requirement

from lesslib import data, profiles
from lesslib.runner import commands, forked, kernels, progress_line
from lesslib.runner import main as runner
from lesslib.runner.notebook import Notebook
from lesslib.runner.run_log import Outcome, RunLog
from lesslib.util.files import write_json
from lesslib.util.paths import ROOT

PARAMETERS = 'import os\n\nprofile = os.environ.get("LESS_PROFILE", "tiny")\nseed = 0'
ELSEWHERE = (
    "import sys, pathlib; from lesslib.runner import main as runner; "
    "runner.NOTEBOOKS = pathlib.Path('{}'); "
)
VERDICT = ("print(f'holds: {profile}, seed {seed}')", "nbval-check-output")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty folder of notebooks and an empty results folder.

    main() leaves its settings in os.environ, so that is put back.
    """
    before = dict(os.environ)
    for name in ("LESS_DATA", "LESS_PROFILE", "LESS_LEDGER", "LESS_FROM_RESULTS", "LESS_PROGRESS"):
        os.environ.pop(name, None)
    os.environ["LESS_RESULTS"] = str(tmp_path / "results")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(commands, "prepare_kernels", lambda *arguments: None)
    # These notebooks import nothing that would be worth loading before.
    monkeypatch.setattr(forked, "fork_kernels", lambda: None)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def declare(**fields: list[str]) -> dict[str, list[str]]:
    """The `metadata.lesslib` of a notebook: these fields, and [] for the others."""
    empty = {"needs": [], "experiments": [], "text_models": [], "task_models": []}
    return empty | fields


def write(
    home: Path,
    name: str,
    *cells: str | tuple[str, ...],
    title: str = "A title (Table 1)",
    parameters: str = PARAMETERS,
    **declared: list[str],
) -> None:
    """Write notebooks/<name>.ipynb; a cell is its source, or (source, tags ...)."""
    node = nbformat.v4.new_notebook(metadata={"lesslib": declare(**declared)})
    node.cells = [
        nbformat.v4.new_markdown_cell(f"# {name[:2]} · {title}\n\nText."),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
    ]
    for cell in cells:
        source, *tags = [cell] if isinstance(cell, str) else cell
        node.cells.append(
            nbformat.v4.new_code_cell(textwrap.dedent(source).strip(), metadata={"tags": tags})
        )
    for i, cell in enumerate(node.cells):
        cell.id = f"cell-{i}"
    nbformat.write(node, home / "notebooks" / f"{name}.ipynb")


def out(home: Path, name: str, profile: str = "smoke") -> str:
    """The text that the executed notebook printed."""
    node = nbformat.read(home / "results" / profile / "notebooks" / f"{name}.ipynb", 4)
    text = ""
    for cell in node.cells:
        if cell.cell_type == "code":
            text += "".join(o.text for o in cell.outputs if o.output_type == "stream")
    return text


def main(*arguments: str) -> int:
    return runner.main(["--profile", "smoke", *arguments])


def never(*_):
    raise AssertionError("nothing should be executed")


# ---------------------------------------------------------------- fail, mend, resume, up to date
def test_a_failure_names_cell_error_file_and_command_and_the_mended_run_goes_on_from_there(
    home, capfd, monkeypatch
):
    write(home, "00_one", VERDICT)
    write(
        home,
        "01_two",
        "x = 1",
        "first = 1\nraise ValueError('a bad number')",
        title="No paper item",
    )
    write(home, "02_three", VERDICT)
    assert main() == 1
    printed = capfd.readouterr().out
    assert (
        "FAILED  01_two, cell In [4]\n    | first = 1\n    | raise ValueError('a bad number')\n"
        in printed
    )
    assert "\nerror   ValueError: a bad number\n" in printed
    opened = Path(re.search(r"^open +(.*)$", printed, re.M)[1])
    assert "a bad number" in opened.read_text()
    assert "rerun   ./run_all.sh --profile smoke --only 01\n" in printed
    # it stopped
    assert not (home / "results/smoke/notebooks/02_three.ipynb").exists()
    write(home, "01_two", "x = 1", title="No paper item")
    assert main("--only", "01") == 0
    capfd.readouterr()
    assert main() == 0
    printed, errors = capfd.readouterr()
    assert re.search(r"00  A title +Table 1  up to date", printed)
    assert re.search(r"02  A title +Table 1  done", printed)
    assert "holds: smoke, seed 0" in printed
    # of kernels, too: no warning about transport, frozen modules or unknown parameters
    assert errors == ""
    monkeypatch.setattr(commands, "execute", never)
    assert main() == 0
    assert capfd.readouterr().out.count("up to date") == 3
    # a second call is quick: it imports no torch
    code = ELSEWHERE.format(runner.NOTEBOOKS) + (
        "assert runner.main(['--profile', 'smoke']) == 0; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("change", ["notebook", "seed", "data", "result", "executed"])
def test_a_changed_notebook_seed_or_data_and_a_lost_result_are_run_again(home, change):
    write(home, "00_one", VERDICT)
    run_log = RunLog("smoke", 0)
    notebook = Notebook.load(runner.NOTEBOOKS / "00_one.ipynb")
    for file in ("one.json", "notebooks/00_one.ipynb"):
        write_json(run_log.home / file, {})
    assert not run_log.is_up_to_date(notebook)
    run_log.add(notebook, Outcome())
    assert RunLog("smoke", 0).is_up_to_date(notebook)
    if change == "notebook":
        write(home, "00_one", VERDICT, "x = 1")
    elif change == "data":
        os.environ["LESS_DATA"] = str(home)
    elif change == "result":
        (run_log.home / "one.json").unlink()
    elif change == "executed":
        (run_log.home / "notebooks/00_one.ipynb").unlink()
    notebook = Notebook.load(runner.NOTEBOOKS / "00_one.ipynb")
    assert not RunLog("smoke", 1 if change == "seed" else 0).is_up_to_date(notebook)


def test_keep_going_runs_the_rest_and_lists_the_failures(home, capfd):
    write(home, "00_one", "import os\nos._exit(3)")
    write(home, "01_two", VERDICT)
    assert main("--keep-going") == 1
    printed = capfd.readouterr().out
    assert "Kernel died (most often: memory ran out)" in printed
    assert "failed: 00. " in printed
    assert out(home, "01_two") == "holds: smoke, seed 0\n"
    assert set(RunLog("smoke", 0).stamps) == {"01_two"}


SWEEP = """
from pathlib import Path
from lesslib.experiments import Experiment, Point

class Squares(Experiment):
    name = "squares"

    def points(self):
        return [Point("one", {{"x": 1}}), Point("two", {{"x": 2}})]

    def compute(self, point):
        x = point.parameters["x"]
        if x == 2 and not Path({home!r}, "mended").exists():
            raise RuntimeError("interrupted")
        print("computed", x)
        return {{"square": x * x}}

Squares(profile, seed).run()
"""


def test_points_computed_here_are_kept_recorded_ones_of_a_clone_are_not_and_fresh_forgets(home):
    write(home, "00_one", SWEEP.format(home=str(home)), experiments=["squares"])
    assert main() == 1
    assert out(home, "00_one") == "computed 1\n"
    (home / "mended").touch()
    assert main() == 0
    # the first point was kept
    assert out(home, "00_one") == "computed 2\n"
    # as in a new clone, which has the recorded squares.json
    for name in (".ledger.json", ".run.json"):
        (home / "results/smoke" / name).unlink()
    assert main() == 0
    assert out(home, "00_one") == "computed 1\ncomputed 2\n"
    assert main("--refresh") == 0
    assert out(home, "00_one") == ""
    assert main("--fresh") == 0
    assert out(home, "00_one") == "computed 1\ncomputed 2\n"


def test_fresh_forgets_only_the_chosen_notebooks_and_kernels_only_with_their_training(home):
    write(home, "02_train", experiments=["training_kernels"])
    write(home, "03_use", experiments=["squares"])
    run_log = RunLog("smoke", 0)
    train, use = (Notebook.load(path) for path in sorted(runner.NOTEBOOKS.iterdir()))
    ledger = run_log.home / ".ledger.json"
    kernels = run_log.home / "kernels"
    write_json(kernels / "k.json", {})
    write_json(ledger, ["squares:a:1", "squares_of_others:a:3", "training_kernels:a:2"])
    for notebook in (train, use):
        run_log.add(notebook, Outcome())
    run_log.forget([use])
    assert json.loads(ledger.read_text()) == ["squares_of_others:a:3", "training_kernels:a:2"]
    assert set(RunLog("smoke", 0).stamps) == {"02_train"}
    assert (kernels / "k.json").exists()
    run_log.forget([train])
    assert json.loads(ledger.read_text()) == ["squares_of_others:a:3"]
    # there, so that the package's no longer do, and none is left
    assert list(kernels.iterdir()) == []


def test_ctrl_c_says_how_to_go_on(home):
    write(
        home,
        "00_one",
        f"import time, pathlib\npathlib.Path({str(home / 'begun')!r}).touch()\ntime.sleep(60)",
    )
    code = ELSEWHERE.format(runner.NOTEBOOKS) + "sys.exit(runner.main(['--seed', '1']))"

    def restore() -> None:
        # a shell may have it ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore,
    )
    while not (home / "begun").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == (
        "\ninterrupted: every finished point is kept, "
        "./run_all.sh --profile tiny --seed 1 goes on from there\n"
    )


# ---------------------------------------------------------------- before anything is computed
def test_every_problem_is_said_at_once(home, capsys, monkeypatch):
    odd = profiles.Profile(
        "odd",
        "nowhere",
        model="no-such",
        evaluation=("books",),
        training=("poems",),
        disk_gib=1e9,
        gpu_gib=1e6,
    )
    monkeypatch.setitem(profiles.PROFILES, "odd", odd)
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(commands, "execute", never)
    os.environ["LESS_DATA"] = str(home / "nowhere")
    write(home, "00_one", parameters="profle = 'tiny'\nseed = 0")
    write(home, "01_two", parameters="import os")
    write(home, "03_four", needs=["02"], text_models=["llama"])
    assert runner.main(["--profile", "odd", "--only", "00,01,03", "--only", "77"]) == 2
    printed = capsys.readouterr().err
    for part in (
        "--only 77: no such notebook; there are 00, 01, 03",
        "00_one.ipynb: 1 parameters cells set ['profle', 'seed']; tag one",
        "01_two.ipynb: 1 parameters cells set []; tag one",
        "profile odd needs 1e+09; free some",
        "03_four reads what 02 computes; run --only 02,03",
        f"LESS_DATA={home / 'nowhere'} is not a folder;",
        "corpus 'books': books_heldout.jsonl.gz is not in $LESS_DATA",
        "unknown corpus 'poems'",
        "model 'no-such': not on this machine",
        "needs a GPU of 1e+06 GiB",
    ):
        assert part in printed
    assert printed.count("\n  - ") == 10
    assert list((home / "results" / "odd").iterdir()) == []


def test_an_unknown_profile_and_an_unwritable_results_folder_are_refused(home, capsys):
    write(home, "00_one")
    assert runner.main(["--profile", "huge", "--only", "5"]) == 2
    printed = capsys.readouterr().err
    assert "unknown profile 'huge': choose from smoke, tiny, wild, paper" in printed
    assert "--only 5: no such notebook; there are 00" in printed
    (home / "file").touch()
    os.environ["LESS_RESULTS"] = str(home / "file" / "below")
    assert main() == 2
    assert "set LESS_RESULTS to another folder" in capsys.readouterr().err


@pytest.mark.parametrize("cells", [0, 2])
def test_a_notebook_has_one_parameters_cell(home, capsys, cells):
    write(home, "00_one", *[(PARAMETERS, "parameters")] * (cells - 1), parameters=PARAMETERS)
    if not cells:
        path = runner.NOTEBOOKS / "00_one.ipynb"
        path.write_text(path.read_text().replace('"parameters"', '"other"'))
    assert main() == 2
    names = ["profile", "seed"] if cells else []
    message = f"00_one.ipynb: {cells} parameters cells set {names}; tag one"
    assert message in capsys.readouterr().err


NOT_DECLARED = declare()
del NOT_DECLARED["experiments"]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({}, "metadata.lesslib lacks 'needs'; add it as a list, [] for none"),
        (NOT_DECLARED, "metadata.lesslib lacks 'experiments'; add it as a list"),
        (declare(needs="02"), "metadata.lesslib.needs is '02'; give a list of words"),
        (declare(needs=[2]), "metadata.lesslib.needs is [2]; give a list of words"),
        (declare(uses=[]), "metadata.lesslib has an unknown field 'uses'; there are needs, exp"),
        (
            declare(task_models=["gpt"]),
            "metadata.lesslib.task_models names 'gpt'; choose from llama, wide, falcon",
        ),
    ],
)
def test_what_a_notebook_declares_is_checked(home, capsys, declared, message):
    write(home, "00_one")
    write(home, "01_two")
    path = runner.NOTEBOOKS / "01_two.ipynb"
    node = json.loads(path.read_text())
    node["metadata"]["lesslib"] = declared
    write_json(path, node)
    assert main("--list") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"nothing was run:\n  - 01_two.ipynb: {message}")
    assert printed.count("\n") == 2
    # it stands in the way of no other
    assert main("--list", "--only", "00") == 0


@pytest.mark.parametrize("text", ["", '{"cells": []}'])
def test_a_file_that_is_no_notebook_is_named(home, capsys, text):
    write(home, "00_one")
    (runner.NOTEBOOKS / "01_two.ipynb").write_text(text)
    assert main("--list") == 2
    assert "\n  - 01_two.ipynb is no notebook with a title" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profil", "tiny"], "unknown argument --profil"),
        (
            ["--fresh", "--from-results"],
            "argument --from-results: not allowed with argument --fresh",
        ),
        (["--refresh", "--seed", "1"], "--refresh takes the notebooks' own seed"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        runner.main(arguments)
    assert message in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(home, capsys, monkeypatch):
    write(home, "00_one")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "papermill" or None)
    assert main() == 2
    message = f"{sys.executable} lacks papermill; install what environment.yml lists"
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- the ways to run
def test_from_results_needs_recorded_results_and_computes_nothing(home, capsys):
    write(home, "00_one", "print(os.environ['LESS_FROM_RESULTS'], os.environ.get('LESS_LEDGER'))")
    assert main("--from-results") == 2
    assert "holds no recorded results; run once without --from-results" in capsys.readouterr().err
    write_json(home / "results/smoke/squares.json", {"points": {}})
    os.environ["LESS_LEDGER"] = "left over"
    assert main("--from-results") == 0
    assert out(home, "00_one") == "1 None\n"
    assert RunLog("smoke", 0).stamps == {}


def test_notebooks_run_in_this_interpreter_at_the_root_whatever_kernels_are_installed(home):
    kernel = home / "share/kernels/python3/kernel.json"
    write_json(
        kernel,
        {
            "argv": ["/bin/false", "{connection_file}"],
            "display_name": "another",
            "language": "python",
        },
    )
    os.environ |= {"JUPYTER_PATH": str(home / "share"), "JUPYTER_DATA_DIR": str(home / "share")}
    where = "sys.executable, os.getcwd(), lesslib.__file__"
    parameters = "profile, seed, os.environ['LESS_PROFILE']"
    write(home, "00_one", f"import sys, lesslib\nprint({where}, {parameters}, sep='\\n')")
    assert main("--seed", "3") == 0
    assert out(home, "00_one").splitlines() == [
        sys.executable,
        str(ROOT),
        str(ROOT / "lesslib/__init__.py"),
        "smoke",
        "3",
        "smoke",
    ]


@pytest.mark.parametrize("profile", ["tiny", "smoke"])
def test_refresh_writes_outputs_back_the_same_bytes_each_time(home, profile):
    write(
        home,
        "00_one",
        "import time\nprint('a')\ntime.sleep(0.3)\nprint('b')\n1 + 1",
        VERDICT,
        needs=["00"],
        text_models=["llama"],
    )
    source = runner.NOTEBOOKS / "00_one.ipynb"
    given = source.read_bytes()
    sha256 = Notebook.load(source).sha256
    path = source if profile == "tiny" else home / "results/smoke/executed/00_one.ipynb"
    assert runner.main(["--profile", profile, "--refresh"]) == 0
    first = path.read_bytes()
    assert runner.main(["--profile", profile, "--refresh"]) == 0
    assert path.read_bytes() == first
    assert (source.read_bytes() == given) == (profile == "smoke")
    node = nbformat.reads(first.decode(), 4)
    assert [c.execution_count for c in node.cells if c.cell_type == "code"] == [1, 2, 3]
    assert [o.get("text") for o in node.cells[2].outputs] == ["a\nb\n", None]
    assert [c.metadata for c in node.cells] == [
        {},
        {"tags": ["parameters"]},
        {},
        {"tags": ["nbval-check-output"]},
    ]
    declared = declare(needs=["00"], text_models=["llama"])
    assert node.metadata.lesslib == declared | {"executed": sha256, "profile": profile}
    assert str(home) not in first.decode()


def test_list_shows_number_title_paper_item_state_and_time(home, capsys, monkeypatch):
    write(home, "00_one", title="First")
    write(home, "01_two", title="Second (Table 2, Figure 3)")
    run_log = RunLog("smoke", 0)
    write_json(run_log.home / "notebooks/01_two.ipynb", {})
    run_log.add(Notebook.load(runner.NOTEBOOKS / "01_two.ipynb"), Outcome(seconds=90.0))
    monkeypatch.setattr(commands, "execute", never)
    assert main("--list") == 0
    first, second = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert first == ["00", "First", "to run"]
    assert second == ["01", "Second", "Table 2, Figure 3", "up to date", "1.5 min"]


def test_progress_is_told_in_words(home, capsys, monkeypatch):
    monkeypatch.setattr(progress_line, "QUIET_SECONDS", 0.02)
    file = home / "progress.json"
    with progress_line.watching("[1/5] 03 Tables", file):
        write_json(file, ["tables 3/8", "windows 2/4", "about 2.5 min left"])
        time.sleep(0.3)
    printed = capsys.readouterr().out
    assert printed.startswith("[1/5] 03 Tables · 0 s")
    assert "[1/5] 03 Tables · 0 s · tables 3/8 · windows 2/4 · about 2.5 min left\n" in printed


def test_test_hands_over_to_pytest_under_smoke_with_results_elsewhere(home, monkeypatch):
    calls = []

    def call(command, cwd, env):
        calls.append((command, env))
        return 5

    monkeypatch.setattr(subprocess, "call", call)
    write(home, "00_one")
    os.environ["LESS_FROM_RESULTS"] = "1"
    assert runner.main(["--test", "-k", "policies"]) == 5
    assert runner.main(["--lab", "--profile", "wild", "--no-browser"]) == 5
    (pytest_command, env), (lab_command, lab_env) = calls
    assert pytest_command[1:4] == ["-m", "pytest", "tests"]
    how = [
        "--nbval-lax",
        "--nbval-current-env",
        "-n",
        "auto",
        "--maxprocesses",
        "4",
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
    ]
    assert pytest_command[4:] == [str(runner.NOTEBOOKS / "00_one.ipynb"), *how, "-k", "policies"]
    assert (env["LESS_PROFILE"], env.get("LESS_FROM_RESULTS")) == ("smoke", None)
    assert env["LESS_RESULTS"] != os.environ["LESS_RESULTS"]
    assert lab_command[1:4] == ["-m", "jupyterlab", str(runner.NOTEBOOKS)]
    assert (lab_command[-1], lab_env["LESS_PROFILE"]) == ("--no-browser", "wild")


def test_kernels_are_compiled_before_notebooks_that_compute_and_before_tests(home, monkeypatch):
    events = []

    def prepare(dtypes, variables):
        events.append(dtypes)
        assert variables["PYTHONPATH"].startswith(str(ROOT))

    def executed(notebook, out, parameters):
        events.append(notebook.number)
        write_json(out, {})
        return nbformat.v4.new_notebook()

    monkeypatch.setattr(commands, "prepare_kernels", prepare)
    monkeypatch.setattr(commands, "execute", executed)
    monkeypatch.setattr(subprocess, "call", lambda *args, **kwargs: events.append("pytest"))
    write(home, "00_one")
    write(home, "01_two")
    assert main() == 0
    # up to date; only listed; only drawn
    assert main() == 0
    assert main("--list") == 0
    write_json(home / "results/smoke/squares.json", {"points": {}})
    assert main("--from-results", "--only", "01") == 0
    runner.main(["--test"])
    assert events == [
        kernels.OF_NOTEBOOKS,
        "00",
        "01",
        "01",
        kernels.OF_TESTS,
        "pytest",
    ]


@pytest.mark.parametrize(
    ("form", "has_numba", "is_complete", "compiles"),
    [
        (None, True, False, True),
        ("cpu", True, False, True),
        (None, True, True, False),
        (None, False, False, False),
        ("torch", True, False, False),
        ("triton", True, False, False),
    ],
)
def test_kernels_are_compiled_in_a_process_of_its_own_unless_they_are(
    form, has_numba, is_complete, compiles, monkeypatch
):
    commands_run = []
    monkeypatch.setattr(kernels.kernel_cache, "has_numba", lambda: has_numba)
    monkeypatch.setattr(kernels.kernel_cache, "is_complete", lambda dtypes: is_complete)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: commands_run.append(words))
    monkeypatch.delenv("LESS_OPS", raising=False)
    if form is not None:
        monkeypatch.setenv("LESS_OPS", form)
    kernels.prepare_kernels(("float32", "float64"), {})
    expected = [[sys.executable, "-m", "lesslib.ops.cpu", "float32", "float64"]]
    assert commands_run == (expected if compiles else [])


# ---------------------------------------------------------------- forked kernels
FORKING = ELSEWHERE + "from lesslib.runner import forked; forked.PRELOADED[:] = {}; "


def start_forking(home: Path, preloaded: list[str]) -> subprocess.Popen:
    """The runner in a process of its own, with these modules loaded before kernels are forked."""
    code = FORKING.format(home / "notebooks", preloaded) + "sys.exit(runner.main())"
    words = [sys.executable, "-c", code, "--profile", "smoke"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")


@on_linux
def test_forked_kernels_share_what_was_imported_and_nothing_else(home):
    imported = "import os, sys, multiprocessing\nprint('matplotlib.pyplot' in sys.modules)"
    where = "sys.executable, os.getcwd(), os.environ['LESS_PROFILE'], profile"
    leaves = "multiprocessing.spam = os.environ['SPAM'] = '1'"
    draws = "import matplotlib.pyplot as plt\nfigure = plt.subplots()[0]\nfigure"
    write(home, "00_one", f"{imported}\nprint({where})\n{leaves}", draws)
    finds = "os.environ.get('SPAM'), hasattr(multiprocessing, 'spam')"
    method = "multiprocessing.get_start_method()"
    write(home, "01_two", f"{imported}\nprint({finds}, {method})")
    runner_process = start_forking(home, ["matplotlib.pyplot"])
    _, errors = runner_process.communicate(timeout=120)
    assert (runner_process.returncode, errors) == (0, "")
    printed = out(home, "00_one").splitlines()
    assert printed[:2] == ["True", f"{sys.executable} {ROOT} smoke smoke"]
    assert out(home, "01_two").splitlines() == ["True", f"None False {get_start_method()}"]
    node = nbformat.read(home / "results/smoke/notebooks/00_one.ipynb", 4)
    assert "image/png" in node.cells[-1].outputs[0].data


@on_linux
def test_a_forked_kernel_ends_with_a_runner_that_is_killed(home):
    file = home / "kernel.txt"
    says = f"import pathlib\npathlib.Path('{file}').write_text(str(os.getpid()))"
    write(home, "00_one", f"import time\n{says}\ntime.sleep(100)")
    runner_process = start_forking(home, [])
    wait_for(lambda: file.exists() and file.read_text())
    runner_process.kill()
    runner_process.communicate()
    wait_for(lambda: not psutil.pid_exists(int(file.read_text())))


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


# ---------------------------------------------------------------- run_all.sh, list of packages
def pins() -> dict[str, str]:
    text = (ROOT / "environment.yml").read_text()
    return dict(re.findall(r"^ +- ([\w-]+)==(\S+)  # \S", text, re.M))


def test_every_package_is_pinned_once_with_a_reason_within_the_ranges_of_pyproject():
    text = (ROOT / "environment.yml").read_text()
    assert len(pins()) == len(re.findall("==", text)) > 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # no notebook and no test needs it: left to those who use it
    assert [r.split("[")[0] for r in extras.pop("harness")] == ["lm_eval"]
    ranges = itertools.chain(project["dependencies"], *extras.values())
    for requirement in map(Requirement, ranges):
        assert requirement.name in pins()
        assert pins()[requirement.name] in requirement.specifier


def shell(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("CONDA_PREFIX", "LESS_PYTHON")}
    command = ["bash", str(folder / "run_all.sh"), *arguments]
    return subprocess.run(
        command, env=kept | env, capture_output=True, text=True, cwd=folder.parent
    )


def test_less_python_is_used_or_refused_with_a_reason(home):
    assert subprocess.run(["bash", "-n", str(ROOT / "run_all.sh")]).returncode == 0
    done = shell(ROOT, "--only", "99", LESS_PYTHON=sys.executable)
    assert done.returncode == 2
    assert "--only 99: no such notebook" in done.stderr
    done = shell(ROOT, LESS_PYTHON="/bin/false")
    assert done.returncode == 2
    assert "LESS_PYTHON=/bin/false is not a Python 3.11 or newer" in done.stderr


@pytest.fixture
def clone(home):
    """run_all.sh with a python3 that only writes down what it is asked to do.

    Files `no-python` and `no-pip` make it refuse.
    """
    for name in ("run_all.sh", "environment.yml", "pyproject.toml"):
        (home / "clone").mkdir(exist_ok=True)
        shutil.copy(ROOT / name, home / "clone" / name)
    fake = home / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        [ "$1" = -c ] && {{ [ ! -e {home}/no-python ]; exit; }}
        echo "$@" >> {home}/log
        [ "$2" = venv ] && mkdir -p {home}/clone/.venv/bin && cp "$0" {home}/clone/.venv/bin/python
        [ "$2" = pip ] && [ -e {home}/no-pip ] && exit 1
        exit 0
        """)
    )
    fake.chmod(0o755)

    def call(*arguments, **env):
        (home / "log").write_text("")
        done = shell(home / "clone", *arguments, PATH=f"{fake.parent}:{os.environ['PATH']}", **env)
        return done.returncode, done.stderr, (home / "log").read_text().splitlines()

    return call


def test_the_venv_is_made_once_and_again_only_when_the_list_changes_or_an_install_was_cut_short(
    home, clone
):
    (home / "no-pip").touch()
    code, _, log = clone()
    assert (code, len(log), (home / "clone/.venv/.stamp").exists()) == (1, 2, False)
    (home / "no-pip").unlink()
    code, _, log = clone("--list", "--only", "03")
    assert (code, log[0], log[-1]) == (
        0,
        f"-m venv --clear {home}/clone/.venv",
        "-m lesslib.run --list --only 03",
    )
    assert set(pins().items()) == {
        tuple(word.split("==")) for word in log[1].split() if "==" in word
    }
    assert clone("--list") == (0, "", ["-m lesslib.run --list"])
    with (home / "clone/environment.yml").open("a") as f:
        f.write("      - another==1.0  # a reason\n")
    code, _, log = clone()
    assert (code, [line.split()[1] for line in log]) == (0, ["pip", "pip", "lesslib.run"])
    assert "another==1.0" in log[0]


def test_an_activated_conda_environment_is_used_when_it_has_the_packages(home, clone):
    (home / "conda/bin").mkdir(parents=True)
    shutil.copy(home / "bin/python3", home / "conda/bin/python")
    assert clone("--list", CONDA_PREFIX=str(home / "conda")) == (0, "", ["-m lesslib.run --list"])
    assert not (home / "clone/.venv").exists()
    # one that lacks them
    (home / "conda/bin/python").write_text("#!/bin/sh\nexit 1\n")
    assert clone("--list", CONDA_PREFIX=str(home / "conda"))[2][0].startswith("-m venv")


def test_an_old_python_gets_one_error_with_the_fix(home, clone):
    (home / "no-python").touch()
    code, errors, log = clone()
    assert (code, log) == (2, [])
    assert errors.count("\n") == 1
    assert "install Python 3.11 with venv" in errors


def test_a_folder_of_models_that_is_not_there_is_named(home, capsys, monkeypatch):
    write(home, "00_one")
    monkeypatch.setenv("LESS_MODELS", str(home / "nowhere"))
    assert main() == 2
    assert f"LESS_MODELS={home / 'nowhere'} is not a folder; correct it" in capsys.readouterr().err


def test_notebooks_that_name_no_model_need_neither_models_nor_texts(home, monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr("lesslib.models.folder_of", lambda name: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(data, "missing", lambda name: f"corpus {name!r} is missing")
    write(home, "00_one", "1 + 1", experiments=["latency"])
    assert main() == 0
    write(home, "00_one", "1 + 2", experiments=["latency", "tour"], text_models=["llama"])
    assert main() == 2


@pytest.mark.parametrize("declared", [{"task_models": ["llama"]}, {"text_models": ["llama"]}])
def test_tasks_are_looked_for_where_a_model_answers_them(home, capsys, monkeypatch, declared):
    monkeypatch.setattr("lesslib.data.tasks.missing", lambda name: f"task {name!r} is missing")
    write(home, "00_one", **declared)
    assert main() == (2 if "task_models" in declared else 0)
    is_named = "task 'yes_no' is missing" in capsys.readouterr().err
    assert is_named == ("task_models" in declared)


@pytest.mark.parametrize(
    ("declared", "models"),
    [
        ({"text_models": ["llama"]}, {"llama"}),
        ({"task_models": ["llama"]}, {"llama of tasks"}),
        ({"text_models": ["llama"], "task_models": ["wide"]}, {"llama", "wide of tasks"}),
        ({"task_models": ["llama", "falcon"]}, {"llama of tasks", "falcon of tasks"}),
        ({"text_models": ["llama", "falcon"]}, {"llama", "falcon"}),
        (
            {"text_models": ["llama", "falcon"], "task_models": ["llama"]},
            {"llama", "llama of tasks", "falcon"},
        ),
    ],
)
def test_the_models_that_notebooks_use_are_looked_for_before_a_run(
    home, capsys, monkeypatch, declared, models
):
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr("lesslib.models.folder_of", lambda name: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    write(home, "00_one", **declared)
    assert main() == 2
    names = profiles.roles("smoke")
    for role, model in profiles.roles("smoke", tasks=True).items():
        names[f"{role} of tasks"] = model
    printed = capsys.readouterr().err
    missing = re.findall(r"model '([\w-]+)': not on this machine", printed)
    assert set(missing) == {names[model] for model in models}
