"""Train the kernels of all layers of a model.

Finished layers lie on disk until all are there, so that an interrupted training resumes. Under
torchrun the ranks share what is left; each then has the kernels of all layers.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lesslib import __version__
from lesslib.data import load_corpus, training_windows
from lesslib.models import load_model, model_shape
from lesslib.policies import Policy, get_policy
from lesslib.profiles import Profile
from lesslib.states import Kernels
from lesslib.training.parts import LayerParts, stamp_of
from lesslib.training.recipe import Recipe
from lesslib.training.share import Job, Share
from lesslib.util.ranks import gather, own_device, place


def train(
    model,
    policy: Policy,
    windows: Tensor,
    recipe: Recipe,
    path: Path,
    header: dict,
    validation: int = 8,
    memory_gib: float = 8.0,
) -> tuple[Kernels, dict]:
    """Train and save the kernels of all layers on token `windows` [N, S].

    Returns them and {layer: curves}. Finished layers lie in `<path>.parts/` until all are there; a
    second call skips those of the same recipe and windows. Under torchrun each rank trains its
    share of the layers, rank 0 writes the file, and all return the same. Raises ValueError before
    compute for a budget that the windows never fill, a damaged part or ranks that differ,
    RuntimeError where another rank died.
    """
    rank, world = place()
    _check_budget(model, policy, windows)
    kernels = _new_kernels(model, policy, recipe, header)
    parts = LayerParts(path, stamp_of(kernels.header, windows), len(kernels.layers))
    layers = parts.unfinished()[rank::world]
    parts.folder.mkdir(parents=True, exist_ok=True)
    if world > 1:
        _print_share(rank, world, model.device, layers)
    if layers:
        job = Job(model, policy, windows, recipe, validation, memory_gib)
        Share(job, kernels, parts, layers).train()
    parts.exchange(layers)
    curves = parts.load_into(kernels)
    kernels.header["curves"] = curves
    if rank == 0:
        kernels.save(path)
        parts.delete()
    # No rank goes on before the file is there.
    gather(None)
    return kernels.eval(), curves


def train_for_profile(
    profile: Profile,
    policy: str,
    fraction: float,
    path: Path,
    seed=0,
    length: int | None = None,
    memory_gib=8.0,
    device: str | None = None,
) -> dict:
    """Train kernels for `policy` at `fraction` of the context by a profile's settings.

    They see windows of `length` tokens (default: the context). Returns {layer: curves}; raises as
    `train` does.
    """
    recipe = Recipe.of(profile, seed)
    model, tokenizer = load_model(profile.model, own_device(device))
    context = model_shape(model)["context"]
    chosen_policy = get_policy(policy).from_fraction(fraction, context)
    corpora = [load_corpus(name) for name in profile.training]
    windows = training_windows(corpora, tokenizer, length or context, profile.sequences, seed)
    header = {
        "fraction": fraction,
        "data": [corpus.record() for corpus in corpora],
        "sequences": len(windows),
        "length": windows.shape[1],
    }
    _, curves = train(
        model, chosen_policy, windows, recipe, path, header, profile.validation, memory_gib
    )
    return curves


def _check_budget(model, policy: Policy, windows: Tensor) -> None:
    """Raises ValueError for a budget above the context, or one that `windows` never fill."""
    policy.check(model_shape(model)["context"])
    tokens = windows.shape[1]
    if policy.budget is None or policy.budget + 1 >= tokens:
        raise ValueError(
            f"{policy}: windows of {tokens} tokens never fill the budget: "
            "use a smaller budget or longer windows"
        )


def _new_kernels(model, policy: Policy, recipe: Recipe, header: dict) -> Kernels:
    """Untrained kernels, whose header says all that decides their weights but the windows."""
    shape = model_shape(model)
    kernels = Kernels.new(shape, recipe.kernel_size, recipe.hidden, recipe.dropout, recipe.seed)
    kernels.header |= getattr(model, "less_identity", {})
    kernels.header |= {
        "policy": policy.name,
        "budget": policy.budget,
        "recipe": asdict(recipe),
        "lesslib": __version__,
    }
    kernels.header |= header
    return kernels


def _print_share(rank: int, world: int, device: torch.device, layers: list[int]) -> None:
    """Say which layers a rank trains.

    In one write, line end included: torchrun's processes do not buffer, and others write too.
    """
    numbers = ", ".join(map(str, layers)) or "none"
    print(f"rank {rank} of {world} on {device}: layers {numbers}\n", end="", flush=True)
