"""Tasks, attention maps and kernel sizes: rows of attention against the naive form, and every experiment end to end in `smoke`."""

from types import SimpleNamespace

import pytest
import torch

from lesslib import H2O, TOVA, Lambda
from lesslib.attention.fit import check_fit
from lesslib.attention.whole_sequence import dense_attention
from lesslib.experiments import scoreboard
from lesslib.experiments import tasks as downstream
from lesslib.experiments.tasks import attention_rows, hellinger
from lesslib.ops.naive import naive_attention


@pytest.mark.parametrize(
    "policy", [H2O(heavy=3, recent=4), Lambda(sinks=2, recent=5), TOVA(tokens=6)], ids=str
)
@pytest.mark.parametrize("absorbing", [False, True])
def test_rows_of_attention_give_the_outputs_of_the_naive_form(sequences, policy, absorbing):
    x = sequences(Dv=5)
    features = (x.phi, x.psi) if absorbing else (None, None)
    out, times = naive_attention(x.q, x.k, x.v, policy, *features)
    kernels = SimpleNamespace(phi=lambda q: x.phi, psi=lambda k: x.psi) if absorbing else None
    rows = attention_rows(x.q, x.k, x.q.shape[-1] ** -0.5, times, kernels)
    assert torch.allclose(rows.sum(-1), torch.ones_like(rows[..., 0]))
    assert torch.allclose(rows.double() @ x.v.repeat_interleave(2, 1), out, atol=1e-4)


def test_rows_without_eviction_are_dense_attention(sequences):
    x = sequences(Dv=5)
    rows = attention_rows(x.q, x.k, 0.3)
    assert torch.allclose(
        rows.double() @ x.v.repeat_interleave(2, 1),
        dense_attention(x.q, x.k, x.v, None, 0.3),
        atol=1e-4,
    )
    assert rows.triu(1).abs().max() == 0


def test_hellinger_distance_of_known_pairs():
    even, first, last = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert hellinger(even, even) == pytest.approx(0, abs=1e-6)
    assert hellinger(first, last) == 1
    assert hellinger(even, first).item() == pytest.approx((1 - 0.5**0.5) ** 0.5)


def test_classification_scores_each_method_on_the_same_questions():
    record = downstream.classification("smoke")
    for task, options in (("yes_no", 2), ("reply", 4)):
        rows = {n.split("/")[1]: p for n, p in record["points"].items() if n.startswith(task)}
        assert set(rows) == set(downstream.METHODS)
        assert all(len(p["right"]) == 8 and p["options"] == options for p in rows.values())
        assert all(p["accuracy"] == sum(p["right"]) / 8 for p in rows.values())
    assert {d["name"] for d in record["manifest"]["data"]} >= {"yes_no", "reply"}
    assert len(list(scoreboard.classification(record))) == 2


def test_summaries_are_scored_by_text_and_the_first_few_are_kept():
    record = downstream.summarization("smoke", "llama")
    assert set(record["points"]) == {
        "summary/Full",
        *(f"summary/5%/{m}" for m in ("Baseline", "Baseline+", "LESS (5%)")),
    }
    for p in record["points"].values():
        assert len(p["scores"]["rouge1"]) == len(p["prompt_tokens"]) == len(p["said"]) == 4
        assert p["rouge1"] == pytest.approx(sum(p["scores"]["rouge1"]) / 4)
        assert max(p["prompt_tokens"]) <= 1024 - 80
    assert [v.claim for v in scoreboard.summarization(record)] == [
        "pico-llama-stories, summary/5%: LESS (5%) scores above Baseline+"
    ]


def test_results_that_are_published_hold_no_words_of_others():
    common = {
        "name": "pico-llama-stories",
        "task": "sentence",
        "shots": 0,
        "new_tokens": 8,
        "count": 2,
        "length": 330,
    }
    found = {
        profile: downstream.summarise(profile, 0, **common, cases=[{"method": "Full"}])[0]
        for profile in ("tiny", "wild")
    }
    assert len(found["tiny"]["said"]) == len(found["tiny"]["references"]) == 2
    assert found["wild"] == found["tiny"] | {"said": [], "references": []}


def test_attention_maps_are_of_every_layer_and_small(monkeypatch):
    record = downstream.attention_maps("smoke")
    point = record["points"]["llama/h2o 5%"]
    assert set(point["distances"]) == {"0", "1", "2", "3"}
    assert all(
        0 < d < 1 for layer in point["distances"].values() for row in layer.values() for d in row
    )
    shapes = {label: (len(rows), len(rows[0])) for label, rows in point["maps"].items()}
    assert shapes == dict.fromkeys(("original", "sparse", "LESS"), (64, 64))
    seen = []
    monkeypatch.setattr(downstream, "check_fit", lambda *a: seen.append(a) or check_fit(*a))
    assert downstream.attention_maps("smoke") == record
    assert not seen  # recorded points are not computed again


def test_kernel_sizes_and_prompt_lengths_are_points_of_a_sweep():
    assert set(downstream.kernel_size("smoke")["points"]) == {"5%/8/Baseline+", "5%/8/LESS (5%)"}
    lengths = downstream.prompt_length("smoke")["points"]
    assert set(lengths) == {
        f"{task}/330/{m}" for task in ("summary", "sentence") for m in downstream.METHODS
    }
