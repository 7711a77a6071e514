"""A row of a table: which policy, at which budget, with which state; its label follows from these.

Nothing here is parsed back from a label: where a record is read, `by_label` maps the labels of
the methods that an experiment declares to these methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Who leaves the cache, how many tokens stay, and what is remembered of those that left.

    `policy`: a name of `lesslib.policies.get_policy`. `fraction`: the budget, as a share of the
    model's context. `state`: a name of `lesslib.states.get_state`. `trained_fraction`: the budget
    that the kernels of the state "less" were trained at; states without weights have none.
    `extra_tokens`: R/2 tokens beyond the budget, which weigh as much as LESS's state (Baseline+).
    """

    policy: str = "h2o"
    fraction: float = 1.0
    state: str = "none"
    trained_fraction: float | None = None
    extra_tokens: bool = False

    def __post_init__(self) -> None:
        if self.state == "less" and self.trained_fraction is None:
            raise ValueError(
                "a method with the state 'less' needs trained_fraction:"
                " the budget that its kernels were trained at, such as 0.05"
            )

    @classmethod
    def full(cls) -> Method:
        """The full cache: nobody leaves."""
        return cls(policy="full")

    @classmethod
    def baseline(cls, fraction: float, policy: str = "h2o") -> Method:
        """The policy alone."""
        return cls(policy, fraction)

    @classmethod
    def baseline_plus(cls, fraction: float, policy: str = "h2o") -> Method:
        """The policy alone, with R/2 more tokens: the paper's Baseline+."""
        return cls(policy, fraction, extra_tokens=True)

    @classmethod
    def performer(cls, fraction: float, policy: str = "h2o") -> Method:
        """The policy with random features in place of learned ones."""
        return cls(policy, fraction, state="performer")

    @classmethod
    def less(
        cls, fraction: float, trained_fraction: float | None = None, policy: str = "h2o"
    ) -> Method:
        """LESS with kernels trained at `trained_fraction`, which is `fraction` unless given."""
        if trained_fraction is None:
            trained_fraction = fraction
        return cls(policy, fraction, state="less", trained_fraction=trained_fraction)

    @property
    def label(self) -> str:
        """How tables and results call the row: "Baseline+", "LESS (5%)", or the state's name."""
        if self.policy == "full":
            return "Full"
        if self.state == "less":
            return f"LESS ({self.trained_fraction:.0%})"
        if self.state == "performer":
            return "Performer"
        if self.state != "none":
            return self.state
        return "Baseline+" if self.extra_tokens else "Baseline"

    @property
    def budget(self) -> str:
        """The share of the context that is kept, in words: "5%"."""
        return f"{self.fraction:.0%}"


def four_methods(fraction: float, policy: str = "h2o") -> tuple[Method, ...]:
    """Full, Baseline, Baseline+ and LESS trained at `fraction`: the rows of most tables."""
    return (
        Method.full(),
        Method.baseline(fraction, policy),
        Method.baseline_plus(fraction, policy),
        Method.less(fraction, policy=policy),
    )


def by_label(methods: Iterable[Method]) -> dict[str, Method]:
    """Methods by their labels, in order; those of one label may differ in what it does not say."""
    return {method.label: method for method in methods}
