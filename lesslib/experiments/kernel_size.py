"""Figure 7: perplexity against the kernel size R, beside the policy with R/2 more tokens, which
hold as many bytes; H2O at 2% and 5%.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Point, Twin
from lesslib.experiments.language_modeling import LanguageModeling
from lesslib.experiments.method import Method
from lesslib.experiments.records import PLUS
from lesslib.experiments.scoring import ScoringExperiment, score
from lesslib.experiments.statistics import nats_apart
from lesslib.reporting import plots

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

# R of the small profiles, and of Figure 7.
SIZES = (2, 4, 8, 16, 32)
PAPER_SIZES = (8, 32, 128, 512)

LESS = "LESS"


# ---------------------------------------------------------------------- points
class KernelSize(ScoringExperiment):
    name = "kernel_size"

    def points(self) -> list[Point]:
        fractions: tuple[float, ...] = (0.02, 0.05)
        sizes: tuple[int, ...] = SIZES
        if self.profile.name == "paper":
            sizes = PAPER_SIZES
        if self.profile.quick:
            fractions = (0.05,)
            sizes = (self.profile.kernel_size,)
        points = []
        for fraction in fractions:
            for R in sizes:
                for method in (Method.baseline_plus(fraction), Method.less(fraction)):
                    key = f"{method.budget}/{R}/{method.label}"
                    parameters = {"fraction": fraction, "kernel_size": R, "method": method.label}
                    points.append(Point(key, parameters, method))
        return points

    def corpora(self) -> tuple[str, ...]:
        return (self.profile.evaluation[0], *self.profile.training)

    def twin(self, point: Point) -> Twin | None:
        """Kernels of the profile's own size are rows of Table 2."""
        if point.parameters["kernel_size"] != self.profile.kernel_size:
            return None
        assert point.method is not None
        key = f"{self.profile.evaluation[0]}/{point.method.budget}/{point.method.label}"
        return Twin(LanguageModeling(self.profile.name, self.seed), key)

    def compute(self, point: Point) -> dict[str, Any]:
        return score(self, point, self.profile.evaluation[0])


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of Figure 7."""
    return KernelSize(profile, seed).run()


def cells(record: dict) -> dict[str, dict[int, dict[str, dict]]]:
    """Entries of Baseline+ and LESS, under these names, by budget ("2%") and R, both ascending."""
    by_budget: dict[str, dict[int, dict[str, dict]]] = {}
    points = sorted(
        record["points"].items(),
        key=lambda item: (item[1]["parameters"]["fraction"], item[1]["parameters"]["kernel_size"]),
    )
    for key, entry in points:
        budget, _, label = key.split("/")
        R = entry["parameters"]["kernel_size"]
        name = PLUS if label == PLUS else LESS
        by_budget.setdefault(budget, {}).setdefault(R, {})[name] = entry
    return by_budget


# ---------------------------------------------------------------------- claims
@claim(
    "Figure 7",
    "A larger kernel size R is better, with diminishing return",
    paper="R = 8, 32, 128, 512, by eye",
    needs=("kernel_size",),
)
def verdicts(record: dict) -> list[Verdict]:
    """By budget: LESS beats tokens of the same bytes, larger R is better, and each doubling gains
    less.
    """
    verdicts = []
    for budget in cells(record):
        verdicts.append(beats_as_many_bytes(record, budget))
        verdicts += _gains(record, budget)
    return verdicts


def beats_as_many_bytes(record: dict, budget: str) -> Verdict:
    """At one budget ("5%"), whether LESS is better than Baseline+ at every R."""
    numbers = []
    is_lower = True
    for R, entries in cells(record)[budget].items():
        ours = entries[LESS]["log_ppl"]
        plus = entries[PLUS]["log_ppl"]
        is_lower = is_lower and ours < plus
        numbers.append(f"R={R}: {np.exp(ours):.2f} against {np.exp(plus):.2f}")
    claim = f"{budget}: LESS beats as many bytes of tokens at every R"
    return Verdict(claim, is_lower, ", ".join(numbers))


def _gains(record: dict, budget: str) -> list[Verdict]:
    """What doublings of R gain at one budget; none where fewer than three sizes were measured."""
    log_ppl = [entries[LESS]["log_ppl"] for entries in cells(record)[budget].values()]
    gains = [smaller - larger for smaller, larger in pairwise(log_ppl)]
    if len(gains) < 2:
        return []
    numbers = " then ".join(f"{gain:.3f}" for gain in gains) + " nats a token"
    is_better = min(gains) > 0
    is_diminishing = all(gain > next_gain for gain, next_gain in pairwise(gains))
    return [
        Verdict(f"{budget}: every doubling of R lowers perplexity", is_better, numbers),
        Verdict(f"{budget}: and gains less than the one before", is_diminishing, numbers),
    ]


# ---------------------------------------------------------------------- tables and a figure
def table(record: dict) -> Markdown:
    """By budget and R: both perplexities and LESS's lead."""
    lines = []
    for budget, by_size in cells(record).items():
        for R, entries in by_size.items():
            lead, low, high = nats_apart(entries[PLUS], entries[LESS])
            ppl = [entries[name]["token_ppl"] for name in (PLUS, LESS)]
            lines.append([budget, str(R), *ppl, lead, f"{low:.3f} to {high:.3f}"])
    columns = ["Baseline+ (R/2 more tokens)", "LESS", "LESS's lead, nats a token"]
    return plots.table(["H2O", "R", *columns, "95% over documents"], lines)


def gains_table(record: dict) -> Markdown:
    """What each doubling of R gains, and then each step of four, as in the paper."""
    lines = []
    for doublings in (1, 2):
        for budget, by_size in cells(record).items():
            sizes = list(by_size)
            for small, large in zip(sizes, sizes[doublings:], strict=False):
                gain, low, high = nats_apart(by_size[small][LESS], by_size[large][LESS])
                lines.append([budget, f"{small} to {large}", gain, f"{low:.3f} to {high:.3f}"])
    return plots.table(["H2O", "R", "gain, nats a token", "95% over documents"], lines)


def figure(record: dict) -> Figure:
    """Perplexity against R, a panel a budget."""
    panels = {}
    for budget, by_size in cells(record).items():
        lines = {}
        for name in (PLUS, LESS):
            ppl = [entries[name]["token_ppl"] for entries in by_size.values()]
            lines[name] = (list(by_size), ppl)
        panels[f"H2O at {budget}"] = lines
    return plots.curves(panels, "R (Baseline+: R/2 more tokens)", "token perplexity", log2=True)
