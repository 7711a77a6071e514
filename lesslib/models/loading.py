"""The model zoo: pico models that the package carries, folders, hub names; and the kernels trained for them."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

from lesslib.data import hub_reachable
from lesslib.policies import get_policy
from lesslib.states import Kernels
from lesslib.util.paths import ASSETS


def carried_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/config.json"))


def folder_of(name: str) -> Path | None:
    """Where a model lies on this machine: carried, below $LESS_MODELS by its hub name, or a folder itself; None for the hub's."""
    places = (ASSETS, Path(os.environ.get("LESS_MODELS", "")), Path())
    return next((p / name for p in places if (p / name / "config.json").is_file()), None)


def _revision(folder: Path) -> str:
    """12 hex digits over the size and the ends of every weight file: enough to tell two trainings apart, at any size."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as f:
            digest.update(f"{path.name} {size}".encode() + f.read(1 << 20))
            f.seek(max(0, size - (1 << 20)))
            digest.update(f.read(1 << 20))
    return digest.hexdigest()[:12]


def load_model(
    name: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a carried model, a local folder or a hub name, in evaluation mode.

    Default: the GPU when there is one; float32 on CPU, bfloat16 on GPU. Raises FileNotFoundError where the hub cannot give the
    model, ValueError for a name that is none of the three and a folder that lacks a tokenizer or whole, finite weights.
    """
    name = os.fspath(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    folder = folder_of(name)
    if folder is None and (Path(name).is_dir() or name.count("/") != 1):
        known = f"carried models are {', '.join(carried_models())}; else give a folder with config.json or a hub name such as org/model"
        raise ValueError(f"unknown model {name!r}: {known}")
    part, source, offline = (
        "tokenizer",
        str(folder or name),
        folder is not None or not hub_reachable(),
    )
    hook = logging.set_tqdm_hook(
        lambda bar, args, options: (
            hook(bar, args, options) if hook else bar(*args, **options | {"disable": True})
        )
    )
    try:  # with the hook, no "Loading weights" bar; those of downloads stay
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline)
        part = "weights"
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, local_files_only=offline, output_loading_info=True
        )
    except Exception as e:  # transformers raises OSError, ValueError, RuntimeError, JSONDecodeError and SafetensorError here
        reason = f"its {part} could not be loaded ({type(e).__name__}: {(str(e).strip() or repr(e)).splitlines()[0]})"
        if folder:
            raise ValueError(
                f"model {name!r}: {reason}; copy or save the folder {folder} again"
            ) from e
        fix = (
            "the hub cannot be reached: connect,"
            if offline
            else "check the name, log in with `hf auth login` if it is gated,"
        )
        raise FileNotFoundError(f"model {name!r}: {reason}; {fix} or give a folder") from e
    finally:
        logging.set_tqdm_hook(hook)
    model, report = loaded
    bad = [
        f"the weights lack {n}" for n in sorted(report["missing_keys"])
    ]  # transformers would draw these at random and only log it
    bad += [
        f"{n} holds NaN or infinite weights"
        for n, p in model.named_parameters()
        if not p.isfinite().all()
    ]
    if bad:
        raise ValueError(f"model {name!r}: {bad[0]}; copy, fetch or train it again")
    revision = _revision(folder) if folder else str(getattr(model.config, "_commit_hash", None))
    model.less_identity = {
        "model": folder.absolute().name if folder == Path(name) else name,
        "revision": revision,
    }
    return model.to(device).eval(), tokenizer


def kernel_path(
    model: str, policy: str, fraction: float, folder: str | os.PathLike | None = None, seed: int = 0
) -> Path:
    """Where the kernels of `model` for `policy` at `fraction` of its context lie, below `folder` (default: the package's own)."""
    name = f"{policy}-{fraction:g}" + (f"-seed{seed}" if seed else "")
    return Path(folder or ASSETS / "kernels") / model.replace("/", "--") / f"{name}.safetensors"


def load_kernels(
    model: str, policy: str, fraction: float, folder: str | os.PathLike | None = None, seed: int = 0
) -> Kernels:
    """The kernels trained for `model` under `policy` at a budget of `fraction` of its context.

    `folder`: see `kernel_path`. Raises FileNotFoundError naming what there is, ValueError for an unknown policy, a damaged file
    or kernels of other weights than the carried model's.
    """
    policy = get_policy(policy).name
    path = kernel_path(model, policy, fraction, folder, seed)
    if not path.is_file():
        have = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        train = f"train them with python -m lesslib.train --model {model} --policy {policy} --fraction {fraction:g}"
        raise FileNotFoundError(
            f"no kernels {path.stem} for {model!r} in {path.parent}: there are {', '.join(have) or 'none'}; {train}"
        )
    kernels = Kernels.load(path)
    made_for, revision = kernels.header.get("revision"), _revision(ASSETS / model)
    if model in carried_models() and made_for != revision:
        raise ValueError(
            f"{path.name} was trained for revision {made_for} of {model!r}, the package carries {revision}: train again"
        )
    return kernels
