"""What a fused kernel must know of a policy; a policy that has no such rule runs in its torch
form.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

RuleName = Literal["h2o", "h2o on full rows", "lambda", "tova"]


class EvictionRule(NamedTuple):
    """Of the slots that may leave, the one with the lowest rank does; the lowest position breaks
    ties.

    "h2o": the rank is the probability that a slot was given so far, summed over the query heads of
    its key-value head; "h2o on full rows": the same, of rows of dense attention. "lambda": the rank
    is the position. "tova": the rank is the newest query's probability, averaged over all heads,
    which hold the same tokens. Kernels say which of these they know.
    """

    name: RuleName
    # so many of the newest tokens are protected
    recent: int
    # so many of the first tokens are protected
    sinks: int
