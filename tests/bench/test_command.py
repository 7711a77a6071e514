"""`python -m lesslib.bench`: its tables, whole sequences, and the fresh processes that measure."""

import os
import subprocess
import sys

import pytest

from lesslib.bench import command, training
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


@pytest.mark.parametrize(("epochs", "expected"), [([3.0, 1.0, 2.0], 1.0), ([5.0], 5.0)])
def test_the_fastest_epoch_counts_and_a_long_one_is_not_repeated(epochs, expected):
    left = iter(epochs)
    assert training.fastest(lambda: next(left)) == expected
    assert list(left) == []
