"""`python -m lesslib.bench score`: seconds and memory of whole sequences, by method."""

import itertools
from dataclasses import dataclass

import torch

from lesslib.bench.shapes import random_kernels, random_model
from lesslib.bench.timing import DEVICE, fresh_process, now, peak_above, restart_peak_memory
from lesslib.hf import less
from lesslib.policies import H2O, Full, Policy
from lesslib.util.hardware import keep_memory

METHODS = ("Full", "Baseline", "LESS")


@dataclass(frozen=True)
class ScoringCase:
    """Forwards over `batch` sequences of `length` random tokens; the best of `runs` counts.

    `method` is one of `METHODS`, with H2O at 5%; kernels are `hidden` wide.
    """

    model: str
    length: int
    batch: int
    method: str
    hidden: int
    runs: int


@torch.no_grad()
def scoring(case: ScoringCase) -> tuple[float, float | None]:
    """Seconds of the quickest run, and its peak MiB above the start."""
    keep_memory()
    model = random_model(case.model)
    policy: Policy = H2O.from_fraction(0.05, case.length)
    if case.method == "Full":
        policy = Full()
    kernels = random_kernels(model, case.hidden) if case.method == "LESS" else None
    size = (case.batch, case.length)
    ids = torch.randint(0, model.config.vocab_size, size, device=DEVICE)
    seconds = []
    with less(model, policy, kernels, mode="parallel"):
        # a short call warms up
        model(ids[:, :64], use_cache=False)
        held = restart_peak_memory()
        for _ in range(case.runs):
            begun = now()
            model(ids, use_cache=False, logits_to_keep=1)
            seconds.append(now() - begun)
    return min(seconds), peak_above(held)


def print_scoring(
    models: list[str], lengths: list[int], batch: int, hidden: int, runs: int
) -> None:
    """A table of `scoring`, every case in a fresh process, with its ratio to dense attention."""
    print(
        f"{'model':>10} {'tokens':>7} {'method':>9} {'seconds':>9} {'times Full':>11}"
        f" {'peak MiB':>9}"
    )
    for model, length in itertools.product(models, lengths):
        dense = None
        for method in METHODS:
            case = ScoringCase(model, length, batch, method, hidden, runs)
            with fresh_process() as pool:
                seconds, peak = pool.submit(scoring, case).result()
            # the first method is dense attention
            if dense is None:
                dense = seconds
            print(
                f"{model:>10} {length:7,} {method:>9} {seconds:9.2f} {seconds / dense:11.2f}"
                f" {peak or 0:9.0f}",
                flush=True,
            )
