"""Kernel training: the loss is what it says, an interrupted run ends where an uninterrupted one does, bad settings are named at once."""
from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lesslib import H2O
from lesslib import train as training
from lesslib.bench import stepwise_attention
from lesslib.hf import attention_modules, model_shape, output_projection
from lesslib.kernels import Kernels
from lesslib.parallel import dense_attention, evict, recover
from lesslib.profiles import get_profile
from lesslib.train import LayerTrainer, Recipe, capture_layers, train

RECIPE = Recipe(kernel_size=4, hidden=8, epochs=2, halve_every=1, lr=3e-3, dropout=0.3, batch=2)
POLICY = H2O(heavy=3, recent=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, initializer_range=0.4, **shape)).eval()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(64, (6, 40), generator=torch.Generator().manual_seed(1))


def trainer_of(model, windows, layer=1):
    data = capture_layers(model, windows, [layer], batch=4)[layer]
    return LayerTrainer(data, POLICY, output_projection(attention_modules(model)[layer]).weight.detach(), validation=2, batch=4)


def test_capture_is_the_models_own_attention_and_is_the_same_from_disk(model, windows, tmp_path):
    held = capture_layers(model, windows, [0, 1], batch=4)
    streamed = capture_layers(model, windows, [0, 1], batch=4, memory_gib=1e-9, folder=tmp_path)
    assert len(list(tmp_path.glob("*.bin"))) == 8
    for i, d in held.items():
        for name in ("q", "k", "v", "out"):
            assert torch.equal(getattr(d, name), getattr(streamed[i], name))
        dense = dense_attention(d.q.float(), d.k.float(), d.v.float(), scaling=d.scaling)
        assert (dense - d.out.float()).norm() < 2e-3 * dense.norm()  # captured in half precision


def test_capture_beyond_memory_without_a_folder_names_the_fix(model, windows):
    with pytest.raises(ValueError, match="memory_gib=1e-09: give a folder"):
        capture_layers(model, windows, [0], memory_gib=1e-9)


def test_loss_is_the_squared_error_after_the_output_projection_past_the_budget(model, windows):
    trainer = trainer_of(model, windows)
    kernels = Kernels.new(model_shape(model), 4, 8, seed=3)[1].eval()
    rows = torch.tensor([0, 3])
    out, target = trainer.output(kernels, rows)
    by_hand = []
    for b in range(2):
        for t in range(POLICY.budget, 40):
            difference = (out - target)[b, :, t].flatten()  # heads side by side, as o_proj takes them
            by_hand.append((trainer.projection @ difference).square().mean())
    assert torch.allclose(trainer.error(out, target), torch.stack(by_hand).mean(), rtol=1e-5)
    d = trainer.data
    sparse = evict(POLICY, d.q.float(), d.k.float(), d.v.float(), scaling=d.scaling).sparse
    validation = trainer.error(sparse[4:], d.out[4:].float())
    assert trainer.sparse_error["validation"] == pytest.approx(validation.item(), rel=1e-2)


def test_untrained_kernels_are_the_sparse_policy_and_training_helps(model, windows):
    trainer = trainer_of(model, windows)
    layer = Kernels.new(model_shape(model), 4, 32, dropout=0.0)[1]
    assert trainer.relative_error(layer) == pytest.approx(1.0, abs=0.02)
    curves = trainer.fit(layer, Recipe(kernel_size=4, hidden=32, epochs=15, lr=1e-2, dropout=0.0))
    assert curves["train"][-1] < 0.9 < curves["validation"][0]
    assert curves["best"] == min(curves["validation"][1:])
    assert trainer.relative_error(layer) == pytest.approx(curves["best"], rel=1e-6)  # the best weights are those that are kept


def test_interrupted_training_resumes_by_layer_and_ends_the_same(model, windows, tmp_path, monkeypatch):
    whole, _ = train(model, POLICY, windows, RECIPE, tmp_path / "whole.safetensors", {}, validation=2)
    fit, calls = LayerTrainer.fit, []

    def interrupted(self, kernels, recipe, label="kernels"):
        calls.append(label)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(self, kernels, recipe, label)

    path = tmp_path / "kernels.safetensors"
    monkeypatch.setattr(LayerTrainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, POLICY, windows, RECIPE, path, {}, validation=2)
    assert not path.exists()
    again, curves = train(model, POLICY, windows, RECIPE, path, {}, validation=2)
    assert [c.split(" layer")[1][:2] for c in calls] == [" 0", " 1", " 1"]
    assert list(curves) == ["0", "1"]
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not list(tmp_path.glob("*.parts"))
    loaded = Kernels.load(path)
    assert loaded.header["recipe"]["epochs"] == 2
    assert loaded.header["budget"] == 6


