"""Options of command lines."""

import argparse
from typing import Any


def options(parser: argparse.ArgumentParser, **given: Any) -> None:
    """Add --options to `parser`, each by (default, help[, choices]), of the default's type; a tuple takes one word or more, a list any."""
    for name, (default, what, *choices) in given.items():
        many = {"tuple": "+", "list": "*"}.get(type(default).__name__)
        kind: Any = {
            "nargs": many,
            "type": type(default[0] if many else default),
            "choices": choices[0] if choices else None,
        }
        kind = {"action": "store_true"} if default is False else kind
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=default,
            help=f"{what} (default: %(default)s)",
            **kind,
        )
