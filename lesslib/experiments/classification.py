"""Table 3: two tasks answered by likelihood, under a Lambda mask at 5% of the context.

What is left of them when the text is withheld is measured beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lesslib.data import encode
from lesslib.evaluation import gap_closed, option_scores, prompts
from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Experiment, Point, TaskTexts
from lesslib.experiments.loaded import examples_of, model_of
from lesslib.experiments.method import Method, four_methods
from lesslib.experiments.records import FULL, PLUS, groups, load_or_empty
from lesslib.experiments.statistics import ahead
from lesslib.hf import less
from lesslib.models import model_shape
from lesslib.profiles import get_tasks, roles
from lesslib.reporting import plots
from lesslib.reporting.paper import PAPER

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

METHODS = four_methods(0.05, "lambda")
LABELS = [method.label for method in METHODS]
LESS = LABELS[-1]
# The point that withholds the text.
WITHHELD = "withheld"


# ---------------------------------------------------------------------- points
class Classification(Experiment):
    name = "classification"
    shares_points = True

    def __init__(self, profile: str, seed: int = 0) -> None:
        super().__init__(profile, seed)
        self.settings = get_tasks(self.profile.name)
        self.model_name = roles(self.profile.name, tasks=True)["llama"]

    def points(self) -> list[Point]:
        points = []
        for task, count, shots, length in self.tasks():
            questions = {
                "name": self.model_name,
                "task": task,
                "shots": shots,
                "count": count,
                "length": length,
            }
            for method in METHODS:
                setting = {"method": method.label, "policy": "lambda", "fraction": 0.05}
                points.append(Point(f"{task}/{method.label}", questions | setting, method))
            if self.settings.withheld:
                alone = {"method": FULL, "text": False, "shots": 0, "count": self.settings.withheld}
                points.append(Point(f"{task}/{WITHHELD}", questions | alone, Method.full()))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.of(self.model_name).training

    def tasks(self) -> list[TaskTexts]:
        most = self.settings.choices
        length = self.settings.length
        return [
            TaskTexts(task, min(count, most), shots, length)
            for task, shots, count in self.settings.classification
        ]

    def models(self) -> tuple[str, ...]:
        return (self.model_name,)

    def compute(self, point: Point) -> dict[str, Any]:
        """Accuracy of the likeliest option, whole prompts scored under one method."""
        p = point.parameters
        model, tokenizer = model_of(p["name"])
        examples, shots = examples_of(p["task"], p["count"], p["shots"], p["length"])
        options = [example.options for example in examples]
        room = model_shape(model)["context"] - longest_option(tokenizer, options)
        prompt_ids = prompts(examples, shots, tokenizer, room, p.get("text", True))
        policy, state = self.setting(point)
        with less(model, policy, state, mode="parallel"):
            scores = option_scores(model, tokenizer, prompt_ids, options, self.profile.batch)
        right = []
        for example, likelihoods in zip(examples, scores, strict=True):
            right.append(int(np.argmax(likelihoods) == example.right))
        return {
            "accuracy": sum(right) / len(right),
            "right": right,
            "options": len(options[0]),
            "majority": majority([example.right for example in examples]),
        }


def longest_option(tokenizer: Any, options: list[tuple[str, ...]]) -> int:
    """Tokens of the longest option of all examples."""
    longest = 0
    for of_example in options:
        for option in of_example:
            longest = max(longest, len(encode(tokenizer, " " + option)))
    return longest


def majority(answers: list[int]) -> float:
    """What naming the commonest answer would score."""
    return max(Counter(answers).values()) / len(answers)


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of Table 3."""
    return Classification(profile, seed).run()


# ---------------------------------------------------------------------- claims
@claim(
    "Table 3",
    "LESS answers more questions rightly than Baseline+",
    paper="MuTual {table3[Baseline+][1]} to {table3[LESS (5%)][1]},"
    " BoolQ {table3[Baseline+][2]} to {table3[LESS (5%)][2]}",
    needs=("classification",),
)
def right_more_often(record: dict) -> Iterator[Verdict]:
    """Per task, LESS against Baseline+ by question."""
    for task, rows in groups(record).items():
        yield lead(task, rows)


