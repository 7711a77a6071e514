"""What computing everything once buys: seconds and peak memory of an epoch of training, ours and
by the step-by-step scheme of the authors' code, each case in a fresh process.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lesslib.bench import SCHEMES, measure
from lesslib.experiments.claims import Verdict
from lesslib.experiments.experiment import Experiment, Point
from lesslib.reporting import plots

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

# Of the windows, in tokens, and the longest by scheme: S x S weights soon take too much memory.
LENGTHS = (512, 1024, 2048, 4096)
LONGEST = dict(zip(SCHEMES, (4096, 2048, 1024), strict=True))

OURS = "ours"
STEPWISE = "stepwise"


# ---------------------------------------------------------------------- points
class TrainingSpeed(Experiment):
    name = "training_speed"

    def points(self) -> list[Point]:
        common = {
            "sequences": 8,
            "fraction": 0.05,
            "hidden": self.profile.hidden,
            "dropout": self.profile.dropout,
            "seed": self.seed,
        }
        lengths = LENGTHS[:1] if self.profile.quick else LENGTHS
        points = []
        for scheme, longest in LONGEST.items():
            for length in lengths:
                if length <= longest:
                    parameters = {"scheme": scheme, "length": length, **common}
                    points.append(Point(f"{scheme} {length}", parameters))
        return points

    def corpora(self) -> tuple[str, ...]:
        return ("topics-train",)

    def compute(self, point: Point) -> dict[str, Any]:
        return measure(**point.parameters)


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of the schemes' speed."""
    return TrainingSpeed(profile, seed).run()


def by_case(record: dict) -> dict[tuple[str, int], dict]:
    """Entries by scheme and length, sorted."""
    cases = {}
    for entry in record["points"].values():
        cases[entry["parameters"]["scheme"], entry["parameters"]["length"]] = entry
    return dict(sorted(cases.items()))


# ---------------------------------------------------------------------- verdicts
def verdicts(record: dict) -> list[Verdict]:
    """Seconds an epoch against the step-by-step scheme, and the growth of peak memory with the
    length; none where only the shortest windows were timed.
    """
    cases = by_case(record)
    ratio = {}
    for scheme, length in cases:
        if scheme == STEPWISE:
            stepwise = cases[STEPWISE, length]["seconds_epoch"]
            ratio[length] = stepwise / cases[OURS, length]["seconds_epoch"]
    if 1024 not in ratio or 2048 not in ratio:
        return []
    numbers = ", ".join(f"{ratio[length]:.0f}x at {length}" for length in sorted(ratio))
    memory = [cases[OURS, length]["peak_mib"] for length in (1024, 2048, 4096)]
    growth = " -> ".join(f"{mib:.0f}" for mib in memory)
    is_linear = all(longer <= 2.2 * shorter for shorter, longer in pairwise(memory))
    return [
        Verdict(
            "an epoch takes at least 25 times fewer seconds at 1,024 tokens",
            ratio[1024] >= 25,
            numbers,
        ),
        Verdict("and the ratio is larger at 2,048", ratio[2048] > ratio[1024], numbers),
        Verdict(
            "peak memory grows linearly: at most 2.2 times per doubling",
            is_linear,
            f"{growth} MiB at 1,024, 2,048 and 4,096 tokens",
        ),
    ]


# ---------------------------------------------------------------------- a table and a figure
def table(record: dict) -> Markdown:
    """Seconds and memory by scheme and length, and seconds over ours.

    "a layer": of the quickest and of the slowest, in the same epoch.
    """
    cases = by_case(record)
    lines = []
    for (scheme, length), entry in cases.items():
        ratio = entry["seconds_epoch"] / cases[OURS, length]["seconds_epoch"]
        # not in older records
        of_layers = " to ".join(f"{s:.3g}" for s in entry.get("seconds_layers", []))
        measured = [entry["seconds_epoch"], of_layers, entry["seconds_once"], entry["peak_mib"]]
        lines.append([scheme, length, *measured, f"{ratio:.1f}"])
    columns = ["s an epoch", "s a layer", "s once", "peak MiB", "times ours"]
    return plots.table(["scheme", "tokens", *columns], lines)


def figure(record: dict) -> Figure:
    """Seconds and memory against the length, for the two schemes as they are meant to run."""
    picture, (left, right) = plots.axes(2)
    cases = by_case(record)
    for scheme, tint in ((STEPWISE, plots.COLOURS["Baseline"]), (OURS, plots.BLUES[1])):
        lengths = [length for name, length in cases if name == scheme]
        for panel, measured in ((left, "seconds_epoch"), (right, "peak_mib")):
            values = [cases[scheme, length][measured] for length in lengths]
            panel.loglog(lengths, values, "o-", color=tint, label=scheme, base=2)
    sequences = cases[OURS, lengths[0]]["parameters"]["sequences"]
    left.set(
        xlabel="tokens a window",
        ylabel=f"seconds an epoch of {sequences} windows",
        title="time",
    )
    right.set(xlabel="tokens a window", ylabel="peak memory above the start, MiB", title="memory")
    left.legend()
    return picture
