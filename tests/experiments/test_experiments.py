"""Experiments, claims and pictures: the oracle of Figure 3 is exact, every verdict can hold and can
fail, pictures come from JSON alone, and recorded points are up to date.
"""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from lesslib.attention.whole_sequence import dense_attention
from lesslib.data import load_corpus
from lesslib.experiments import (
    Method,
    attention_maps,
    breakdown,
    classification,
    generation,
    kernel_size,
    language_modeling,
    latency,
    loaded,
    low_rank_residuals,
    multi_query,
    prompt_length,
    recipes,
    seeds,
    setting,
    sparse_policies,
    summarization,
    tour,
    training_kernels,
    training_speed,
)
from lesslib.experiments.claims import claims_of
from lesslib.experiments.records import rows
from lesslib.experiments.scoring import cell_verdicts, shares
from lesslib.models import kernel_path, load_kernels
from lesslib.profiles import get_profile, get_tasks, results_dir, roles
from lesslib.reporting import plots
from lesslib.reporting.paper import PAPER, table2, table7
from lesslib.reporting.results import cache_key
from lesslib.util.paths import ASSETS, ROOT


def test_topk_with_every_key_is_dense_attention_and_with_one_is_the_heaviest_value():
    torch.manual_seed(0)
    q = torch.randn(1, 4, 23, 8, dtype=torch.float64)
    k, v = (torch.randn(1, 2, 23, 8, dtype=torch.float64) for _ in range(2))
    full, every = low_rank_residuals.topk_outputs(q, k, v, 8**-0.5, 23)
    assert torch.allclose(full, dense_attention(q, k, v))
    assert torch.allclose(every, full)
    _, one = low_rank_residuals.topk_outputs(q, k, v, 8**-0.5, 1)
    heaviest = (q[0, 3, 10] @ k[0, 1, :11].T).argmax()
    assert torch.allclose(one[0, 3, 10], v[0, 1, heaviest])


