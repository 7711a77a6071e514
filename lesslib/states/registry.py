"""States by name."""

from __future__ import annotations

from typing import TypeVar

from lesslib.states.base import State

STATES: dict[str, type[State]] = {}
AnyState = TypeVar("AnyState", bound=type[State])


def register_state(state: AnyState) -> AnyState:
    """Class decorator: from now on `get_state(state.name)` gives the class.

    Raises ValueError when another class has the name already.
    """
    taken = STATES.get(state.name)
    if taken is not None and taken.__qualname__ != state.__qualname__:
        raise ValueError(
            f"a state called {state.name!r} is registered already ({taken.__qualname__}):"
            " choose another name"
        )
    STATES[state.name] = state
    return state


def get_state(name: str) -> type[State]:
    """The state class called `name`. Raises ValueError for an unknown one."""
    if name not in STATES:
        raise ValueError(f"unknown state {name!r}: choose from {', '.join(STATES)}")
    return STATES[name]
