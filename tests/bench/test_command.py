"""`python -m lesslib.bench`: its tables, whole sequences, and the fresh processes that measure."""

import os
import subprocess
import sys

import pytest

from lesslib.bench import command
from lesslib.bench.endurance import Endurance, Reading, failures
from lesslib.bench.scoring import ScoringCase, scoring
from lesslib.bench.timing import PRELOADED, fresh_process


@pytest.mark.parametrize("method", ["Full", "Baseline", "LESS"])
def test_whole_sequences_are_timed(method):
    seconds, peak = scoring(ScoringCase("pico", 128, 2, method, hidden=16, runs=2))
    assert seconds > 0
    assert peak is None or peak >= 0


def test_fresh_processes_start_with_the_environment_of_now(monkeypatch):
    for value in ("first", "second"):
        monkeypatch.setenv("LESS_OF_THIS_TEST", value)
        with fresh_process() as pool:
            assert pool.submit(os.getenv, "LESS_OF_THIS_TEST").result() == value
            assert pool.submit(os.getpid).result() != os.getpid()


def test_what_fresh_processes_fork_from_has_loaded_what_takes_long_and_asked_for_no_gpu():
    script = (
        f"import sys, {PRELOADED}; "
        "print(*(name in sys.modules for name in ('torch', 'transformers', 'lesslib.bench')))"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["True", "True", "False"]


def test_each_benchmark_prints_its_table(capsys):
    train = "train --lengths 128 --sequences 2 --schemes ours --hidden 8"
    score = "score --models pico --lengths 64 --runs 1 --hidden 8"
    decode = (
        "decode --models pico --batches 1 --contexts 40 --budget 20 --steps 4 --hidden 8"
        " --generate 4 --compiled"
    )
    lines = {}
    for words in (train, score, decode):
        command.main(words.split())
        lines[words] = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[train][1][:2] == ["128", "ours"]
    assert lines[train][1][-1] == "1.0"
    assert [row[:3] for row in lines[score][1:]] == [
        ["pico", "64", "Full"],
        ["pico", "64", "Baseline"],
        ["pico", "64", "LESS"],
    ]
    assert [row[0] for row in lines[decode][-5:-1]] == ["Full", "Baseline", "Baseline+", "LESS"]
    assert lines[decode][-1][:3] == ["LESS", "/", "Baseline+"]


def test_compiled_steps_are_timed_after_eager_ones_at_one_context_and_without_full():
    words = "decode --models pico --hidden 8 --batches 1 --compiled pico"
    cases = command.decode_cases(command.parse(words.split()))
    assert [(case.compiled, case.kernel_dtype, case.contexts) for case in cases] == [
        (False, "float32", (1024, 4096, 16384)),
        (True, "float32", (1024,)),
        (True, "bfloat16", (1024,)),
    ]
    assert cases[1].methods == ("Baseline", "Baseline+", "LESS")


def test_endurance_reads_memory_once_it_has_settled_and_at_the_end(capsys):
    command.main(["endurance", "--tokens", "60", "--budget", "12", "--hidden", "8"])
    lines = capsys.readouterr().out.splitlines()
    counts = [line.split()[0] for line in lines[2:-1]]
    assert counts == ["30", "36", "42", "48", "54", "60"]
    assert lines[-1].startswith("held: memory flat, all finite")
    million = Endurance("pico", 1_000_000, 52, 128)
    assert sorted(million.marks())[:3] == [10_000, 100_000, 200_000]
    assert max(million.marks()) == 1_000_000


def test_endurance_fails_where_memory_grows_or_a_number_is_not_finite(monkeypatch):
    settled = Reading(10, 1.0, 100.0, are_logits_finite=True, score=3.0, z=2.0)
    held = settled._replace(tokens=20, resident_mib=100.9)
    assert failures([settled, held]) == []
    grown = held._replace(resident_mib=101.5)
    assert failures([settled, grown]) == ["resident memory grew by 1.5% between 10 and 20 tokens"]
    broken = held._replace(are_logits_finite=False, score=float("nan"), z=float("inf"))
    assert failures([settled, broken]) == [
        "a logit was not finite",
        "score is not finite",
        "z is not finite",
    ]
    monkeypatch.setattr(Endurance, "readings", lambda self: [settled, grown])
    with pytest.raises(SystemExit, match=r"failed: resident memory grew by 1\.5%"):
        command.main(["endurance"])