def lead(task: str, rows: dict[str, dict]) -> Verdict:
    """The lead of LESS over Baseline+ in percent of the questions of a task."""
    ours = np.multiply(100.0, rows[LESS]["right"])
    plus = np.multiply(100.0, rows[PLUS]["right"])
    return ahead(
        f"{task}: {LESS} is right more often than {PLUS}",
        ours.tolist(),
        plus.tolist(),
        rows[FULL],
        f"; {np.mean(ours):.1f}% against {np.mean(plus):.1f}%",
    )


def nothing_but_chance(task: str, withheld: dict) -> Verdict:
    """That without the text nothing is left but chance."""
    n = len(withheld["right"])
    chance = 1 / withheld["options"]
    accuracy = withheld["accuracy"]
    two_errors = 2 * (chance * (1 - chance) / n) ** 0.5
    return Verdict(
        f"{task}: without its text accuracy is at chance (within two standard errors)",
        abs(accuracy - chance) <= two_errors,
        f"{accuracy:.1%} of {n}",
    )


def verdicts(record: dict) -> Iterator[Verdict]:
    """Per task, the lead of LESS, and where it was measured, what is left without the text."""
    for task, rows in groups(record).items():
        yield lead(task, rows)
        if WITHHELD in rows:
            yield nothing_but_chance(task, rows[WITHHELD])


# ---------------------------------------------------------------------- tables
def paper_table() -> Markdown:
    """Table 3 of the paper: accuracies of Llama 2 7B."""
    paper = PAPER["table3"]
    rows = [[label, *paper[label][1:]] for label in LABELS]
    return plots.table(["paper", *paper["columns"][1:]], rows)


def table(record: dict) -> Markdown:
    """Accuracy by method and task, beside chance and what is left without the text."""
    tasks = groups(record)
    lines = accuracies(tasks)
    lines.append(["chance", *chance(record).values()])
    if all(WITHHELD in rows for rows in tasks.values()):
        withheld = [rows[WITHHELD]["accuracy"] for rows in tasks.values()]
        lines.append(["Full, text withheld", *withheld])
    return plots.table(["accuracy", *tasks], lines)


def accuracies(tasks: dict[str, dict[str, dict]]) -> list[list[Any]]:
    """Lines of a table: by method, its accuracy in each of the tasks."""
    lines = []
    for label in LABELS:
        lines.append([label, *(rows[label]["accuracy"] for rows in tasks.values())])
    return lines


def chance(record: dict) -> dict[str, float]:
    """By task, the accuracy of guessing."""
    return {task: 1 / rows[FULL]["options"] for task, rows in groups(record).items()}


def recovery_table(record: dict) -> Markdown:
    """Of the accuracy that Baseline+ loses to the full cache, the share that LESS gives back."""
    lines: list[list[str | None]] = []
    for task, rows in groups(record).items():
        if sum(rows[FULL]["right"]) > sum(rows[PLUS]["right"]):
            # A right answer as a loss of -1.
            losses = [as_losses(rows[label]["right"]) for label in (FULL, PLUS, LESS)]
            share, low, high = gap_closed(*losses)
            lines.append([task, f"{share:.0%}", f"{low:.0%} to {high:.0%}"])
        else:
            lines.append([task, "nothing is lost", None])
    return plots.table(["task", "given back", "95%"], lines)


def as_losses(right: list[int]) -> dict:
    """Answers in the form of losses by document, as `gap_closed` takes them."""
    return {"by_document": [[-answer, 1] for answer in right]}


def wild_table() -> Markdown | None:
    """Recorded accuracies of the profile `wild`; says so, and is None, where there are none."""
    tasks = groups(load_or_empty("classification", "wild"))
    if not tasks:
        print("none are recorded here: ./run_all.sh --profile wild --only 05")
        return None
    return plots.table(["method", *tasks], accuracies(tasks))


# ---------------------------------------------------------------------- figures
def figure(record: dict) -> Figure:
    """Accuracy by task and method, with two standard errors, and chance."""
    bars = {}
    for task, rows in groups(record).items():
        bars[task] = {label: rows[label]["right"] for label in LABELS}
    title = "Lambda mask at 5% (two standard errors; dotted: chance)"
    return plots.mean_bars(bars, "accuracy", title, chance(record))
