"""Rows like Table 2's for Falcon's architecture, where all query heads share one key-value head:
H2O at 5%, with kernels trained for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lesslib.experiments import language_modeling
from lesslib.experiments.claims import Verdict
from lesslib.experiments.experiment import Experiment, Point
from lesslib.experiments.language_modeling import methods_at
from lesslib.experiments.method import Method
from lesslib.experiments.records import load_or_empty
from lesslib.experiments.scoring import score, shares_table
from lesslib.experiments.setting import fit_kernels
from lesslib.profiles import roles

if TYPE_CHECKING:
    from IPython.display import Markdown

FRACTION = 0.05


# ---------------------------------------------------------------------- points
class MultiQuery(Experiment):
    name = "multi_query"

    @property
    def model_name(self) -> str:
        return roles(self.profile.name)["falcon"]

    def points(self) -> list[Point]:
        points = []
        if not self.profile.quick:
            points.append(Point("kernels", {"name": self.model_name}))
        for corpus in self.profile.evaluation:
            for method in (Method.full(), *methods_at(FRACTION, [FRACTION])):
                key = f"{corpus}/{FRACTION:.0%}/{method.label}"
                if method == Method.full():
                    key = f"{corpus}/{method.label}"
                parameters = {
                    "corpus": corpus,
                    "method": method.label,
                    "fraction": FRACTION,
                    "name": self.model_name,
                }
                points.append(Point(key, parameters, method))
        return points

    def corpora(self) -> tuple[str, ...]:
        return (*self.profile.evaluation, *self.profile.training)

    def models(self) -> tuple[str, ...]:
        return (self.model_name,)

    def may_be_shared(self, point: Point) -> bool:
        return point.method is not None

    def compute(self, point: Point) -> dict[str, Any]:
        if point.method is None:
            return fit_kernels(self.profile.name, self.seed, model_name=self.model_name)
        return score(self, point, point.parameters["corpus"])


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of the multi-query model."""
    return MultiQuery(profile, seed).run()


# ---------------------------------------------------------------------- verdicts and tables
def verdicts(record: dict) -> list[Verdict]:
    """What Table 2 claims, at 5%. Its claims on both models stand in language_modeling.py."""
    scored = {key: entry for key, entry in record["points"].items() if key != "kernels"}
    return language_modeling.verdicts({"points": scored}, "Falcon, ")


def table(record: dict, profile: str) -> Markdown:
    """The rows of this profile and of `wild`, with the shares of the gap that they close."""
    records = {profile: record, "wild": load_or_empty("multi_query", "wild")}
    return shares_table(records, "corpus, budget")
