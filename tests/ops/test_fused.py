"""$LESS_TRITON=1 puts the GPU kernels in the places of the torch forms, and changes no number beyond rounding."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from lesslib.ops import dispatch as fused
from lesslib.ops import scan
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

    calls = []
    for name in ("decode_step", "features", "absorb", "column_sums", "lowrank_attention"):
        def counted(*args, name=name, function=getattr(triton, name)):
            calls.append(name)
            return function(*args)
        setattr(triton, name, counted)

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=32, max_position_embeddings=64, initializer_range=0.3)
    model = LlamaForCausalLM(config).eval()
    learned = Kernels.new(model_shape(model), 4, 16)
    for layer in learned.layers:
        torch.nn.init.constant_(layer.s1, 1.0)  # away from the start, where LESS is eviction alone
    ids = torch.randint(64, (3, 18))
    mask = torch.ones(3, 18, dtype=torch.long)
    mask[1, :7] = mask[2, :16] = 0

    @torch.no_grad()
    def logits(policy, kernels):
        cache, found = LessCache(model, policy, kernels), []
        with less(model):
            found.append(model(ids[:, :14], attention_mask=mask[:, :14], past_key_values=cache).logits[:, -1])
            for t in range(14, 18):
                found.append(model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits[:, 0])
        return torch.stack(found), [b for layer in cache.less_layers() for b in layer.buffers()]

    for policy in (H2O(3, 4), Lambda(recent=5, sinks=2), TOVA(7)):
        for kernels in (None, learned, Kernels.performer(model_shape(model), 4)):
            found = []
            for asked in "01":
                os.environ["LESS_TRITON"], calls[:] = asked, []
                found.append(logits(policy, kernels))
            (want, expected), (got, held) = found
            expects = {"decode_step"} | ({"column_sums"} if policy.name == "h2o" else set())
            expects |= set() if kernels is None else {"absorb", "features"} if kernels is learned else {"absorb"}
            assert set(calls) == expects, (policy, calls)
            assert (got - want).abs().max() < 1e-4 * want.abs().max(), policy
            for a, b in zip(held, expected, strict=True):
                assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4), policy

    @torch.no_grad()
    def scores(policy, kernels):
        with less(model, policy, kernels):
            return model(ids, attention_mask=mask).logits

    for policy, expects in ((H2O(3, 4), {"decode_step"}), (Lambda(recent=5, sinks=2), {"decode_step"}), (TOVA(7), set())):
        for kernels in (None, learned):
            found = []
            for asked in "01":
                os.environ["LESS_TRITON"], calls[:] = asked, []
                found.append(scores(policy, kernels)[mask.bool()])
            assert set(calls) == expects | (set() if kernels is None else {"lowrank_attention"}), (policy, calls)
            assert torch.allclose(*found, rtol=1e-4, atol=1e-4), policy

    curves = []
    for asked in "01":
        os.environ["LESS_TRITON"], calls[:] = asked, []
        recipe = Recipe(kernel_size=4, hidden=8, epochs=1, dropout=0.0)
        windows = torch.randint(64, (4, 40), generator=torch.Generator().manual_seed(1))
        _, found = train(model, H2O(3, 3), windows, recipe, Path(os.environ["OUT"]) / f"{asked}.safetensors", {}, validation=1)
        curves.append([x for c in found.values() for x in c["validation"]])
    assert set(calls) == {"decode_step", "lowrank_attention"}
    assert torch.allclose(*map(torch.tensor, curves), rtol=1e-4)
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


def test_the_kernels_are_used_where_they_are_asked_for_and_can_run(monkeypatch):
    x, compiling = torch.zeros(2), torch.compiler.is_compiling
    cases = (
        ("1", True, False, True),
        ("0", True, False, False),
        ("1", False, False, False),
        ("1", True, True, False),
    )
    for asked, can, traced, wanted in cases:
        monkeypatch.setenv("LESS_TRITON", asked)
        monkeypatch.setattr(ours, "available", lambda x, can=can: can)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda traced=traced: traced)
        assert fused.wanted(x) is wanted
    monkeypatch.setattr(torch.compiler, "is_compiling", compiling)
    monkeypatch.delenv("LESS_TRITON")
    assert not fused.wanted(x)


def test_the_scan_is_the_torch_form_unless_asked(monkeypatch):
    monkeypatch.delenv("LESS_TRITON", raising=False)
    monkeypatch.setattr(scan, "lowrank_attention", lambda *args: "torch")
    monkeypatch.setattr(ours, "lowrank_attention", lambda *args: "triton")
    assert fused.lowrank_attention(*[torch.zeros(1)] * 3) == "torch"
    monkeypatch.setattr(fused, "wanted", lambda x: True)
    assert fused.lowrank_attention(*[torch.zeros(1)] * 3) == "triton"
