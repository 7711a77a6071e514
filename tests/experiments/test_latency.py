"""Latency and the parts of a step: their loads, and every verdict can hold and can fail."""

import pytest

from lesslib.bench.serving import WARM_UP
from lesslib.experiments import breakdown, latency
from lesslib.experiments.latency import (
    done_before,
    times_faster,
    times_the_throughput,
    writes_more,
)


def test_the_loads_of_all_profiles_have_names_of_their_own_and_enough_steps_for_parts():
    assert set(latency.LOADS) == set(breakdown.LOADS) == {"smoke", "tiny", "wild", "paper"}
    for loads in latency.LOADS.values():
        assert len({str(load) for load in loads}) == len(loads)
    for load in breakdown.LOADS.values():
        assert load.batch > 0
        assert load.generate >= 2 * (WARM_UP + 32)


def test_both_tables_are_recorded_and_read_again(monkeypatch):
    first = latency.run("smoke"), breakdown.run("smoke")
    monkeypatch.setattr(latency, "serve", lambda *a: pytest.fail("computed again"))
    monkeypatch.setattr(breakdown, "parts", lambda *a: pytest.fail("computed again"))
    assert (latency.run("smoke"), breakdown.run("smoke")) == first
    assert latency.hold_what_their_formula_says(first[0])
    assert len(latency.table(first[0]).data.splitlines()) == 2 + 5
    assert len(breakdown.table(first[1]).data.splitlines()) == 2 + 3


def test_a_limit_takes_the_smallest_loads(monkeypatch):
    monkeypatch.setenv("LESS_LIMIT", "2")
    assert latency.loads("paper") == latency.LOADS["smoke"]
    assert breakdown.load_of("paper") == breakdown.LOADS["smoke"]


def row(decode_s: list[float], rows: int = 2) -> dict:
    """What was measured of a method whose prompts take no time."""
    return {"rows": rows, "prompt_s": [0.0] * len(decode_s), "decode_s": decode_s, "seconds": 1.0}


FULL = {"Full, dynamic": row([9.0, 9.0, 9.0]), "Full, static": row([2.0, 2.2, 2.1])}


@pytest.mark.parametrize(
    ("seconds", "holds"),
    [([1.0, 1.1, 1.2], True), ([3.0, 3.1, 3.2], False), ([1.9, 2.0, 2.3], None)],
)
def test_verdicts_on_latency_hold_fail_and_are_undecided(seconds, holds):
    methods = FULL | {"LESS": row(seconds)}
    record = {"points": {"a load": {"parameters": {"cache_mib": 0}, "methods": methods}}}
    (verdict,) = done_before(record)
    assert verdict.holds is holds
    assert list(writes_more(record)) == []
    assert list(latency.verdicts(record)) == [verdict]


def test_ratios_are_to_the_quicker_full_cache():
    methods = FULL | {"LESS": row([1.0, 1.1, 1.2])}
    expected = (2.1 / 1.1, 2.0 / 1.2, 2.2 / 1.0)
    assert times_faster(methods, "LESS") == pytest.approx(expected)
    # as many rows make no difference
    assert times_the_throughput(methods, "LESS") == pytest.approx(expected)


def test_verdicts_on_throughput_count_the_rows():
    methods = {"Full, static": row([2.0, 2.0], rows=10), "LESS": row([4.0, 4.0], rows=40)}
    record = {"points": {"a load": {"parameters": {"cache_mib": 5}, "methods": methods}}}
    (verdict,) = writes_more(record)
    assert (verdict.holds, verdict.numbers) == (True, "2.00 times [2.00, 2.00]; 40 rows against 10")
    assert list(done_before(record)) == []
    methods["LESS"] = {"rows": 40, "out_of_memory": True}
    assert list(writes_more(record)) == []


@pytest.mark.parametrize(("less", "holds"), [(1.1, True), (1.2, False)])
def test_verdicts_on_a_steps_overhead(less, holds):
    methods = {"Baseline+": {"unobserved_ms": 1.0}, "LESS": {"unobserved_ms": less}}
    (verdict,) = breakdown.verdicts({"points": {"a load": {"methods": methods}}})
    assert (verdict.holds, verdict.numbers) == (holds, f"{less - 1:+.1%}")


def test_the_table_of_parts_has_the_step_in_kernels_where_it_was_timed():
    columns = ("decoding", "eviction", "total", "unobserved")
    rows = {m: {f"{c}_ms": 1.0 for c in columns} for m in ("Full, static", "LESS")}
    record = {"points": {"a load": {"methods": rows}}}
    before = breakdown.table(record).data.splitlines()
    rows["LESS"]["fused_ms"] = 0.5
    after = breakdown.table(record).data.splitlines()
    assert after[0] == f"{before[0]} in fused kernels |"
    assert after[-1].endswith(" 1.000 | 0.500 |")
    assert "fused" not in before[0]
