"""The ablation behind the small profiles' recipe of training: one setting changed at a time, H2O
at the smallest budget, first and last layer.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lesslib.experiments.experiment import Experiment, Point
from lesslib.experiments.loaded import model_of
from lesslib.experiments.training_kernels import layer_trainers
from lesslib.models import model_shape
from lesslib.reporting import plots
from lesslib.states import Kernels
from lesslib.training import LayerTrainer, Recipe, layer_pool

if TYPE_CHECKING:
    from IPython.display import Markdown

# Windows at the most: this sweep has many points.
WINDOWS = 40

FIRST_AND_LAST = (0, -1)
CHANGES: dict[str, tuple[float, ...]] = {
    "lr": (1e-3, 3e-3, 1e-2, 3e-2),
    "dropout": (0.0, 0.3),
    "hidden": (128, 512),
    "batch": (2, 8),
}
QUICK_CHANGES: dict[str, tuple[float, ...]] = {"lr": (1e-3,)}


# ---------------------------------------------------------------------- points
class Recipes(Experiment):
    name = "recipes"

    def points(self) -> list[Point]:
        recipe = asdict(Recipe.of(self.profile, self.seed))
        points = [Point("this profile", recipe)]
        changes = QUICK_CHANGES if self.profile.quick else CHANGES
        for setting, values in changes.items():
            for value in values:
                if value != recipe[setting]:
                    points.append(Point(f"{setting} {value:g}", recipe | {setting: value}))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.training

    @functools.cached_property
    def trainers(self) -> dict[int, LayerTrainer]:
        """What both layers are trained with, made once for all recipes."""
        p = self.profile
        count = min(p.sequences, WINDOWS)
        return layer_trainers(self, min(p.fractions), FIRST_AND_LAST, count)

    def compute(self, point: Point) -> dict[str, Any]:
        recipe = Recipe(**point.parameters)
        model, _ = model_of(self.profile.model)
        kernels = Kernels.new(
            model_shape(model), recipe.kernel_size, recipe.hidden, recipe.dropout, recipe.seed
        )
        trainers = self.trainers

        def best_error(layer: int) -> float:
            return trainers[layer].fit(kernels[layer], recipe)["best"]

        with layer_pool(model.device) as pool:
            errors = list(pool.map(best_error, trainers))
        by_layer = zip(trainers, errors, strict=True)
        return {"error_left": {str(layer): error for layer, error in by_layer}}


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of the recipes."""
    return Recipes(profile, seed).run()


# ---------------------------------------------------------------------- a table
def table(record: dict) -> Markdown:
    """The best validation error over the sparse policy's, by recipe: mean, and by layer."""
    lines = []
    for key, entry in record["points"].items():
        errors = list(entry["error_left"].values())
        mean = sum(errors) / len(errors)
        lines.append([key, mean, *errors, f"{entry['seconds']:.0f}"])
    layers = [f"layer {layer}" for layer in entry["error_left"]]
    return plots.table(["recipe", "mean error left", *layers, "seconds"], lines)
