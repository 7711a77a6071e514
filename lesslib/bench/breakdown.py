"""Table 8: the parts of a decode step, timed by wrapping what the layers of a cache call.

Only the torch forms have these parts: kernels do a step's slots, scores and eviction in one piece.
So the parts, their total and `unobserved_ms` are of the torch forms everywhere, as they were before
there were kernels; `fused_ms`, where kernels serve, is the step as it runs by default.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lesslib.attention.layer import LessLayer
from lesslib.bench.latency import WARM_UP
from lesslib.bench.load import Load
from lesslib.bench.served_model import FULL_STATIC, ServedModel
from lesslib.bench.timing import now
from lesslib.ops import dispatch
from lesslib.states import LowRank
from lesslib.util.progress import progress

# of Table 8; decoding: all that is none of the others
PARTS = ("decoding", "eviction", "kernels", "synthesis", "update")
# of a step with nothing inside it timed: in the torch forms, and in kernels
WHOLE = ("unobserved", "fused")


@contextlib.contextmanager
def torch_forms() -> Iterator[None]:
    """Within the context all operations run in their torch forms, whatever $LESS_OPS says."""
    before = os.environ.get("LESS_OPS")
    os.environ["LESS_OPS"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LESS_OPS"]
        else:
            os.environ["LESS_OPS"] = before


def timed_methods(layer: LessLayer) -> list[tuple[Any, str, str]]:
    """(object, name of its method, part that it counts for) of one layer's step."""
    methods: list[tuple[Any, str, str]] = [(layer, "_evict", "eviction")]
    if not layer.state.is_empty:
        methods.append((layer, "_with_state", "synthesis"))
        methods.append((layer, "_absorb", "update"))
    if isinstance(layer.state, LowRank):
        methods.append((layer.state, "phi", "kernels"))
        methods.append((layer.state, "psi", "kernels"))
    return methods


class Clock:
    """Seconds by part.

    A function that `timed` wraps counts for its part, less what wrapped functions inside it took.
    """

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)
        # of wrapped functions that ran inside the one that runs now
        self.inner = 0.0

    def timed(self, part: str, function: Callable) -> Callable:
        """`function`, whose calls count for `part`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            inner_of_caller = self.inner
            self.inner = 0.0
            begun = self.now()
            result = function(*args, **kwargs)
            took = self.now() - begun
            self.seconds[part] += took - self.inner
            self.inner = inner_of_caller + took
            return result

        return wrapped


@contextlib.contextmanager
def parts_timed(cache: Any, clock: Clock) -> Iterator[None]:
    """Within the context `clock` times what a LessCache's layers do besides attending their slots.

    Other caches have no such parts. Its steps run in the torch forms, which have them.
    """
    methods = []
    for layer in cache.layers:
        if isinstance(layer, LessLayer):
            methods += timed_methods(layer)
    # attributes of the objects themselves, which hide those of their classes
    for thing, name, part in methods:
        vars(thing)[name] = clock.timed(part, getattr(thing, name))
    try:
        with torch_forms():
            yield
    finally:
        for thing, name, _ in methods:
            del vars(thing)[name]


class SteppedCache:
    """One method's cache, the token that each of its steps reads again, and the times of steps."""

    def __init__(self, served: ServedModel, method: str):
        self.served = served
        self.method = method
        self.cache = served.cache(method)
        self.token: Tensor
        self.milliseconds: dict[str, list[float]] = {part: [] for part in (*PARTS, "total", *WHOLE)}

    def read_prompt(self) -> None:
        ids = self.served.random_prompt(self.served.rows(self.method))
        with self.served.attention(self.method):
            self.token = self.served.read_prompt(ids, self.cache)

    def has_kernels(self) -> bool:
        """Whether kernels serve a step of the cache, by default or as $LESS_OPS says."""
        layer = self.cache.layers[0]
        if not isinstance(layer, LessLayer):
            return False
        return dispatch.step_kernels(layer.slots.keys) is not None

    def observed_step(self) -> dict[str, float]:
        """Seconds of one step by part, and their `total`."""
        clock = Clock(now)
        with self.served.attention(self.method), parts_timed(self.cache, clock):
            step = clock.timed("decoding", self.served.model)
            step(self.token, past_key_values=self.cache)
        return clock.seconds | {"total": sum(clock.seconds.values())}

    def whole_step(self) -> float:
        """Seconds of one step that nothing inside it times."""
        with self.served.attention(self.method):
            begun = now()
            self.served.model(self.token, past_key_values=self.cache)
            return now() - begun

    def steps(self) -> dict[str, float]:
        """Seconds of one step by part, and of whole ones."""
        seconds = self.observed_step()
        with torch_forms():
            seconds["unobserved"] = self.whole_step()
        if self.has_kernels():
            seconds["fused"] = self.whole_step()
        return seconds

    def record(self, seconds: dict[str, float]) -> None:
        for part, of_part in seconds.items():
            self.milliseconds[part].append(1000 * of_part)

    def medians(self) -> dict[str, float]:
        return {
            f"{part}_ms": round(statistics.median(values), 4)
            for part, values in self.milliseconds.items()
            if values
        }


@torch.no_grad()
def parts(
    load: Load, methods: tuple[str, ...] = (FULL_STATIC, "Baseline+", "LESS"), steps: int = 32
) -> dict[str, dict]:
    """By method, median milliseconds of each of `PARTS` and in `total` of a decode step.

    And `unobserved_ms` of a step that nothing inside it times, both in the torch forms; where
    kernels serve a bounded cache also `fused_ms`, of a step in them. Medians are of `steps` steps
    after the prompt, the methods in turn. Steps are not compiled: a compiled one has no parts.
    Raises ValueError where the load generates fewer tokens than are timed.
    """
    # of a full cache, which fills up; a bounded one may take more
    needed = 2 * (WARM_UP + steps)
    if load.generate < needed:
        raise ValueError(
            f"generate is {load.generate}: {steps} steps timed in two ways need at least {needed}"
        )
    served = ServedModel(load)
    caches = {method: SteppedCache(served, method) for method in methods}
    for stepped in caches.values():
        stepped.read_prompt()
    for i in range(WARM_UP + steps):
        for stepped in caches.values():
            progress("steps", i, WARM_UP + steps)
            seconds = stepped.steps()
            if i >= WARM_UP:
                stepped.record(seconds)
    progress("steps", 1, 1)
    return {method: stepped.medians() for method, stepped in caches.items()}
