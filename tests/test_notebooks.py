"""The committed notebooks: whole, executed as they stand, readable, and without traces of the machine they ran on."""
import json
import re

import pytest

from lesslib.run import NOTEBOOKS, Notebook

NAMES = ("00_tour", "01_low_rank_residuals", "02_training_kernels", "03_language_modeling", "04_sparse_policies", "05_classification",
         "06_summarization", "07_attention_maps", "08_kernel_size", "09_prompt_length", "10_latency_throughput",
         "11_breakdown_memory", "12_scoreboard", "13_generate")  # fmt: skip
ABSOLUTE = re.compile(r"(?<![\w.:/])/(home|Users|root|tmp|work|workspace|mnt|content|opt|usr|var|private|data)/|[A-Z]:\\\\?Users")

each = pytest.mark.parametrize("name", NAMES)


def node(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"))


def code_cells(name):
    return [c for c in node(name)["cells"] if c["cell_type"] == "code"]


def tagged(name, tag):
    return [c for c in code_cells(name) if tag in c["metadata"].get("tags", [])]


def test_the_notebooks_are_these():
    assert tuple(sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb"))) == NAMES


@each
def test_the_first_cell_is_the_title_and_the_claim(name):
    first = node(name)["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(rf"# {name[:2]} · \S[^\n]*\n\n.*[Cc]laim", "".join(first["source"]), re.S)


@each
def test_parameters_are_profile_and_seed_and_cells_are_short(name):
    assert Notebook(NOTEBOOKS / f"{name}.ipynb").problem() is None
    assert [len(c["source"]) for c in code_cells(name) if len("".join(c["source"]).splitlines()) > 15] == []


@each
def test_it_was_executed_from_top_to_bottom_as_it_stands_under_the_default_profile(name):
    counts = [c["execution_count"] for c in code_cells(name)]
    assert counts == list(range(1, len(counts) + 1))
    recorded = node(name)["metadata"]["lesslib"]
    fix = f"{name} was changed after it was executed: ./run_all.sh --refresh --only {name[:2]}"
    assert recorded["executed"] == Notebook(NOTEBOOKS / f"{name}.ipynb").sha256, fix
    assert recorded["profile"] == "tiny"


@each
def test_verdict_cells_print_text_and_nothing_else(name):
    cells = tagged(name, "nbval-check-output")
    assert cells
    for cell in cells:
        assert [(o["output_type"], o.get("name")) for o in cell["outputs"]] == [("stream", "stdout")]
        assert "".join(cell["outputs"][0]["text"]).strip()


@each
def test_no_errors_no_warnings_no_paths_and_not_too_large(name):
    outputs = [o for c in code_cells(name) for o in c["outputs"]]
    assert [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    path = NOTEBOOKS / f"{name}.ipynb"
    assert path.stat().st_size < 2**20
    without_images = re.sub(r'"image/\w+": "[^"]*"', "", path.read_text("utf-8"))
    assert [m[0] for m in ABSOLUTE.finditer(without_images)] == []
