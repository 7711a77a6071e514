"""Section 3.2: the curves of every set of kernels that notebooks 03 and 04 use, trained or carried;
and where they are carried, of one layer that is trained here beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lesslib.data import load_corpus, training_windows
from lesslib.experiments.claims import Verdict
from lesslib.experiments.experiment import Experiment, Point
from lesslib.experiments.loaded import model_of
from lesslib.experiments.setting import fit_kernels
from lesslib.hf import attention_modules, output_projection
from lesslib.models import model_shape
from lesslib.policies import get_policy
from lesslib.reporting import plots
from lesslib.states import Kernels
from lesslib.training import LayerTrainer, Recipe, capture_layers
from lesslib.util.hardware import one_thread

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

# The set that one layer is trained of, beside the carried one, and that layer.
TRAINED_HERE = "h2o 5%, here"
CARRIED = "h2o 5%"
LAYER = 0


# ---------------------------------------------------------------------- points
class TrainingKernels(Experiment):
    name = "training_kernels"

    def points(self) -> list[Point]:
        sets = [("h2o", fraction) for fraction in self.profile.fractions]
        if not self.profile.quick:
            sets += [("lambda", 0.05), ("tova", 0.05)]
        points = []
        for policy, fraction in sets:
            parameters: dict[str, Any] = {"policy": policy, "fraction": fraction}
            points.append(Point(f"{policy} {fraction:.0%}", parameters))
        if self.profile.carried:
            points.append(Point(TRAINED_HERE, {"layer": LAYER}))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.training

    def compute(self, point: Point) -> dict[str, Any]:
        if "layer" in point.parameters:
            return self._train_one_layer(point.parameters["layer"])
        policy = point.parameters["policy"]
        return fit_kernels(self.profile.name, self.seed, policy, point.parameters["fraction"])

    def _train_one_layer(self, layer: int) -> dict[str, Any]:
        """Curves of one layer's kernels for H2O at 5%."""
        p = self.profile
        shape = model_shape(model_of(p.model)[0])
        trainer = layer_trainers(self, 0.05, (layer,), p.sequences)[layer]
        kernels = Kernels.new(shape, p.kernel_size, p.hidden, p.dropout, self.seed)
        with one_thread():
            curves = trainer.fit(kernels[layer], Recipe.of(p, self.seed))
        return {"layers": {str(layer): curves}}


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of the kernels' training."""
    return TrainingKernels(profile, seed).run()


def layer_trainers(
    experiment: Experiment, fraction: float, layers: tuple[int, ...], count: int
) -> dict[int, LayerTrainer]:
    """What the kernels of `layers` (-1 is the last) for H2O at `fraction` are trained with, from
    `count` windows; by the number of the layer.
    """
    p = experiment.profile
    model, tokenizer = model_of(p.model)
    corpora = [load_corpus(corpus) for corpus in p.training]
    context = model_shape(model)["context"]
    windows = training_windows(corpora, tokenizer, context, count, experiment.seed)
    policy = get_policy("h2o").from_fraction(fraction, windows.shape[1])
    modules = attention_modules(model)
    numbers = sorted(modules)
    captured = capture_layers(model, windows, [numbers[layer] for layer in layers])
    trainers = {}
    for layer, data in captured.items():
        projection = output_projection(modules[layer]).weight.detach()
        trainers[layer] = LayerTrainer(data, policy, projection, p.validation)
    return trainers


# ---------------------------------------------------------------------- verdicts
def verdicts(record: dict) -> list[Verdict]:
    """Training works in every layer, and beats more tokens."""
    curves = {}
    for key, entry in record["points"].items():
        for layer, curve in entry["layers"].items():
            curves[f"{key}, layer {layer}"] = curve
    most, worst = max((curve["best"], name) for name, curve in curves.items())
    better = sum(curve["best"] < curve["baseline_plus"] for curve in curves.values())
    verdicts = [
        Verdict(
            "trained kernels leave less error than eviction alone in every layer",
            most < 1.0,
            f"at most {most:.1%} of it ({worst})",
        ),
        Verdict(
            "and less than Baseline+ does",
            better == len(curves),
            f"in {better} of {len(curves)} cases",
        ),
    ]
    trained = curves.get(f"{TRAINED_HERE}, layer {LAYER}")
    carried = curves.get(f"{CARRIED}, layer {LAYER}")
    if trained and carried:
        verdicts.append(
            Verdict(
                "a layer trained here leaves as much as the carried one does (within 10%)",
                abs(trained["best"] / carried["best"] - 1) <= 0.1,
                f"{trained['best']:.3f} against {carried['best']:.3f}",
            )
        )
    return verdicts


# ---------------------------------------------------------------------- a table and a figure
def table(record: dict) -> Markdown:
    """What is left of the sparse policy's error, by set and layer."""
    lines = []
    for key, entry in record["points"].items():
        for layer, curve in entry["layers"].items():
            errors = [f"{curve[name]:.1%}" for name in ("best", "baseline_plus")]
            lines.append([key, layer, *errors, f"{curve['seconds']:.0f}"])
    return plots.table(["policy", "layer", "LESS leaves", "Baseline+ leaves", "seconds"], lines)


def figure(record: dict) -> Figure:
    """Validation error by epoch, a panel a set, beside what Baseline+ leaves."""
    points = record["points"]
    picture, panels = plots.axes(len(points), width=3.1, height=2.9)
    for panel, (key, entry) in zip(panels, points.items(), strict=True):
        for layer, curve in entry["layers"].items():
            line = panel.plot(curve["validation"], marker=".", label=f"layer {layer}")[0]
            panel.axhline(curve["baseline_plus"], color=line.get_color(), ls=":", lw=1)
        panel.set(xlabel="epoch", title=key, ylim=(0, 1.05))
    panels[0].set_ylabel("validation error / sparse error")
    picture.legend(
        *panels[0].get_legend_handles_labels(),
        title="dotted: Baseline+",
        fontsize=8,
        loc="outside right center",
    )
    return picture
