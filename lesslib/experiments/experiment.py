"""What every experiment is: points, and how to compute one.

A point is one measurement, with a key in results/<profile>/<name>.json and the parameters that
are recorded there. A record is the dict of such a file, and nothing else is called a record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lesslib.data import load_corpus
from lesslib.data.tasks import task_record
from lesslib.experiments.loaded import model_of
from lesslib.experiments.method import Method
from lesslib.experiments.setting import policy_and_state
from lesslib.experiments.sweep import sweep
from lesslib.policies import Policy
from lesslib.profiles import get_profile
from lesslib.states import ModelState
from lesslib.util.hardware import keep_memory


@dataclass(frozen=True)
class Point:
    """One measurement: its key in the record, and the parameters recorded there beside its value.

    `parameters` decide, with the seed and the data, whether a recorded value is up to date. Some
    names mean the same in all experiments: "name", a model other than the profile's;
    "kernel_size", R; "carried", only kernels of the package; "s", the seed of the kernels.
    `method`: what the parameters "method", "policy" and "fraction" say, where there are any.
    """

    key: str
    parameters: dict[str, Any]
    method: Method | None = None


class Twin(NamedTuple):
    """A point of another experiment, by its key, that measures the same as a point of this one."""

    experiment: Experiment
    key: str


class TaskTexts(NamedTuple):
    """The texts of a task that an experiment reads: how many examples, how many shots before each,
    and the words that a text is cut to. See `lesslib.data.tasks.task_record`.
    """

    task: str
    examples: int
    shots: int
    length: int


class Experiment:
    """Base of all experiments, for one profile and seed; `run` gives the record.

    A subclass says its `name` and overrides `points` and `compute`, and what its points depend on:
    `corpora`, `tasks` and `models`.
    """

    # Of its file, results/<profile>/<name>.json.
    name: str
    # Of the code behind the points: raised, it makes every recorded point stale.
    version: int = 2
    # Parameters in which points may differ and still be computed at once, by `compute_together`.
    together: tuple[str, ...] = ()
    # Whether processes may share the points: for those that only score or write with a model.
    shares_points: bool = False

    def __init__(self, profile: str, seed: int = 0) -> None:
        self.profile = get_profile(profile)
        self.seed = seed

    # ------------------------------------------------------------------ what a subclass says
    def points(self) -> list[Point]:
        """Every point of the profile, in the order in which they are computed."""
        raise NotImplementedError

    def corpora(self) -> Sequence[str]:
        """Names of the corpora that decide the values."""
        return ()

    def tasks(self) -> Sequence[TaskTexts]:
        """Texts of tasks that decide the values."""
        return ()

    def models(self) -> Sequence[str]:
        """Names of the models whose weights decide the values."""
        return (self.profile.model,)

    def may_be_shared(self, point: Point) -> bool:
        """Whether a process beside others may compute the point; see `shares_points`."""
        return self.shares_points

    def compute(self, point: Point) -> dict[str, Any]:
        """The value of a point, JSON without NaN."""
        raise NotImplementedError

    def compute_together(self, points: list[Point]) -> list[dict[str, Any]]:
        """The values of points that differ only in the parameters named in `together`."""
        return [self.compute(point) for point in points]

    def twin(self, point: Point) -> Twin | None:
        """The point of another experiment that measures the same, if there is one.

        Where that one is up to date, its value is taken instead of being computed again.
        """
        return None

    def prepare(self, point: Point) -> None:
        """Called before processes share the points: trains the kernels of its method if need be."""
        if point.method is not None:
            self.setting(point)

    # ------------------------------------------------------------------ what all share
    def setting(self, point: Point) -> tuple[Policy, ModelState | None]:
        """(policy, state) of the point's method; see `policy_and_state`."""
        assert point.method is not None
        return policy_and_state(
            point.method,
            self.profile.name,
            point.parameters.get("s", self.seed),
            point.parameters.get("name"),
            point.parameters.get("kernel_size"),
            point.parameters.get("carried", False),
        )

    def sources(self) -> list[dict[str, Any]]:
        """All that the points depend on beside parameters and seed, each with its sha256: texts,
        the models' weights and the profile's settings.
        """
        texts = [load_corpus(corpus).record() for corpus in self.corpora()]
        texts += [task_record(*task) for task in self.tasks()]
        models = []
        for name in dict.fromkeys(self.models()):
            identity = vars(model_of(name)[0])["less_identity"]
            models.append({"name": f"model {identity['model']}", "sha256": identity["revision"]})
        settings = json.dumps(asdict(self.profile), sort_keys=True)
        sha256 = hashlib.sha256(settings.encode()).hexdigest()
        return [*texts, *models, {"name": f"profile {self.profile.name}", "sha256": sha256}]

    def run(self) -> dict[str, Any]:
        """The record, once every point that is not up to date was computed: see `sweep`."""
        # Also in the processes that share points.
        keep_memory()
        return sweep(self)
