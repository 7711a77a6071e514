"""Load a model by name, and say in one sentence why one cannot be loaded.

A name is that of a model which the package carries, a folder, or a hub name such as org/model.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
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
from lesslib.models.catalog import carried_models, folder_of, revision_of


def load_model(
    name: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a carried model, a local folder or a hub name, in evaluation mode.

    Default: the GPU when there is one; float32 on CPU, bfloat16 on GPU. The model's `less_identity`
    says its name and revision, by which kernels know the weights that they were trained for.
    Raises FileNotFoundError where the hub cannot give the model, ValueError for a name that is none
    of the three and for a folder that lacks a tokenizer or whole, finite weights.
    """
    name = os.fspath(name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    folder = folder_of(name)
    if folder is None:
        _check_hub_name(name)
    model, tokenizer, missing = _load(name, folder, dtype)
    _check_weights(name, model, missing)
    model.less_identity = _identity(name, folder, model)
    return model.to(device).eval(), tokenizer


def _check_hub_name(name: str) -> None:
    """Raises ValueError for a name that is no hub name, org/model, either."""
    if Path(name).is_dir() or name.count("/") != 1:
        raise ValueError(
            f"unknown model {name!r}: carried models are {', '.join(carried_models())}; "
            "else give a folder with config.json or a hub name such as org/model"
        )


def _load(
    name: str, folder: Path | None, dtype: torch.dtype
) -> tuple[Any, PreTrainedTokenizerBase, set[str]]:
    """The model, its tokenizer, and the names of the weights that its files lack."""
    source = str(folder or name)
    is_offline = folder is not None or not hub_reachable()
    part = "tokenizer"
    try:
        with _no_bar_of_weights():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_offline)
            part = "weights"
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, local_files_only=is_offline, output_loading_info=True
            )
    # OSError, ValueError, RuntimeError, JSONDecodeError and SafetensorError have been seen.
    except Exception as e:
        message = str(e).strip() or repr(e)
        first_line = message.splitlines()[0]
        reason = f"its {part} could not be loaded ({type(e).__name__}: {first_line})"
        if folder:
            raise ValueError(
                f"model {name!r}: {reason}; copy or save the folder {folder} again"
            ) from e
        if is_offline:
            fix = "the hub cannot be reached: connect,"
        else:
            fix = "check the name, log in with `hf auth login` if it is gated,"
        raise FileNotFoundError(f"model {name!r}: {reason}; {fix} or give a folder") from e
    model, report = loaded
    return model, tokenizer, report["missing_keys"]


@contextlib.contextmanager
def _no_bar_of_weights() -> Iterator[None]:
    """transformers draws no "Loading weights" bar within the context; those of downloads stay.

    A hook that the user has set stays in charge, and is there again afterwards.
    """

    def hook(bar: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
        if users_hook:
            return users_hook(bar, args, options)
        return bar(*args, **options | {"disable": True})

    users_hook = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(users_hook)


def _check_weights(name: str, model: PreTrainedModel, missing: set[str]) -> None:
    """Raises ValueError for weights that are missing, NaN or infinite.

    transformers would draw the missing ones at random and only log it.
    """
    faults = [f"the weights lack {weights}" for weights in sorted(missing)]
    for weights, values in model.named_parameters():
        if not values.isfinite().all():
            faults.append(f"{weights} holds NaN or infinite weights")
    if faults:
        raise ValueError(f"model {name!r}: {faults[0]}; copy, fetch or train it again")


def _identity(name: str, folder: Path | None, model: PreTrainedModel) -> dict[str, str]:
    """Name and revision of a model; one that was given as a folder is called by its last part."""
    if folder is None:
        commit = getattr(model.config, "_commit_hash", None)
        return {"model": name, "revision": str(commit)}
    is_path = folder == Path(name)
    return {
        "model": folder.absolute().name if is_path else name,
        "revision": revision_of(folder),
    }
