"""The kernels that were trained for a model: where their files lie, and how they are loaded."""

import os
from pathlib import Path

from lesslib.models.catalog import carried_models, revision_of
from lesslib.policies import get_policy
from lesslib.states import Kernels
from lesslib.util.paths import ASSETS


def kernel_path(
    model: str, policy: str, fraction: float, folder: str | os.PathLike | None = None, seed: int = 0
) -> Path:
    """Where the kernels of `model` for `policy` at `fraction` of its context lie.

    They lie below `folder`, by default the package's own.
    """
    name = f"{policy}-{fraction:g}"
    if seed:
        name += f"-seed{seed}"
    kernels = Path(folder or ASSETS / "kernels")
    return kernels / model.replace("/", "--") / f"{name}.safetensors"


def load_kernels(
    model: str, policy: str, fraction: float, folder: str | os.PathLike | None = None, seed: int = 0
) -> Kernels:
    """The kernels trained for `model` under `policy` at a budget of `fraction` of its context.

    `folder`: see `kernel_path`. Raises FileNotFoundError naming what there is, ValueError for an
    unknown policy, a damaged file or kernels of other weights than the carried model's.
    """
    policy = get_policy(policy).name
    path = kernel_path(model, policy, fraction, folder, seed)
    if not path.is_file():
        present = sorted(file.stem for file in path.parent.glob("*.safetensors"))
        raise FileNotFoundError(
            f"no kernels {path.stem} for {model!r} in {path.parent}: "
            f"there are {', '.join(present) or 'none'}; train them with python -m lesslib.train "
            f"--model {model} --policy {policy} --fraction {fraction:g}"
        )
    kernels = Kernels.load(path)
    if model in carried_models():
        _check_revision(kernels, path, model)
    return kernels


def _check_revision(kernels: Kernels, path: Path, model: str) -> None:
    """Raises ValueError for kernels of other weights than those of the carried `model`."""
    trained_for = kernels.header.get("revision")
    revision = revision_of(ASSETS / model)
    if trained_for != revision:
        raise ValueError(
            f"{path.name} was trained for revision {trained_for} of {model!r}, "
            f"the package carries {revision}: train again"
        )
