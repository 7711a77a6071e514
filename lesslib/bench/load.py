"""What is served: a `Load` is one row of the paper's Table 6."""

from __future__ import annotations

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
