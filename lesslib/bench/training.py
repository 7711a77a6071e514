"""`python -m lesslib.bench train`: seconds and memory of an epoch of kernel training, by scheme.

Open `TrainingBench` for the schemes, `measure` for one number, `print_training` for the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lesslib.attention.fit import model_shape
from lesslib.bench.shapes import MODELS, random_model
from lesslib.bench.stepwise import stepwise_attention
from lesslib.bench.timing import DEVICE, fresh_process, now, peak_above, restart_peak_memory
from lesslib.data import load_corpus, training_windows
from lesslib.hf import attention_modules, output_projection
from lesslib.models import load_model
from lesslib.policies import H2O, budget_of
from lesslib.states import Kernels, LayerKernels
from lesslib.training import LayerTrainer, Recipe, capture_layers, features, layer_pool

# ours; one layer after the other, as the authors do; and theirs with layers side by side, as ours
OURS = "ours"
STEPWISE = "stepwise"
STEPWISE_PARALLEL = "stepwise, layers in parallel"
SCHEMES = (OURS, STEPWISE, STEPWISE_PARALLEL)

# the median counts: the first fills the allocator, and a shared machine is slow at times
EPOCHS = 3
# the longest windows of which a CPU repeats a stepwise epoch; one of longer ones takes seconds
LONGEST_REPEATED = 512


@dataclass(frozen=True)
class TrainingCase:
    """One epoch to time: `sequences` windows of `length` tokens, H2O at `fraction` of a window.

    `model` is a carried one, or the shape of a random one; its first `layers` are trained.
    """

    scheme: str
    length: int
    sequences: int
    fraction: float
    recipe: Recipe
    model: str = "pico-llama"
    layers: int = 4


def model_and_windows(case: TrainingCase) -> tuple[Any, Tensor]:
    """The model of a case, and the token windows [N, S] that its kernels are trained on."""
    seed = case.recipe.seed
    if case.model in MODELS:
        model = random_model(case.model)
        size = (case.sequences, case.length)
        generator = torch.Generator().manual_seed(seed)
        return model, torch.randint(model.config.vocab_size, size, generator=generator)
    model, tokenizer = load_model(case.model, DEVICE, torch.float32)
    corpora = [load_corpus("topics-train")]
    return model, training_windows(corpora, tokenizer, case.length, case.sequences, seed)


class Timed(NamedTuple):
    """Seconds of all layers together, and of each; some may have run at the same time."""

    seconds: float
    by_layer: list[float]


class TrainingBench:
    """Layers of a model with fresh kernels, and what they are trained on by either scheme."""

    def __init__(self, case: TrainingCase):
        recipe = case.recipe
        model, windows = model_and_windows(case)
        modules = attention_modules(model)

        kernels = Kernels.new(
            model_shape(model), recipe.kernel_size, recipe.hidden, recipe.dropout, recipe.seed
        ).to(DEVICE)

        self.model = model
        self.policy = H2O.from_budget(budget_of(case.fraction, case.length))
        self.layers = list(modules)[: case.layers]
        self.kernels = [cast(LayerKernels, layer.train()) for layer in kernels.layers]
        self.projections = {i: output_projection(modules[i]).weight.detach() for i in self.layers}
        self.optimizers = {
            i: torch.optim.Adam(self.kernels[i].parameters(), lr=recipe.lr, fused=True)
            for i in self.layers
        }
        self.data = capture_layers(model, windows, self.layers)
        self.capture_seconds = sum(data.seconds for data in self.data.values())
        self.batch = recipe.batch
        self.batches = torch.arange(case.sequences).split(recipe.batch)
        self.trainers: dict[int, LayerTrainer] = {}

    def prepare(self, i: int) -> None:
        """What ours computes once for layer `i`."""
        self.trainers[i] = LayerTrainer(
            self.data[i], self.policy, self.projections[i], validation=1, batch=self.batch
        )

    def ours(self, i: int) -> None:
        """An epoch of layer `i` from eviction times, sparse outputs and targets computed once."""
        self.trainers[i].epoch(self.kernels[i], self.optimizers[i], self.batches)

    def stepwise(self, i: int) -> None:
        """An epoch of layer `i` that builds masks and S x S weights anew at every step."""
        for rows in self.batches:
            self._stepwise_step(i, rows)

    def warm_up_stepwise(self) -> None:
        """One step, which fills the allocator."""
        self._stepwise_step(self.layers[0], self.batches[0])

    def _stepwise_step(self, i: int, rows: Tensor) -> None:
        loss = self._stepwise_loss(i, rows)
        self.optimizers[i].zero_grad()
        loss.backward()
        self.optimizers[i].step()

    def _stepwise_loss(self, i: int, rows: Tensor) -> Tensor:
        """Mean squared error after W_O, past the budget."""
        data = self.data[i]
        q, k, v = (x[rows].to(DEVICE, torch.float32) for x in (data.q, data.k, data.v))
        phi_and_psi = features(self.kernels[i], q, k)
        out, target = stepwise_attention(q, k, v, self.policy, phi_and_psi, data.scaling)
        past_budget = (out - target)[:, :, self.policy.budget :]
        # [B, S - budget, H * Dv]
        difference = past_budget.transpose(1, 2).flatten(2)
        return (difference @ self.projections[i].T).square().mean()

    def time(self, run: Callable, work: Callable[[int], None]) -> Timed:
        """Time `work` for all layers, through `run`: `map`, or that of a pool of threads."""

        def seconds_of(i: int) -> float:
            begun = now()
            work(i)
            return now() - begun

        begun = now()
        by_layer = list(run(seconds_of, self.layers))
        return Timed(now() - begun, by_layer)


def epochs(bench: TrainingBench, case: TrainingCase, run: Callable) -> list[Timed]:
    """Epochs of which the median counts.

    Long stepwise ones on a CPU take many seconds: there a step to warm up, and one epoch, whose
    spread shows between its layers. A median favours neither scheme, as the fastest of several
    beside the only one would.
    """
    if case.scheme == OURS:
        return [bench.time(run, bench.ours) for _ in range(EPOCHS)]
    if case.length <= LONGEST_REPEATED or DEVICE.type == "cuda":
        return [bench.time(run, bench.stepwise) for _ in range(EPOCHS)]
    bench.warm_up_stepwise()
    return [bench.time(run, bench.stepwise)]


def epoch(case: TrainingCase) -> dict:
    """Train all layers for an epoch: its seconds, those of its quickest and its slowest layer,
    those of the capture and of what else is computed once (the eviction passes), and peak MiB.

    The peak is above what the process held before; None where it cannot be read.
    """
    bench = TrainingBench(case)
    seconds_once = 0.0
    held = restart_peak_memory()
    if case.scheme == STEPWISE:
        timed = epochs(bench, case, map)
    else:
        with layer_pool(bench.model.device) as pool:
            if case.scheme == OURS:
                seconds_once = bench.time(pool.map, bench.prepare).seconds
            timed = epochs(bench, case, pool.map)
    peak_mib = peak_above(held)
    typical = sorted(timed, key=lambda epoch: epoch.seconds)[len(timed) // 2]
    return {
        "seconds_epoch": round(typical.seconds, 4),
        "seconds_layers": [round(min(typical.by_layer), 4), round(max(typical.by_layer), 4)],
        "seconds_once": round(seconds_once, 4),
        "seconds_capture": round(bench.capture_seconds, 4),
        "peak_mib": None if peak_mib is None else round(peak_mib, 1),
    }


def measure(scheme: str, length: int, sequences: int, fraction: float, **recipe) -> dict:
    """`measure_case` for the four layers of pico-llama; `recipe`: fields of `Recipe`."""
    return measure_case(TrainingCase(scheme, length, sequences, fraction, Recipe(**recipe)))


def measure_case(case: TrainingCase) -> dict:
    """`epoch` in a fresh process, so that its peak is its own."""
    with fresh_process() as pool:
        return pool.submit(epoch, case).result()


def print_training(
    model: str,
    layers: int,
    lengths: list[int],
    schemes: list[str],
    sequences: int,
    fraction: float,
    hidden: int,
    dropout: float,
) -> None:
    """A table of `measure_case` by scheme, each with its ratio to the first.

    Capture and eviction are done once, whatever the number of epochs.
    """
    first = schemes[0]
    recipe = Recipe(hidden=hidden, dropout=dropout)
    print(
        f"{'tokens':>6} {'scheme':>28} {'capture s':>9} {'eviction s':>10} {'s/epoch':>9}"
        f" {'peak MiB':>9} {'times ' + first:>23}"
    )
    for length in lengths:
        measured = {}
        for scheme in schemes:
            case = TrainingCase(scheme, length, sequences, fraction, recipe, model, layers)
            measured[scheme] = measure_case(case)
        for scheme, row in measured.items():
            seconds = row["seconds_epoch"]
            times = seconds / measured[first]["seconds_epoch"]
            print(
                f"{length:6d} {scheme:>28} {row['seconds_capture']:9.2f}"
                f" {row['seconds_once']:10.2f} {seconds:9.3f}"
                f" {row['peak_mib'] or 0:9.0f} {times:23.1f}"
            )
