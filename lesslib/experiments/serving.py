"""Tables 6 and 8: latency, throughput, and the parts of a decode step."""

from __future__ import annotations

from dataclasses import asdict

from lesslib.bench import Load, parts, serve
from lesslib.experiments.language import record
from lesslib.profiles import SETTINGS, get_limit

# by profile: the loads of Table 6, on small machines with lengths divided by 4 to 10, and that of Table 8
LOADS = {
    p: ([Load(**x) for x in s["loads"]["Table 6"]], Load(**s["loads"]["Table 8"]))
    for p, s in SETTINGS.items()
}


def loads(profile: str) -> tuple[list[Load], Load]:
    """The loads of Tables 6 and 8 in a profile; the smallest where $LESS_LIMIT cuts it short."""
    return LOADS["smoke" if get_limit() else profile]


def latency(profile: str, seed: int = 0) -> dict:
    """Table 6: `serve` under each load of the profile."""
    points = {str(load): asdict(load) for load in loads(profile)[0]}
    return record(
        "latency", profile, seed, points, lambda **load: {"methods": serve(Load(**load))}, models=()
    )


def breakdown(profile: str, seed: int = 0) -> dict:
    """Table 8: the `parts` of a step."""
    load = loads(profile)[1]
    return record(
        "breakdown",
        profile,
        seed,
        {str(load): asdict(load)},
        lambda **load: {"methods": parts(Load(**load))},
        models=(),
    )
