"""Tasks, attention maps and kernel sizes, end to end in `smoke`.

Rows of attention are held against the naive form.
"""

from types import SimpleNamespace

import pytest
import torch

from lesslib import H2O, TOVA, Lambda
from lesslib.attention.fit import check_fit
from lesslib.attention.whole_sequence import dense_attention
from lesslib.experiments import (
    attention_maps,
    classification,
    kernel_size,
    prompt_length,
    summarization,
)
from lesslib.experiments.attention_maps import dense_rows, hellinger, less_rows, sparse_rows
from lesslib.experiments.experiment import Point
from lesslib.experiments.method import Method
from lesslib.experiments.summarization import Summarization, summarise
from lesslib.ops.naive import naive_attention

LABELS = ("Full", "Baseline", "Baseline+", "LESS (5%)")


@pytest.mark.parametrize(
    "policy", [H2O(heavy=3, recent=4), Lambda(sinks=2, recent=5), TOVA(tokens=6)], ids=str
)
@pytest.mark.parametrize("absorbing", [False, True])
def test_rows_of_attention_give_the_outputs_of_the_naive_form(sequences, policy, absorbing):
    x = sequences(Dv=5)
    features = (x.phi, x.psi) if absorbing else (None, None)
    out, times = naive_attention(x.q, x.k, x.v, policy, *features)
    scaling = x.q.shape[-1] ** -0.5
    if absorbing:
        kernels = SimpleNamespace(phi=lambda q: x.phi, psi=lambda k: x.psi)
        rows = less_rows(x.q, x.k, scaling, times, kernels)
    else:
        rows = sparse_rows(x.q, x.k, scaling, times)
    assert torch.allclose(rows.sum(-1), torch.ones_like(rows[..., 0]))
    assert torch.allclose(rows.double() @ x.v.repeat_interleave(2, 1), out, atol=1e-4)


def test_rows_without_eviction_are_dense_attention(sequences):
    x = sequences(Dv=5)
    rows = dense_rows(x.q, x.k, 0.3)
    assert torch.allclose(
        rows.double() @ x.v.repeat_interleave(2, 1),
        dense_attention(x.q, x.k, x.v, None, 0.3),
        atol=1e-4,
    )
    assert rows.triu(1).abs().max() == 0


def test_hellinger_distance_of_known_pairs():
    even = torch.tensor([0.5, 0.5])
    first = torch.tensor([1.0, 0.0])
    last = torch.tensor([0.0, 1.0])
    assert hellinger(even, even) == pytest.approx(0, abs=1e-6)
    assert hellinger(first, last) == 1
    assert hellinger(even, first).item() == pytest.approx((1 - 0.5**0.5) ** 0.5)


def test_classification_scores_each_method_on_the_same_questions():
    record = classification.run("smoke")
    for task, options in (("yes_no", 2), ("reply", 4)):
        rows = {}
        for key, entry in record["points"].items():
            if key.startswith(task):
                rows[key.split("/")[1]] = entry
        assert set(rows) == set(LABELS)
        assert all(len(entry["right"]) == 8 for entry in rows.values())
        assert all(entry["options"] == options for entry in rows.values())
        assert all(entry["accuracy"] == sum(entry["right"]) / 8 for entry in rows.values())
    assert {d["name"] for d in record["manifest"]["data"]} >= {"yes_no", "reply"}
    assert len(list(classification.verdicts(record))) == 2


def test_summaries_are_scored_by_text_and_the_first_few_are_kept():
    record = summarization.run("smoke", "llama")
    assert set(record["points"]) == {
        "summary/Full",
        "summary/5%/Baseline",
        "summary/5%/Baseline+",
        "summary/5%/LESS (5%)",
    }
    for entry in record["points"].values():
        scores = entry["scores"]["rouge1"]
        assert len(scores) == len(entry["prompt_tokens"]) == len(entry["said"]) == 4
        assert entry["rouge1"] == pytest.approx(sum(scores) / 4)
        assert max(entry["prompt_tokens"]) <= 1024 - 80
    verdicts = summarization.llama_scores_above_plus(record)
    assert [v.claim for v in verdicts] == [
        "pico-llama-stories, summary/5%: LESS (5%) scores above Baseline+"
    ]


def test_results_that_are_published_hold_no_words_of_others():
    texts = {
        "name": "pico-llama-stories",
        "task": "sentence",
        "shots": 0,
        "new_tokens": 8,
        "count": 2,
        "length": 330,
    }
    point = Point("sentence/Full", texts | {"method": "Full"}, Method.full())
    values = {}
    for profile in ("tiny", "wild"):
        (values[profile],) = summarise(Summarization(profile, "llama"), [point])
    assert len(values["tiny"]["said"]) == len(values["tiny"]["references"]) == 2
    assert values["wild"] == values["tiny"] | {"said": [], "references": []}


def test_attention_maps_are_of_every_layer_and_small(monkeypatch):
    record = attention_maps.run("smoke")
    entry = record["points"]["llama/h2o 5%"]
    assert set(entry["distances"]) == {"0", "1", "2", "3"}
    for of_layer in entry["distances"].values():
        for distances in of_layer.values():
            assert all(0 < distance < 1 for distance in distances)
    shapes = {label: (len(rows), len(rows[0])) for label, rows in entry["maps"].items()}
    assert shapes == dict.fromkeys(("original", "sparse", "LESS"), (64, 64))
    checked = []
    monkeypatch.setattr(attention_maps, "check_fit", lambda *a: checked.append(a) or check_fit(*a))
    assert attention_maps.run("smoke") == record
    # recorded points are not computed again
    assert not checked


def test_kernel_sizes_and_prompt_lengths_are_points_of_a_sweep():
    assert set(kernel_size.run("smoke")["points"]) == {"5%/8/Baseline+", "5%/8/LESS (5%)"}
    points = set(prompt_length.run("smoke")["points"])
    assert points == {f"{task}/330/{label}" for task in ("summary", "sentence") for label in LABELS}
