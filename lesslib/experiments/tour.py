"""The effect in four rows: H2O at 5% of the context, with the kernels that the package carries, or
else trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lesslib.experiments.claims import Verdict
from lesslib.experiments.experiment import Point
from lesslib.experiments.method import Method, four_methods
from lesslib.experiments.records import FULL, corpora_of, rows
from lesslib.experiments.scoring import ScoringExperiment, cell_verdicts
from lesslib.models import kernel_path
from lesslib.reporting import plots

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

FRACTION = 0.05
METHODS = four_methods(FRACTION)
LESS = Method.less(FRACTION)


# ---------------------------------------------------------------------- points
class Tour(ScoringExperiment):
    name = "tour"

    def points(self) -> list[Point]:
        corpus = self.profile.evaluation[0]
        carried = kernel_path(self.profile.model, "h2o", FRACTION).is_file()
        points = []
        for method in METHODS:
            parameters = {
                "corpus": corpus,
                "fraction": FRACTION,
                "carried": carried,
                "method": method.label,
            }
            points.append(Point(f"{corpus}/{FRACTION:.0%}/{method.label}", parameters, method))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.evaluation[:1]


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of the tour."""
    return Tour(profile, seed).run()


# ---------------------------------------------------------------------- what readers see
def cell(record: dict) -> dict[str, dict]:
    """Entries by label, Full first."""
    return rows(record, f"{corpora_of(record)[0]}/{FRACTION:.0%}", METHODS)


def verdicts(record: dict) -> list[Verdict]:
    """What Table 2 claims, at 5% on one corpus."""
    return cell_verdicts(cell(record), LESS.label, f"H2O at {LESS.budget}")


def table(record: dict) -> Markdown:
    """Perplexity by method, with its error over documents."""
    lines = []
    for label, entry in cell(record).items():
        measures = [entry[name] for name in ("token_ppl", "word_ppl", "log_ppl", "log_ppl_se")]
        lines.append([label, *measures])
    columns = ["token perplexity", "word perplexity", "nats a token", "± (over documents)"]
    return plots.table(["method", *columns], lines)


def figure(record: dict) -> Figure:
    """What is lost along the context, and what comes back."""
    entries = cell(record)
    sparse = {label: entry for label, entry in entries.items() if label != FULL}
    title = f"{corpora_of(record)[0]}: H2O at {LESS.budget} of the context"
    return plots.by_position(entries[FULL], sparse, title)
