"""The committed notebooks: whole, executed as they stand, readable, and without traces of the machine they ran on; in `wild` too."""

import json
import re

import pytest

from lesslib.runner.run import NOTEBOOKS, Notebook
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
ABSOLUTE = re.compile(
    r"(?<![\w.:/])/(home|Users|root|tmp|work|workspace|mnt|content|opt|usr|var|private|data)/|[A-Z]:\\\\?Users"
)

FOLDERS = {"tiny": NOTEBOOKS, "wild": ROOT / "results/wild/executed"}
ELSEWHERE = [
    ("wild", n) for n in NAMES if n != "13_generate"
]  # which would show the words of others

each = pytest.mark.parametrize("name", NAMES)
executed = pytest.mark.parametrize(("profile", "name"), [*(("tiny", n) for n in NAMES), *ELSEWHERE])


def node(name, profile="tiny"):
    return json.loads((FOLDERS[profile] / f"{name}.ipynb").read_text("utf-8"))


def code_cells(name, profile="tiny"):
    return [c for c in node(name, profile)["cells"] if c["cell_type"] == "code"]


def tagged(name, tag, profile="tiny"):
    return [c for c in code_cells(name, profile) if tag in c["metadata"].get("tags", [])]


def test_the_notebooks_are_these():
    assert tuple(sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb"))) == NAMES
    assert sorted({p.stem for p in FOLDERS["wild"].glob("*.ipynb")} - {"13_generate"}) == [
        n for _, n in ELSEWHERE
    ]  # 13 is not committed


@each
def test_the_first_cell_is_the_title_and_the_claim(name):
    first = node(name)["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(rf"# {name[:2]} · \S[^\n]*\n\n.*[Cc]laim", "".join(first["source"]), re.S)


@each
def test_parameters_are_profile_and_seed_and_cells_are_short(name):
    assert Notebook(NOTEBOOKS / f"{name}.ipynb").problem() is None
    assert [
        len(c["source"]) for c in code_cells(name) if len("".join(c["source"]).splitlines()) > 15
    ] == []


@executed
def test_it_was_executed_from_top_to_bottom_as_it_stands(profile, name):
    counts = [c["execution_count"] for c in code_cells(name, profile)]
    assert counts == list(range(1, len(counts) + 1))
    recorded = node(name, profile)["metadata"]["lesslib"]
    fix = f"{name} was changed after it was executed: ./run_all.sh --profile {profile} --from-results --refresh --only {name[:2]}"
    assert recorded["executed"] == Notebook(NOTEBOOKS / f"{name}.ipynb").sha256, fix
    assert (
        Notebook(FOLDERS[profile] / f"{name}.ipynb").cells
        == Notebook(NOTEBOOKS / f"{name}.ipynb").cells
    )
    assert recorded["profile"] == profile


@executed
def test_verdict_cells_print_text_and_nothing_else(profile, name):
    cells = tagged(name, "nbval-check-output", profile)
    assert cells
    for cell in cells:
        assert [(o["output_type"], o.get("name")) for o in cell["outputs"]] == [
            ("stream", "stdout")
        ]
        assert "".join(cell["outputs"][0]["text"]).strip()


@executed
def test_no_errors_no_warnings_no_paths_and_not_too_large(profile, name):
    outputs = [o for c in code_cells(name, profile) for o in c["outputs"]]
    assert [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    path = FOLDERS[profile] / f"{name}.ipynb"
    assert path.stat().st_size < 2**20
    without_images = re.sub(r'"image/\w+": "[^"]*"', "", path.read_text("utf-8"))
    assert [m[0] for m in ABSOLUTE.finditer(without_images)] == []
