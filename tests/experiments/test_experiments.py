"""Experiments, claims and plots: the oracle of Figure 3 is exact, every verdict can hold and can fail, pictures come from JSON alone."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from lesslib.attention.whole_sequence import dense_attention
from lesslib.data import load_corpus
from lesslib.experiments import claims
from lesslib.experiments import language as experiments
from lesslib.models import kernel_path, load_kernels
from lesslib.profiles import get_profile, get_tasks, results_dir, roles
from lesslib.reporting import plots
from lesslib.reporting.paper import PAPER, table2, table7
from lesslib.util.paths import ASSETS, ROOT


def test_topk_with_every_key_is_dense_attention_and_with_one_is_the_heaviest_value():
    torch.manual_seed(0)
    q = torch.randn(1, 4, 23, 8, dtype=torch.float64)
    k, v = (torch.randn(1, 2, 23, 8, dtype=torch.float64) for _ in range(2))
    full, every = experiments.topk_outputs(q, k, v, 8**-0.5, 23)
    assert torch.allclose(full, dense_attention(q, k, v))
    assert torch.allclose(every, full)
    _, one = experiments.topk_outputs(q, k, v, 8**-0.5, 1)
    heaviest = (q[0, 3, 10] @ k[0, 1, :11].T).argmax()
    assert torch.allclose(one[0, 3, 10], v[0, 1, heaviest])


def test_best_of_rank_leaves_exactly_the_smaller_singular_values():
    x = torch.randn(3, 20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(x)
    for rank in range(1, 7):
        left = (x - experiments.best_of_rank(x, rank)).square().sum((1, 2))
        assert torch.allclose(left, values[:, rank:].square().sum(1), atol=1e-10)


def row(nll: float, *more: float) -> dict:
    by_document = [[100 * (nll + d), 100] for d in (0.0, 0.1, *more)]
    log_ppl = sum(n for n, _ in by_document) / (100 * len(by_document))
    return {
        "token_ppl": math.exp(log_ppl),
        "by_document": by_document,
        "by_position": [log_ppl] * 4,
    }


@pytest.mark.parametrize(
    ("ours", "performer", "expected"), [(1.2, 1.95, [True] * 4), (1.9, 1.2, [False] * 4)]
)
def test_verdicts_of_a_table_hold_and_fail(ours, performer, expected):
    rows = {
        "Baseline": row(2.0),
        "Baseline+": row(1.8),
        "Performer": row(performer),
        "LESS (5%)": row(ours),
    }
    found = claims.perplexity_table(row(1.0), rows, "LESS (5%)", "here")
    assert [v.holds for v in found] == expected
    assert str(found[0]).startswith("holds" if expected[0] else "FAILS")


@pytest.mark.parametrize("worse", [0.3, -0.3])
def test_kernels_trained_at_another_budget_are_compared_with_those_trained_at_it(worse):
    points = {"c/Full": row(1.0)}
    for f in ("2%", "10%"):
        methods = {"Baseline": 2.0, "Baseline+": 1.9, "LESS (2%)": 1.3, "LESS (10%)": 1.3 + worse}
        points |= {f"c/{f}/{m}": row(x) for m, x in methods.items()}
    found = claims.language_modeling({"points": points}, ["c"], [0.1, 0.02])
    assert len(found) == 5
    assert found[-1].holds == (worse > 0)
    shares = claims.shares({"points": points})
    assert shares["c/2%", "LESS (2%)"][0] == "70.0%"
    assert ("c/2%", "Baseline") not in shares


@pytest.mark.parametrize("low", [True, False])
def test_verdicts_of_figure_3_hold_and_fail(low):
    decay = [0.5**i for i in range(8)] if low else [1.0] * 8
    layers = {"0": {"full": [0.9**i for i in range(8)], "residual": decay}}
    points: dict = {
        "singular values": {"parameters": {"what": "singular values"}, "layers": layers}
    }
    points["full"] = {"parameters": {"what": "perplexity", "fraction": 1.0}, "token_ppl": 10.0}
    for rank, ppl in ((0, 20.0), (4, 11.0 if low else 19.0)):
        points[f"rank {rank}"] = {
            "parameters": {"what": "perplexity", "fraction": 0.05, "rank": rank},
            "token_ppl": ppl,
        }
    found = claims.low_rank_residuals({"points": points})
    assert [v.holds for v in found] == [low] * 3


@pytest.mark.parametrize(("here", "holds"), [(0.21, True), (0.3, False)])
def test_a_layer_trained_here_is_compared_with_the_carried_one(here, holds):
    best = {"h2o 5%": 0.2, "h2o 5%, here": here}
    points = {
        name: {"layers": {"0": {"best": error, "baseline_plus": 0.9}}}
        for name, error in best.items()
    }
    assert [v.holds for v in claims.training_kernels({"points": points})] == [True, True, holds]


def test_carried_kernels_do_until_some_are_trained_here(monkeypatch):
    assert experiments.kernels_dir("tiny", 8) == ASSETS / "kernels"
    assert experiments.kernels_dir("tiny", 16) == ASSETS / "kernels" / "R16"
    assert experiments.kernels_dir("wild", 8) == results_dir("wild") / "kernels"
    found = experiments.fit("tiny", 0)
    assert found["carried"]
    assert found["layers"] == load_kernels("pico-llama", "h2o", 0.05).header["curves"]
    assert all(
        c["best"] == min(c["validation"]) < c["baseline_plus"] for c in found["layers"].values()
    )
    for profile in ("tiny", "smoke"):
        (results_dir(profile) / "kernels").mkdir(parents=True)
    assert (
        experiments.kernels_dir("smoke", 8) == ASSETS / "kernels"
    )  # which only has the first seed's
    assert experiments.fit("smoke", 1) == found
    assert experiments.setting("smoke", 1, "LESS (5%)", fraction=0.05)[1].header["seed"] == 0
    assert experiments.kernels_dir("tiny", 8) == results_dir("tiny") / "kernels"
    monkeypatch.setattr(
        experiments, "train_for_profile", lambda p, *rest: (p.model, p.kernel_size, *rest)
    )
    path = results_dir("tiny") / "kernels" / "R16" / "pico-falcon" / "lambda-0.1-seed3.safetensors"
    assert experiments.fit("tiny", 3, "lambda", 0.1, "pico-falcon", 16) == {
        "layers": ("pico-falcon", 16, "lambda", 0.1, path, 3)
    }


def test_kernels_are_trained_when_a_method_needs_them(monkeypatch):
    for profile in ("tiny", "wild"):  # the recipe of the carried kernels is tiny's
        made = load_kernels("pico-llama", "h2o", 0.05)
        made.header["data"] = [
            load_corpus("topics-train").record()
        ]  # which differs between versions of Python
        made.save(kernel_path("pico-llama", "h2o", 0.05, results_dir(profile) / "kernels"))
    trained = []
    monkeypatch.setattr(experiments, "fit", lambda *a: trained.append(a))
    with pytest.raises(FileNotFoundError, match=r"no kernels h2o-0\.02"):  # the stand-in made none
        experiments.setting("tiny", 3, "LESS (2%)", fraction=0.05, kernel_size=4)
    assert trained == [("tiny", 3, "h2o", 0.02, None, 4)]
    assert experiments.setting("tiny", 0, "LESS (5%)", fraction=0.05, carried=True)[1] is not None
    experiments.setting("smoke", 0, "LESS (5%)", fraction=0.05)
    experiments.setting("tiny", 0, "Baseline+", fraction=0.05)
    experiments.setting(
        "tiny", 0, "LESS (5%)", fraction=0.05
    )  # those that lie there are of this recipe
    assert len(trained) == 1
    experiments.setting("wild", 0, "LESS (5%)", fraction=0.05)  # and here they are not
    assert trained[1:] == [("wild", 0, "h2o", 0.05, None, 8)]
    made.header["recipe"] |= {"lr": 0.5}
    made.save(kernel_path("pico-llama", "h2o", 0.05, results_dir("tiny") / "kernels"))
    experiments.setting(
        "tiny", 0, "LESS (5%)", fraction=0.05
    )  # of as many windows of these texts, and of another recipe
    assert trained[2:] == [("tiny", 0, "h2o", 0.05, None, 8)]
    made.header["recipe"] = load_kernels("pico-llama", "h2o", 0.05).header["recipe"]
    made.save(kernel_path("pico-llama", "h2o", 0.05, results_dir("tiny") / "kernels"))
    monkeypatch.setattr(experiments, "sha256_of", lambda corpus: f"of another {corpus}")
    experiments.setting("tiny", 0, "LESS (5%)", fraction=0.05)  # of this recipe, and of other texts
    assert trained[3:] == [("tiny", 0, "h2o", 0.05, None, 8)]
    del made.header["data"], made.header["sequences"]
    made.save(kernel_path("pico-llama", "h2o", 0.05, results_dir("tiny") / "kernels"))
    experiments.setting(
        "tiny", 0, "LESS (5%)", fraction=0.05
    )  # that do not say of what texts they are
    assert len(trained) == 5


def test_models_of_stories_train_their_kernels_on_stories():
    tiny, wild, paper = (get_profile(name) for name in ("tiny", "wild", "paper"))
    assert tiny.of("pico-falcon").training == tiny.training == ("topics-train",)
    for model in roles("tiny", tasks=True).values():
        assert tiny.of(model).training == ("stories-kernels",)
        assert wild.of(model).training == ("c4",)
    assert tiny.of("pico-llama-wide").model == "pico-llama-wide"
    assert roles("paper", tasks=True) == roles("paper")
    assert paper.of(roles("paper")["wide"]).training == ("c4",)


@pytest.mark.parametrize("good", [True, False])
def test_verdicts_of_training_hold_and_fail(good):
    layers = {"0": {"best": 0.2 if good else 1.2, "baseline_plus": 0.9}}
    assert [
        v.holds for v in claims.training_kernels({"points": {"h2o 5%": {"layers": layers}}})
    ] == [good] * 2
    seconds = {
        512: (1, 10),
        1024: (2, 60 if good else 40),
        2048: (4, 400 if good else 30),
        4096: (8, None),
    }
    points = {}
    for n, (ours, stepwise) in seconds.items():
        peak = n if good else n * n
        points[f"ours {n}"] = {
            "parameters": {"scheme": "ours", "length": n},
            "seconds_epoch": ours,
            "peak_mib": peak,
        }
        if stepwise:
            points[f"stepwise {n}"] = {
                "parameters": {"scheme": "stepwise", "length": n},
                "seconds_epoch": stepwise,
                "peak_mib": peak,
            }
    assert [v.holds for v in claims.training_speed({"points": points})] == [good] * 3


def test_the_papers_cells_are_found_by_our_names():
    assert table2("WikiText", 0.02, "LESS (2%)") == PAPER["table2"]["WikiText"]["LESS (2%)"][0]
    assert table2("PG-19", 0.1, "Performer") == PAPER["table2"]["PG-19"]["H2O+Performer"][2]
    assert table7("WikiText", "tova", "Baseline") == PAPER["table7"]["WikiText"]["Baseline"][2]
    with pytest.raises(KeyError):
        table2("WikiText", 0.02, "SnapKV")


@pytest.mark.parametrize("profile", ["tiny", "wild"])
def test_every_recorded_result_draws_and_is_complete(profile, monkeypatch, tmp_path):
    """`--from-results`: no compute, and the recorded points are those that the experiments ask for."""
    recorded = ROOT / "results" / profile
    if profile == "wild" and not (recorded / "sparse_policies.json").is_file():
        pytest.skip("this copy carries no wild results")
    monkeypatch.setenv("LESS_RESULTS", str(tmp_path))
    monkeypatch.setenv("LESS_FROM_RESULTS", "1")
    (tmp_path / profile).mkdir()
    for path in recorded.glob("*.json"):
        os.symlink(path, tmp_path / profile / path.name)
    monkeypatch.setattr(experiments, "load_model", lambda *a: pytest.fail("a model was loaded"))
    record = experiments.language_modeling(profile)
    corpora = list(experiments.get_profile(profile).evaluation)
    groups = {c: (record["points"][f"{c}/Full"], plots.cells(record, f"{c}/5%")) for c in corpora}
    figure = plots.save(plots.gaps(groups, "gaps"), profile, "gaps")
    assert len(figure.axes[0].get_xticklabels()) == len(corpora)
    assert (tmp_path / profile / "figures" / "gaps.png").stat().st_size > 10_000
    plots.save(plots.training_curves(experiments.training_kernels(profile)), profile, "curves")
    plots.save(
        plots.low_rank_residuals(experiments.low_rank_residuals(profile)), profile, "residuals"
    )
    rows = plots.cells(experiments.tour(profile), f"{corpora[0]}/5%")
    assert list(rows) == ["Full", "Baseline", "Baseline+", "LESS (5%)"]
    assert json.loads((recorded / "tour.json").read_text())["manifest"]["profile"] == profile
    assert set(experiments.sparse_policies(profile)["points"]) == {
        f"{c}/{p}/{m}"
        for c in corpora
        for p in ("lambda", "tova")
        for m in ("Baseline", "Baseline+", "LESS (5%)")
    }


def test_tables_and_orders_for_readers():
    text = plots.table(["a", "b"], [["x", 1.23456], [None, 2]]).data
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| x | 1.235 |", "| – | 2 |"]  # noqa: RUF001
    points = {
        f"c/2%/{m}": {} for m in ("LESS (10%)", "Performer", "LESS (2%)", "Baseline+", "Baseline")
    }
    assert list(plots.cells({"points": points}, "c/2%")) == [
        "Baseline",
        "Baseline+",
        "Performer",
        "LESS (2%)",
        "LESS (10%)",
    ]


def test_loss_by_kind_of_token_adds_up():
    kinds = {
        "Full": {"new": [30.0, 10], "near": [20.0, 20], "far": [40.0, 10]},
        "5%/Baseline": {"new": [31.0, 10], "near": [28.0, 20], "far": [51.0, 10]},
        "5%/LESS (5%)": {"new": [29.5, 10], "near": [30.0, 20], "far": [45.5, 10]},
    }
    rows = claims.by_recurrence({f"c/{m}": {"by_recurrence": k} for m, k in kinds.items()}, "5%")
    assert rows == [
        ["c", "new", "25%", "0.100", "5%", "150%"],
        ["c", "near", "50%", "0.400", "40%", "-25%"],
        ["c", "far", "25%", "1.100", "55%", "50%"],
    ]


@pytest.mark.parametrize("good", [True, False])
def test_verdicts_of_generation_hold_and_fail(good):
    grows = 1 if good else 200
    held = {"Full": 100, "Baseline": grows, "Baseline+": grows, "LESS (5%)": grows}
    points: dict = {
        f"bytes/{m}": {"bytes": [[t, b * t if m == "Full" or not good else 900] for t in (32, 64)]}
        for m, b in held.items()
    }
    if not good:
        points["bytes/Baseline+"] = {"bytes": [[32, 10], [64, 10]]}
    nats = {"Full/dense": 1.0, "Baseline/dense": 2.0, "Baseline/streaming": 2.2}
    nats |= (
        {"LESS (5%)/dense": 1.4, "LESS (5%)/streaming": 1.5}
        if good
        else {"LESS (5%)/dense": 1.6, "LESS (5%)/streaming": 1.9}
    )
    points |= {f"prefill/{name}": {"nats": n} for name, n in nats.items()}
    assert [v.holds for v in claims.generation({"points": points})] == [good] * 5


@pytest.mark.parametrize(("ours", "holds"), [(1.2, True), (1.9, False)])
def test_verdicts_of_the_multi_query_model_hold_and_fail(ours, holds):
    methods = {"Baseline": 2.0, "Baseline+": 1.8, "LESS (5%)": ours}
    points = {"c/Full": row(1.0)} | {f"c/5%/{m}": row(x) for m, x in methods.items()}
    assert [
        v.holds for v in claims.language_modeling({"points": points}, ["c"], [0.05], "Falcon, ")
    ] == [holds] * 2


def test_a_limit_cuts_a_profile_and_keeps_its_results_apart(monkeypatch):
    whole, tasks = get_profile("paper"), get_tasks("paper")
    monkeypatch.setenv("LESS_LIMIT", "3")
    p, t = get_profile("paper"), get_tasks("paper")
    assert (p.max_windows, p.windows_per_document, p.sequences, p.epochs, p.gpu_gib) == (
        3,
        3,
        3,
        3,
        0,
    )
    assert 0 < p.validation < p.sequences
    assert (p.hidden, p.lr, p.fractions, p.model) == (
        whole.hidden,
        whole.lr,
        whole.fractions,
        whole.model,
    )
    assert (t.choices, t.texts, t.classification, t.summaries) == (
        3,
        3,
        tasks.classification,
        tasks.summaries,
    )
    assert results_dir("paper").name == "paper-limit3"
    monkeypatch.setenv("LESS_LIMIT", "")
    assert get_profile("paper") == whole
    assert results_dir("paper").name == "paper"
    for wrong in ("1", "-2", "few"):
        monkeypatch.setenv("LESS_LIMIT", wrong)
        with pytest.raises(ValueError, match=f"limit is '{wrong}'"):
            get_profile("tiny")
