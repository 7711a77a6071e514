"""Who leaves the cache."""

from lesslib.policies.base import (
    H2O,
    POLICIES,
    TOVA,
    Full,
    Lambda,
    Policy,
    budget_of,
    get_policy,
    simulate,
)

__all__ = [
    "H2O",
    "POLICIES",
    "TOVA",
    "Full",
    "Lambda",
    "Policy",
    "budget_of",
    "get_policy",
    "simulate",
]
