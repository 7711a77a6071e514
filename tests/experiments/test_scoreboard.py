"""The scoreboard: every claim can hold and can fail, and is not measured where a record is missing."""

import numpy as np
import pytest
from tiny_models import parameter_count

from lesslib.experiments import claims, scoreboard
from lesslib.experiments.scoreboard import (
    by_length,
    claim_list,
    difference,
    groups,
    nats_apart,
    neighbours,
    recovered,
    skilled,
    status,
    verdicts,
)
from lesslib.profiles import results_dir
from lesslib.reporting import plots
from lesslib.states import Kernels
from lesslib.util.files import write_json

FRACTIONS = {"5%": 0.05, "10%": 0.1, "20%": 0.2}


def texts(*scores: float, **parameters) -> dict:
    return {
        "rouge1": float(np.mean(scores)),
        "scores": {"rouge1": list(scores)},
        "chance": {"rouge1": 10.0},
        "parameters": {"name": "m"} | parameters,
        "prompt_tokens": list(range(500, 500 + 100 * len(scores), 100)),
    }


def table(less: float, budget: str = "5%") -> dict:
    rows = {"Baseline": 30.0, "Baseline+": 32.0, f"LESS ({budget})": less}
    return {
        "points": {"t/Full": texts(41.0, 43.0), "t/withheld": texts(1.0, 1.0)}
        | {
            f"t/{budget}/{m}": texts(x - 1, x + 1, fraction=FRACTIONS[budget])
            for m, x in rows.items()
        }
    }


def test_groups_are_methods_of_one_cell_with_the_full_cache_among_them():
    found = groups(table(36.0))
    assert list(found) == ["t/5%"]
    assert set(found["t/5%"]) == {"Full", "withheld", "Baseline", "Baseline+", "LESS (5%)"}
    assert groups({"points": {"t/Full": {}, "t/Baseline+": {}, "t/LESS (5%)": {}}}) == {
        "t": {"Full": {}, "Baseline+": {}, "LESS (5%)": {}}
    }


def test_nats_apart_are_a_token_and_paired_by_document():
    more, less = (
        {"by_document": [[x, 4], [y, 6]], "tokens": 10} for x, y in ((10.0, 20.0), (8.0, 15.0))
    )
    assert nats_apart(more, less) == pytest.approx([0.7, 0.4, 1.0])
    assert nats_apart(less, more) == pytest.approx([-0.7, -1.0, -0.4])
    assert nats_apart(less, less) == [0, 0, 0]


@pytest.mark.parametrize(("less", "holds"), [(36.0, True), (31.0, False)])
def test_rouge_verdicts_hold_and_fail(less, holds):
    assert [v.holds for v in scoreboard.summarization(table(less), table(less))] == [holds] * 2
    assert [v.holds for v in scoreboard.summarization(table(less), least=0.39)] == [holds]
    for only in ("/20%", ["/20%"]):
        assert list(scoreboard.summarization(table(less), only=only)) == []
    assert [v.holds for v in scoreboard.summarization(table(less), rival="Baseline")] == [True]
    rows = groups(table(less))["t/5%"]
    assert recovered(rows, "LESS (5%)") == pytest.approx((less - 32) / 10)
    assert recovered(rows, "LESS (5%)", "Baseline") == pytest.approx((less - 30) / 12)
    assert recovered(rows | {"Full": texts(20.0)}, "LESS (5%)") is None
    both = {"points": table(less)["points"] | {"t/5%/LESS (2%)": texts(33.0, 35.0, fraction=0.05)}}
    assert [
        v.holds for v in scoreboard.summarization(both, method="LESS (2%)", only=("/5%", "/10%"))
    ] == [True]


def test_differences_say_when_they_are_noise():
    assert difference([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]) == "+2.00 [+2.00, +2.00]"
    assert difference([3.0, 0.0, 5.0], [1.0, 2.0, 3.0]).endswith("within noise")


def right(n: int, majority: float = 0.5) -> dict:
    return {
        "accuracy": n / 100,
        "options": 2,
        "right": [1] * n + [0] * (100 - n),
        "majority": majority,
    }


@pytest.mark.parametrize("good", [True, False])
def test_classification_verdicts_hold_and_fail(good):
    points = {f"t/{m}": right(70) for m in ("Full", "Baseline", "Baseline+")}
    points |= {"t/LESS (5%)": right(90 if good else 50), "t/withheld": right(55 if good else 65)}
    assert [v.holds for v in scoreboard.classification({"points": points})] == [good] * 2
    assert [v.holds for v in scoreboard.classification({"points": points}, withheld=False)] == [
        good
    ]


