"""Policies by name."""

from __future__ import annotations

from typing import TypeVar

from lesslib.policies.base import Policy

POLICIES: dict[str, type[Policy]] = {}
AnyPolicy = TypeVar("AnyPolicy", bound=type[Policy])


def register_policy(policy: AnyPolicy) -> AnyPolicy:
    """Class decorator: from now on `get_policy(policy.name)` gives the class, in any case.

    Raises ValueError when another class has the name already.
    """
    name = policy.name.lower()
    taken = POLICIES.get(name)
    if taken is not None and taken.__qualname__ != policy.__qualname__:
        raise ValueError(
            f"a policy called {policy.name!r} is registered already ({taken.__qualname__}):"
            " choose another name"
        )
    POLICIES[name] = policy
    return policy


def get_policy(name: str) -> type[Policy]:
    """The policy class called `name`, in any case. Raises ValueError for an unknown one."""
    policy = POLICIES.get(str(name).lower())
    if policy is None:
        raise ValueError(f"unknown policy {name!r}: choose from {', '.join(POLICIES)}")
    return policy
