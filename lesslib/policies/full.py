"""Nobody leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lesslib.policies.base import Policy
from lesslib.policies.registry import register_policy


@register_policy
@dataclass(frozen=True)
class Full(Policy):
    """Keeps every token: dense attention."""

    name: ClassVar[str] = "full"
