"""The GPU kernels in the places of the torch forms change no number beyond rounding."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from lesslib.ops import dispatch, scan
from lesslib.ops import triton as ours
from lesslib.util.paths import ROOT

SCRIPT = """
    import os
    from pathlib import Path

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from lesslib import H2O, TOVA, Lambda, LessCache, less
    from lesslib.kernels import Kernels
    from lesslib.models import model_shape
    from lesslib.ops import triton
    from lesslib.train import Recipe, train

    FUNCTIONS = (
        "decode_step", "attend_step", "sequence_of_steps", "phi", "psi", "read", "absorb",
        "column_sums", "lowrank_attention",
    )
    calls = []

    def count(name):
        function = getattr(triton, name)

        def counted(*args):
            calls.append(name)
            return function(*args)

        setattr(triton, name, counted)

    for name in FUNCTIONS:
        count(name)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    learned = Kernels.new(model_shape(model), 4, 16)
    for layer in learned.layers:
        torch.nn.init.constant_(layer.s1, 1.0)  # away from the start, where LESS is eviction alone
    performer = Kernels.performer(model_shape(model), 4)
    ids = torch.randint(64, (3, 18))
    mask = torch.ones(3, 18, dtype=torch.long)
    mask[1, :7] = mask[2, :16] = 0

    def by_both_forms(function, *args):
        results = []
        # asked for, not forced: what the kernels do not know is left to torch
        os.environ["LESS_TRITON"] = "1"
        for form in ("torch", ""):
            os.environ["LESS_OPS"] = form
            calls.clear()
            results.append(function(*args))
        return results

    @torch.no_grad()
    def decoded(policy, kernels):
        cache = LessCache(model, policy, kernels)
        logits = []
        with less(model):
            seen = mask[:, :14]
            out = model(ids[:, :14], attention_mask=seen, past_key_values=cache)
            logits.append(out.logits[:, -1])
            for t in range(14, 18):
                seen = mask[:, : t + 1]
                out = model(ids[:, t : t + 1], attention_mask=seen, past_key_values=cache)
                logits.append(out.logits[:, 0])
        return torch.stack(logits), [layer.tensors() for layer in cache.less_layers()]

    for policy, step in (
        (H2O(3, 4), "decode_step"), (Lambda(recent=5, sinks=2), "decode_step"),
        (TOVA(7), "attend_step"),
    ):
        for kernels in (None, learned, performer):
            (want, expected), (got, held) = by_both_forms(decoded, policy, kernels)
            expects = {step} | ({"column_sums"} if policy.name == "h2o" else set())
            if kernels is not None:
                expects |= {"read", "absorb"}
            if kernels is learned:
                expects |= {"phi", "psi"}
            assert set(calls) == expects, (policy, calls)
            # four steps of one layer
            assert calls.count(step) == 4
            assert calls.count("read") == (0 if kernels is None else 4)
            assert (got - want).abs().max() < 1e-4 * want.abs().max(), policy
            for a, b in zip(held, expected, strict=True):
                assert a.keys() == b.keys()
                for name in a:
                    same = torch.allclose(a[name].double(), b[name].double(), rtol=1e-4, atol=1e-4)
                    assert same, (policy, name)

    @torch.no_grad()
    def scores(policy, kernels):
        with less(model, policy, kernels):
            return model(ids, attention_mask=mask).logits[mask.bool()]

    for policy, steps in (
        (H2O(3, 4), {"sequence_of_steps"}), (Lambda(recent=5, sinks=2), {"sequence_of_steps"}),
        (TOVA(7), set()),
    ):
        for kernels in (None, learned):
            found = by_both_forms(scores, policy, kernels)
            expects = steps | (set() if kernels is None else {"lowrank_attention"})
            assert set(calls) == expects, (policy, calls)
            assert torch.allclose(*found, rtol=1e-4, atol=1e-4), policy

    def curve():
        recipe = Recipe(kernel_size=4, hidden=8, epochs=1, dropout=0.0)
        windows = torch.randint(64, (4, 40), generator=torch.Generator().manual_seed(1))
        path = Path(os.environ["OUT"]) / f"{os.environ['LESS_OPS'] or 'triton'}.safetensors"
        _, curves = train(model, H2O(3, 3), windows, recipe, path, {}, validation=1)
        return torch.tensor([loss for c in curves.values() for loss in c["validation"]])

    curves = by_both_forms(curve)
    assert set(calls) == {"sequence_of_steps", "lowrank_attention"}
    assert torch.allclose(*curves, rtol=1e-4)
    print("the same")
"""


def test_decoding_prompts_and_training_are_the_same_with_the_kernels(tmp_path):
    pytest.importorskip(
        "triton", reason="triton is not installed (on Linux it comes with torch for CUDA)"
    )
    env = os.environ | {"TRITON_INTERPRET": "1", "OUT": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "the same"), done.stderr[-4000:]


@pytest.mark.parametrize(
    ("asked", "can", "is_traced", "wanted"),
    [
        ("1", True, False, True),
        ("0", True, False, False),
        (None, True, False, False),
        ("1", False, False, False),
        ("1", True, True, False),
    ],
)
def test_the_kernels_are_used_where_they_are_asked_for_and_can_run(
    asked, can, is_traced, wanted, monkeypatch
):
    monkeypatch.delenv("LESS_OPS", raising=False)
    monkeypatch.delenv("LESS_TRITON", raising=False)
    if asked is not None:
        monkeypatch.setenv("LESS_TRITON", asked)
    monkeypatch.setattr(ours, "available", lambda x: can)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_traced)
    assert (dispatch.kernels_for(torch.zeros(2)) is ours) is wanted


def test_the_scan_is_the_torch_form_unless_asked(monkeypatch):
    inputs = [torch.zeros(1)] * 3
    of_torch = (torch.zeros(1, 2), torch.full((1,), 3.0))
    of_triton = (torch.ones(1, 2), torch.full((1,), 2.0))
    monkeypatch.setenv("LESS_OPS", "torch")
    monkeypatch.setattr(scan, "lowrank_attention", lambda *args: of_torch)
    monkeypatch.setattr(ours, "lowrank_attention", lambda *args: of_triton)
    output, logsumexp = dispatch.lowrank_part(*inputs)
    assert torch.equal(output, torch.zeros(1, 2))
    assert torch.equal(logsumexp, torch.full((1,), 3.0).log())
    monkeypatch.setattr(dispatch, "kernels_for", lambda x: ours)
    output, logsumexp = dispatch.lowrank_part(*inputs)
    assert torch.equal(output, torch.full((1, 2), 0.5))
    assert torch.equal(logsumexp, torch.full((1,), 2.0).log())
