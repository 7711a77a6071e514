"""Whole loads beside full caches: what is measured, left out, printed, recorded and resumed."""

import pytest
import torch

from lesslib.bench import command, loads
from lesslib.bench.load import Load, LoadOfSlots, Loads, tokens_of
from lesslib.bench.loads import LoadsCase, expected_seconds, measure_load, measured_loads, work
from lesslib.bench.record import BenchmarkRecord
from lesslib.bench.served_model import FULL_DYNAMIC, LESS_STREAMING, ServedModel
from lesslib.bench.shapes import MODELS

SMALL = LoadsCase(("pico",), ("40+12",), (2,), ("Full, static", "LESS"), 20, 8, 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.delenv("LESS_PROGRESS", raising=False)
    monkeypatch.setattr(loads, "copy_bandwidth", lambda: 1e10)


def test_smollm2s_shape_is_the_models():
    served = ServedModel(Load("smollm2-135m", 8, 8, 1))
    parameters = sum(p.numel() for p in served.model.parameters())
    assert parameters == 134_515_008
    assert served.shape | {"context": 0} == {
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "context": 0,
    }
    # the one table is read to the end by every step
    assert served.weight_bytes("Baseline") == 4 * parameters
    kernels = sum(p.numel() for p in served.kernels.parameters())
    assert served.weight_bytes("LESS") == 4 * (parameters + kernels)


def test_tables_of_their_own_are_not_read_by_steps():
    served = ServedModel(Load("pico", 8, 8, 1))
    parameters = sum(p.numel() for p in served.model.parameters())
    assert served.weight_bytes("Baseline") == 4 * (parameters - 4096 * 192)


def test_every_model_length_and_batch_is_a_load_of_the_same_budget():
    case = Loads(("pico", "12x768"), ("40+12", "8192+256"), (1, 8), ("LESS",), budget=102)
    assert [str(load) for load in case.each()][::3] == [
        "pico 40+12, batch 1, budget 102",
        "pico 8192+256, batch 8, budget 102",
        "12x768 8192+256, batch 1, budget 102",
    ]
    assert {load.budget for load in case.each()} == {102}
    # a share of the length, as before
    assert Load("pico", 768, 256, 4).budget == 50
    assert Load("pico", 8, 8, 4).budget == 4


@pytest.mark.parametrize("words", ["", "512", "512+", "+128", "a+b", "1+2+3", "-1+2"])
def test_lengths_that_are_none_are_refused(words):
    with pytest.raises(ValueError, match=r"length .*as in 2048\+256"):
        tokens_of(words)


@pytest.mark.parametrize("slots", [2, 205])
def test_budgets_that_h2o_cannot_halve_are_refused(slots):
    with pytest.raises(ValueError, match=f"budget is {slots}: give an even number"):
        LoadOfSlots("pico", 40, 12, 1, slots=slots)


def test_the_command_says_what_is_wrong_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(loads, "measure_load", lambda *a: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="length '512': give the tokens"):
        command.main(["loads", "--lengths", "512"])


def test_a_quick_run_is_a_few_of_the_loads():
    arguments = vars(command.parse(["loads", "--quick", "--budget", "102"]))
    for name in ("command", "fresh"):
        arguments.pop(name)
    case = command.checked(LoadsCase, arguments)
    assert [str(load) for load in case.each()] == [
        "pico 512+128, batch 1, budget 102",
        "pico 512+128, batch 8, budget 102",
        "12x768 512+128, batch 1, budget 102",
        "12x768 512+128, batch 8, budget 102",
    ]
    assert case.methods == loads.METHODS


def test_all_methods_of_a_load_are_measured_in_turn(monkeypatch):
    turns = []
    answer = ServedModel.answer

    def noted_answer(self, method, ids, generate):
        turns.append((method, ids.shape[1], generate))
        return answer(self, method, ids, generate)

    monkeypatch.setattr(ServedModel, "answer", noted_answer)
    (load,) = SMALL.each()
    rows = measure_load(SMALL, load)
    short = [("Full, static", 40, 8)] * 4 + [("LESS", 40, 8)] * 4
    assert turns == short + [("Full, static", 40, 12), ("LESS", 40, 12)] * 2
    for row in rows.values():
        assert len(row["prompt_s"]) == len(row["decode_s"]) == 2
        assert row["floor_ms"] > 0
    # of 20 slots each, and what is beside them
    assert rows["Full, static"]["bytes"] == 2 * 4 * 2 * 192 * 52 * 4
    assert rows["LESS"]["bytes"] < rows["Full, static"]["bytes"]
    assert rows["Full, static"]["full_over"] == 1
    less_over = rows["Full, static"]["seconds"] / rows["LESS"]["seconds"]
    assert rows["LESS"]["full_over"] == pytest.approx(less_over, abs=2e-3)


def test_a_compiled_full_cache_is_a_method_of_its_own(monkeypatch):
    compiled = []

    def compile_nothing(model, **settings):
        def step(*args, **kwargs):
            compiled.append(settings)
            return model(*args, **kwargs)

        return step

    monkeypatch.setattr(torch, "compile", compile_nothing)
    served = ServedModel(Load("pico", 40, 12, 2, hidden=8))
    held = {m: served.run(m, 12, 2)["bytes"] for m in ("Full, static", "Full, compiled")}
    assert held["Full, static"] == held["Full, compiled"]
    assert len(compiled) == 11
    # one that grows would be compiled at every length
    everything = ServedModel(Load("pico", 40, 12, 2, compiled=True))
    steps = {m: everything.step(m) is everything.compiled for m in loads.METHODS}
    assert [m for m in steps if not steps[m]] == [FULL_DYNAMIC]


def test_the_quickest_full_cache_is_what_ratios_are_of():
    rows = {
        "Full, dynamic": {"seconds": 6.0},
        "Full, static": {"seconds": 3.0},
        "Full, compiled": {"rows": 8, "out_of_memory": True},
        "LESS": {"seconds": 2.0},
    }
    ratios = {m: row.get("full_over") for m, row in loads.with_ratios(rows).items()}
    assert ratios == {
        "Full, dynamic": 0.5,
        "Full, static": 1.0,
        "Full, compiled": None,
        "LESS": 1.5,
    }
    assert loads.with_ratios({"LESS": {"seconds": 2.0}}) == {"LESS": {"seconds": 2.0}}


# ---------------------------------------------------------------- how long it will take
def test_a_longer_prompt_and_answer_are_expected_to_take_longer():
    took = {"prompt": 1.0, "decode": 0.7}

    def seconds(method, prompt, generate):
        served = ServedModel(LoadOfSlots("pico", prompt, generate, 2, hidden=8))
        return expected_seconds(served, method, took, bandwidth=1e9)

    # the prompt was as long; 7 steps took 0.7 s
    assert seconds("LESS", 256, 11) == pytest.approx(1 + 10 * 0.1)
    served = ServedModel(Load("pico", 256, 8, 2))
    growth = work(served, "LESS", 1024) / work(served, "LESS", 256)
    assert 4 < growth < 16
    assert seconds("LESS", 1024, 11) == pytest.approx(growth + 10 * 0.1)
    # past the budget each query attends as many tokens
    assert seconds(LESS_STREAMING, 1024, 11) == pytest.approx(4 + 10 * 0.1)
    # 2 rows, 4 layers, 192 wide, keys and values, read, written and read again by every step
    copied = 3 * 2 * 4 * 2 * 192 * 4 * (256 + 11)
    assert seconds(FULL_DYNAMIC, 256, 11) == pytest.approx(1 + 10 * (0.1 + copied / 1e9))


def test_one_slow_moment_while_warming_up_changes_no_expectation(monkeypatch):
    prompts = iter([50.0, 3.0, 90.0, 2.0])

    def answer(self, method, ids, generate):
        return {"prompt": next(prompts), "decode": 0.7, "bytes": 1}

    monkeypatch.setattr(ServedModel, "answer", answer)
    served = ServedModel(LoadOfSlots("pico", 256, 11, 2, hidden=8))
    assert loads.warm_up(served, ("LESS",), bandwidth=1e9) == pytest.approx(2 + 10 * 0.1)


def test_a_load_that_would_take_too_long_is_left_out_with_a_line(capsys, monkeypatch):
    monkeypatch.setattr(loads, "warm_up", lambda *a: 100.0)
    case = LoadsCase(("pico",), ("40+12",), (2,), ("LESS",), 20, 8, runs=3, limit=4)
    assert list(measured_loads(case, fresh=False)) == []
    assert capsys.readouterr().out.strip() == (
        "pico 40+12, batch 2, budget 20: left out, would take some 5.0 min, and the limit is 4 min"
    )
    assert BenchmarkRecord("loads").entries() == {}


def test_a_load_that_does_not_fit_into_memory_is_left_out_with_a_line(capsys):
    huge = LoadsCase(("pico",), ("30000+2",), (100000,), ("Full, static",), 20, 8, 1)
    assert list(measured_loads(huge, fresh=False)) == []
    said = capsys.readouterr().out
    assert "batch 100000, budget 20: left out, needs" in said
    assert "are free" in said


# ---------------------------------------------------------------- records
def test_loads_are_printed_recorded_and_not_measured_again(capsys, monkeypatch):
    words = "loads --models pico --lengths 40+12 48+12 --batches 2 --budget 20 --hidden 8 --runs 1"
    arguments = [*words.split(), "--methods", "Full, static", "LESS"]
    measured = []
    measure = loads.measure_load

    def noted(case, load):
        if len(measured) == 1 and load.prompt == 48:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append(str(load))
        return measure(case, load)

    monkeypatch.setattr(loads, "measure_load", noted)
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    # the second is not there yet, the first is whole
    first, second = "pico 40+12, batch 2, budget 20", "pico 48+12, batch 2, budget 20"
    assert list(BenchmarkRecord("loads").entries()) == [first]
    command.main(arguments)
    assert measured == [first, "interrupted", second]
    capsys.readouterr()

    command.main(arguments)
    assert len(measured) == 3
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].startswith(f"{first}, kernels 8 wide; ")
    assert "threads, torch" in lines[0]
    assert [line.split()[0] for line in lines[2:4]] == ["Full,", "LESS"]
    entries = BenchmarkRecord("loads").entries()
    row = entries[first]["methods"]["LESS"]
    assert f"{row['full_over']:.2f}" in lines[3].split()
    assert f"{row['step_ms'] / row['floor_ms']:.2f}" in lines[3].split()
    assert str(BenchmarkRecord("loads").path) in lines[-1]
    manifest = entries[second]["manifest"]
    assert manifest["hardware"]["threads"] == torch.get_num_threads()
    assert manifest["versions"]["torch"] == torch.__version__
    assert {"commit", "date", "seconds"} <= set(manifest)

    command.main([*arguments, "--fresh"])
    assert measured[3:] == [first, second]


def test_only_the_same_measurement_on_the_same_machine_counts_as_recorded():
    record = BenchmarkRecord("loads")
    record.write("a", {"x": 1}, 2.0, {"methods": {}})
    record.write("b", {"x": 2}, 2.0, {"methods": {}})
    assert record.finished("a", {"x": 1}) == record.entries()["a"]
    assert record.finished("a", {"x": 2}) is None
    assert record.finished("c", {"x": 1}) is None
    record.manifest["hardware"] = record.manifest["hardware"] | {"cpu": "another"}
    assert record.finished("a", {"x": 1}) is None


def test_models_that_loads_offer_are_known():
    assert set(loads.MODELS) <= set(MODELS)
