"""The layers that one rank trains: how many at once, by which threads, and how far they are.

A pass of the model captures the layers (several passes, where that is too much to hold); each is
then trained by a thread of its own. One that fails ends the others.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from lesslib.hf import attention_modules, output_projection
from lesslib.models import model_shape
from lesslib.policies import Policy
from lesslib.states import Kernels
from lesslib.training.capture import LayerData, capture_layers, captured_bytes
from lesslib.training.layer import LayerTrainer
from lesslib.training.parts import LayerParts
from lesslib.training.recipe import Recipe
from lesslib.util.hardware import one_thread
from lesslib.util.progress import progress
from lesslib.util.ranks import place


@contextlib.contextmanager
def layer_pool(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads that each train a layer.

    On CPU there is one per core, with its operations on that core alone; else a single one. A step
    is many small operations: cores that share each of them spend more time waiting for one another
    than computing.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1

    def begin() -> None:
        # A thread begins on the first GPU, whichever its parent chose.
        if device.type == "cuda":
            torch.cuda.set_device(device)

    with one_thread(), ThreadPoolExecutor(threads, initializer=begin) as pool:
        yield pool


@dataclass(frozen=True)
class Job:
    """What is trained on what: the arguments of `train` that every layer needs."""

    model: Any
    policy: Policy
    windows: Tensor  # [N, S]
    recipe: Recipe
    validation: int
    memory_gib: float


class Share:
    """The layers that this rank trains, at least one, and how far it is with them."""

    def __init__(self, job: Job, kernels: Kernels, parts: LayerParts, layers: list[int]):
        self.job = job
        self.kernels = kernels
        self.parts = parts
        self.layers = layers
        self.label = f"{job.policy.name} {job.policy.budget}"
        self.captured: dict[int, LayerData] = {}
        # Counts the epochs of all threads: next() of a count is one step to them.
        self.epochs = itertools.count(1)
        self.has_failed = threading.Event()

    def train(self) -> None:
        """Capture as many layers as there is room for and train them, until all are trained."""
        count = self._layers_at_once()
        for start in range(0, len(self.layers), count):
            layers = self.layers[start : start + count]
            with tempfile.TemporaryDirectory(dir=self.parts.folder) as folder:
                self.captured = capture_layers(
                    self.job.model,
                    self.job.windows,
                    layers,
                    memory_gib=self.job.memory_gib,
                    folder=Path(folder),
                )
                self._train_together(layers)

    def _layers_at_once(self) -> int:
        """How many layers' captures find room, in memory or, where that holds more, on disk."""
        job = self.job
        free = shutil.disk_usage(self.parts.folder.parent).free
        if job.model.device.type == "cuda":
            # Passes are quick: rather one more than reading from the disk what memory cannot hold.
            free = min(free, psutil.virtual_memory().total)
        ranks_of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = max(job.memory_gib * 2**30, 0.9 * free / ranks_of_machine)
        return max(1, int(room / captured_bytes(model_shape(job.model), job.windows)))

    def _train_together(self, layers: list[int]) -> None:
        """Train captured `layers`, each by a thread; one that fails ends the others."""
        with layer_pool(self.job.model.device) as pool:
            try:
                # As a list, so that all have ended and what a thread raises is raised here.
                list(pool.map(self._train_layer, layers))
            except BaseException:
                self.has_failed.set()
                raise

    def _train_layer(self, layer: int) -> None:
        """Train one captured layer and record it."""
        job = self.job
        projection = output_projection(attention_modules(job.model)[layer]).weight.detach()
        # Popped: what a layer needs is freed as soon as it is trained.
        trainer = LayerTrainer(
            self.captured.pop(layer),
            job.policy,
            projection,
            job.validation,
            plus=job.recipe.kernel_size // 2,
        )
        kernels = self.kernels[layer]
        curves = trainer.fit(kernels, job.recipe, f"{self.label}: layer {layer}", self._tick)
        self.parts.add(layer, kernels, curves)

    def _tick(self) -> None:
        """Move the bar after a layer's epoch; raises RuntimeError where another layer failed."""
        if self.has_failed.is_set():
            raise RuntimeError("another layer failed or was interrupted")
        _, world = place()
        layers = "all" if world == 1 else "its"
        total = self.job.recipe.epochs * len(self.layers)
        progress(f"{self.label}: epochs of {layers} layers", next(self.epochs), total)
