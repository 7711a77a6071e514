"""`python -m lesslib.bench decode`: milliseconds per decode step at many contexts, by method.

Open `Decoding` for how caches are filled and steps timed, `print_decode` for the table. Steps of
all methods and contexts take turns, so that a machine's slow moments meet all alike.
"""

import contextlib
import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StaticCache

from lesslib.attention.cache import LessCache
from lesslib.attention.fit import model_shape
from lesslib.bench.shapes import KERNEL_SIZE, random_kernels, random_model
from lesslib.bench.timing import DEVICE, DTYPE, now
from lesslib.hf import less
from lesslib.policies import H2O

METHODS = ("Full", "Baseline", "Baseline+", "LESS")
# random tokens that a cache is filled with at once
FILL = 512
# of which so many are read together
CHUNK = 64
# steps timed in a row, before the next method or context has its turn
RUN = 4

# milliseconds of each timed step, by (method, context)
StepTimes = dict[tuple[str, int], list[float]]


@dataclass(frozen=True)
class DecodeCase:
    """What one table is about.

    `model` is a shape of `MODELS`; `budget` is H2O's, in tokens; kernels are `hidden` wide in
    `kernel_dtype`. Of every method and context `steps` steps count, after as many that warm up.
    """

    model: str
    batch: int
    budget: int
    hidden: int
    kernel_dtype: str
    steps: int
    contexts: tuple[int, ...]
    methods: tuple[str, ...] = METHODS
    compiled: bool = False

    def __str__(self) -> str:
        mode = "compiled" if self.compiled else "eager"
        return (
            f"{self.model}, batch {self.batch}, budget {self.budget},"
            f" kernels {self.hidden} wide in {self.kernel_dtype}, {mode}"
        )


class Decoding:
    """A random model and kernels of a case, the filled caches of each method, and their steps."""

    def __init__(self, case: DecodeCase):
        self.case = case
        self.model = random_model(case.model)
        self.shape = model_shape(self.model)
        self.policy = H2O.from_budget(case.budget)
        dtype = getattr(torch, case.kernel_dtype)
        self.kernels = random_kernels(self.model, case.hidden).to(DEVICE, dtype)

    def empty_cache(self, method: str, context: int) -> Any:
        """A cache of `method` for `context` tokens and the steps after them.

        The full cache is transformers' StaticCache, its quicker one on long contexts.
        """
        if method == "Full":
            length = context + 2 * self.case.steps + RUN
            return StaticCache(config=self.model.config, max_cache_len=length)
        policy = self.policy
        if method == "Baseline+":
            policy = policy.plus(KERNEL_SIZE // 2)
        kernels = self.kernels if method == "LESS" else None
        return LessCache(self.model, policy, kernels, prefill="streaming", chunk=CHUNK)

    def filled_cache(self, method: str, context: int) -> Any:
        """The cache of `method` after `context` random tokens.

        They passed through its attention layers alone, which is quicker than the whole model.
        """
        cache = self.empty_cache(method, context)
        generator = torch.Generator().manual_seed(context)
        D = self.shape["head_dim"]
        # of q, k and v
        heads = (self.shape["heads"], self.shape["kv_heads"], self.shape["kv_heads"])
        chunks = range(0, context, FILL)
        for i, start in itertools.product(range(self.shape["layers"]), chunks):
            S = min(FILL, context - start)
            q, k, v = (
                torch.randn(self.case.batch, H, S, D, generator=generator).to(DEVICE, DTYPE)
                for H in heads
            )
            layer = cache.layers[i]
            layer.armed = True
            cache.update(k, v, i)
            if method != "Full":
                layer.attend(q, k, v, None, D**-0.5)
        return cache

    def call(self) -> Any:
        """The model, as one method's steps call it."""
        if not self.case.compiled:
            return self.model
        return torch.compile(self.model, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step_times(self) -> StepTimes:
        """Milliseconds of each of the case's steps, after as many that warm up."""
        case = self.case
        keys = list(itertools.product(case.methods, case.contexts))
        caches = {key: self.filled_cache(*key) for key in keys}
        times: StepTimes = {key: [] for key in keys}
        size = (case.batch, 1)
        tokens = torch.randint(0, self.model.config.vocab_size, size, device=DEVICE)
        # one for each method: their slots differ, so that each is compiled for itself
        calls = {method: self.call() for method in case.methods}
        turns = math.ceil(2 * case.steps / RUN)
        for _ in range(turns):
            for (method, context), cache in caches.items():
                attention = contextlib.nullcontext() if method == "Full" else less(self.model)
                with attention:
                    for _ in range(RUN):
                        begun = now()
                        calls[method](tokens, past_key_values=cache)
                        times[method, context].append(1000 * (now() - begun))
        return {key: values[len(values) // 2 :] for key, values in times.items()}


def median_times(case: DecodeCase) -> dict[tuple[str, int], float]:
    """Milliseconds of a step, by (method, context)."""
    # no case starts with what an earlier one compiled
    torch._dynamo.reset()
    times = Decoding(case).step_times()
    return {key: statistics.median(values) for key, values in times.items()}


def print_decode(case: DecodeCase) -> None:
    """A table of medians, each with its ratio to the full cache at that context.

    Beside them the ratios that matter: longest over shortest context, and LESS over Baseline+.
    """
    median = median_times(case)
    has_full = "Full" in case.methods
    contexts = "".join(f"{context:>18,}" for context in case.contexts)
    print(f"\n{case}: ms per step{' (times full)' if has_full else ''}")
    print(f"{'context':>10}{contexts}{'longest/shortest':>18}")
    for method in case.methods:
        medians = [median[method, context] for context in case.contexts]
        cells = [f"{milliseconds:.2f}" for milliseconds in medians]
        if has_full:
            full = [median["Full", context] for context in case.contexts]
            cells = [
                f"{cell} ({milliseconds / full_ms:.2f})"
                for cell, milliseconds, full_ms in zip(cells, medians, full, strict=True)
            ]
        row = "".join(f"{cell:>18}" for cell in cells)
        print(f"{method:>10}{row}{max(medians) / min(medians):18.2f}")
    ratios = [
        f"{median['LESS', context] / median['Baseline+', context]:.3f}" for context in case.contexts
    ]
    print(f"LESS / Baseline+ per step: {', '.join(ratios)}", flush=True)
