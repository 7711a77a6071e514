"""What serving costs: the loads, the rows that fit into memory, the clock of nested parts, and
what is recorded and concluded.
"""

import json

import pytest
import torch

from lesslib.bench import (
    DEVICE,
    METHODS,
    PARTS,
    Clock,
    Load,
    now,
    parts,
    serve,
    serving,
)
from lesslib.bench.breakdown import SteppedCache, parts_timed
from lesslib.bench.served_model import ServedModel
from lesslib.bench.timing import copy_bandwidth
from lesslib.ops import dispatch
from lesslib.reporting import plots

SMALL = Load("pico", 40, 12, 3, hidden=16)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LESS_RESULTS", str(tmp_path))
    for name in ("LESS_LEDGER", "LESS_FROM_RESULTS", "LESS_PROGRESS", "LESS_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "llama"}, "unknown shape 'llama': choose from pico"),
        ({"prompt": 1}, "prompt is 1"),
        ({"generate": 0}, "generate is 0"),
        ({"batch": 0}, "batch 0 and cache_mib 0: give one"),
        ({"cache_mib": 3}, "batch 2 and cache_mib 3: give one"),
    ],
)
def test_a_load_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Load(**{"model": "pico", "prompt": 8, "generate": 8, "batch": 2} | changes)


def test_every_method_is_served_and_holds_what_the_formula_says():
    found = serve(SMALL, runs=2)
    assert tuple(found) == METHODS
    for method, row in found.items():
        assert (row["rows"], len(row["prompt_s"]), len(row["decode_s"])) == (3, 2, 2)
        assert row["seconds"] == pytest.approx(sum(row["prompt_s"] + row["decode_s"]) / 2, abs=1e-3)
        assert row["tokens_per_s"] == pytest.approx(3 * 12 / row["seconds"], rel=0.01)
        # a counter by layer
        shared = 0 if method.startswith("Full") else 4 * 8
        # the last token is written, and never read
        one_short = row["formula_bytes"] / 52 if method == "Full, dynamic" else 0
        assert row["bytes"] == row["formula_bytes"] + shared - one_short
        assert row["floor_ms"] > 0
    # state and kernels
    assert found["LESS"]["floor_ms"] > found["Baseline"]["floor_ms"] > 0
    assert found["Full, static"]["bytes"] > found["LESS"]["bytes"]


def test_as_many_rows_as_fit_into_the_memory():
    served = ServedModel(Load("pico", 40, 12, cache_mib=1))
    for method in METHODS:
        rows = served.rows(method)
        assert rows * served.row_bytes(method) <= 2**20 < (rows + 1) * served.row_bytes(method)
    assert served.rows("LESS") > served.rows("Full, static")


def test_a_method_that_runs_out_of_memory_is_said_to_and_the_others_go_on(monkeypatch):
    run = ServedModel.run

    def scarce(self, method, generate, batch):
        if method == "Full, static":
            raise torch.OutOfMemoryError("out of memory")
        return run(self, method, generate, batch)

    monkeypatch.setattr(ServedModel, "run", scarce)
    found = serve(SMALL, methods=("Full, static", "LESS"), runs=1)
    assert found["Full, static"] == {"rows": 3, "out_of_memory": True}
    assert found["LESS"]["seconds"] > 0


def test_the_most_rows_that_fit_are_found_by_trying(monkeypatch):
    tried = {"Full, static": [], "Baseline": []}

    def scarce(self, method, generate, batch):
        tried[method].append(batch)
        # the whole length holds more than the warm-up
        fitting_rows = 20 if generate < 12 else 15
        if batch > fitting_rows or method == "Baseline":
            raise torch.OutOfMemoryError("out of memory")
        return {"prompt": 1.0, "decode": 2.0, "bytes": 3}

    monkeypatch.setattr(ServedModel, "run", scarce)
    found = serve(Load("pico", 24, 12, cache_mib=8), methods=tuple(tried), runs=2)
    assert tried["Full, static"] == [37, 32, 28, 24, 21, 18, 18, 15, 15]
    row = found["Full, static"]
    assert (row["rows"], row["prompt_s"], row["decode_s"]) == (15, [1.0, 1.0], [2.0, 2.0])
    assert row["formula_bytes"] == 15 * 2 * 4 * 192 * 36 * 4
    assert tried["Baseline"][-2:] == [2, 1]
    assert found["Baseline"] == {"rows": 1, "out_of_memory": True}


def test_a_clock_gives_each_part_what_parts_inside_it_do_not_take():
    time = iter(range(100))
    clock = Clock(lambda: next(time))
    # 1 tick
    inner = clock.timed("inner", lambda: None)
    # 5 ticks, 2 of them inside
    middle = clock.timed("middle", lambda: (inner(), inner()))
    # 9 ticks
    outer = clock.timed("outer", lambda: (middle(), inner()))
    outer()
    assert clock.seconds == {"inner": 3, "middle": 3, "outer": 3}


