"""Benchmarks that print ratios: `python -m lesslib.bench COMMAND`, with --help.

`train`: seconds and memory of kernel training: capture, eviction, an epoch. `ours` trains from
eviction times, sparse outputs and targets computed once; `stepwise`, after the authors' code,
rebuilds at every step the dense weights, the mask token by token and the S x S low-rank weights.
`decode`: milliseconds per step of random models at many contexts, for the full cache and bounded
ones; bytes and peak memory.
`score`: seconds and memory of whole sequences through dense attention, a policy alone, and LESS.
`endurance`: very many tokens through one cache; fails where memory grows or a number overflows.
`loads`: whole loads, prompt and answer, beside what a user would pick; recorded.
`peers`: the same loads by kvpress, in an environment of its own; recorded.
"""

import argparse
import itertools
from dataclasses import replace
from typing import Any

import torch

from lesslib.bench import loads, peers
from lesslib.bench.decoding import METHODS, DecodeCase, print_decode
from lesslib.bench.endurance import Endurance, print_endurance
from lesslib.bench.memory import print_memory
from lesslib.bench.peer_environment import PeerMissing
from lesslib.bench.scoring import print_scoring
from lesslib.bench.shapes import MODELS
from lesslib.bench.timing import DEVICE, DTYPE
from lesslib.bench.training import SCHEMES, print_training
from lesslib.policies import H2O
from lesslib.util.command_line import options
from lesslib.util.hardware import keep_memory

# What --quick makes of the options of `loads` and `peers`: a minute or two.
QUICK: dict[str, Any] = {
    "models": ("pico", "12x768"),
    "lengths": ("512+128",),
    "batches": (1, 8),
    "runs": 3,
}


def add_training_options(parser: argparse.ArgumentParser) -> None:
    options(
        parser,
        model=("pico-llama", "a carried model, or the shape of a random one, such as 12x768"),
        layers=(4, "so many of its layers are trained, the first ones"),
        lengths=((512, 1024, 2048), "tokens a window"),
        schemes=(SCHEMES, "ratios are of the first", SCHEMES),
        sequences=(8, "windows an epoch"),
        fraction=(0.05, "H2O's budget as a share of the window"),
        hidden=(128, "width of the kernels"),
        dropout=(0.0, "on the first pre-activation"),
    )


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    dtypes = ("float32", "bfloat16", "float16")
    options(
        parser,
        models=(("pico", "12x768"), "shapes of random models", MODELS),
        batches=((1, 8), "rows decoded together"),
        contexts=((1024, 4096, 16384), "tokens seen before"),
        budget=(204, "H2O's slots: 204 is 5%% of Llama 2's context"),
        hidden=((128, 512), "width of the kernels"),
        steps=(24, "decode steps timed for each entry, after as many that warm up"),
        kernel_dtypes=(dtypes[:2], "of the kernels; eager steps take the first", dtypes),
        compiled=(["12x768"], "models that torch.compile is timed on, without Full", MODELS),
        generate=([64, 1024, 16384], "tokens after which bytes and peak memory are read"),
    )


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    options(
        parser,
        models=(("12x768",), "shapes of random models", MODELS),
        lengths=((1024, 2048, 4096), "tokens a sequence"),
        batch=(1, "sequences at once"),
        hidden=(128, "width of the kernels"),
        runs=(3, "of which the quickest counts"),
    )


def add_endurance_options(parser: argparse.ArgumentParser) -> None:
    options(
        parser,
        model=("pico", "shape of the random model", tuple(MODELS)),
        tokens=(1_000_000, "tokens decoded in one go"),
        budget=(52, "H2O's slots"),
        hidden=(128, "width of the kernels"),
    )


def add_options_of_loads(
    parser: argparse.ArgumentParser, models: tuple[str, ...], lengths: tuple[str, ...]
) -> None:
    """What `loads` and `peers` have in common."""
    options(
        parser,
        models=(models, "shapes of random models", MODELS),
        lengths=(lengths, "prompt + answer, in tokens"),
        batches=((1, 8), "rows at once"),
        budget=(204, "tokens that bounded caches hold"),
        hidden=(128, "width of the kernels"),
        runs=(3, "replicates, the methods in turn"),
        quick=(False, "pico and 12x768 at 512+128 alone"),
        fresh=(False, "also measure again what is recorded"),
    )


