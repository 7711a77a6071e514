"""The model zoo: pico models that the package carries, folders, hub names; and the kernels trained for them."""
from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .kernels import Kernels

ASSETS = Path(__file__).parent / "assets"


def carried_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/config.json"))


def _revision(folder: Path) -> str:
    """12 hex digits over the size and the ends of every weight file: enough to tell two trainings apart, at any size."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as f:
            digest.update(f.read(1 << 20))
            f.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(f.read())
    return digest.hexdigest()[:12]


def load_model(name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a carried model, a local folder or a hub name, in evaluation mode.

    Default device: the GPU when there is one; default dtype: float32 on CPU, bfloat16 on GPU. Raises ValueError for a
    name that is none of the three or for weights that hold NaN, FileNotFoundError when the hub cannot be reached.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    folder = ASSETS / name if (ASSETS / name / "config.json").is_file() else Path(name)
    local = (folder / "config.json").is_file()
    if not local and name.count("/") != 1:
        raise ValueError(f"unknown model {name!r}: carried models are {', '.join(carried_models())}; else give a folder with config.json or a hub name such as meta-llama/Llama-2-7b-hf")
    source = str(folder) if local else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local)
    except OSError as e:
        if local:
            raise
        raise FileNotFoundError(f"model {name!r} is not in the local hub cache and could not be fetched ({type(e).__name__}): log in with `hf auth login`, or give a folder") from e
    bad = next((n for n, p in model.named_parameters() if not p.isfinite().all()), None)
    if bad is not None:
        raise ValueError(f"model {name!r}: {bad} holds NaN or infinite weights; fetch or train it again")
    revision = _revision(folder) if local else str(getattr(model.config, "_commit_hash", None))
    model.less_identity = {"model": folder.name if local else name, "revision": revision}
    return model.to(device).eval(), tokenizer


def kernel_path(model: str, policy: str, fraction: float, folder: Path | None = None, seed: int = 0) -> Path:
    """Where the kernels of `model` for `policy` at `fraction` of its context lie, below `folder` (default: the package's own)."""
    suffix = f"-seed{seed}" if seed else ""
    return (folder or ASSETS / "kernels") / model.replace("/", "--") / f"{policy}-{fraction:g}{suffix}.safetensors"


def load_kernels(model: str, policy: str, fraction: float, folder: str | os.PathLike | None = None, seed: int = 0) -> Kernels:
    """The kernels trained for `model` under `policy` at a budget of `fraction` of its context.

    `folder` is where `python -m lesslib.train --out` put them; without it, those that come with the package. Raises
    FileNotFoundError naming what there is, ValueError for a damaged file or kernels of other weights than the carried model's.
    """
    path = kernel_path(model, policy, fraction, None if folder is None else Path(folder), seed)
    if not path.is_file():
        have = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        raise FileNotFoundError(f"no kernels {path.stem} for {model!r} in {path.parent}: there are {', '.join(have) or 'none'}; train them with python -m lesslib.train --model {model} --policy {policy} --fraction {fraction:g}")
    kernels = Kernels.load(path)
    if (ASSETS / model / "config.json").is_file():
        revision = _revision(ASSETS / model)
        if kernels.header.get("revision") != revision:
            raise ValueError(f"{path.name} was trained for revision {kernels.header.get('revision')} of {model!r}, the package carries {revision}: train again")
    return kernels