def test_parts_are_timed_within_the_context_alone_and_change_no_result(monkeypatch):
    # kernels round otherwise, and the parts are of the torch forms
    monkeypatch.setenv("LESS_OPS", "torch")
    served = ServedModel(SMALL)
    ids = torch.randint(0, 4096, (3, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits = []
    seconds = {}
    for watched in (False, True):
        cache = served.cache("LESS")
        clock = Clock(now)
        with torch.no_grad(), served.attention("LESS"):
            served.model(ids, past_key_values=cache)
            if watched:
                with parts_timed(cache, clock):
                    logits.append(served.model(ids[:, :1], past_key_values=cache).logits)
                assert set(clock.seconds) == {"eviction", "kernels", "synthesis", "update"}
                seconds = dict(clock.seconds)
            else:
                logits.append(served.model(ids[:, :1], past_key_values=cache).logits)
            served.model(ids[:, :1], past_key_values=cache)
        # no longer counted
        assert clock.seconds == seconds or not watched
    assert torch.equal(*logits)


def test_the_parts_of_a_step():
    found = parts(Load("pico", 40, 24, 2, hidden=16), steps=4)
    expected = {
        "Full, static": {"decoding"},
        "Baseline+": {"decoding", "eviction"},
        "LESS": set(PARTS),
    }
    assert found.keys() == expected.keys()
    for method, row in found.items():
        assert {part for part in PARTS if f"{part}_ms" in row} == expected[method]
        assert all(milliseconds > 0 for milliseconds in row.values())
    with pytest.raises(
        ValueError, match="generate is 23: 4 steps timed in two ways need at least 24"
    ):
        parts(Load("pico", 40, 23, 2), steps=4)


@pytest.mark.parametrize("form", [None, "torch", "cpu"])
def test_parts_run_in_the_torch_forms_alone(monkeypatch, form):
    if form is None:
        monkeypatch.delenv("LESS_OPS", raising=False)
    else:
        monkeypatch.setenv("LESS_OPS", form)
    with parts_timed(ServedModel(SMALL).cache("LESS"), Clock(now)):
        assert dispatch.forced_form() == "torch"
    assert dispatch.forced_form() == form


def test_where_kernels_serve_the_step_in_them_stands_beside_the_parts(monkeypatch):
    """With the torch forms in place of kernels: which of the two ran is seen by $LESS_OPS."""
    monkeypatch.delenv("LESS_OPS", raising=False)
    forms = []
    whole_step = SteppedCache.whole_step

    def noted_step(self):
        forms.append((self.method, dispatch.forced_form()))
        return whole_step(self)

    monkeypatch.setattr(SteppedCache, "whole_step", noted_step)
    monkeypatch.setattr(SteppedCache, "has_kernels", lambda self: self.method == "LESS")
    found = parts(Load("pico", 40, 24, 2, hidden=16), ("Full, static", "LESS"), steps=4)
    assert set(forms) == {("Full, static", "torch"), ("LESS", "torch"), ("LESS", None)}
    assert "fused_ms" not in found["Full, static"]
    assert found["LESS"]["fused_ms"] > 0


def test_a_full_cache_has_no_kernels_and_forced_torch_forms_have_none(monkeypatch):
    monkeypatch.setenv("LESS_OPS", "torch")
    for method in ("Full, static", "LESS"):
        stepped = SteppedCache(ServedModel(SMALL), method)
        with torch.no_grad():
            stepped.read_prompt()
        assert not stepped.has_kernels()


def test_parts_are_of_as_many_rows_as_are_served(monkeypatch):
    load = Load("pico", 40, 24, cache_mib=1, hidden=16)
    caches = []
    empty_cache = ServedModel.cache

    def noted_cache(self, method):
        caches.append(empty_cache(self, method))
        return caches[-1]

    monkeypatch.setattr(ServedModel, "cache", noted_cache)
    parts(load, methods=("LESS",), steps=4)
    assert caches[0].layers[0].batch_size == ServedModel(load).rows("LESS") > 1


def test_a_copys_bandwidth_is_that_of_memory():
    assert 1e8 < copy_bandwidth(mib=64) < 1e13


def test_stacked_bars_are_as_long_as_their_parts():
    figure = plots.stacked(
        {"Full": {"decoding": 3.0}, "LESS": {"decoding": 2.0, "eviction": 0.5}}, "ms", "title"
    )
    assert [(p.get_x(), p.get_width()) for p in figure.axes[0].patches] == [
        (0, 3.0),
        (0, 2.0),
        (2.0, 0.5),
    ]


def test_the_command_prints_ratios_and_writes_json(capsys, home):
    load = ["--prompt", "40", "--generate", "12"]
    out = ["--out", str(home / "x.json")]
    two_methods = ["--methods", "Full, static", "LESS"]
    serving.main([*load, "--batch", "2", "--runs", "1", *two_methods, *out])
    said = capsys.readouterr().out
    assert "pico 40+12, batch 2; " in said
    assert "Full, static: rows 2" in said
    written = json.loads((home / "x.json").read_text())
    assert set(written["methods"]) == {"Full, static", "LESS"}
    less_ms = written["methods"]["LESS"]["step_ms"]
    full_ms = written["methods"]["Full, static"]["step_ms"]
    assert f"({less_ms / full_ms:.2f})" in said
    with pytest.raises(SystemExit):
        serving.main(load)
    assert "batch 0 and cache_mib 0: give one of the two" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        serving.main([*load, "--batch", "2", "--parts"])
    assert "generate is 12: 32 steps timed in two ways need at least 80" in capsys.readouterr().err
