"""Tables 4 and 5: ROUGE of summaries that three models write from a cache of H2O's budget.

The prompt is read with all of its tokens; then the cache is cut to its budget, and the summary is
written from what is left. A record is of one model, by its role: "llama" stands for Llama 2 7B
(Table 5), "wide" and "falcon" for Llama 2 13B and Falcon 7B (Table 4).

The cells that decide a table: for every task and budget of the record, each row of LESS against
Baseline+, by ROUGE-1 of the same texts. Points "<task>/<budget>/LESS (p%)" and
"<task>/<budget>/Baseline+" are compared; "<task>/Full" tells whether the model is able to do the
task at all, without which no verdict is given. "Baseline", "withheld" and the other ROUGEs decide
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lesslib.data.storyworld import Example
from lesslib.evaluation import Decoding, continuations, paired, prompts, rouge
from lesslib.experiments import language_modeling
from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Experiment, Point, TaskTexts
from lesslib.experiments.loaded import examples_of, model_of
from lesslib.experiments.method import Method
from lesslib.experiments.records import FULL, PLUS, corpora_of, groups, load_or_empty
from lesslib.experiments.statistics import ahead, difference
from lesslib.models import model_shape
from lesslib.profiles import get_tasks, roles
from lesslib.reporting import plots
from lesslib.reporting.paper import PAPER

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

METRICS = ("rouge1", "rouge2", "rougeL")
# Examples whose summaries and references are recorded.
TEXTS_KEPT = 4


@dataclass(frozen=True)
class Grid:
    """The rows of one model: budgets, the budgets its kernels were trained at, how many tasks."""

    stands_for: str
    fractions: tuple[float, ...]
    trained_fractions: tuple[float, ...]
    tasks: int


# By role; those of Falcon are also the budgets that independent re-runs report.
GRIDS = {
    "llama": Grid("Llama 2 7B", (0.05, 0.1), (0.02, 0.05), tasks=3),
    "wide": Grid("Llama 2 13B", (0.1,), (0.02, 0.05), tasks=2),
    "falcon": Grid("Falcon 7B", (0.05, 0.1, 0.2), (0.05, 0.1), tasks=2),
}
LABELS_OF_LESS = [Method.less(0.05, trained).label for trained in (0.02, 0.05, 0.1)]
# Trained at 5%, which all models have.
LESS = Method.less(0.05).label


def methods_at(fraction: float, trained_fractions: tuple[float, ...]) -> list[Method]:
    """The rows of one budget."""
    less = [Method.less(fraction, trained) for trained in trained_fractions]
    return [Method.baseline(fraction), Method.baseline_plus(fraction), *less]


# ---------------------------------------------------------------------- points
class Summarization(Experiment):
    # One reading of the prompts serves all methods.
    together = ("method", "fraction", "s")
    shares_points = True

    def __init__(self, profile: str, role: str, seed: int = 0) -> None:
        super().__init__(profile, seed)
        self.name = f"summarization_{role}"
        self.settings = get_tasks(self.profile.name)
        self.model_name = roles(self.profile.name, tasks=True)[role]
        grid = GRIDS[role]
        self.fractions = grid.fractions
        self.trained_fractions = grid.trained_fractions
        self.summaries = self.settings.summaries[: grid.tasks]
        if self.profile.quick:
            self.fractions = grid.fractions[:1]
            self.trained_fractions = grid.trained_fractions[-1:]
            self.summaries = self.settings.summaries[:1]

    def points(self) -> list[Point]:
        points = []
        for task, shots, new_tokens in self.summaries:
            texts = {
                "name": self.model_name,
                "task": task,
                "shots": shots,
                "new_tokens": new_tokens,
                "count": self.settings.texts,
                "length": self.settings.length,
            }
            points.append(Point(f"{task}/{FULL}", texts | {"method": FULL}, Method.full()))
            for fraction in self.fractions:
                for method in methods_at(fraction, self.trained_fractions):
                    key = f"{task}/{method.budget}/{method.label}"
                    setting = {"method": method.label, "fraction": fraction}
                    points.append(Point(key, texts | setting, method))
            if self.settings.withheld:
                alone = {"method": FULL, "text": False, "shots": 0}
                points.append(Point(f"{task}/withheld", texts | alone, Method.full()))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.of(self.model_name).training

    def tasks(self) -> list[TaskTexts]:
        count = self.settings.texts
        length = self.settings.length
        return [TaskTexts(task, count, shots, length) for task, shots, _ in self.summaries]

    def models(self) -> tuple[str, ...]:
        return (self.model_name,)

    def compute_together(self, points: list[Point]) -> list[dict[str, Any]]:
        return summarise(self, points)


def summarise(experiment: Experiment, points: list[Point]) -> list[dict[str, Any]]:
    """ROUGE of what a model writes under each point's method, prompts read densely.

    Scores are by example; the points differ in nothing but the method and its kernels. The profile
    `wild` keeps no texts: its results are published, and hold no words of others.
    """
    p = points[0].parameters
    profile = experiment.profile.name
    model, tokenizer = model_of(p["name"])
    examples, shots = examples_of(p["task"], p["count"], p["shots"], p["length"])
    room = model_shape(model)["context"] - p["new_tokens"]
    prompt_ids = prompts(examples, shots, tokenizer, room, p.get("text", True))
    decoding = Decoding(p["new_tokens"], get_tasks(profile).at_once, seed=experiment.seed)
    methods = [experiment.setting(point) for point in points]
    written = continuations(model, tokenizer, prompt_ids, decoding, methods)
    texts_kept = 0 if profile == "wild" else TEXTS_KEPT
    values = []
    for summaries in written:
        value = rouge_of(summaries, references_of(examples))
        value["prompt_tokens"] = [len(ids) for ids in prompt_ids]
        value["said"] = summaries[:texts_kept]
        value["references"] = references_of(examples)[:texts_kept]
        values.append(value)
    return values


def references_of(examples: list[Example]) -> list[str]:
    """The summary that each example has."""
    return [example.options[0] for example in examples]


def rouge_of(summaries: list[str], references: list[str]) -> dict[str, Any]:
    """Means of ROUGE, "scores" by text, and as "chance" the means against another's reference.

    Another text's reference says what the form of a summary earns, whatever it says.
    """
    scores = rouge(summaries, references)
    of_another = rouge(summaries, references[1:] + references[:1])
    chance = {metric: float(np.mean(values)) for metric, values in of_another.items()}
    means = {metric: float(np.mean(values)) for metric, values in scores.items()}
    return {**means, "scores": scores, "chance": chance}


def run(profile: str, role: str, seed: int = 0) -> dict[str, Any]:
    """The record of one model: `role` is "llama" (Table 5), "wide" or "falcon" (Table 4)."""
    return Summarization(profile, role, seed).run()


# ---------------------------------------------------------------------- claims
Cells = Mapping[str, dict[str, dict]]


def at_fractions(record: dict, *fractions: float) -> Cells:
    """The cells of a record, by task and budget, that are at one of these budgets."""
    cells = {}
    for group, rows in groups(record).items():
        if rows[PLUS]["parameters"]["fraction"] in fractions:
            cells[group] = rows
    return cells


def labels_of_less(rows: dict[str, dict]) -> list[str]:
    """The rows of LESS in a cell, as recorded."""
    return [label for label in rows if label in LABELS_OF_LESS]


def recovered(rows: dict[str, dict], label: str, rival: str = PLUS) -> float | None:
    """The share of the ROUGE-1 that `rival` loses to Full which a row gives back (section 4.2).

    None where nothing is lost.
    """
    full = rows[FULL]["rouge1"]
    lower = rows[rival]["rouge1"]
    if full <= lower:
        return None
    return (rows[label]["rouge1"] - lower) / (full - lower)


def scores_above(cells: Cells, rival: str = PLUS) -> Iterator[Verdict]:
    """By cell and row of LESS, whether its ROUGE-1 is above that of `rival`, paired by text."""
    for group, rows in cells.items():
        bar = rows[rival]["scores"]["rouge1"]
        for label in labels_of_less(rows):
            yield _against(group, rows, label, rival, bar, f"scores above {rival}")


def gives_back(group: str, rows: dict[str, dict], label: str, least: float) -> Verdict:
    """Whether a row gives back the share `least` of the ROUGE-1 that Baseline+ loses to Full."""
    full = np.array(rows[FULL]["scores"]["rouge1"])
    plus = np.array(rows[PLUS]["scores"]["rouge1"])
    bar = ((1 - least) * plus + least * full).tolist()
    does = f"gives back at least {least:.1%} of what {PLUS} loses"
    return _against(group, rows, label, PLUS, bar, does)


def _against(
    group: str, rows: dict[str, dict], label: str, rival: str, bar: list[float], does: str
) -> Verdict:
    """The verdict that a row's ROUGE-1 is above the `bar`, text by text; `does` says so in words.

    Beside it stands the share that the row gives back of what `rival` loses.
    """
    lost = np.mean(rows[FULL]["scores"]["rouge1"]) - np.mean(rows[rival]["scores"]["rouge1"])
    share = recovered(rows, label, rival) or 0
    return ahead(
        f"{rows[label]['parameters']['name']}, {group}: {label} {does}",
        rows[label]["scores"]["rouge1"],
        bar,
        rows[FULL],
        f"; {share:.0%} of the {lost:.1f} that {rival} loses",
    )


@claim(
    "Table 5",
    "LESS has better ROUGE-1 than Baseline+ (Llama 2 7B)",
    paper="CNN/DailyMail at 5%: {rouge[llama][cnn_dailymail][5%][Baseline+][0]}"
    " to {rouge[llama][cnn_dailymail][5%][LESS (5%)][0]}",
    needs=("summarization_llama",),
)
def llama_scores_above_plus(record: dict) -> Iterator[Verdict]:
    return scores_above(groups(record))


@claim(
    "Table 4",
    "the same for a larger model (Llama 2 13B)",
    paper="CNN/DailyMail at 10%: {rouge[wide][cnn_dailymail][10%][Baseline+][0]}"
    " to {rouge[wide][cnn_dailymail][10%][LESS (5%)][0]}",
    needs=("summarization_wide",),
)
def wide_scores_above_plus(record: dict) -> Iterator[Verdict]:
    return scores_above(groups(record))


@claim(
    "Table 4",
    "the same for multi-query attention (Falcon 7B)",
    paper="CNN/DailyMail at 20%: {rouge[falcon][cnn_dailymail][20%][Baseline+][0]}"
    " to {rouge[falcon][cnn_dailymail][20%][LESS (10%)][0]}",
    needs=("summarization_falcon",),
)
def falcon_scores_above_plus(record: dict) -> Iterator[Verdict]:
    return scores_above(groups(record))


# The share of Falcon's row, and the tasks that stand for its CNN/DailyMail.
SHARE_OF_FALCON = 0.414
TASKS_OF_SHARE = ("cnn_dailymail", "summary")


@claim(
    "Section 4.2",
    "41.4% of the ROUGE-1 that Baseline+ loses comes back (Falcon)",
    paper="{rouge[falcon][cnn_dailymail][20%][Baseline+][0]}"
    " to {rouge[falcon][cnn_dailymail][20%][LESS (10%)][0]},"
    " full {rouge[falcon][cnn_dailymail][20%][Full][0]}",
    needs=("summarization_falcon",),
)
def falcon_gives_back(record: dict) -> Iterator[Verdict]:
    """At 20%, by kernels trained at 10%, in the task that stands for CNN/DailyMail."""
    label = Method.less(0.2, 0.1).label
    for group, rows in at_fractions(record, 0.2).items():
        task, _ = group.split("/")
        if task in TASKS_OF_SHARE:
            yield gives_back(group, rows, label, SHARE_OF_FALCON)


NOT_IN_THE_PAPER = "not in the paper; independent re-runs found it below on XSum"


@claim(
    "re-runs",
    "Falcon at 5% of its context: LESS scores above H2O alone",
    paper=NOT_IN_THE_PAPER,
    needs=("summarization_falcon",),
)
def falcon_scores_above_h2o_at_5(record: dict) -> Iterator[Verdict]:
    return scores_above(at_fractions(record, 0.05), rival="Baseline")


@claim(
    "re-runs",
    "Falcon at 10% of its context: LESS scores above H2O alone",
    paper=NOT_IN_THE_PAPER,
    needs=("summarization_falcon",),
)
def falcon_scores_above_h2o_at_10(record: dict) -> Iterator[Verdict]:
    return scores_above(at_fractions(record, 0.1), rival="Baseline")


def verdicts(records: dict[str, dict]) -> Iterator[Verdict]:
    """Rows of LESS against Baseline+ of every model; then Falcon's share at 20%, by all kernels.

    `records` by role.
    """
    for record in records.values():
        yield from scores_above(groups(record))
    for group, rows in at_fractions(records["falcon"], 0.2).items():
        for label in labels_of_less(rows):
            yield gives_back(group, rows, label, SHARE_OF_FALCON)


def rerun_verdicts(record: dict) -> Iterator[Verdict]:
    """Whether Falcon with LESS scores above H2O alone at 5% and 10%."""
    return scores_above(at_fractions(record, 0.05, 0.1), rival="Baseline")


# ---------------------------------------------------------------------- tables
def paper_table() -> Markdown:
    """ROUGE-1 of the paper, by model, task and budget."""
    cells = {}
    for role, grid in GRIDS.items():
        for task, budgets in PAPER["rouge"][role].items():
            for budget, scores in budgets.items():
                cells[grid.stands_for, task, budget] = scores
    # Each once, in the order in which they are met.
    labels: dict[str, None] = {}
    for scores in cells.values():
        labels |= dict.fromkeys(scores)
    lines = []
    for place, scores in cells.items():
        lines.append([*place, *(scores.get(label, [None])[0] for label in labels)])
    return plots.table(["model", "task", "budget", *labels], lines)


def table(record: dict) -> Markdown:
    """ROUGE by task, budget and method, and what of ROUGE-1 is owed to having read the text."""
    lines = []
    for group, rows in groups(record).items():
        for label, row in rows.items():
            if label == "withheld":
                continue
            share = None
            if label in LABELS_OF_LESS:
                share = f"{recovered(rows, label) or 0:.0%}"
            of_another = row["chance"]["rouge1"]
            metrics = [row[metric] for metric in METRICS]
            net = row["rouge1"] - of_another
            lines.append([group, label, *metrics, share, of_another, net])
    columns = ["task", "method", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    return plots.table([*columns, "recovered", "another story", "difference"], lines)


def wild_table() -> Markdown | None:
    """`table` of Llama's role in the profile `wild`; says so, and is None, without a record."""
    record = load_or_empty("summarization_llama", "wild")
    if not record["points"]:
        print("none are recorded here: ./run_all.sh --profile wild --only 06")
        return None
    return table(record)


