"""Options of command lines, declared by their defaults."""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option of a command line.

    `default` decides its type: one word of that type; False is a flag; a tuple takes one word or
    more of its first item's type, a list any number. `choices`: the words allowed, None for all.
    """

    default: Any
    help: str
    choices: Sequence[Any] | None = None


def options(parser: argparse.ArgumentParser, **declared: tuple) -> None:
    """Add `--name` to `parser` for every name; each is an `Option`, or a tuple of its fields."""
    for name, fields in declared.items():
        _add(parser, name, Option(*fields))


def _add(parser: argparse.ArgumentParser, name: str, option: Option) -> None:
    flag = f"--{name.replace('_', '-')}"
    text = f"{option.help} (default: %(default)s)"
    default = option.default
    if default is False:
        parser.add_argument(flag, action="store_true", help=text)
        return
    number: str | None = None
    kind = type(default)
    if isinstance(default, tuple | list):
        number = "+" if isinstance(default, tuple) else "*"
        kind = type(default[0])
    parser.add_argument(
        flag, default=default, help=text, nargs=number, type=kind, choices=option.choices
    )