@pytest.mark.parametrize("good", [True, False])
def test_verdicts_of_attention_and_kernel_size_hold_and_fail(good):
    distances = {
        "0": {"LESS": [0.1, 0.2], "sparse": [0.3, 0.3]},
        "1": {"LESS": [0.2 if good else 0.5], "sparse": [0.4]},
    }
    assert [
        v.holds for v in scoreboard.attention_maps({"points": {"h2o": {"distances": distances}}})
    ] == [good]
    nats = {2: 3.2, 4: 3.1, 8: 3.05} if good else {2: 3.0, 4: 3.15, 8: 3.35}
    points = {
        f"5%/{R}/LESS (5%)": {"parameters": {"kernel_size": R}, "log_ppl": x}
        for R, x in nats.items()
    }
    points |= {
        f"5%/{R}/Baseline+": {"parameters": {"kernel_size": R}, "log_ppl": 3.3} for R in nats
    }
    expected = (
        [True] * 3 if good else [False, False, True]
    )  # what the third says of gains that grow more negative
    assert [v.holds for v in scoreboard.kernel_size({"points": points})] == expected
    fast = {f"5%/{R}/LESS (5%)": {"log_ppl": x} for R, x in {2: 3.2, 4: 3.1, 8: 2.9}.items()}
    assert [v.holds for v in scoreboard.kernel_size({"points": points | fast})] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(("growth", "holds"), [(5.0, True), (-5.0, False)])
def test_verdict_of_prompt_lengths_holds_and_fails(growth, holds):
    lead = growth * np.arange(8)
    rows = {"Full": 9 + 0 * lead, "LESS (5%)": lead, "Baseline": 2 * lead, "Baseline+": 0 * lead}
    points = {f"t/{n}/{m}": texts(*(20.0 + x)) for n in (300, 400) for m, x in rows.items()}
    plus, alone = scoreboard.prompt_length({"points": points})
    assert (plus.holds, alone.holds) == (holds, not holds)
    assert plus.numbers.startswith(f"{growth:+.2f} points per 100 tokens")
    assert "over Baseline grows" in alone.claim


def test_an_interval_over_prompts_keeps_the_lengths_of_a_story_together():
    leads = {
        300: [0.0, 30.0, 0.0, 30.0],
        400: [1.0, 31.0, 1.0, 31.0],
    }  # every story gains 1, whatever its own level
    points = {}
    for n, lead in leads.items():
        rows = {
            "Full": [40.0] * 4,
            "LESS (5%)": lead,
            "Baseline": [0.0] * 4,
            "Baseline+": [0.0] * 4,
        }
        points |= {f"t/{n}/{m}": texts(*x) | {"prompt_tokens": [n] * 4} for m, x in rows.items()}
    assert (
        next(scoreboard.prompt_length({"points": points})).numbers
        == "+1.00 points per 100 tokens [+1.00, +1.00]"
    )


def test_nothing_is_decided_where_the_full_cache_fails_at_the_task():
    assert [skilled(right(n)) for n in (30, 57, 63)] == [False, False, True]
    assert not skilled(right(63, majority=0.62))
    assert skilled(texts(11.0, 12.0))
    assert not skilled(
        texts(11.0, 12.0), texts(9.0, 30.0)
    )  # the second above 10 on average, and within noise of it
    rows = {
        "q/Full": right(57),
        "q/Baseline": right(30),
        "q/Baseline+": right(30),
        "q/LESS (5%)": right(90),
    }
    answers = {"points": table(36.0)["points"] | {"t/Full": texts(9.0, 30.0)}}
    lead = 9.0 * np.arange(8)
    scores = {
        "Full": [0.0, 28.0] * 4,
        "LESS (5%)": lead,
        "Baseline": 0 * lead,
        "Baseline+": 0 * lead,
    }
    lengths = {f"t/{n}/{m}": texts(*x) for n in (300, 400) for m, x in scores.items()}
    found = [*scoreboard.summarization(answers), *scoreboard.summarization(answers, least=0.4)]
    found += [
        *scoreboard.classification({"points": rows}),
        *scoreboard.prompt_length({"points": lengths}),
    ]
    assert [v.holds for v in found] == [None] * 5
    assert status(found) == "undecided"
    assert str(found[0]).startswith("undecided: ")
    assert "fails at the task" in found[0].numbers
    assert status([*found, *scoreboard.sizes("state")]) == "2 hold, 5 open"


def test_nothing_is_decided_within_noise():
    points = table(36.0)["points"] | {
        "t/5%/LESS (5%)": texts(20.0, 50.0, fraction=0.05)
    }  # 35 against 32 on average
    found = list(scoreboard.summarization({"points": points}))
    scores = {
        "Full": [40.0] * 6,
        "LESS (5%)": [1.0, 9.0, 2.0, 8.0, 0.0, 7.0],
        "Baseline": [0.0] * 6,
        "Baseline+": [0.0] * 6,
    }
    found += scoreboard.prompt_length(
        {"points": {f"t/300/{m}": texts(*x) for m, x in scores.items()}}
    )
    rows = {"q/Full": right(90), "q/Baseline+": right(60), "q/LESS (5%)": right(61)}
    found += scoreboard.classification({"points": rows})
    assert [v.holds for v in found] == [None] * 4
    assert all("fails" not in v.numbers for v in found)


