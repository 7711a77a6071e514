"""Table 7 and the first column of Table 3: Lambda masks and TOVA at 5% of the context. The rows of
Full and of H2O stand in the record of Table 2, `language_modeling`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Point
from lesslib.experiments.method import Method
from lesslib.experiments.records import FULL, groups, load_or_empty, rows
from lesslib.experiments.scoring import (
    ScoringExperiment,
    beats_baseline_plus,
    cell_verdicts,
    shares_table,
)
from lesslib.profiles import get_profile
from lesslib.reporting import plots
from lesslib.reporting.paper import POLICIES, table7

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

FRACTION = 0.05
LESS = Method.less(FRACTION)

# Entries by label, by (corpus, policy).
Cells = dict[tuple[str, str], dict[str, dict]]


def sparse_methods(policy: str) -> tuple[Method, ...]:
    """The rows of one policy."""
    return (
        Method.baseline(FRACTION, policy),
        Method.baseline_plus(FRACTION, policy),
        Method.less(FRACTION, policy=policy),
    )


# ---------------------------------------------------------------------- points
class SparsePolicies(ScoringExperiment):
    name = "sparse_policies"

    def points(self) -> list[Point]:
        points = []
        for corpus in self.profile.evaluation:
            for policy in ("lambda", "tova"):
                for method in sparse_methods(policy):
                    parameters = {
                        "corpus": corpus,
                        "method": method.label,
                        "policy": policy,
                        "fraction": FRACTION,
                    }
                    points.append(Point(f"{corpus}/{policy}/{method.label}", parameters, method))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.evaluation


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of Table 7, without its H2O column."""
    return SparsePolicies(profile, seed).run()


def cells(record: dict, language: dict, profile: str) -> Cells:
    """Entries of all policies by (corpus, policy), Full first; `language` is the record of Table
    2.
    """
    by_place = {}
    for corpus in get_profile(profile).evaluation:
        full = {FULL: language["points"][f"{corpus}/{FULL}"]}
        for policy in POLICIES:
            source = language if policy == "h2o" else record
            group = f"{corpus}/{LESS.budget}" if policy == "h2o" else f"{corpus}/{policy}"
            by_place[corpus, policy] = full | rows(source, group, sparse_methods(policy))
    return by_place


# ---------------------------------------------------------------------- claims
@claim(
    "Tables 3, 7",
    "Every sparse policy gains from LESS",
    paper="WikiText at 5%, Lambda: {table7[WikiText][Baseline+][1]} to"
    " {table7[WikiText][LESS (5%)][1]}; TOVA: {table7[WikiText][Baseline+][2]} to"
    " {table7[WikiText][LESS (5%)][2]}",
    needs=("sparse_policies", "language_modeling"),
)
def every_policy_gains(record: dict, language: dict) -> Iterator[Verdict]:
    """At 5%, each policy with LESS against the same policy with Baseline+."""
    both = {"points": language["points"] | record["points"]}
    for group, entries in groups(both).items():
        if group.split("/")[1] in (LESS.budget, *POLICIES):
            yield beats_baseline_plus(entries, LESS.label, group)


def verdicts(record: dict, language: dict, profile: str) -> list[Verdict]:
    """What Table 7 claims, by corpus and policy."""
    verdicts = []
    for (corpus, policy), entries in cells(record, language, profile).items():
        where = f"{corpus}, {POLICIES[policy]} at {LESS.budget}"
        verdicts += cell_verdicts(entries, LESS.label, where)
    return verdicts


def verdicts_of_every_profile(record: dict, language: dict, profile: str) -> list[Verdict]:
    """Those on the profile's first corpus, which they do not name."""
    first = get_profile(profile).evaluation[0]
    verdicts = []
    for (corpus, policy), entries in cells(record, language, profile).items():
        if corpus == first:
            verdicts += cell_verdicts(entries, LESS.label, f"{POLICIES[policy]} at {LESS.budget}")
    return verdicts


# ---------------------------------------------------------------------- tables and a figure
def paper_table() -> Markdown:
    """Table 7 of the paper: word perplexity of Llama 2 7B at 5%."""
    places = list(itertools.product(("WikiText", "PG-19"), POLICIES))
    lines = []
    for method in (Method.full(), *sparse_methods("h2o")):
        lines.append([method.label, *(table7(c, p, method.label) for c, p in places)])
    return plots.table(["paper", *(f"{c} {POLICIES[p]}" for c, p in places)], lines)


def table(record: dict, language: dict, profile: str, measure: str = "token_ppl") -> Markdown:
    """Table 7 by method; `measure` is "token_ppl" or "word_ppl"."""
    by_place = cells(record, language, profile)
    lines = []
    for method in (Method.full(), *sparse_methods("h2o")):
        values = [entries[method.label][measure] for entries in by_place.values()]
        lines.append([method.label, *values])
    return plots.table(["", *(f"{c} {POLICIES[p]}" for c, p in by_place)], lines)


def wild_table() -> Markdown:
    """The recorded rows of the profile `wild`, if this copy of the repository has them."""
    points = dict(load_or_empty("sparse_policies", "wild")["points"])
    for key, entry in load_or_empty("language_modeling", "wild")["points"].items():
        if key.endswith(f"/{FULL}"):
            points[key] = entry
    return shares_table({"wild": {"points": points}}, "corpus, policy")


def figure(record: dict, language: dict, profile: str) -> Figure:
    """The share of the gap that each method closes, by corpus and policy."""
    bars = {}
    for (corpus, policy), entries in cells(record, language, profile).items():
        sparse = {label: entry for label, entry in entries.items() if label != FULL}
        bars[f"{corpus}\n{POLICIES[policy]}"] = (entries[FULL], sparse)
    return plots.gaps(bars, "gap in log perplexity closed at 5% (95% over documents)")
