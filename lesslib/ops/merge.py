"""Partial softmaxes: attention over some of the keys, with the log-sum-exp that lets it join
others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Attention over a part of what a query sees.

    output [..., Dv]: the softmax over this part alone, times its values; finite in any case.
    logsumexp [...]: log of the sum of the part's weights, -inf for a part that holds nothing.
    """

    output: Tensor
    logsumexp: Tensor


def part_of_sums(numerator: Tensor, denominator: Tensor) -> Part:
    """The part whose weights add up to `denominator`, and times their values to `numerator`.

    numerator [..., Dv], denominator [...]. With a zero denominator (nothing was absorbed yet, or
    kernels are at zero) the part holds nothing.
    """
    is_held = denominator > 0
    divisor = denominator.where(is_held, 1.0)
    return Part(numerator / divisor[..., None], divisor.log().where(is_held, -math.inf))


def merge(first: Part, *others: Part) -> Tensor:
    """Attention over all parts together, [..., Dv]: the paper's eq. 3, in log space.

    A part whose log-sum-exp is -inf changes nothing; `first` must hold something. No floor is added
    anywhere.
    """
    output, total = first
    for part in others:
        total = torch.logaddexp(total, part.logsumexp)
        share = (part.logsumexp - total).exp()
        output = torch.lerp(output, part.output, share[..., None])
    return output
