"""Partial softmaxes: attention over some of the keys, with the log-sum-exp that lets it join the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Attention over a part of what a query sees.

    output [..., Dv]: the softmax over this part alone, times its values; logsumexp [...]: log of the
    sum of the part's weights, -inf for a part that holds nothing.
    """

    output: Tensor
    logsumexp: Tensor


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
