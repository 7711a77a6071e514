"""Table 2: perplexity under H2O at several budgets, with kernels trained at each and tested at
every one. The rows of the multi-query model, `multi_query.py`, decide two of its claims too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lesslib.evaluation import gap_closed
from lesslib.evaluation.perplexity import RECURRENCE
from lesslib.experiments import tour
from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Point, Twin
from lesslib.experiments.method import Method
from lesslib.experiments.records import FULL, PLUS, corpora_of, groups, load_or_empty, rows
from lesslib.experiments.scoring import (
    ScoringExperiment,
    cell_verdicts,
    closes_half_of_the_gap,
    shares_table,
)
from lesslib.profiles import get_profile
from lesslib.reporting import plots
from lesslib.reporting.paper import table2

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

PAPER_FRACTIONS = (0.02, 0.05, 0.1)


def methods_at(fraction: float, trained_fractions: Iterable[float]) -> list[Method]:
    """The rows of one column: all methods at `fraction`, LESS by the budget of its kernels."""
    methods = [
        Method.baseline(fraction),
        Method.baseline_plus(fraction),
        Method.performer(fraction),
    ]
    methods += [Method.less(fraction, trained) for trained in trained_fractions]
    return methods


# ---------------------------------------------------------------------- points
class LanguageModeling(ScoringExperiment):
    name = "language_modeling"

    def points(self) -> list[Point]:
        points = []
        for corpus in self.profile.evaluation:
            parameters: dict[str, Any] = {"corpus": corpus, "method": FULL}
            points.append(Point(f"{corpus}/{FULL}", parameters, Method.full()))
        for corpus in self.profile.evaluation:
            for fraction in self.profile.fractions:
                for method in methods_at(fraction, self.profile.fractions):
                    key = f"{corpus}/{method.budget}/{method.label}"
                    parameters = {"corpus": corpus, "method": method.label, "fraction": fraction}
                    points.append(Point(key, parameters, method))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.evaluation

    def twin(self, point: Point) -> Twin | None:
        """The tour has some rows of one cell; that of LESS may have other kernels."""
        method = point.method
        if method not in tour.METHODS or method.state != "none":
            return None
        key = f"{point.parameters['corpus']}/{tour.FRACTION:.0%}/{method.label}"
        return Twin(tour.Tour(self.profile.name, self.seed), key)


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of Table 2."""
    return LanguageModeling(profile, seed).run()


# ---------------------------------------------------------------------- cells
def fractions_of(record: dict) -> list[float]:
    """The budgets of a record, from the smallest."""
    fractions = set()
    for entry in record["points"].values():
        if "fraction" in entry["parameters"]:
            fractions.add(entry["parameters"]["fraction"])
    return sorted(fractions)


def cell(record: dict, corpus: str, fraction: float) -> dict[str, dict]:
    """Entries of a corpus at a budget by label, Full first, in the order of the paper's table."""
    methods = methods_at(fraction, fractions_of(record))
    full = {FULL: record["points"][f"{corpus}/{FULL}"]}
    return full | rows(record, f"{corpus}/{fraction:.0%}", methods)


def cells(record: dict, profile: str) -> dict[tuple[str, float], dict[str, dict]]:
    """`cell` by corpus and fraction, in the order of the profile."""
    by_place = {}
    for corpus in get_profile(profile).evaluation:
        for fraction in fractions_of(record):
            by_place[corpus, fraction] = cell(record, corpus, fraction)
    return by_place


def first_cell(record: dict, profile: str) -> dict[str, dict]:
    """`cell` at 5%, which every profile has, of the profile's first corpus."""
    return cell(record, get_profile(profile).evaluation[0], 0.05)


# ---------------------------------------------------------------------- claims
@claim(
    "Table 2",
    "LESS < Baseline+ < Baseline in perplexity at every sparsity",
    paper="WikiText at 2%: {table2[WikiText][LESS (2%)][0]} < {table2[WikiText][Baseline+][0]}"
    " < {table2[WikiText][Baseline][0]}",
    needs=("language_modeling", "multi_query"),
)
def order_of_methods(*records: dict) -> Iterator[Verdict]:
    """At every budget, by LESS with kernels trained at it."""
    for place, entries in _groups_with_model(*records):
        trained_at_it = Method.less(entries[PLUS]["parameters"]["fraction"]).label
        ppl = [entries[label]["token_ppl"] for label in (trained_at_it, PLUS, "Baseline")]
        is_ordered = ppl[0] < ppl[1] < ppl[2]
        numbers = ", ".join(f"{x:.2f}" for x in ppl)
        yield Verdict(f"{place}: LESS < Baseline+ < Baseline", is_ordered, numbers)


