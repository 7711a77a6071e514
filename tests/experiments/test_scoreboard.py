"""The scoreboard: every claim holds or fails by its record, and is not measured without one."""

import numpy as np
import pytest
from tiny_models import parameter_count

from lesslib.experiments import (
    attention_maps,
    classification,
    prompt_length,
    scoreboard,
    sizes,
    summarization,
)
from lesslib.experiments.claims import claims_of
from lesslib.experiments.prompt_length import by_length, neighbours
from lesslib.experiments.records import groups
from lesslib.experiments.scoreboard import claim_list, status, verdicts
from lesslib.experiments.statistics import difference, nats_apart, skilled
from lesslib.experiments.summarization import at_fractions, gives_back, recovered, scores_above
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
    cells = groups(table(36.0))
    assert list(cells) == ["t/5%"]
    assert set(cells["t/5%"]) == {"Full", "withheld", "Baseline", "Baseline+", "LESS (5%)"}
    assert groups({"points": {"t/Full": {}, "t/Baseline+": {}, "t/LESS (5%)": {}}}) == {
        "t": {"Full": {}, "Baseline+": {}, "LESS (5%)": {}}
    }


def test_nats_apart_are_a_token_and_paired_by_document():
    more = {"by_document": [[10.0, 4], [20.0, 6]], "tokens": 10}
    less = {"by_document": [[8.0, 4], [15.0, 6]], "tokens": 10}
    assert nats_apart(more, less) == pytest.approx([0.7, 0.4, 1.0])
    assert nats_apart(less, more) == pytest.approx([-0.7, -1.0, -0.4])
    assert nats_apart(less, less) == [0, 0, 0]


@pytest.mark.parametrize(("less", "holds"), [(36.0, True), (31.0, False)])
def test_rouge_verdicts_hold_and_fail(less, holds):
    record = table(less)
    (plus,) = scores_above(groups(record))
    assert plus.holds is holds
    rows = groups(record)["t/5%"]
    assert gives_back("t/5%", rows, "LESS (5%)", least=0.39).holds is holds
    assert at_fractions(record, 0.2) == {}
    (alone,) = scores_above(groups(record), rival="Baseline")
    assert alone.holds is True
    assert recovered(rows, "LESS (5%)") == pytest.approx((less - 32) / 10)
    assert recovered(rows, "LESS (5%)", "Baseline") == pytest.approx((less - 30) / 12)
    assert recovered(rows | {"Full": texts(20.0)}, "LESS (5%)") is None


def test_rouge_verdicts_are_on_every_row_of_less_and_every_model():
    other_kernels = {"t/5%/LESS (2%)": texts(33.0, 35.0, fraction=0.05)}
    both = {"points": table(31.0)["points"] | other_kernels}
    assert [v.holds for v in scores_above(at_fractions(both, 0.05, 0.1))] == [False, True]
    records = {"llama": table(36.0), "wide": table(31.0), "falcon": table(36.0)}
    assert [v.holds for v in summarization.verdicts(records)] == [True, False, True]
    assert [v.holds for v in summarization.rerun_verdicts(table(36.0))] == [True]


@pytest.mark.parametrize(("less", "holds"), [(38.0, True), (31.0, False)])
def test_falcons_share_is_of_one_task_budget_and_set_of_kernels(less, holds):
    rows = {"Baseline": 30.0, "Baseline+": 32.0, "LESS (5%)": 40.0, "LESS (10%)": less}
    points = {}
    for task in ("summary", "sentence"):
        points[f"{task}/Full"] = texts(41.0, 43.0)
        for budget in ("10%", "20%"):
            for label, score in rows.items():
                entry = texts(score - 1, score + 1, fraction=FRACTIONS[budget])
                points[f"{task}/{budget}/{label}"] = entry
    (verdict,) = summarization.falcon_gives_back({"points": points})
    assert verdict.holds is holds
    claim = "m, summary/20%: LESS (10%) gives back at least 41.4% of what Baseline+ loses"
    assert verdict.claim == claim


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
    record = {"points": points}
    assert [v.holds for v in classification.verdicts(record)] == [good] * 2
    assert [v.holds for v in classification.right_more_often(record)] == [good]


@pytest.mark.parametrize("good", [True, False])
def test_verdicts_of_attention_hold_and_fail(good):
    distances = {
        "0": {"LESS": [0.1, 0.2], "sparse": [0.3, 0.3]},
        "1": {"LESS": [0.2 if good else 0.5], "sparse": [0.4]},
    }
    record = {"points": {"h2o": {"distances": distances}}}
    assert [v.holds for v in attention_maps.verdicts(record)] == [good]


@pytest.mark.parametrize(("growth", "holds"), [(5.0, True), (-5.0, False)])
def test_verdict_of_prompt_lengths_holds_and_fails(growth, holds):
    lead = growth * np.arange(8)
    rows = {"Full": 9 + 0 * lead, "LESS (5%)": lead, "Baseline": 2 * lead, "Baseline+": 0 * lead}
    points = {f"t/{n}/{m}": texts(*(20.0 + x)) for n in (300, 400) for m, x in rows.items()}
    plus, alone = prompt_length.verdicts({"points": points})
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
        next(prompt_length.verdicts({"points": points})).numbers
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
    cells = groups(answers)
    undecided = [
        *scores_above(cells),
        gives_back("t/5%", cells["t/5%"], "LESS (5%)", least=0.4),
        *classification.verdicts({"points": rows}),
        *prompt_length.verdicts({"points": lengths}),
    ]
    assert [v.holds for v in undecided] == [None] * 5
    assert status(undecided) == "undecided"
    assert str(undecided[0]).startswith("undecided: ")
    assert "fails at the task" in undecided[0].numbers
    assert status([*undecided, *sizes.state()]) == "2 hold, 5 open"


