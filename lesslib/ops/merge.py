"""Partial softmaxes: attention over some of the keys, with the log-sum-exp that lets it join the
others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Attention over a part of what a query sees.

    output [..., Dv]: the softmax over this part alone, times its values; logsumexp [...]: log of
    the sum of the part's weights, -inf for a part that holds nothing.
    """

    output: Tensor
    logsumexp: Tensor


def divisor_of(denominator: Tensor) -> tuple[Tensor, Tensor]:
    """(denominator, its log), each [...]; (1, -inf) where it is 0, so that one may divide by it."""
    is_held = denominator > 0
    divisor = denominator.where(is_held, 1.0)
    return divisor, divisor.log().where(is_held, -math.inf)


def part_of_sums(numerator: Tensor, denominator: Tensor) -> Part:
    """The part whose weights add up to `denominator` [...] and, times values, `numerator` [...,
    Dv].

    With a zero denominator (nothing was absorbed yet, or kernels are at zero) it holds nothing.
    """
    divisor, logsumexp = divisor_of(denominator)
    return Part(numerator / divisor[..., None], logsumexp)


def merge(first: Part, *others: Part) -> Tensor:
    """Attention over all parts together, [..., Dv]: the paper's eq. 3, in log space.

    A part whose log-sum-exp is -inf changes nothing; `first` must hold something. No floor is added
    anywhere.
    """
    total = first.logsumexp
    for part in others:
        total = torch.logaddexp(total, part.logsumexp)
    merged = first.output * (first.logsumexp - total).exp()[..., None]
    for part in others:
        merged = merged + part.output * (part.logsumexp - total).exp()[..., None]
    return merged
