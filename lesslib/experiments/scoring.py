"""Experiments that score text: perplexity by method, and what the tables of the paper claim of it.

`compare` gives any methods their rows, also of a policy or a state that a user registered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lesslib.evaluation import gap_closed, perplexity
from lesslib.experiments.claims import Verdict
from lesslib.experiments.experiment import Experiment, Point
from lesslib.experiments.loaded import model_of, windows_of
from lesslib.experiments.method import Method
from lesslib.experiments.records import FULL, PLUS, groups
from lesslib.hf import less
from lesslib.profiles import get_profile
from lesslib.reporting.results import load
from lesslib.reporting.tables import table

if TYPE_CHECKING:
    from IPython.display import Markdown


def score(experiment: Experiment, point: Point, corpus: str) -> dict[str, Any]:
    """Perplexity on `corpus` under the point's method; see `lesslib.evaluation.perplexity`."""
    profile = experiment.profile
    model_name = point.parameters.get("name")
    model, _ = model_of(model_name or profile.model)
    policy, state = experiment.setting(point)
    with less(model, policy, state, mode="parallel"):
        return perplexity(model, windows_of(profile.name, corpus, model_name), profile.batch)


class ScoringExperiment(Experiment):
    """An experiment whose points are perplexities on the corpus that their parameters name."""

    shares_points = True

    def compute(self, point: Point) -> dict[str, Any]:
        return score(self, point, point.parameters["corpus"])


# ---------------------------------------------------------------------- rows of one's own
class Comparison(ScoringExperiment):
    """Rows for the methods that a user names, beside Full: `name` is of the file."""

    def __init__(self, name: str, methods: Iterable[Method], profile: str, seed: int) -> None:
        super().__init__(profile, seed)
        check_name_is_free(name, self.profile.name)
        self.name = name
        self.methods = (Method.full(), *methods)

    def points(self) -> list[Point]:
        points = []
        for corpus in self.profile.evaluation:
            for method in self.methods:
                parameters = {"corpus": corpus} | asdict(method)
                key = f"{corpus}/{method.policy} {method.budget}/{method.label}"
                points.append(Point(key, parameters, method))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.evaluation


def check_name_is_free(name: str, profile: str) -> None:
    """Raises ValueError where results/<profile>/<name>.json is of another kind of experiment."""
    record = load(name, profile) or {"points": {}}
    for entry in record["points"].values():
        if "extra_tokens" not in entry["parameters"]:
            raise ValueError(
                f"{name!r} is the record of another experiment in the profile {profile}:"
                " choose another name"
            )


def compare(
    name: str, methods: Iterable[Method], profile: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """The record results/<profile>/<name>.json of `methods` and Full, scored on the profile's
    corpora.

    A method's policy and state may be one's own, registered by `register_policy` and
    `register_state`. Their code is not part of a point's identity: delete the file after a change.
    """
    return Comparison(name, methods, get_profile(profile).name, seed).run()


def comparison_table(record: dict) -> Markdown:
    """The rows of `compare`."""
    lines = []
    for entry in record["points"].values():
        parameters = dict(entry["parameters"])
        corpus = parameters.pop("corpus")
        method = Method(**parameters)
        budget = f"{method.policy} {method.budget}"
        lines.append([corpus, budget, method.label, entry["token_ppl"], entry["word_ppl"]])
    return table(["corpus", "policy", "method", "token perplexity", "word perplexity"], lines)


# ---------------------------------------------------------------------- shares and verdicts
def shares(record: dict) -> dict[tuple[str, str], tuple[str, str]]:
    """By group and label: the share of the gap between Baseline and Full that is closed, and its
    95% interval, in words; of all rows but those two.
    """
    in_words = {}
    for group, rows in groups(record).items():
        for label, row in rows.items():
            if label not in (FULL, "Baseline"):
                share, low, high = gap_closed(rows[FULL], rows["Baseline"], row)
                in_words[group, label] = (f"{share:.1%}", f"{low:.1%} to {high:.1%}")
    return in_words


def shares_table(records: dict[str, dict], group_name: str) -> Markdown:
    """Perplexities and shares of all rows, by profile where there are several records."""
    head = ["profile"] if len(records) > 1 else []
    columns = ["token perplexity", "word perplexity", "share of the gap closed", "95%"]
    lines = []
    for profile, record in records.items():
        share = shares(record)
        for group, rows in groups(record).items():
            for label, row in rows.items():
                line = [group, label, row["token_ppl"], row["word_ppl"]]
                line += share.get((group, label), (None, None))
                lines.append([profile, *line] if head else line)
    return table([*head, group_name, "method", *columns], lines)


def closes_half_of_the_gap(rows: dict[str, dict], label: str, where: str) -> Verdict:
    """The claim on the row `label` of LESS in a cell; `rows` by label, with Full among them."""
    share, numbers = _gap_in_words(rows, label)
    claim = f"{where}: {label} closes at least half of the gap between Baseline and Full"
    return Verdict(claim, share >= 0.5, numbers)


def beats_baseline_plus(rows: dict[str, dict], label: str, where: str) -> Verdict:
    """The claim on the row `label` of LESS in a cell."""
    less_ppl = rows[label]["token_ppl"]
    plus_ppl = rows[PLUS]["token_ppl"]
    numbers = f"{less_ppl:.2f} against {plus_ppl:.2f}"
    return Verdict(
        f"{where}: {label} has lower perplexity than {PLUS}", less_ppl < plus_ppl, numbers
    )


def performer_verdicts(rows: dict[str, dict], where: str) -> list[Verdict]:
    """The claims on random features in a cell; none where they were not measured."""
    if "Performer" not in rows:
        return []
    share, gap = _gap_in_words(rows, "Performer")
    ppl = rows["Performer"]["token_ppl"]
    plus_ppl = rows[PLUS]["token_ppl"]
    numbers = f"{ppl:.2f} against {plus_ppl:.2f}"
    return [
        Verdict(f"{where}: Performer closes less than half of that gap", share < 0.5, gap),
        Verdict(f"{where}: Performer does not beat {PLUS}", ppl >= plus_ppl, numbers),
    ]


def cell_verdicts(rows: dict[str, dict], label: str, where: str) -> list[Verdict]:
    """What Tables 2, 3 and 7 claim for one cell: a corpus, a policy and a budget.

    `rows` by label, with Full among them; `label` is the row of LESS; `where` leads the claims.
    """
    return [
        closes_half_of_the_gap(rows, label, where),
        beats_baseline_plus(rows, label, where),
        *performer_verdicts(rows, where),
    ]


def _gap_in_words(rows: dict[str, dict], label: str) -> tuple[float, str]:
    """The share of the gap that a row closes, and the same in words with its 95% interval."""
    share, low, high = gap_closed(rows[FULL], rows["Baseline"], rows[label])
    return share, f"{share:.1%} [{low:.1%}, {high:.1%}]"
