"""A notebook as the runner sees it: number, title, code cells, and what its metadata declares."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesslib.util.paths import ROOT

NOTEBOOKS = ROOT / "notebooks"
PARAMETERS = {"profile", "seed"}
# of metadata.lesslib: what `--refresh` adds to the declared fields
WRITTEN_BY_REFRESH = ("executed", "profile")
ROLES = {"text_models": ("llama", "falcon"), "task_models": ("llama", "wide", "falcon")}


@dataclass(frozen=True)
class Declaration:
    """The fields of a notebook's `metadata.lesslib`; `lesslib.runner` says what each one means."""

    needs: list[str]
    experiments: list[str]
    text_models: list[str]
    task_models: list[str]

    @classmethod
    def read(cls, file: str, metadata: dict[str, Any]) -> Declaration:
        """The declaration in the `metadata.lesslib` of the notebook `file`.

        Raises ValueError, which names the notebook and the field, for one that is missing, unknown,
        no list of words, or a role that no model has.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for field in fields:
            check_words(file, field, metadata)
        for field in metadata:
            if field not in fields and field not in WRITTEN_BY_REFRESH:
                names = ", ".join(fields)
                raise ValueError(
                    f"{file}: metadata.lesslib has an unknown field {field!r}; there are {names}"
                )
        return cls(**{field: metadata[field] for field in fields})


def check_words(file: str, field: str, metadata: dict[str, Any]) -> None:
    """Raises ValueError where `field` of a notebook's `metadata.lesslib` is no list of words."""
    if field not in metadata:
        raise ValueError(
            f"{file}: metadata.lesslib lacks {field!r}; add it as a list, [] for none "
            "(lesslib/runner/__init__.py says of what)"
        )
    words = metadata[field]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{file}: metadata.lesslib.{field} is {words!r}; give a list of words")
    for word in words:
        if field in ROLES and word not in ROLES[field]:
            raise ValueError(
                f"{file}: metadata.lesslib.{field} names {word!r}; "
                f"choose from {', '.join(ROLES[field])}"
            )


@dataclass(frozen=True)
class Notebook:
    """A file of notebooks/, whose first line reads `# 03 · Title (Table 2)`."""

    path: Path
    title: str
    # what it shows of the paper ("Table 2"), "" for nothing
    paper_item: str
    # (source, tags) of every code cell
    cells: list[tuple[str, list[str]]]
    declares: Declaration

    @classmethod
    def load(cls, path: Path) -> Notebook:
        """Read a notebook. Raises ValueError for a file that is none, or that declares badly."""
        try:
            node = json.loads(path.read_text("utf-8"))
            heading = "".join(node["cells"][0]["source"]).split("\n")[0]
        except (ValueError, LookupError) as error:
            raise ValueError(
                f"{path.name} is no notebook with a title ({error!r}); mend it, or move it away"
            ) from error
        heading = heading.removeprefix(f"# {number_of(path)} · ").removesuffix(")")
        title, _, paper_item = heading.partition(" (")
        cells = [
            ("".join(cell["source"]), cell["metadata"].get("tags", []))
            for cell in node["cells"]
            if cell["cell_type"] == "code"
        ]
        declares = Declaration.read(path.name, node["metadata"].get("lesslib", {}))
        return cls(path, title, paper_item, cells, declares)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> str:
        return number_of(self.path)

    @functools.cached_property
    def sha256(self) -> str:
        """Over the code cells and their tags alone: other metadata does not make outputs stale."""
        return hashlib.sha256(json.dumps(self.cells).encode()).hexdigest()

    def problem(self) -> str | None:
        """What is wrong with the `parameters` cell, None for nothing.

        papermill would only warn, and run with the notebook's own values.
        """
        sources = [source for source, tags in self.cells if "parameters" in tags]
        names = {
            node.id
            for node in ast.walk(ast.parse("\n".join(sources)))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        if len(sources) == 1 and names == PARAMETERS:
            return None
        return (
            f"{self.path.name}: {len(sources)} parameters cells set {sorted(names)}; "
            "tag one, which sets profile and seed, no more"
        )


def number_of(path: Path) -> str:
    """The number that a notebook's file name begins with: "03" of 03_language_modeling.ipynb."""
    return path.stem.split("_")[0]


def notebook_paths(folder: Path) -> dict[str, Path]:
    """The notebooks of a folder by number, in order."""
    return {number_of(path): path for path in sorted(folder.glob("*.ipynb"))}