@claim(
    "Table 2",
    "At the smallest budget, LESS closes half of the gap that eviction opens",
    paper="WikiText: {table2[WikiText][Baseline][0]} to {table2[WikiText][LESS (2%)][0]},"
    " full {table2[WikiText][Full][0]}",
    needs=("language_modeling",),
)
def half_of_the_gap_at_the_smallest_budget(record: dict) -> Iterator[Verdict]:
    smallest = Method.less(fractions_of(record)[0])
    for corpus in corpora_of(record):
        entries = cell(record, corpus, smallest.fraction)
        where = f"{corpus}, H2O at {smallest.budget}"
        yield closes_half_of_the_gap(entries, smallest.label, where)


@claim(
    "Table 2",
    "Kernels trained at a denser budget than tested do worse",
    paper="WikiText at 2%: {table2[WikiText][LESS (2%)][0]} trained at 2%,"
    " {table2[WikiText][LESS (10%)][0]} at 10%",
    needs=("language_modeling",),
)
def denser_kernels_do_worse(record: dict) -> Iterator[Verdict]:
    for corpus in corpora_of(record):
        yield from transfer_verdicts(record, corpus)


@claim(
    "Table 2",
    "Performer's random features gain nothing",
    paper="WikiText at 2%: {table2[WikiText][H2O+Performer][0]},"
    " Baseline {table2[WikiText][Baseline][0]}",
    needs=("language_modeling", "multi_query"),
)
def performer_gains_nothing(*records: dict) -> Iterator[Verdict]:
    """Random features close none of the gap, by its interval over documents."""
    for place, entries in _groups_with_model(*records):
        share, low, high = gap_closed(entries[FULL], entries["Baseline"], entries["Performer"])
        yield Verdict(
            f"{place}: Performer closes none of the gap",
            low <= 0,
            f"{share:.1%} [{low:.1%}, {high:.1%}]",
        )


def _groups_with_model(*records: dict) -> Iterator[tuple[str, dict[str, dict]]]:
    """(the model, where it is not the profile's, and the group; entries by label)."""
    for record in records:
        for group, entries in groups(record).items():
            model = entries[PLUS]["parameters"].get("name", "")
            yield f"{model} {group}".strip(), entries


def transfer_verdicts(record: dict, corpus: str) -> list[Verdict]:
    """What kernels trained at the largest budget do at the smallest; none with one budget."""
    fractions = fractions_of(record)
    if len(fractions) < 2:
        return []
    matched = Method.less(fractions[0])
    denser = Method.less(fractions[0], trained_fraction=fractions[-1])
    entries = cell(record, corpus, fractions[0])
    matched_ppl = entries[matched.label]["token_ppl"]
    denser_ppl = entries[denser.label]["token_ppl"]
    claim = (
        f"{corpus}: at {matched.budget}, kernels trained at {fractions[-1]:.0%}"
        " do worse than those trained at it"
    )
    numbers = f"{denser_ppl:.2f} against {matched_ppl:.2f}"
    return [Verdict(claim, denser_ppl > matched_ppl, numbers)]


def verdicts(record: dict, whose: str = "") -> list[Verdict]:
    """Table 2: every budget with the kernels trained at it, and then kernels of the largest at
    the smallest. `whose` leads the claims: of another model, say.
    """
    verdicts = []
    for corpus in corpora_of(record):
        for fraction in fractions_of(record):
            method = Method.less(fraction)
            where = f"{whose}{corpus}, H2O at {method.budget}"
            verdicts += cell_verdicts(cell(record, corpus, fraction), method.label, where)
        verdicts += transfer_verdicts(record, corpus)
    return verdicts


def verdicts_of_every_profile(record: dict, profile: str) -> list[Verdict]:
    """Those at 5% on the profile's first corpus, which they do not name."""
    method = Method.less(0.05)
    return cell_verdicts(first_cell(record, profile), method.label, f"H2O at {method.budget}")


