"""`./run_all.sh` and `python -m lesslib.run`: parse the command line, call what it asks for."""

from __future__ import annotations

import os
import sys

from lesslib.runner import commands
from lesslib.runner.notebook import NOTEBOOKS
from lesslib.runner.options import parse
from lesslib.runner.plan import Refusal, make_plan

REFUSED = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments`, by default the process's own; the exit code.

    0: all is well; 1: a notebook failed; 2: nothing was run, for the reasons printed; 130: Ctrl-C.
    """
    options = parse(arguments)
    if options.test:
        os.environ["LESS_LIMIT"] = ""
        return commands.run_tests(NOTEBOOKS, options.further)
    if options.limit:
        os.environ["LESS_LIMIT"] = options.limit
    try:
        plan = make_plan(options, NOTEBOOKS)
        if options.fresh and not (options.list_only or options.lab):
            commands.forget_computed(plan)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return REFUSED
    if options.lab:
        return commands.open_lab(NOTEBOOKS, plan.profile.name, options.further)
    if options.list_only:
        return commands.list_notebooks(plan)
    return commands.run_notebooks(plan)
