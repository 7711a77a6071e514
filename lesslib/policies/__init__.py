"""Who leaves the cache.

A policy is one file: a frozen dataclass under `@register_policy` that scores slots and says which
goes next. Open base.py first, then h2o.py; simulation.py runs a policy along a whole sequence and
gives its eviction times. May import from ops and util.
"""

from lesslib.ops.blocks import NEVER
from lesslib.policies.base import Policy, budget_of
from lesslib.policies.full import Full
from lesslib.policies.h2o import H2O
from lesslib.policies.lambda_mask import Lambda
from lesslib.policies.registry import POLICIES, get_policy, register_policy
from lesslib.policies.simulation import simulate
from lesslib.policies.tova import TOVA

__all__ = [
    "H2O",
    "NEVER",
    "POLICIES",
    "TOVA",
    "Full",
    "Lambda",
    "Policy",
    "budget_of",
    "get_policy",
    "register_policy",
    "simulate",
]