# ---------------------------------------------------------------------- tables
def paper_table() -> Markdown:
    """Table 2 of the paper: word perplexity of Llama 2 7B."""
    methods = [Method.full(), *methods_at(PAPER_FRACTIONS[0], PAPER_FRACTIONS)]
    places = list(itertools.product(("WikiText", "PG-19"), PAPER_FRACTIONS))
    lines = []
    for method in methods:
        lines.append([method.label, *(table2(c, f, method.label) for c, f in places)])
    return plots.table(["paper", *(f"{c} {f:.0%}" for c, f in places)], lines)


def table(record: dict, profile: str, measure: str = "token_ppl") -> Markdown:
    """Table 2 by method and budget; `measure` is "token_ppl" or "word_ppl"."""
    by_place = cells(record, profile)
    labels = list(next(iter(by_place.values())))
    lines = []
    for label in labels:
        lines.append([label, *(entries[label][measure] for entries in by_place.values())])
    return plots.table(["", *(f"{corpus} {f:.0%}" for corpus, f in by_place)], lines)


def wild_table() -> Markdown:
    """The recorded rows of the profile `wild`, if this copy of the repository has them."""
    return shares_table({"wild": load_or_empty("language_modeling", "wild")}, "corpus, budget")


def recurrence_table(record: dict, profile: str) -> Markdown:
    """`by_recurrence` at 5%, of this record and of the profile `wild`."""
    lines = []
    records = {profile: record, "wild": load_or_empty("language_modeling", "wild")}
    for name, each in records.items():
        for corpus in corpora_of(each):
            entries = cell(each, corpus, 0.05)
            for kind in by_recurrence(entries, Method.less(0.05).label):
                lines.append([name, corpus, *kind])
    columns = ["profile", "corpus", "token", "of all tokens", "nats lost a token"]
    return plots.table([*columns, "of all that is lost", "LESS gives back"], lines)


def by_recurrence(entries: dict[str, dict], label: str) -> list[list[str]]:
    """Lines by kind of token (see `lesslib.evaluation.perplexity.RECURRENCE`).

    Its share of the tokens, nats that Baseline loses on one, its share of all that is lost, and
    the share of its loss that the row `label` of LESS gives back.
    """
    # By kind: [nll, tokens].
    full = entries[FULL]["by_recurrence"]
    baseline = entries["Baseline"]["by_recurrence"]
    ours = entries[label]["by_recurrence"]
    lost = {kind: baseline[kind][0] - full[kind][0] for kind in RECURRENCE}
    tokens = {kind: full[kind][1] for kind in RECURRENCE}
    lines = []
    for kind in RECURRENCE:
        given_back = (baseline[kind][0] - ours[kind][0]) / lost[kind]
        lines.append(
            [
                kind,
                f"{tokens[kind] / sum(tokens.values()):.0%}",
                f"{lost[kind] / tokens[kind]:.3f}",
                f"{lost[kind] / sum(lost.values()):.0%}",
                f"{given_back:.0%}",
            ]
        )
    return lines


# ---------------------------------------------------------------------- figures
def figure(record: dict, profile: str) -> Figure:
    """Perplexity against the budget, a panel a corpus."""
    fractions = fractions_of(record)
    budgets = [100 * fraction for fraction in fractions]
    panels: dict[str, dict] = {}
    for (corpus, _), entries in cells(record, profile).items():
        panel = panels.setdefault(corpus, {label: (budgets, []) for label in entries})
        for label, entry in entries.items():
            panel[label][1].append(entry["token_ppl"])
    return plots.curves(panels, "H2O budget, % of the context", "token perplexity")


def gap_figure(record: dict, profile: str) -> Figure:
    """The share of the gap that each method closes, by corpus and budget."""
    bars = {}
    for (corpus, fraction), entries in cells(record, profile).items():
        sparse = {label: entry for label, entry in entries.items() if label != FULL}
        bars[f"{corpus}\n{fraction:.0%}"] = (entries[FULL], sparse)
    return plots.gaps(bars, "gap in log perplexity closed, H2O (95% over documents)")


def position_figure(record: dict, profile: str) -> Figure:
    """What is lost along the context at the smallest budget, on the profile's first corpus."""
    corpus = get_profile(profile).evaluation[0]
    smallest = Method.less(fractions_of(record)[0])
    entries = cell(record, corpus, smallest.fraction)
    shown = {label: entries[label] for label in ("Baseline", PLUS, smallest.label)}
    title = f"{corpus}: H2O at {smallest.budget} of the context"
    return plots.by_position(entries[FULL], shown, title)
