"""The house rules that a program can check: style, types, layers, and who may look inside
transformers.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lesslib.util.paths import ROOT

PACKAGE = ROOT / "lesslib"
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))
TOOLS = {
    "ruff": [sys.executable, "-m", "ruff", "check", "."],
    "ruff format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    "mypy": [sys.executable, "-m", "mypy"],
    # the order of the folders: [tool.importlinter] in pyproject.toml
    "import-linter": [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as c; c()",
    ],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_style_types_and_layers_are_clean(tool):
    done = subprocess.run(TOOLS[tool], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imports(file: Path) -> set[tuple[str, str]]:
    """(module, name) of all that a file imports, inside functions too; the name is "" for `import
    module`.
    """
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(str(node.module), alias.name) for alias in node.names}
    return found


def inside_transformers(file: Path) -> set[tuple[str, str]]:
    """What `file` imports from transformers beyond public classes of its top level and its
    logging.
    """
    inside = set()
    for module, name in imports(file):
        is_public = module == "transformers" and (name == "logging" or name[:1].isupper())
        if module.split(".")[0] == "transformers" and not is_public:
            inside.add((module, name))
    return inside


# The bases that a cache has to have; everything else of transformers is behind hf/.
CACHE_BASES = {
    ("transformers.cache_utils", "Cache"),
    ("transformers.cache_utils", "CacheLayerMixin"),
}


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("hf/")])
def test_only_hf_knows_the_inside_of_transformers(file):
    allowed = CACHE_BASES if file.startswith("attention/") else set()
    assert inside_transformers(PACKAGE / file) - allowed == set()


def test_the_check_above_sees_what_it_is_for(tmp_path):
    lines = [
        "import transformers.masking_utils",
        "from transformers import AutoModel, logging, masking_utils",
    ]
    (tmp_path / "naive.py").write_text("\n".join(lines))
    assert inside_transformers(tmp_path / "naive.py") == {
        ("transformers.masking_utils", ""),
        ("transformers", "masking_utils"),
    }