def test_a_part_of_another_recipe_is_not_reused_and_a_damaged_one_is_named(model, windows, tmp_path):
    path = tmp_path / "kernels.safetensors"
    part = tmp_path / "kernels.safetensors.parts" / "layer-000.pt"
    part.parent.mkdir()
    torch.save({"stamp": "another recipe", "weights": {}, "curves": {"best": -1.0}}, part)
    _, curves = train(model, POLICY, windows, RECIPE, path, {}, validation=2)
    assert curves["0"]["best"] > 0
    part.parent.mkdir()
    part.write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"layer-000\.pt is damaged .*: delete it"):
        train(model, POLICY, windows, RECIPE, path, {}, validation=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dropout": 1.0}, "dropout=1.0: it is a share"), ({"epochs": 0}, "epochs=0: it must"), ({"lr": -1.0}, "lr=-1.0")],
)
def test_a_recipe_that_cannot_work_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_windows_that_never_fill_the_budget_are_refused(model, windows, tmp_path):
    with pytest.raises(ValueError, match="windows of 40 tokens never fill the budget"):
        train(model, H2O(heavy=20, recent=20), windows, RECIPE, tmp_path / "k", {}, validation=2)
    with pytest.raises(ValueError, match="above the model's context of 64"):
        train(model, H2O(heavy=40, recent=40), windows, RECIPE, tmp_path / "k", {}, validation=2)
    with pytest.raises(ValueError, match="6 validation sequences of 6"):
        train(model, POLICY, windows, RECIPE, tmp_path / "k", {}, validation=6)


def test_the_paper_profile_keeps_the_papers_recipe():
    assert Recipe.of(get_profile("paper"), 0) == Recipe(8, 512, 40, 10, 1e-3, 0.3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--policy", "snapkv"], "unknown policy 'snapkv'"), (["--fraction", "-0.1"], "fraction -0.1"),
     (["--model", "nope"], "unknown model 'nope'"), (["--profile", "huge"], "unknown profile 'huge'"),
     (["--epochs", "0"], "epochs=0"), (["--training", "x"], "unknown corpus 'x'")],
)  # fmt: skip
def test_the_command_line_names_what_is_wrong(arguments, message):
    with pytest.raises(SystemExit, match=message):
        training.main(["--profile", "tiny", *arguments])


def test_the_command_line_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        training.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in training.SETTINGS)


def test_the_stepwise_scheme_is_the_same_function_with_the_same_gradients():
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 3, 70, 8, dtype=torch.float64) for _ in range(3))
    phi, psi = (torch.rand(2, 3, 70, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    policy = H2O(heavy=5, recent=4, scores="full")
    slow, target = stepwise_attention(q, k, v, policy, phi, psi, 8**-0.5)
    fast = recover(evict(policy, q, k, v), phi, psi, v)
    assert (slow - fast).abs().max() < 1e-12
    assert (target - dense_attention(q, k, v)).abs().max() < 1e-12
    weights = torch.randn_like(slow)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (phi, psi)) for x in (slow, fast)), strict=True):
        assert (a - b).abs().max() < 1e-10


def test_the_command_trains_a_carried_model(tmp_path, capsys):
    small = {"profile": "smoke", "sequences": 3, "validation": 1, "epochs": 1, "length": 96, "hidden": 8, "fraction": 0.02, "out": tmp_path}
    training.main([f"--{name}={value}" for name, value in small.items()])
    assert "of the sparse error is left" in capsys.readouterr().out
    header = Kernels.load(tmp_path / "pico-llama" / "h2o-0.02.safetensors").header
    assert json.dumps(header)
    assert (header["model"], header["fraction"], header["length"], header["sequences"]) == ("pico-llama", 0.02, 96, 3)
