"""What is served: a `Load` is one row of the paper's Table 6."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from lesslib.bench.shapes import MODELS


@dataclass(frozen=True)
class Load:
    """A prompt of `prompt` random tokens in `batch` rows, and `generate` tokens written after it.

    `model`: a shape of `MODELS`, with random weights. `fraction`: H2O's budget as a share of
    prompt + generate. `hidden`: width of the kernels. `cache_mib`: instead of `batch`, as many rows
    as each method's cache fits into so many MiB, fewer where a GPU's memory ends before.
    `compiled`: decode steps through torch.compile, on a GPU as CUDA graphs.

    Raises ValueError for an unknown shape, fewer than 2 tokens, and where not exactly one of
    `batch` and `cache_mib` is above 0.
    """

    model: str
    prompt: int
    generate: int
    batch: int = 0
    fraction: float = 0.05
    hidden: int = 128
    cache_mib: int = 0
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"unknown shape {self.model!r}: choose from {', '.join(MODELS)}")
        for name, tokens in (("prompt", self.prompt), ("generate", self.generate)):
            if tokens < 2:
                raise ValueError(f"{name} is {tokens}: give at least 2 tokens")
        if (self.batch > 0) == (self.cache_mib > 0):
            raise ValueError(
                f"batch {self.batch} and cache_mib {self.cache_mib}: give one of the two, above 0"
            )

    def __str__(self) -> str:
        rows = f"batch {self.batch}" if self.batch else f"{self.cache_mib} MiB of cache"
        suffix = ", compiled" if self.compiled else ""
        return f"{self.model} {self.prompt}+{self.generate}, {rows}{suffix}"

    @property
    def length(self) -> int:
        """Tokens of a row at the end."""
        return self.prompt + self.generate

    @property
    def budget(self) -> int:
        """H2O's slots: an even number, at least 4."""
        return max(4, int(self.fraction * self.length) // 2 * 2)


@dataclass(frozen=True)
class LoadOfSlots(Load):
    """A load whose budget is `slots` tokens at any length; `fraction` says nothing."""

    slots: int = 204

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 4 or self.slots % 2:
            raise ValueError(f"budget is {self.slots}: give an even number, at least 4")

    def __str__(self) -> str:
        return f"{super().__str__()}, budget {self.slots}"

    @property
    def budget(self) -> int:
        return self.slots


@dataclass(frozen=True)
class Loads:
    """Every model, length ("2048+256": prompt and answer) and batch, by each of some methods.

    All hold `budget` tokens, whatever the length; kernels are `hidden` wide. Each load has `runs`
    replicates.
    """

    models: tuple[str, ...]
    lengths: tuple[str, ...]
    batches: tuple[int, ...]
    methods: tuple[str, ...]
    budget: int = 204
    hidden: int = 128
    runs: int = 3

    def each(self) -> list[LoadOfSlots]:
        """In the order in which they are measured. Raises ValueError for one that cannot be."""
        loads = []
        for model, words, batch in itertools.product(self.models, self.lengths, self.batches):
            prompt, generate = tokens_of(words)
            load = LoadOfSlots(
                model, prompt, generate, batch, hidden=self.hidden, slots=self.budget
            )
            loads.append(load)
        return loads


def tokens_of(words: str) -> tuple[int, int]:
    """(prompt, generate) of "2048+256". Raises ValueError for other words."""
    prompt, _, generate = words.partition("+")
    if not (prompt.isdecimal() and generate.isdecimal()):
        raise ValueError(f"length {words!r}: give the tokens of prompt and answer, as in 2048+256")
    return int(prompt), int(generate)
