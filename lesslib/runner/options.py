"""The options of `./run_all.sh`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from lesslib.profiles import PROFILES

DESCRIPTION = (
    "Run the notebooks. One that is up to date is left alone, one that was interrupted resumes, "
    "and what would fail later for want of data, a model, disk or memory is said before anything "
    "is computed."
)


@dataclass(frozen=True)
class Options:
    """What a command line asks for; `./run_all.sh --help` says what each option does."""

    profile: str | None
    seed: int
    limit: str | None
    only: list[str]
    fresh: bool
    from_results: bool
    keep_going: bool
    refresh: bool
    list_only: bool
    test: bool
    lab: bool
    # arguments that are handed on: to pytest, or to JupyterLab
    further: list[str]

    @property
    def numbers(self) -> list[str]:
        """The notebooks of `--only`, which may be repeated, or a list with commas; [] for all."""
        return [number for number in ",".join(self.only).split(",") if number]


def parse(arguments: list[str] | None = None) -> Options:
    """The options in `arguments`, by default the process's. Exits with 2 where they are wrong."""
    parser = make_parser()
    parsed, further = parser.parse_known_args(arguments)
    if further and not (parsed.test or parsed.lab):
        parser.error(f"unknown argument {further[0]}")
    if parsed.refresh and parsed.seed:
        parser.error("--refresh takes the notebooks' own seed, 0")
    return Options(**vars(parsed), further=further)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("./run_all.sh", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--profile", help=f"{', '.join(PROFILES)} (default: $LESS_PROFILE, or tiny)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--limit",
        metavar="N",
        help="try a profile out: at most N windows, examples and epochs; results/PROFILE-limitN",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="03",
        help="these notebooks; may be repeated, or a list with commas",
    )
    either = parser.add_mutually_exclusive_group()
    switch(either, "--fresh", "compute again what was computed on this machine")
    switch(
        either,
        "--from-results",
        "redraw figures and tables from the recorded results, without compute",
    )
    switch(parser, "--keep-going", "go on after a notebook that fails")
    switch(
        parser,
        "--refresh",
        "also write notebooks with outputs: to notebooks/, or results/PROFILE/executed",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        dest="list_only",
        help="show the notebooks and what would be run",
    )
    switch(parser, "--test", "run the tests, on up to 4 cores; further arguments go to pytest")
    switch(parser, "--lab", "open JupyterLab on the notebooks; further arguments go to it")
    return parser


def switch(group: argparse._ActionsContainer, name: str, text: str) -> None:
    """Add an option that takes no value."""
    group.add_argument(name, action="store_true", help=text)
