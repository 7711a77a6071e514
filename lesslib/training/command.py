"""The command `python -m lesslib.train`: a profile's training, any setting of it changed."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lesslib.models import kernel_path
from lesslib.profiles import Profile, get_profile, results_dir
from lesslib.training.all_layers import train_for_profile
from lesslib.util.command_line import Option, options
from lesslib.util.hardware import keep_memory
from lesslib.util.ranks import place

PROGRAM = "python -m lesslib.train"

DESCRIPTION = """\
Train the kernels of LESS, layer by layer; under torchrun its ranks share the layers.

One pass of the model (several, where that is too much to hold) captures q, k, v and the attention
outputs of all wanted layers. What does not depend on the kernels is computed once per sequence; an
epoch then costs phi, psi and one linear scan. The loss is the squared error past the budget, after
the output projection (paper, section 3.2), over the sparse policy's own: 1 is eviction alone, 0 the
full cache.
"""

# Fields of Profile that an option of the same name changes.
SETTINGS = {
    "model": "carried model, folder or hub name",
    "training": "corpora to train on, in equal shares",
    "sequences": "token windows, validation included",
    "validation": "windows held out to choose the best epoch",
    "kernel_size": "R, the features of phi and psi",
    "hidden": "width of their hidden layer",
    "epochs": "passes over the windows",
    "halve_every": "epochs after which the learning rate halves",
    "lr": "Adam's learning rate",
    "train_batch": "windows a step",
    "dropout": "on the first pre-activation",
}


def main(argv: list[str] | None = None) -> None:
    """Train kernels as the command line says; SystemExit names what is wrong with it."""
    arguments = _parser().parse_args(argv)
    keep_memory()
    try:
        path, curves = _train(arguments)
    except (ValueError, TypeError, OSError) as e:
        raise SystemExit(f"{PROGRAM}: {e}") from e
    rank, _ = place()
    if rank == 0:
        _print_curves(curves, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options(
        parser,
        policy=Option("h2o", "h2o, lambda or tova"),
        fraction=Option(0.05, "budget as a share of the model's context"),
        seed=Option(0, "of windows, weights, order and dropout"),
        memory_gib=Option(8.0, "captured tensors beyond this go to disk, per rank"),
    )
    parser.add_argument(
        "--profile", help="the source of the defaults below (default: $LESS_PROFILE, else tiny)"
    )
    for name, text in SETTINGS.items():
        _add_setting(parser, name, text)
    parser.add_argument("--length", type=int, help="tokens a window (default: the model's context)")
    parser.add_argument(
        "--device", help="cpu, cuda, ... (default: the GPU when there is one; of a rank, its own)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for load_kernels(..., folder=...) (default: results/<profile>/kernels)",
    )
    return parser


def _add_setting(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """An option of a field of Profile, without a default: the profile gives that."""
    flag = f"--{name.replace('_', '-')}"
    kind = type(getattr(Profile, name))
    if kind is tuple:
        parser.add_argument(flag, type=str, nargs="+", help=text)
    else:
        parser.add_argument(flag, type=kind, help=text)


def _train(arguments: argparse.Namespace) -> tuple[Path, dict]:
    """Train as `arguments` say; returns where the kernels lie, and {layer: curves}."""
    changes = {}
    for name in SETTINGS:
        value = getattr(arguments, name)
        if value is not None:
            changes[name] = value
    profile = get_profile(arguments.profile)
    profile = replace(profile.of(arguments.model or profile.model), **changes)
    path = kernel_path(
        profile.model,
        arguments.policy,
        arguments.fraction,
        arguments.out or results_dir(profile.name) / "kernels",
        arguments.seed,
    )
    curves = train_for_profile(
        profile,
        arguments.policy,
        arguments.fraction,
        path,
        arguments.seed,
        arguments.length,
        arguments.memory_gib,
        arguments.device,
    )
    return path, curves


def _print_curves(curves: dict, path: Path) -> None:
    lines = []
    for layer, curve in curves.items():
        lines.append(
            f"layer {layer}: {curve['best']:.3f} of the sparse error is left "
            f"(Baseline+ {curve['baseline_plus']:.3f}), {curve['seconds']:.0f} s"
        )
    print("\n".join([*lines, _seconds_by_part(curves), f"saved {path}"]))


def _seconds_by_part(curves: dict) -> str:
    """What capture, eviction and epochs took, over all layers.

    Layers that train side by side share the time, so their sum is that of all cores.
    """
    parts = {"capture": "seconds_capture", "eviction": "seconds_eviction", "epochs": "seconds"}
    texts = []
    for part, key in parts.items():
        # Layers that were finished before the parts were timed lack some.
        seconds = sum(curve.get(key, 0.0) for curve in curves.values())
        texts.append(f"{part} {seconds:.0f} s")
    return f"all layers, one by one: {', '.join(texts)}"