def add_load_options(parser: argparse.ArgumentParser) -> None:
    add_options_of_loads(parser, loads.MODELS, loads.LENGTHS)
    options(
        parser,
        methods=(loads.METHODS, "in this order", loads.METHODS),
        limit=(60.0, "minutes; a load that would take longer is left out"),
    )


def add_peer_options(parser: argparse.ArgumentParser) -> None:
    add_options_of_loads(parser, peers.MODELS_MEASURED, peers.LENGTHS)
    options(
        parser,
        methods=(peers.OURS, "of ours", ("Baseline", "Baseline+", "LESS")),
        presses=(peers.PRESSES, "of kvpress", peers.PRESSES),
        interval=(peers.PeersCase.interval, "steps between two compressions of kvpress"),
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m lesslib.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_training_options(commands.add_parser("train"))
    add_decoding_options(commands.add_parser("decode"))
    add_scoring_options(commands.add_parser("score"))
    add_endurance_options(commands.add_parser("endurance"))
    add_load_options(commands.add_parser("loads"))
    add_peer_options(commands.add_parser("peers"))
    return parser.parse_args(argv)


def decode_cases(arguments: argparse.Namespace) -> list[DecodeCase]:
    """The tables of `decode`: eager steps, then compiled ones of the models that ask for them."""
    cases = []
    sizes = itertools.product(arguments.models, arguments.hidden, arguments.batches)
    for model, hidden, batch in sizes:
        eager = DecodeCase(
            model=model,
            batch=batch,
            budget=arguments.budget,
            hidden=hidden,
            kernel_dtype=arguments.kernel_dtypes[0],
            steps=arguments.steps,
            contexts=tuple(arguments.contexts),
        )
        cases.append(eager)
        if model not in arguments.compiled:
            continue
        for dtype in arguments.kernel_dtypes:
            compiled = replace(
                eager,
                kernel_dtype=dtype,
                # compiling takes long, and a bounded cache's step is the same at any context
                contexts=eager.contexts[:1],
                methods=tuple(method for method in METHODS if method != "Full"),
                compiled=True,
            )
            cases.append(compiled)
    return cases


def run_decoding(arguments: argparse.Namespace) -> None:
    keep_memory()
    print(f"{torch.get_num_threads()} threads, {DEVICE}, torch {torch.__version__}, {DTYPE}")
    if arguments.generate:
        policy = H2O.from_budget(arguments.budget)
        print_memory(policy, arguments.hidden[0], arguments.generate)
    for case in decode_cases(arguments):
        print_decode(case)


def checked(case: Any, settings: dict[str, Any]) -> Any:
    """A `case` of the `settings`, --quick taken into account.

    Raises SystemExit for loads that cannot be.
    """
    if settings.pop("quick"):
        settings |= QUICK
    fields = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    made = case(**fields)
    try:
        made.each()
    except ValueError as error:
        raise SystemExit(f"python -m lesslib.bench: {error}") from error
    return made


def run_loads(settings: dict[str, Any]) -> None:
    keep_memory()
    fresh = settings.pop("fresh")
    loads.compare_loads(checked(loads.LoadsCase, settings), fresh)


def run_peers(settings: dict[str, Any]) -> None:
    keep_memory()
    fresh = settings.pop("fresh")
    try:
        peers.compare_peers(checked(peers.PeersCase, settings), fresh)
    except PeerMissing as error:
        raise SystemExit(
            f"kvpress cannot be installed here, so nothing is compared.\n{error}"
        ) from error


def main(argv: list[str] | None = None) -> None:
    """`python -m lesslib.bench`."""
    arguments = parse(argv)
    settings = dict(vars(arguments))
    command = settings.pop("command")
    if command == "train":
        print_training(**settings)
    elif command == "score":
        print_scoring(**settings)
    elif command == "endurance":
        print_endurance(Endurance(**settings))
    elif command == "loads":
        run_loads(settings)
    elif command == "peers":
        run_peers(settings)
    else:
        run_decoding(arguments)
