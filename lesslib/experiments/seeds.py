"""The headline rows again with kernels of three seeds: LESS trained at 5%, H2O at 5%.

Perplexity on the profile's corpora, and ROUGE of its summaries; notebook 06 shows the spread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lesslib.experiments.experiment import Experiment, Point, TaskTexts, Twin
from lesslib.experiments.language_modeling import LanguageModeling
from lesslib.experiments.method import Method
from lesslib.experiments.records import PLUS
from lesslib.experiments.scoring import score
from lesslib.experiments.statistics import difference
from lesslib.experiments.summarization import Summarization, at_fractions, summarise
from lesslib.profiles import get_tasks, roles
from lesslib.reporting import plots

if TYPE_CHECKING:
    from IPython.display import Markdown

METHOD = Method.less(0.05)
COUNT = 3


# ---------------------------------------------------------------------- points
class Seeds(Experiment):
    name = "seeds"
    together = ("method", "fraction", "s")
    shares_points = True

    def __init__(self, profile: str, seed: int = 0) -> None:
        super().__init__(profile, seed)
        self.settings = get_tasks(self.profile.name)
        # The model that was taught to write summaries.
        self.writer = roles(self.profile.name, tasks=True)["llama"]

    def points(self) -> list[Point]:
        points = []
        setting = {"method": METHOD.label, "fraction": METHOD.fraction}
        seeds = range(self.seed, self.seed + COUNT)
        for corpus in self.profile.evaluation:
            for s in seeds:
                parameters = setting | {"s": s, "name": self.profile.model, "corpus": corpus}
                points.append(Point(f"{corpus}/{s}", parameters, METHOD))
        for task, shots, new_tokens in self.settings.summaries:
            texts = {
                "name": self.writer,
                "task": task,
                "shots": shots,
                "new_tokens": new_tokens,
                "count": self.settings.texts,
                "length": self.settings.length,
            }
            for s in seeds:
                points.append(Point(f"{task}/{s}", setting | texts | {"s": s}, METHOD))
        return points

    def corpora(self) -> list[str]:
        of_writer = self.profile.of(self.writer).training
        names = (*self.profile.evaluation, *self.profile.training, *of_writer)
        return list(dict.fromkeys(names))

    def tasks(self) -> list[TaskTexts]:
        count = self.settings.texts
        length = self.settings.length
        return [TaskTexts(task, count, shots, length) for task, shots, _ in self.settings.summaries]

    def models(self) -> tuple[str, ...]:
        return (self.profile.model, self.writer)

    def twin(self, point: Point) -> Twin | None:
        """Kernels of the first seed are those of Table 2 and of the summaries."""
        if point.parameters["s"] != self.seed:
            return None
        text, _ = point.key.split("/")
        key = f"{text}/{METHOD.budget}/{METHOD.label}"
        if "task" in point.parameters:
            return Twin(Summarization(self.profile.name, "llama", self.seed), key)
        return Twin(LanguageModeling(self.profile.name, self.seed), key)

    def compute_together(self, points: list[Point]) -> list[dict[str, Any]]:
        if "task" in points[0].parameters:
            return summarise(self, points)
        return [score(self, point, point.parameters["corpus"]) for point in points]


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of the headline rows by seed."""
    return Seeds(profile, seed).run()


# ---------------------------------------------------------------------- tables
HEADER = [f"seed {i}" for i in range(COUNT)]


def by_seed(record: dict) -> dict[str, list[dict]]:
    """Entries by corpus or task, then by seed."""
    entries: dict[str, list[dict]] = {}
    for key, entry in record["points"].items():
        text, _ = key.split("/")
        entries.setdefault(text, []).append(entry)
    return entries


def table(record: dict) -> Markdown:
    """Perplexity or ROUGE-1 by seed, mean and spread."""
    lines = []
    for text, entries in by_seed(record).items():
        measure = "rouge1" if "rouge1" in entries[0] else "token_ppl"
        values = [entry[measure] for entry in entries]
        lines.append([text, *values, np.mean(values), np.std(values, ddof=1)])
    head = f"{METHOD.label}, H2O at {METHOD.budget}"
    return plots.table([head, *HEADER, "mean", "standard deviation"], lines)


def lead_table(record: dict, summaries: dict) -> Markdown:
    """The lead of each seed in ROUGE-1 over the same Baseline+, of the record `summaries`."""
    lines = []
    of_seeds = by_seed(record)
    for group, rows in at_fractions(summaries, METHOD.fraction).items():
        task, _ = group.split("/")
        if task in of_seeds:
            plus = rows[PLUS]["scores"]["rouge1"]
            leads = [difference(x["scores"]["rouge1"], plus) for x in of_seeds[task]]
            lines.append([task, *leads])
    return plots.table([f"ahead of {PLUS} in ROUGE-1", *HEADER], lines)
