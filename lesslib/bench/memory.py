"""`python -m lesslib.bench decode`: bytes held and peak memory while a model generates."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesslib.attention.cache import LessCache
from lesslib.attention.fit import cache_bytes, model_shape
from lesslib.bench.shapes import KERNEL_SIZE, random_kernels, random_model
from lesslib.bench.timing import DEVICE, DTYPE, peak_memory
from lesslib.hf import less
from lesslib.policies import H2O


class Reading(NamedTuple):
    """What was held once `tokens` tokens were generated."""

    tokens: int
    cache_bytes: int
    peak_mib: float | None


class MemoryReader:
    """A stopping criterion that never stops, and reads memory after some numbers of tokens."""

    def __init__(self, cache: LessCache, token_counts: list[int]):
        self.cache = cache
        self.token_counts = token_counts
        self.readings: list[Reading] = []

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        # the prompt is one token
        generated = ids.shape[1] - 1
        if generated in self.token_counts:
            self.readings.append(Reading(generated, self.cache.nbytes(), peak_memory()))
        return torch.zeros(len(ids), dtype=torch.bool, device=DEVICE)


def print_memory(policy: H2O, hidden: int, token_counts: list[int]) -> None:
    """Bytes held and peak memory after `token_counts` tokens that a model of "pico" generates.

    Beside them what a full cache would hold.
    """
    model: Any = random_model("pico")
    kernels = random_kernels(model, hidden)
    cache = LessCache(model, policy, kernels)
    reader = MemoryReader(cache, token_counts)
    with less(model):
        model.generate(
            torch.ones(1, 1, dtype=torch.int64, device=DEVICE),
            past_key_values=cache,
            max_new_tokens=max(token_counts),
            do_sample=False,
            stopping_criteria=[reader],
            eos_token_id=None,
            pad_token_id=0,
        )
    formula = cache_bytes(model_shape(model), policy, KERNEL_SIZE, 1, DTYPE)
    report = cache.report()
    full_bytes_per_token = report["full"] // report["tokens"]
    print(
        f"\npico, batch 1, budget {policy.budget}: the formula says {formula:,} bytes;"
        f" the kernels' weights are {report['kernels']:,}"
    )
    print(f"{'tokens':>10}{'LESS bytes':>14}{'full bytes':>14}{'peak MiB':>12}")
    for tokens, held, peak in reader.readings:
        print(f"{tokens:10,}{held:14,}{tokens * full_bytes_per_token:14,}{peak or 0:12.1f}")