@pytest.mark.parametrize("gains", [True, False])
def test_verdicts_on_random_features_and_on_the_order_of_methods(gains):
    point = lambda nats: {
        "by_document": [[10 * nats, 10], [11 * nats, 10]],
        "token_ppl": nats,
        "parameters": {"name": "m"},
    }  # noqa: E731
    rows = {
        "Baseline": 3.0,
        "Baseline+": 2.9,
        "Performer": 2.5 if gains else 3.1,
        "LESS (5%)": 2.0 if gains else 2.95,
    }
    points = {"c/Full": point(1.0)} | {f"c/5%/{m}": point(x) for m, x in rows.items()}
    assert [
        v.holds for v in scoreboard.ordered({"points": points}, {"points": points}, performer=True)
    ] == [not gains] * 2
    assert [v.holds for v in scoreboard.ordered({"points": points}, {"points": points})] == [
        gains
    ] * 2
    assert (
        next(scoreboard.ordered({"points": points})).claim == "m c/5%: LESS < Baseline+ < Baseline"
    )


def test_nearest_neighbour_regression():
    lengths, scores = by_length(
        {"points": {"t/1/Full": texts(4.0, 2.0, 6.0), "t/2/Full": texts(8.0)}}, "t", "Full"
    )
    assert lengths.tolist() == [500, 500, 600, 700]
    assert scores.tolist() == [4.0, 8.0, 2.0, 6.0]
    assert neighbours(lengths, scores, np.array([500, 700]), share=0.5).tolist() == [6.0, 4.0]
    assert neighbours(lengths, scores, np.array([700]), share=0.01).tolist() == [6.0]


def test_sizes_follow_from_shapes():
    shape = {"layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16}
    model = {"m": shape | {"parameters": 10**6}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scoreboard.PAPER, "models", model)
        (parameters,) = scoreboard.sizes("parameters", hidden=8, R=4)
        (state,) = scoreboard.sizes("state", hidden=8, R=8)
    assert parameters.numbers == f"{parameter_count(Kernels.new(shape, 4, 8)) / 10**6:.2%}"
    assert not state.holds  # 8 * 17 / 32 = 4.25 tokens
    seven, thirteen = scoreboard.sizes("parameters")
    assert (seven.holds, seven.numbers, thirteen.holds, thirteen.numbers) == (
        False,
        "2.12%",
        True,
        "1.71%",
    )
    assert [v.numbers.split(";")[0] for v in scoreboard.sizes("state")] == ["4.03 tokens"] * 2


def test_every_claim_is_decided_by_a_function_or_awaits_one_and_quotes_the_paper():
    for c in claim_list():
        assert set(c) - {"options"} == {"where", "claim", "paper", "needs", "decide"}
        assert "{" not in c["paper"]
        if c["decide"] is None:
            assert c["needs"][0] in ("latency", "throughput", "breakdown")
        else:
            assert callable(getattr(scoreboard, c["decide"], None) or getattr(claims, c["decide"]))


def test_a_claim_that_names_no_function_is_an_error():
    with pytest.raises(AttributeError, match="guess"):
        verdicts({"needs": [], "decide": "guess"}, "tiny")


def test_a_claim_without_its_record_is_not_measured():
    claim = next(c for c in claim_list() if c["decide"] == "summarization")
    assert verdicts(claim, "tiny") == []
    assert status(verdicts(claim, "tiny")) == "not measured"
    write_json(results_dir("tiny") / f"{claim['needs'][0]}.json", table(36.0))
    assert status(verdicts(claim, "tiny")) == "holds"
    write_json(results_dir("tiny") / f"{claim['needs'][0]}.json", table(31.0))
    assert status(verdicts(claim, "tiny")) == "FAILS"
    assert status([*verdicts(claim, "tiny"), *scoreboard.sizes("state")]) == "2 hold, 1 fail"


def test_pictures_of_tasks_are_drawn(monkeypatch):
    rows = {"yes_no": {"Full": [1.0, 0.0], "Baseline": [0.0, 1.0], "LESS (5%)": [1.0, 1.0]}}
    figure = plots.mean_bars(rows, "accuracy", "tasks", {"yes_no": 0.25})
    assert [
        segment[:, 1].tolist() for segment in figure.axes[0].collections[-1].get_segments()
    ] == [[0.25, 0.25]]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.5, 0.5, 1.0]
    figure = plots.curves(
        {"a": {"Full": ([1, 2], [3.0, 4.0]), "LESS (5%)": ([1, 2], [5.0, 6.0])}},
        "x",
        "y",
        log2=True,
    )
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[3.0, 4.0], [5.0, 6.0]]
    maps = {label: [[0.5, 0.0], [0.25, 0.25]] for label in ("original", "sparse", "LESS")}
    assert (
        len(plots.attention_maps({"points": {"h2o": {"maps": maps}}}).axes) == 4
    )  # and the scale of the colours
    assert plots.save(
        plots.scoreboard([("a claim", ["holds", "FAILS"])], ["tiny", "wild"]), "tiny", "scoreboard"
    )
    assert (results_dir("tiny") / "figures" / "scoreboard.png").stat().st_size > 5000
