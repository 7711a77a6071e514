"""Figure 8: ROUGE-1 against the length of the prompt, under H2O at 5% of the context.

The same stories are told at several lengths, so the lead of LESS can be followed text by text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Experiment, Point, TaskTexts
from lesslib.experiments.method import four_methods
from lesslib.experiments.records import FULL, PLUS, corpora_of, groups
from lesslib.experiments.statistics import skilled
from lesslib.experiments.summarization import summarise
from lesslib.profiles import get_tasks, roles
from lesslib.reporting import plots

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

METHODS = four_methods(0.05)
LABELS = [method.label for method in METHODS]
LESS = LABELS[-1]
# Of the profile's tasks, the paper draws two.
TASKS = 2
RESAMPLES = 2000
# Lengths that a curve is drawn through.
POINTS_OF_CURVE = 40


# ---------------------------------------------------------------------- points
class PromptLength(Experiment):
    name = "prompt_length"
    together = ("method", "fraction", "s")
    shares_points = True

    def __init__(self, profile: str, seed: int = 0) -> None:
        super().__init__(profile, seed)
        self.settings = get_tasks(self.profile.name)
        self.model_name = roles(self.profile.name, tasks=True)["llama"]

    def points(self) -> list[Point]:
        points = []
        for task, shots, new_tokens in self.settings.summaries[:TASKS]:
            for length in self.settings.lengths:
                texts = {
                    "name": self.model_name,
                    "task": task,
                    "shots": shots,
                    "new_tokens": new_tokens,
                    "count": self.settings.texts,
                    "length": length,
                }
                for method in METHODS:
                    key = f"{task}/{length}/{method.label}"
                    setting = {"method": method.label, "fraction": 0.05}
                    points.append(Point(key, texts | setting, method))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.of(self.model_name).training

    def tasks(self) -> list[TaskTexts]:
        texts = []
        for task, shots, _ in self.settings.summaries[:TASKS]:
            for length in self.settings.lengths:
                texts.append(TaskTexts(task, self.settings.texts, shots, length))
        return texts

    def models(self) -> tuple[str, ...]:
        return (self.model_name,)

    def compute_together(self, points: list[Point]) -> list[dict[str, Any]]:
        return summarise(self, points)


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of Figure 8."""
    return PromptLength(profile, seed).run()


# ---------------------------------------------------------------------- curves
def cells_of(record: dict, task: str) -> list[dict[str, dict]]:
    """The rows of a task, by length as recorded."""
    return [rows for group, rows in groups(record).items() if group.split("/")[0] == task]


def by_length(record: dict, task: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """(prompt lengths in tokens, ROUGE-1) of all texts of a task under one method, by length."""
    entries = []
    for key, entry in record["points"].items():
        task_of_key, _, label_of_key = key.split("/")
        if (task_of_key, label_of_key) == (task, label):
            entries.append(entry)
    lengths = np.concatenate([entry["prompt_tokens"] for entry in entries])
    scores = np.concatenate([entry["scores"]["rouge1"] for entry in entries])
    order = np.argsort(lengths, kind="stable")
    return lengths[order], scores[order]


def neighbours(
    lengths: np.ndarray, scores: np.ndarray, at: np.ndarray, share: float = 0.25
) -> np.ndarray:
    """Nearest-neighbour regression, as in Figure 8.

    At each length, the mean score of the `share` of all texts that are nearest to it in length.
    """
    count = max(1, round(share * len(lengths)))
    means = []
    for length in at:
        nearest = np.argsort(np.abs(lengths - length), kind="stable")[:count]
        means.append(scores[nearest].mean())
    return np.array(means)


# ---------------------------------------------------------------------- claims
@claim("Figure 8", "Long prompts gain most", paper="by eye", needs=("prompt_length",))
def verdicts(record: dict) -> Iterator[Verdict]:
    """Whether the lead of LESS over each baseline grows with the prompt: by the sign of a slope.

    Its interval is a bootstrap over texts, each with all of its lengths: the same story is told at
    every length, so its scores are not independent.
    """
    rng = np.random.default_rng(0)
    for task in corpora_of(record):
        for rival in (PLUS, "Baseline"):
            yield _growth(cells_of(record, task), task, rival, rng)


def _growth(
    cells: list[dict[str, dict]], task: str, rival: str, rng: np.random.Generator
) -> Verdict:
    """The verdict on one task and rival; `cells` are the rows of its lengths."""
    # [lengths, texts]
    lengths = np.array([rows[FULL]["prompt_tokens"] for rows in cells])
    ours = np.array([rows[LESS]["scores"]["rouge1"] for rows in cells])
    theirs = np.array([rows[rival]["scores"]["rouge1"] for rows in cells])
    lead = ours - theirs

    texts = lead.shape[1]
    slope = _slope(lengths, lead)
    resamples = rng.integers(0, texts, (RESAMPLES, texts))
    slopes = [_slope(lengths[:, drawn], lead[:, drawn]) for drawn in resamples]
    low, high = np.quantile(slopes, [0.025, 0.975])

    is_noise = low <= 0 <= high
    holds = None
    if skilled(*(rows[FULL] for rows in cells)) and not is_noise:
        holds = bool(slope > 0)
    return Verdict(
        f"{task}: LESS's lead over {rival} grows with the prompt",
        holds,
        f"{slope:+.2f} points per 100 tokens [{low:+.2f}, {high:+.2f}]",
    )


def _slope(lengths: np.ndarray, lead: np.ndarray) -> float:
    """Points of ROUGE-1 per 100 tokens of prompt, by least squares."""
    return 100 * np.polyfit(lengths.ravel(), lead.ravel(), 1)[0]


# ---------------------------------------------------------------------- tables and figures
def table(record: dict) -> Markdown:
    """ROUGE-1 by task, length and method."""
    lines = []
    for group, rows in groups(record).items():
        task, words = group.split("/")
        tokens = rows[FULL]["prompt_tokens"]
        scores = [rows[label]["rouge1"] for label in LABELS]
        lines.append([task, words, f"{min(tokens)} to {max(tokens)}", *scores])
    return plots.table(["task", "words of text", "tokens of prompt", *LABELS], lines)


def figure(record: dict) -> Figure:
    """ROUGE-1 against the prompt's length by method, a panel a task."""
    panels = {}
    for task in corpora_of(record):
        curves = {}
        for label in LABELS:
            lengths, scores = by_length(record, task, label)
            at = np.linspace(lengths[0], lengths[-1], POINTS_OF_CURVE)
            curves[label] = (at, neighbours(lengths, scores, at))
        panels[task] = curves
    return plots.curves(panels, "tokens of the prompt", "ROUGE-1")


def same_prompts(record: dict, task: str) -> bool:
    """Whether all methods were scored on the same prompts of a task, by their lengths."""
    expected, _ = by_length(record, task, FULL)
    for label in LABELS:
        lengths, _ = by_length(record, task, label)
        if not (lengths == expected).all():
            return False
    return True
