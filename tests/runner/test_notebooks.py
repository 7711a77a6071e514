"""The committed notebooks, of `wild` too: executed as they stand, no traces of a machine."""

import ast
import json
import re
from pathlib import Path

import pytest

from lesslib.profiles import get_tasks
from lesslib.reporting.results import load
from lesslib.runner.notebook import NOTEBOOKS, WRITTEN_BY_REFRESH, Notebook
from lesslib.runner.preflight import model_names
from lesslib.util.paths import ROOT

NAMES = (
    "00_tour",
    "01_low_rank_residuals",
    "02_training_kernels",
    "03_language_modeling",
    "04_sparse_policies",
    "05_classification",
    "06_summarization",
    "07_attention_maps",
    "08_kernel_size",
    "09_prompt_length",
    "10_latency_throughput",
    "11_breakdown_memory",
    "12_scoreboard",
    "13_generate",
)
ROOTS = "home|Users|root|tmp|work|workspace|mnt|content|opt|usr|var|private|data"
ABSOLUTE = re.compile(rf"(?<![\w.:/])/({ROOTS})/|[A-Z]:\\\\?Users")

FOLDERS = {"tiny": NOTEBOOKS, "wild": ROOT / "results/wild/executed"}
# 13 would show the words of others
IN_WILD = [name for name in NAMES if name != "13_generate"]
EXECUTED = [("tiny", name) for name in NAMES] + [("wild", name) for name in IN_WILD]

each = pytest.mark.parametrize("name", NAMES)
executed = pytest.mark.parametrize(("profile", "name"), EXECUTED)


def path_of(name: str, profile: str = "tiny") -> Path:
    return FOLDERS[profile] / f"{name}.ipynb"


def node(name, profile="tiny"):
    return json.loads(path_of(name, profile).read_text("utf-8"))


def code_cells(name, profile="tiny"):
    return [c for c in node(name, profile)["cells"] if c["cell_type"] == "code"]


def tagged(name, tag, profile="tiny"):
    return [c for c in code_cells(name, profile) if tag in c["metadata"].get("tags", [])]


def test_the_notebooks_are_these():
    assert tuple(sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb"))) == NAMES
    # 13 is not committed, but may lie here
    in_wild = {p.stem for p in FOLDERS["wild"].glob("*.ipynb")}
    assert sorted(in_wild - {"13_generate"}) == IN_WILD


@each
def test_the_first_cell_is_the_title_and_the_claim(name):
    first = node(name)["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(rf"# {name[:2]} · \S[^\n]*\n\n.*[Cc]laim", "".join(first["source"]), re.S)


@each
def test_parameters_are_profile_and_seed(name):
    assert Notebook.load(path_of(name)).problem() is None


@each
def test_code_cells_are_short_and_plain(name):
    for cell in code_cells(name):
        source = "".join(cell["source"])
        lines = source.splitlines()
        assert len(lines) <= 15, source
        assert [line for line in lines if len(line) > 100] == []
        dense = [
            x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.NamedExpr | ast.Lambda)
        ]
        assert [ast.unparse(expression) for expression in dense] == []


@executed
def test_it_was_executed_from_top_to_bottom_as_it_stands(profile, name):
    counts = [c["execution_count"] for c in code_cells(name, profile)]
    assert counts == list(range(1, len(counts) + 1))
    recorded = node(name, profile)["metadata"]["lesslib"]
    notebook = Notebook.load(path_of(name))
    command = f"./run_all.sh --profile {profile} --from-results --refresh --only {name[:2]}"
    assert recorded["executed"] == notebook.sha256, f"{name} was changed since then: {command}"
    assert Notebook.load(path_of(name, profile)).cells == notebook.cells
    assert recorded["profile"] == profile


@executed
def test_it_declares_the_same_in_every_profile(profile, name):
    assert Notebook.load(path_of(name, profile)).declares == Notebook.load(path_of(name)).declares
    fields = set(node(name, profile)["metadata"]["lesslib"])
    assert fields >= set(WRITTEN_BY_REFRESH)


def test_together_they_compute_every_results_file():
    declared = []
    for name in NAMES:
        declared += Notebook.load(path_of(name)).declares.experiments
    # Both 03 and 04 show language_modeling.
    assert set(declared) == {path.stem for path in (ROOT / "results/tiny").glob("[!.]*.json")}
    assert len(declared) == len(set(declared)) + 1


@executed
def test_it_declares_the_models_and_tasks_that_its_results_were_computed_with(
    profile, name, monkeypatch
):
    monkeypatch.setenv("LESS_RESULTS", str(ROOT / "results"))
    notebook = Notebook.load(path_of(name))
    used = set()
    for experiment in notebook.declares.experiments:
        used |= {source["name"] for source in load(experiment, profile)["manifest"]["data"]}
    models = {source for source in used if source.startswith("model ")}
    assert models == {f"model {model}" for model in model_names(profile, [notebook])}
    tasks = get_tasks(profile)
    names = {task for task, *_ in (*tasks.classification, *tasks.summaries)}
    assert bool(used & names) == bool(notebook.declares.task_models)


@each
def test_it_needs_notebooks_that_come_before_it(name):
    numbers = [other[:2] for other in NAMES if other < name]
    assert set(Notebook.load(path_of(name)).declares.needs) <= set(numbers)


@executed
def test_verdict_cells_print_text_and_nothing_else(profile, name):
    cells = tagged(name, "nbval-check-output", profile)
    assert cells
    for cell in cells:
        kinds = [(o["output_type"], o.get("name")) for o in cell["outputs"]]
        assert kinds == [("stream", "stdout")]
        assert "".join(cell["outputs"][0]["text"]).strip()


@executed
def test_no_errors_no_warnings_no_paths_and_not_too_large(profile, name):
    for cell in code_cells(name, profile):
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr"
    path = path_of(name, profile)
    assert path.stat().st_size < 2**20
    without_images = re.sub(r'"image/\w+": "[^"]*"', "", path.read_text("utf-8"))
    assert [match[0] for match in ABSOLUTE.finditer(without_images)] == []
