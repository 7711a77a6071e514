"""What all notebooks show: provenance, verdicts, and one colour a method."""

import pytest

from lesslib.experiments.claims import Verdict
from lesslib.profiles import results_dir
from lesslib.reporting import plots
from lesslib.reporting.provenance import provenance
from lesslib.reporting.style import BLUES, colour
from lesslib.util.files import write_json


def test_provenance_is_a_line_a_result_and_a_line_a_source(capsys):
    source = {"name": "yes_no", "origin": "made", "sha256": "0123456789abcdef"}
    manifest = {
        "commit": "f" * 40,
        "date": "2026-11-26T10:00:00+00:00",
        "seconds": 239.6,
        "hardware": {"cpu": "a CPU", "gpu": None},
        "data": [source, {"name": "model m", "sha256": "fedcba9876543210"}],
    }
    write_json(results_dir("tiny") / "one.json", {"manifest": manifest, "points": {}})
    provenance("tiny", "one")
    assert capsys.readouterr().out.splitlines() == [
        "one | commit ffffffffffff | 2026-11-26 | 240 s | a CPU | no GPU",
        "    yes_no made 0123456789ab",
        "    model m  fedcba987654",
    ]


def test_provenance_of_what_is_not_recorded_names_the_file():
    with pytest.raises(FileNotFoundError, match=r"tiny/two\.json is not there: run the cells"):
        provenance("tiny", "two")


def test_verdicts_are_shown_in_one_word_each():
    verdicts = [Verdict("a", True, "1"), Verdict("b", False, "2"), Verdict("c", None, "3")]
    rows = plots.verdict_table(verdicts).data.splitlines()
    assert rows[0] == "| claim | holds here | numbers |"
    assert rows[2:] == ["| a | holds | 1 |", "| b | FAILS | 2 |", "| c | undecided | 3 |"]


def test_rows_of_less_get_blues_in_their_order():
    methods = ["Full", "Baseline", "LESS (2%)", "LESS (5%)"]
    assert [colour(m, methods) for m in methods[2:]] == list(BLUES[:2])
    assert colour("Baseline", methods) == colour("Baseline", ["Baseline"])
