"""What a call of the runner is about: the notebooks it chose, those it has to run, and why not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lesslib.profiles import Profile, get_limit, get_profile
from lesslib.runner.notebook import Notebook, notebook_paths
from lesslib.runner.options import Options
from lesslib.runner.preflight import preflight
from lesslib.runner.run_log import UP_TO_DATE, Outcome, RunLog


class Refusal(Exception):
    """Nothing is run: every problem of a call, each with its fix."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n  - ".join(["nothing was run:", *problems]))


@dataclass
class Plan:
    """The `chosen` notebooks in order, those `todo` among them, and by name how they went."""

    options: Options
    profile: Profile
    run_log: RunLog
    chosen: list[Notebook]
    todo: list[Notebook]
    outcomes: dict[str, Outcome]

    @property
    def command(self) -> str:
        """The command line that goes on where this call stopped."""
        words = ["./run_all.sh", "--profile", self.profile.name]
        if self.options.from_results:
            words.append("--from-results")
        if self.options.refresh:
            words.append("--refresh")
        if self.options.seed:
            words.append(f"--seed {self.options.seed}")
        if get_limit():
            words.append(f"--limit {get_limit()}")
        return " ".join(words)


def make_plan(options: Options, folder: Path) -> Plan:
    """Choose among the notebooks of `folder`. Raises Refusal, with all that is wrong at once."""
    chosen, problems = load_chosen(options.numbers, folder)
    try:
        profile = get_profile(options.profile)
        run_log = RunLog(profile.name, options.seed)
        todo = [notebook for notebook in chosen if has_to_run(notebook, run_log, options)]
        if todo and not (options.list_only or options.lab):
            problems += preflight(profile, run_log, todo, not options.from_results)
    # of a profile or a limit that there is not
    except ValueError as error:
        raise Refusal([*problems, str(error)]) from error
    # JupyterLab is where a notebook is mended.
    if problems and not options.lab:
        raise Refusal(problems)
    outcomes = {}
    for notebook in chosen:
        outcome = run_log.last_outcome(notebook)
        if notebook not in todo:
            outcome.state = UP_TO_DATE
        outcomes[notebook.name] = outcome
    return Plan(options, profile, run_log, chosen, todo, outcomes)


def load_chosen(numbers: list[str], folder: Path) -> tuple[list[Notebook], list[str]]:
    """(the notebooks called `numbers`, all for [], what is wrong with them or with the numbers)."""
    paths = notebook_paths(folder)
    problems = []
    for number in numbers:
        if number not in paths:
            problems.append(f"--only {number}: no such notebook; there are {', '.join(paths)}")
    chosen = []
    for number, path in paths.items():
        if numbers and number not in numbers:
            continue
        try:
            notebook = Notebook.load(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        chosen.append(notebook)
        problem = notebook.problem()
        if problem is not None:
            problems.append(problem)
    return chosen, problems


def has_to_run(notebook: Notebook, run_log: RunLog, options: Options) -> bool:
    """Whether options ask for it in any case, or it is not up to date."""
    if options.fresh or options.from_results or options.refresh:
        return True
    return not run_log.is_up_to_date(notebook)