def with_less(record: dict) -> Cells:
    """The cells that have a row of LESS trained at 5%."""
    return {group: rows for group, rows in groups(record).items() if LESS in rows}


def lead_table(records: dict[str, dict]) -> Markdown:
    """By model, where LESS leads Baseline+ beyond noise, and where it falls behind."""
    lines = []
    for role, record in records.items():
        cells = with_less(record)
        ahead_in = []
        behind_in = []
        for group, rows in cells.items():
            _, low, high = paired(rows[LESS]["scores"]["rouge1"], rows[PLUS]["scores"]["rouge1"])
            if low > 0:
                ahead_in.append(group)
            if high < 0:
                behind_in.append(group)
        count = f"{len(ahead_in)} of {len(cells)}"
        stands_for = GRIDS[role].stands_for
        lines.append([stands_for, count, ", ".join(ahead_in), ", ".join(behind_in)])
    return plots.table(["stands for", "ahead in", "ahead", "behind"], lines)


def form_table(records: dict[str, dict]) -> Markdown:
    """The lead over Baseline+ in ROUGE-1, in ROUGE-2, and in what is no mere form of a summary."""
    lines = []
    for role, record in records.items():
        for group, rows in with_less(record).items():
            leads = []
            for metric in ("rouge1", "rouge2"):
                leads.append(difference(rows[LESS]["scores"][metric], rows[PLUS]["scores"][metric]))
            leads.append(difference(above_another(rows[LESS]), above_another(rows[PLUS])))
            lines.append([GRIDS[role].stands_for, group, *leads])
    columns = ["stands for", f"{LESS} against {PLUS}", "ROUGE-1", "ROUGE-2"]
    return plots.table([*columns, "ROUGE-1 above another story"], lines)


