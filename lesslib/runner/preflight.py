"""What would fail later for want of packages, data, a model, disk or memory, said beforehand."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from lesslib.profiles import Profile, get_tasks, roles
from lesslib.runner.notebook import Notebook
from lesslib.runner.run_log import RunLog
from lesslib.util.files import check_writable

PACKAGES = ("torch", "transformers", "papermill", "ipykernel", "matplotlib")
GIB = 2**30


def preflight(
    profile: Profile, run_log: RunLog, todo: list[Notebook], compute: bool
) -> Iterator[str]:
    """Every reason why running `todo` would fail, each with its fix.

    Without `compute` the notebooks only redraw what is recorded: fewer things have to be there.
    """
    home = run_log.home
    yield from disk_problems(profile, home, compute)
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        yield (
            f"{sys.executable} lacks {', '.join(lacking)}; "
            "install what environment.yml lists, or unset LESS_PYTHON"
        )
    if not compute and not any(home.glob("[!.]*.json")):
        yield f"{home} holds no recorded results; run once without --from-results"
    if lacking or not compute:
        return
    # Quick profiles use the kernels in the package.
    if not profile.quick:
        yield from needs_problems(run_log, todo)
    yield from folder_problems()
    yield from gpu_problems(profile)
    yield from data_problems(profile, todo)
    for name in model_names(profile.name, todo):
        yield from model_problems(name)


def disk_problems(profile: Profile, home: Path, compute: bool) -> Iterator[str]:
    """A results folder that cannot be written, or a disk with less room than the profile needs."""
    try:
        check_writable(home)
        free = shutil.disk_usage(home).free / GIB
    except OSError as error:
        yield error.strerror or str(error)
        return
    if compute and free < profile.disk_gib:
        yield (
            f"{home}: {free:.1f} GiB free, profile {profile.name} needs {profile.disk_gib:g}; "
            "free some, or set LESS_RESULTS"
        )


def needs_problems(run_log: RunLog, todo: list[Notebook]) -> Iterator[str]:
    """Notebooks that read what another one computes, which neither was run nor will be."""
    numbers = {name.split("_")[0] for name in run_log.stamps}
    numbers |= {notebook.number for notebook in todo}
    for notebook in todo:
        for needed in notebook.declares.needs:
            if needed not in numbers:
                yield (
                    f"{notebook.name} reads what {needed} computes; "
                    f"run --only {needed},{notebook.number}"
                )


def folder_problems() -> Iterator[str]:
    """Folders that the environment names and that are not there."""
    for name in ("LESS_DATA", "LESS_MODELS"):
        folder = os.environ.get(name)
        if folder and not Path(folder).is_dir():
            yield f"{name}={folder} is not a folder; correct it, or unset it to use the hub"


def gpu_problems(profile: Profile) -> Iterator[str]:
    """A GPU that is smaller than the profile needs, or none."""
    # Imported here: the answer "up to date" should not wait for it.
    import torch

    memory = 0.0
    if profile.gpu_gib and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
    if memory < profile.gpu_gib:
        yield (
            f"profile {profile.name} needs a GPU of {profile.gpu_gib:g} GiB, here: {memory:.0f}; "
            "use --profile wild or tiny"
        )


def data_problems(profile: Profile, todo: list[Notebook]) -> Iterator[str]:
    """Corpora and tasks of the profile that cannot be read, where notebooks have a model read."""
    from lesslib.data import missing, tasks

    reads_tasks = any(notebook.declares.task_models for notebook in todo)
    reads_text = any(notebook.declares.text_models for notebook in todo)
    problems: list[str | None] = []
    if reads_text or reads_tasks:
        corpora = dict.fromkeys(profile.evaluation + profile.training)
        problems += [missing(corpus) for corpus in corpora]
    if reads_tasks:
        of_profile = get_tasks(profile.name)
        names = [name for name, *_ in (*of_profile.classification, *of_profile.summaries)]
        problems += [tasks.missing(name) for name in names]
    for problem in problems:
        if problem is not None:
            yield problem


def model_names(profile: str, todo: list[Notebook]) -> list[str]:
    """The models that notebooks use under a profile, each once."""
    text_models = roles(profile)
    task_models = roles(profile, tasks=True)
    names = []
    for notebook in todo:
        names += [text_models[role] for role in notebook.declares.text_models]
        names += [task_models[role] for role in notebook.declares.task_models]
    return list(dict.fromkeys(names))


def model_problems(name: str) -> Iterator[str]:
    """A model that is not on this machine, and that the hub does not give either."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    from lesslib.data import hub_reachable
    from lesslib.models import folder_of

    if folder_of(name) or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if not hub_reachable():
        yield (
            f"model {name!r}: not on this machine, and no hub; "
            "connect, or set LESS_MODELS to a folder that holds it"
        )
        return
    try:
        HfApi().auth_check(name)
    # The hub's client raises many types: gated, not found, no token.
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        yield (
            f"model {name!r}: {reason}; "
            "accept its licence on the hub and log in with `hf auth login`"
        )
