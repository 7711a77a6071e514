"""The paper's tables and figures, one file each: its points, how one is computed, its claims, and
what readers see of it.

Every such file has `run(profile, seed)`, which gives the record, and `verdicts`, `table` and
`figure` of a record. Open language_modeling.py, Table 2, first; experiment.py and method.py say
what a point and a row are, sweep.py computes what is not recorded yet, and scoreboard.py shows all
claims. May import from everything but the runner.
"""

from lesslib.experiments import (
    attention_maps,
    breakdown,
    classification,
    generation,
    kernel_size,
    language_modeling,
    latency,
    low_rank_residuals,
    multi_query,
    prompt_length,
    recipes,
    scoreboard,
    seeds,
    sizes,
    sparse_policies,
    summarization,
    tour,
    training_kernels,
    training_speed,
)
from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Experiment, Point, TaskTexts
from lesslib.experiments.method import Method
from lesslib.experiments.scoring import compare, comparison_table

__all__ = [
    "Experiment",
    "Method",
    "Point",
    "TaskTexts",
    "Verdict",
    "attention_maps",
    "breakdown",
    "claim",
    "classification",
    "compare",
    "comparison_table",
    "generation",
    "kernel_size",
    "language_modeling",
    "latency",
    "low_rank_residuals",
    "multi_query",
    "prompt_length",
    "recipes",
    "scoreboard",
    "seeds",
    "sizes",
    "sparse_policies",
    "summarization",
    "tour",
    "training_kernels",
    "training_speed",
]