def above_another(row: dict) -> list[float]:
    """ROUGE-1 by text, less the mean that the same summaries have against another's reference."""
    return [score - row["chance"]["rouge1"] for score in row["scores"]["rouge1"]]


def recurrence_table() -> Markdown:
    """What LESS gives back to a language model by kind of token, at 5% in the profile `tiny`."""
    record = load_or_empty("language_modeling", "tiny")
    lines = []
    for corpus in corpora_of(record):
        cell = language_modeling.cell(record, corpus, 0.05)
        for line in language_modeling.by_recurrence(cell, LESS):
            lines.append([corpus, *line])
    columns = ["corpus", "token", "of all tokens", "nats lost on one"]
    return plots.table([*columns, "of all loss", "LESS gives back"], lines)


def print_summaries(record: dict) -> None:
    """Print the reference of the first text and what each method writes, where texts are kept."""
    rows = next(iter(groups(record).values()))
    print("reference:", first_text(rows[FULL]["references"]))
    for label, row in rows.items():
        if label != "withheld":
            print(f"{label:>12}:", first_text(row["said"]))


def first_text(texts: list[str]) -> str:
    return texts[0] if texts else "(texts of others are not kept)"


# ---------------------------------------------------------------------- figures
def figure(record: dict, role: str) -> Figure:
    """ROUGE-1 by task, budget and method, with two standard errors, and chance."""
    bars = {}
    chance = {}
    for group, rows in by_task_and_budget(record).items():
        labels = [FULL, "Baseline", PLUS, *labels_of_less(rows)]
        place = group.replace("/", "\n")
        bars[place] = {label: rows[label]["scores"]["rouge1"] for label in labels}
        chance[place] = rows[FULL]["chance"]["rouge1"]
    title = f"{role}: H2O (two standard errors; dotted: Full against another story)"
    return plots.mean_bars(bars, "ROUGE-1", title, chance)


def by_task_and_budget(record: dict) -> Cells:
    """The cells of a record by task, and from the smallest budget."""
    cells = groups(record)

    def place(group: str) -> tuple[str, float]:
        task, _ = group.split("/")
        return task, cells[group][PLUS]["parameters"]["fraction"]

    return {group: cells[group] for group in sorted(cells, key=place)}
