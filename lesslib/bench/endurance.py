"""`python -m lesslib.bench endurance`: a model decodes very many tokens through one cache.

Memory must stay flat and all numbers finite, however long it goes on. Open `Endurance`.
"""

import sys
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from lesslib.attention.cache import LessCache
from lesslib.bench.shapes import random_kernels, random_model
from lesslib.bench.timing import DEVICE, now
from lesslib.hf import less
from lesslib.policies import H2O

# tokens after which a process holds all that it ever will
SETTLED = 10_000
# by how much it may hold more at the end
GROWTH = 0.01
# rows of the table after that
ROWS = 10


class Reading(NamedTuple):
    """What was seen after `tokens` tokens."""

    tokens: int
    seconds: float
    resident_mib: float
    # True while every logit was finite
    are_logits_finite: bool
    # the largest of H2O's scores and of z, over all layers; NaN where any is
    score: float
    z: float


@dataclass(frozen=True)
class Endurance:
    """Random weights of a shape of `MODELS`, H2O's `budget` in tokens, kernels `hidden` wide.

    Positions go on beyond the context that the model's config names.
    """

    model: str
    tokens: int
    budget: int
    hidden: int

    def marks(self) -> set[int]:
        """Tokens after which is read."""
        first = min(SETTLED, max(1, self.tokens // 2))
        rows = {self.tokens * row // ROWS for row in range(1, ROWS + 1)}
        return {first} | {tokens for tokens in rows if tokens > first}

    @torch.no_grad()
    def readings(self) -> list[Reading]:
        """Decode all tokens, each drawn from the logits of the one before it; print as it goes."""
        model = random_model(self.model)
        kernels = random_kernels(model, self.hidden).to(DEVICE)
        for name, weights in kernels.named_parameters():
            # Away from the start of training, where the state hardly weighs in.
            if name.endswith("s1"):
                torch.nn.init.ones_(weights)
        cache = LessCache(model, H2O.from_budget(self.budget), kernels)
        generator = torch.Generator(DEVICE).manual_seed(0)
        token = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        is_finite = torch.ones((), dtype=torch.bool, device=DEVICE)
        marks = self.marks()
        readings = []
        print(HEADER)
        begun = now()
        with less(model):
            for tokens in range(1, self.tokens + 1):
                logits = model(token, past_key_values=cache).logits[:, -1]
                is_finite &= logits.isfinite().all()
                token = torch.multinomial(
                    logits.softmax(-1).nan_to_num(1.0), 1, generator=generator
                )
                if tokens in marks:
                    reading = read(cache, tokens, now() - begun, bool(is_finite))
                    readings.append(reading)
                    print(row_of(reading), flush=True)
        return readings


def read(cache: LessCache, tokens: int, seconds: float, are_logits_finite: bool) -> Reading:
    layers = cache.less_layers()
    return Reading(
        tokens=tokens,
        seconds=seconds,
        resident_mib=resident_mib(),
        are_logits_finite=are_logits_finite,
        score=largest([layer.slots.score for layer in layers]),
        z=largest([layer.memory["z"] for layer in layers]),
    )


def resident_mib() -> float:
    """MiB of this process that lie in memory."""
    return psutil.Process().memory_info().rss / 2**20


def largest(tensors: list[Tensor]) -> float:
    return float(torch.stack([x.max() for x in tensors]).max())


HEADER = f"{'tokens':>10}{'seconds':>10}{'resident MiB':>14}{'largest score':>15}{'largest z':>12}"


def row_of(reading: Reading) -> str:
    return (
        f"{reading.tokens:10,}{reading.seconds:10.0f}{reading.resident_mib:14.1f}"
        f"{reading.score:15.1f}{reading.z:12.1f}"
    )


def failures(readings: list[Reading]) -> list[str]:
    """What is not as it should be, in words."""
    first = readings[0]
    last = readings[-1]
    said = []
    growth = last.resident_mib / first.resident_mib - 1
    if growth > GROWTH:
        said.append(
            f"resident memory grew by {growth:.1%} between {first.tokens:,} and"
            f" {last.tokens:,} tokens"
        )
    if not last.are_logits_finite:
        said.append("a logit was not finite")
    for name in ("score", "z"):
        value = torch.tensor(getattr(last, name))
        if not value.isfinite():
            said.append(f"{name} is not finite")
    return said


def print_endurance(case: Endurance) -> None:
    """The table, and the verdict; exits with 1 where a check fails."""
    print(f"{case.model}, budget {case.budget}, kernels {case.hidden} wide, {DEVICE}")
    readings = case.readings()
    said = failures(readings)
    if said:
        sys.exit(f"failed: {'; '.join(said)}")
    last = readings[-1]
    print(f"held: memory flat, all finite; {last.tokens / last.seconds:.0f} tokens a second")