def test_best_of_rank_leaves_exactly_the_smaller_singular_values():
    x = torch.randn(3, 20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(x)
    for rank in range(1, 7):
        left = (x - low_rank_residuals.best_of_rank(x, rank)).square().sum((1, 2))
        assert torch.allclose(left, values[:, rank:].square().sum(1), atol=1e-10)


def row(nll: float, *more: float) -> dict:
    by_document = [[100 * (nll + d), 100] for d in (0.0, 0.1, *more)]
    log_ppl = sum(n for n, _ in by_document) / (100 * len(by_document))
    return {
        "token_ppl": math.exp(log_ppl),
        "by_document": by_document,
        "by_position": [log_ppl] * 4,
    }


def at(fraction: float, nll: float) -> dict:
    return row(nll) | {"parameters": {"fraction": fraction}}


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
    verdicts = cell_verdicts({"Full": row(1.0)} | rows, "LESS (5%)", "here")
    assert [v.holds for v in verdicts] == expected
    assert str(verdicts[0]).startswith("holds" if expected[0] else "FAILS")


@pytest.mark.parametrize("worse", [0.3, -0.3])
def test_kernels_trained_at_another_budget_are_compared_with_those_trained_at_it(worse):
    points = {"c/Full": row(1.0) | {"parameters": {}}}
    for fraction in (0.1, 0.02):
        methods = {"Baseline": 2.0, "Baseline+": 1.9, "LESS (2%)": 1.3, "LESS (10%)": 1.3 + worse}
        for label, nll in methods.items():
            points[f"c/{fraction:.0%}/{label}"] = at(fraction, nll)
    verdicts = language_modeling.verdicts({"points": points})
    assert len(verdicts) == 5
    assert verdicts[-1].holds == (worse > 0)
    share = shares({"points": points})
    assert share["c/2%", "LESS (2%)"][0] == "70.0%"
    assert ("c/2%", "Baseline") not in share


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
    verdicts = low_rank_residuals.verdicts({"points": points})
    assert [v.holds for v in verdicts] == [low] * 3


@pytest.mark.parametrize(("here", "holds"), [(0.21, True), (0.3, False)])
def test_a_layer_trained_here_is_compared_with_the_carried_one(here, holds):
    best = {"h2o 5%": 0.2, "h2o 5%, here": here}
    points = {
        name: {"layers": {"0": {"best": error, "baseline_plus": 0.9}}}
        for name, error in best.items()
    }
    assert [v.holds for v in training_kernels.verdicts({"points": points})] == [True, True, holds]


def test_carried_kernels_do_until_some_are_trained_here(monkeypatch):
    assert setting.kernels_dir("tiny", 8) == ASSETS / "kernels"
    assert setting.kernels_dir("tiny", 16) == ASSETS / "kernels" / "R16"
    assert setting.kernels_dir("wild", 8) == results_dir("wild") / "kernels"
    fitted = setting.fit_kernels("tiny", 0)
    assert fitted["carried"]
    assert fitted["layers"] == load_kernels("pico-llama", "h2o", 0.05).header["curves"]
    for curves in fitted["layers"].values():
        assert curves["best"] == min(curves["validation"]) < curves["baseline_plus"]
    for profile in ("tiny", "smoke"):
        (results_dir(profile) / "kernels").mkdir(parents=True)
    # A quick profile keeps to the package, which only has the first seed's.
    assert setting.kernels_dir("smoke", 8) == ASSETS / "kernels"
    assert setting.fit_kernels("smoke", 1) == fitted
    _, kernels = setting.policy_and_state(Method.less(0.05), "smoke", 1)
    assert kernels.header["seed"] == 0
    assert setting.kernels_dir("tiny", 8) == results_dir("tiny") / "kernels"
    monkeypatch.setattr(
        setting, "train_for_profile", lambda p, *rest: (p.model, p.kernel_size, *rest)
    )
    path = results_dir("tiny") / "kernels" / "R16" / "pico-falcon" / "lambda-0.1-seed3.safetensors"
    assert setting.fit_kernels("tiny", 3, "lambda", 0.1, "pico-falcon", 16) == {
        "layers": ("pico-falcon", 16, "lambda", 0.1, path, 3)
    }


def save_as_trained(kernels, profile):
    """Put `kernels` where a profile's own lie."""
    kernels.save(kernel_path("pico-llama", "h2o", 0.05, results_dir(profile) / "kernels"))


def test_kernels_are_trained_when_a_method_needs_them(monkeypatch):
    less = Method.less(0.05)
    # The recipe of the carried kernels is tiny's; their texts differ between versions of Python.
    kernels = load_kernels("pico-llama", "h2o", 0.05)
    kernels.header["data"] = [load_corpus("topics-train").record()]
    for profile in ("tiny", "wild"):
        save_as_trained(kernels, profile)
    trained = []
    monkeypatch.setattr(setting, "fit_kernels", lambda *arguments: trained.append(arguments))
    # The stand-in trains none.
    with pytest.raises(FileNotFoundError, match=r"no kernels h2o-0\.02"):
        setting.policy_and_state(Method.less(0.05, 0.02), "tiny", 3, kernel_size=4)
    assert trained == [("tiny", 3, "h2o", 0.02, "pico-llama", 4)]
    _, carried = setting.policy_and_state(less, "tiny", 0, carried=True)
    assert carried is not None
    setting.policy_and_state(less, "smoke", 0)
    setting.policy_and_state(Method.baseline_plus(0.05), "tiny", 0)
    # Those that lie there are of this recipe.
    setting.policy_and_state(less, "tiny", 0)
    assert len(trained) == 1
    # And here they are not.
    setting.policy_and_state(less, "wild", 0)
    assert trained[1:] == [("wild", 0, "h2o", 0.05, "pico-llama", 8)]
    # Of as many windows of these texts, and of another recipe.
    kernels.header["recipe"] |= {"lr": 0.5}
    save_as_trained(kernels, "tiny")
    setting.policy_and_state(less, "tiny", 0)
    assert trained[2:] == [("tiny", 0, "h2o", 0.05, "pico-llama", 8)]
    # Of this recipe, and of other texts.
    kernels.header["recipe"] = load_kernels("pico-llama", "h2o", 0.05).header["recipe"]
    save_as_trained(kernels, "tiny")
    with monkeypatch.context() as patch:
        patch.setattr(setting, "sha256_of", lambda corpus: f"of another {corpus}")
        setting.policy_and_state(less, "tiny", 0)
    assert trained[3:] == [("tiny", 0, "h2o", 0.05, "pico-llama", 8)]
    # Of texts that they do not name.
    del kernels.header["data"], kernels.header["sequences"]
    save_as_trained(kernels, "tiny")
    setting.policy_and_state(less, "tiny", 0)
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
        v.holds for v in training_kernels.verdicts({"points": {"h2o 5%": {"layers": layers}}})
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
    assert [v.holds for v in training_speed.verdicts({"points": points})] == [good] * 3


def test_the_papers_cells_are_found_by_our_names():
    assert table2("WikiText", 0.02, "LESS (2%)") == PAPER["table2"]["WikiText"]["LESS (2%)"][0]
    assert table2("PG-19", 0.1, "Performer") == PAPER["table2"]["PG-19"]["H2O+Performer"][2]
    assert table7("WikiText", "tova", "Baseline") == PAPER["table7"]["WikiText"]["Baseline"][2]
    with pytest.raises(KeyError):
        table2("WikiText", 0.02, "SnapKV")


@pytest.mark.parametrize("profile", ["tiny", "wild"])
def test_every_recorded_result_draws_and_is_complete(profile, monkeypatch, tmp_path):
    """`--from-results`: no compute, and the recorded points are those that experiments ask for."""
    recorded = ROOT / "results" / profile
    if profile == "wild" and not (recorded / "sparse_policies.json").is_file():
        pytest.skip("this copy carries no wild results")
    monkeypatch.setenv("LESS_RESULTS", str(tmp_path))
    monkeypatch.setenv("LESS_FROM_RESULTS", "1")
    (tmp_path / profile).mkdir()
    for path in recorded.glob("*.json"):
        os.symlink(path, tmp_path / profile / path.name)
    monkeypatch.setattr(loaded, "load_model", lambda *a: pytest.fail("a model was loaded"))
    loaded.model_of.cache_clear()
    language = language_modeling.run(profile)
    corpora = list(get_profile(profile).evaluation)
    gaps = language_modeling.gap_figure(language, profile)
    plots.save(gaps, profile, "gaps")
    places = len(corpora) * len(get_profile(profile).fractions)
    assert len(gaps.axes[0].get_xticklabels()) == places
    assert (tmp_path / profile / "figures" / "gaps.png").stat().st_size > 10_000
    plots.save(training_kernels.figure(training_kernels.run(profile)), profile, "curves")
    plots.save(low_rank_residuals.figure(low_rank_residuals.run(profile)), profile, "residuals")
    entries = tour.cell(tour.run(profile))
    assert list(entries) == ["Full", "Baseline", "Baseline+", "LESS (5%)"]
    assert json.loads((recorded / "tour.json").read_text())["manifest"]["profile"] == profile
    assert set(sparse_policies.run(profile)["points"]) == {
        f"{c}/{p}/{m}"
        for c in corpora
        for p in ("lambda", "tova")
        for m in ("Baseline", "Baseline+", "LESS (5%)")
    }


def test_tables_and_orders_for_readers():
    text = plots.table(["a", "b"], [["x", 1.23456], [None, 2]]).data
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| x | 1.235 |", "| – | 2 |"]  # noqa: RUF001
    points = {}
    for label in ("LESS (10%)", "Performer", "LESS (2%)", "Baseline+", "Baseline"):
        points[f"c/2%/{label}"] = {}
    methods = language_modeling.methods_at(0.02, [0.02, 0.05, 0.1])
    assert list(rows({"points": points}, "c/2%", methods)) == [
        "Baseline",
        "Baseline+",
        "Performer",
        "LESS (2%)",
        "LESS (10%)",
    ]


def test_loss_by_kind_of_token_adds_up():
    kinds = {
        "Full": {"new": [30.0, 10], "near": [20.0, 20], "far": [40.0, 10]},
        "Baseline": {"new": [31.0, 10], "near": [28.0, 20], "far": [51.0, 10]},
        "LESS (5%)": {"new": [29.5, 10], "near": [30.0, 20], "far": [45.5, 10]},
    }
    entries = {label: {"by_recurrence": by_kind} for label, by_kind in kinds.items()}
    assert language_modeling.by_recurrence(entries, "LESS (5%)") == [
        ["new", "25%", "0.100", "5%", "150%"],
        ["near", "50%", "0.400", "40%", "-25%"],
        ["far", "25%", "1.100", "55%", "50%"],
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
    assert [v.holds for v in generation.verdicts({"points": points})] == [good] * 5


@pytest.mark.parametrize(("ours", "holds"), [(1.2, True), (1.9, False)])
def test_verdicts_of_the_multi_query_model_hold_and_fail(ours, holds):
    methods = {"Baseline": 2.0, "Baseline+": 1.8, "LESS (5%)": ours}
    points = {"c/Full": at(0.05, 1.0), "kernels": {"parameters": {"name": "m"}}}
    for label, nll in methods.items():
        points[f"c/5%/{label}"] = at(0.05, nll)
    verdicts = multi_query.verdicts({"points": points})
    assert [v.holds for v in verdicts] == [holds] * 2
    assert all(v.claim.startswith("Falcon, c, H2O at 5%: LESS (5%)") for v in verdicts)


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


# ---------------------------------------------------------------------- claims of two records
@pytest.mark.parametrize("gains", [True, False])
def test_verdicts_on_random_features_and_on_the_order_of_methods(gains):
    def point(nats: float) -> dict:
        return {
            "by_document": [[10 * nats, 10], [11 * nats, 10]],
            "token_ppl": nats,
            "parameters": {"name": "m", "fraction": 0.05},
        }

    methods = {
        "Baseline": 3.0,
        "Baseline+": 2.9,
        "Performer": 2.5 if gains else 3.1,
        "LESS (5%)": 2.0 if gains else 2.95,
    }
    points = {"c/Full": point(1.0)}
    points |= {f"c/5%/{label}": point(nats) for label, nats in methods.items()}
    record = {"points": points}
    of_performer = language_modeling.performer_gains_nothing(record, record)
    assert [v.holds for v in of_performer] == [not gains] * 2
    of_order = list(language_modeling.order_of_methods(record, record))
    assert [v.holds for v in of_order] == [gains] * 2
    assert of_order[0].claim == "m c/5%: LESS < Baseline+ < Baseline"


def test_the_claims_of_a_table_stand_in_its_file_in_the_papers_order():
    claims = claims_of("language_modeling")
    assert [claim.text.split()[0] for claim in claims] == ["LESS", "At", "Kernels", "Performer's"]
    assert {claim.where for claim in claims} == {"Table 2"}
    assert claims[0].paper == "WikiText at 2%: 10.745 < 12.718 < 13.333"
    assert claims[0].needs == ("language_modeling", "multi_query")


@pytest.mark.parametrize("good", [True, False])
def test_verdicts_of_kernel_size_hold_and_fail(good):
    nats = {2: 3.2, 4: 3.1, 8: 3.05} if good else {2: 3.0, 4: 3.15, 8: 3.35}

    def points(nats: dict[int, float]) -> dict:
        by_key = {}
        for R, log_ppl in nats.items():
            parameters = {"fraction": 0.05, "kernel_size": R}
            by_key[f"5%/{R}/LESS (5%)"] = {"parameters": parameters, "log_ppl": log_ppl}
            by_key[f"5%/{R}/Baseline+"] = {"parameters": parameters, "log_ppl": 3.3}
        return {"points": by_key}

    # What the third says of gains that grow more negative.
    expected = [True] * 3 if good else [False, False, True]
    assert [v.holds for v in kernel_size.verdicts(points(nats))] == expected
    growing_gains = points({2: 3.2, 4: 3.1, 8: 2.9})
    assert [v.holds for v in kernel_size.verdicts(growing_gains)] == [True, True, False]


# ---------------------------------------------------------------------- methods
def test_a_label_is_made_of_what_a_method_is():
    labels = {
        "Full": Method.full(),
        "Baseline": Method.baseline(0.05, "tova"),
        "Baseline+": Method.baseline_plus(0.05),
        "Performer": Method.performer(0.05),
        "LESS (2%)": Method.less(0.05, trained_fraction=0.02),
        "running-mean": Method("every-second", 0.05, "running-mean"),
    }
    assert {label: method.label for label, method in labels.items()} == dict(
        zip(labels, labels, strict=True)
    )
    with pytest.raises(ValueError, match="needs trained_fraction"):
        Method("h2o", 0.05, "less")


def test_methods_of_names_that_nobody_registered_are_refused():
    with pytest.raises(ValueError, match="unknown policy 'every-third'"):
        setting.policy_and_state(Method("every-third", 0.05), "smoke", 0)
    with pytest.raises(ValueError, match="unknown state 'last-word'"):
        setting.policy_and_state(Method("h2o", 0.05, "last-word"), "smoke", 0)


def every_experiment(profile):
    """Of all tables and figures, for seed 0."""
    yield attention_maps.AttentionMaps(profile)
    yield breakdown.Breakdown(profile)
    yield classification.Classification(profile)
    yield generation.Generation(profile)
    yield kernel_size.KernelSize(profile)
    yield language_modeling.LanguageModeling(profile)
    yield latency.Latency(profile)
    yield low_rank_residuals.LowRankResiduals(profile)
    yield multi_query.MultiQuery(profile)
    yield prompt_length.PromptLength(profile)
    yield recipes.Recipes(profile)
    yield seeds.Seeds(profile)
    yield sparse_policies.SparsePolicies(profile)
    for role in ("llama", "wide", "falcon"):
        yield summarization.Summarization(profile, role)
    yield tour.Tour(profile)
    yield training_kernels.TrainingKernels(profile)
    yield training_speed.TrainingSpeed(profile)


@pytest.mark.parametrize("profile", ["tiny", "wild"])
def test_no_key_and_no_parameter_of_a_recorded_point_changed(profile):
    """Cache keys are of the recorded sources: texts differ between machines, here they need not
    be.
    """
    for experiment in every_experiment(profile):
        path = ROOT / "results" / profile / f"{experiment.name}.json"
        if not path.is_file():
            continue
        record = json.loads(path.read_text())
        assert {point.key for point in experiment.points()} == set(record["points"])
        for point in experiment.points():
            entry = record["points"][point.key]
            assert entry["parameters"] == json.loads(json.dumps(point.parameters))
            key = cache_key(point.parameters, 0, record["manifest"]["data"], experiment.version)
            assert entry["cache_key"] == key
            if point.method is not None and "method" in point.parameters:
                assert point.method.label == point.parameters["method"]


def test_recorded_points_of_tiny_name_their_sources():
    """Texts in their order, then models, then the profile's settings."""
    for experiment in every_experiment("tiny"):
        record = json.loads((ROOT / "results/tiny" / f"{experiment.name}.json").read_text())
        recorded = [source["name"] for source in record["manifest"]["data"]]
        assert [source["name"] for source in experiment.sources()] == recorded
