"""lm-evaluation-harness on a local JSONL, offline, for both kinds of request.

Skipped where the optional lm_eval is not installed.
"""

import json

import pytest
import torch

pytest.importorskip("lm_eval.models.huggingface", reason='optional: pip install "lm_eval[hf]"')
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lesslib import H2O, LessCache, less
from lesslib.data import load_corpus
from lesslib.evaluation.harness import LessLM
from lesslib.models import load_kernels, load_model

TASKS = {
    "next_line": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    },
    "continuation": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """Which of four lines follows a passage of held-out prose? And: write it."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        line
        for d in load_corpus("topics-heldout").documents
        for line in d.text.split("\n")
        if len(line) > 50
    ][:300]
    with (folder / "lines.jsonl").open("w") as f:
        for i in range(12):
            at = 20 * i
            choices = [lines[at + 12], *(lines[(at + 7 * j) % 300] for j in (1, 2, 3))]
            order = [(i + j) % 4 for j in range(4)]
            doc = {
                "context": "\n".join(lines[at : at + 12]),
                "choices": [choices[j] for j in order],
                "answer": order.index(0),
            }
            f.write(json.dumps(doc) + "\n")
    for name, task in TASKS.items():
        files = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "lines.jsonl")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(
            json.dumps({"task": name, **files, **task, "target_delimiter": "\n"})
        )
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(lm, manager):
    results = simple_evaluate(
        lm, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    return {name: [[r[0] for r in s["resps"]] for s in results["samples"][name]] for name in TASKS}


def test_a_budget_of_the_whole_context_answers_as_the_stock_model(manager):
    model, tokenizer = load_model("pico-llama", "cpu")
    stock = evaluated(
        HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4), manager
    )
    for arguments in ({"policy": "full"}, {"policy": "h2o", "fraction": 1.0, "kernels": "none"}):
        ours = evaluated(LessLM("pico-llama", device="cpu", batch_size=4, **arguments), manager)
        assert ours["continuation"] == stock["continuation"]
        for got, expected in zip(ours["next_line"], stock["next_line"], strict=True):
            assert [x[0] for x in got] == pytest.approx([x[0] for x in expected], abs=1e-3)


def test_a_small_budget_scores_and_generates_as_the_library_does(manager):
    lm = LessLM("pico-llama", policy="h2o", fraction=0.05, device="cpu", batch_size=4)
    responses = evaluated(lm, manager)
    model, kernels, policy = (
        lm.model,
        load_kernels("pico-llama", "h2o", 0.05),
        H2O.from_fraction(0.05, 1024),
    )
    assert lm.policy == policy
    samples = simple_evaluate(
        lm,
        tasks=["continuation"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        limit=2,
    )["samples"]
    for i, sample in enumerate(samples["continuation"]):
        doc = sample["doc"]
        context = lm.tok_encode(doc["context"])
        with torch.no_grad(), less(model, policy, kernels):
            for choice, (got, _) in zip(doc["choices"], responses["next_line"][i], strict=True):
                whole = lm.tok_encode(doc["context"] + "\n" + choice)
                logits = (
                    model(torch.tensor([whole[:-1]]), use_cache=False).logits[0].log_softmax(-1)
                )
                tokens = torch.tensor(whole[1:])[len(context) - 1 :]
                expected = logits[len(context) - 1 :].gather(1, tokens[:, None]).sum()
                assert got == pytest.approx(expected.item(), abs=1e-2)
        with less(model):
            cache = LessCache(model, policy, kernels)
            said = model.generate(
                torch.tensor([context]), past_key_values=cache, max_new_tokens=12, do_sample=False
            )
        assert (
            responses["continuation"][i][0]
            == lm.tokenizer.decode(said[0, len(context) :]).split("\n\n")[0]
        )


def test_wrong_arguments_are_refused_and_none_means_no_kernels():
    for arguments, match in (
        (
            {"fracton": 0.2},
            "unknown argument fracton of the model less: choose from pretrained, policy",
        ),
        ({"peft": "x"}, "unknown argument peft"),
        ({"dtype": "fp16"}, "dtype 'fp16': choose float32"),
        ({"prefill": "bad"}, "prefill 'bad'"),
        ({"policy": "h3o"}, "unknown policy"),
    ):
        with pytest.raises(ValueError, match=match):
            LessLM("pico-llama", device="cpu", **arguments)
    assert (
        LessLM.create_from_arg_string(
            "pretrained=pico-llama,fraction=0.05,kernels=none,device=cpu"
        ).kernels
        is None
    )
    assert LessLM("pico-llama", device="cpu", kernels=None).kernels is None