def test_nothing_is_decided_within_noise():
    points = table(36.0)["points"] | {
        "t/5%/LESS (5%)": texts(20.0, 50.0, fraction=0.05)
    }  # 35 against 32 on average
    undecided = list(scores_above(groups({"points": points})))
    scores = {
        "Full": [40.0] * 6,
        "LESS (5%)": [1.0, 9.0, 2.0, 8.0, 0.0, 7.0],
        "Baseline": [0.0] * 6,
        "Baseline+": [0.0] * 6,
    }
    undecided += prompt_length.verdicts(
        {"points": {f"t/300/{m}": texts(*x) for m, x in scores.items()}}
    )
    rows = {"q/Full": right(90), "q/Baseline+": right(60), "q/LESS (5%)": right(61)}
    undecided += classification.verdicts({"points": rows})
    assert [v.holds for v in undecided] == [None] * 4
    assert all("fails" not in v.numbers for v in undecided)


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
        patch.setitem(sizes.PAPER, "models", model)
        (parameters,) = sizes.parameters(hidden=8, R=4)
        (state,) = sizes.state(hidden=8, R=8)
    assert parameters.numbers == f"{parameter_count(Kernels.new(shape, 4, 8)) / 10**6:.2%}"
    # 8 * 17 / 32 = 4.25 tokens
    assert not state.holds
    seven, thirteen = sizes.parameters()
    assert (seven.holds, seven.numbers) == (False, "2.12%")
    assert (thirteen.holds, thirteen.numbers) == (True, "1.71%")
    assert [v.numbers.split(";")[0] for v in sizes.state()] == ["4.03 tokens"] * 2


def test_every_claim_is_decided_by_a_function_and_quotes_the_paper():
    claims = claim_list()
    assert len(claims) == 21
    for claim in claims:
        assert callable(claim.decide)
        assert claim.where
        assert claim.text
        assert claim.paper
        assert "{" not in claim.paper
    of_rouge = next(c for c in claims if c.where == "Table 5")
    assert of_rouge.paper == "CNN/DailyMail at 5%: 18.24 to 19.21"


def test_a_file_that_makes_no_claim_is_an_error():
    with pytest.raises(KeyError, match="guess"):
        claims_of("guess")


def test_a_claim_without_its_record_is_not_measured():
    claim = next(c for c in claim_list() if c.where == "Table 5")
    assert verdicts(claim, "tiny") == []
    assert status(verdicts(claim, "tiny")) == "not measured"
    path = results_dir("tiny") / f"{claim.needs[0]}.json"
    write_json(path, table(36.0))
    assert status(verdicts(claim, "tiny")) == "holds"
    write_json(path, table(31.0))
    assert status(verdicts(claim, "tiny")) == "FAILS"
    assert status([*verdicts(claim, "tiny"), *sizes.state()]) == "2 hold, 1 fail"


def test_lines_of_the_scoreboard_are_by_claim_and_profile():
    write_json(results_dir("tiny") / "summarization_llama.json", table(31.0))
    lines = scoreboard.read(["tiny", "wild"])
    line = next(line for line in lines if line.claim.where == "Table 5")
    assert line.statuses() == ["FAILS", "not measured"]
    rows = scoreboard.failing_table(lines).data.splitlines()
    of_tiny = [row for row in rows if row.startswith("| tiny | Table 5 | m, t/5%: LESS (5%)")]
    assert len(of_tiny) == 1
    assert len(scoreboard.table(lines).data.splitlines()) == 2 + len(claim_list())
    assert "FAILS: m, t/5%" in scoreboard.numbers_table(lines, "tiny").data


def test_pictures_of_tasks_are_drawn():
    rows = {"yes_no": {"Full": [1.0, 0.0], "Baseline": [0.0, 1.0], "LESS (5%)": [1.0, 1.0]}}
    figure = plots.mean_bars(rows, "accuracy", "tasks", {"yes_no": 0.25})
    segments = figure.axes[0].collections[-1].get_segments()
    assert [segment[:, 1].tolist() for segment in segments] == [[0.25, 0.25]]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.5, 0.5, 1.0]
    lines = {"Full": ([1, 2], [3.0, 4.0]), "LESS (5%)": ([1, 2], [5.0, 6.0])}
    figure = plots.curves({"a": lines}, "x", "y", log2=True)
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[3.0, 4.0], [5.0, 6.0]]
    maps = {label: [[0.5, 0.0], [0.25, 0.25]] for label in ("original", "sparse", "LESS")}
    figure = attention_maps.maps_figure({"points": {"h2o": {"maps": maps}}})
    # three maps, and the scale of the colours
    assert len(figure.axes) == 4
    figure = scoreboard.board([("a claim", ["holds", "FAILS"])], ["tiny", "wild"])
    plots.save(figure, "tiny", "scoreboard")
    assert (results_dir("tiny") / "figures" / "scoreboard.png").stat().st_size > 5000
