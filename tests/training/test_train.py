"""Kernel training: the loss is what it says, an interrupted run ends where an uninterrupted one
does, bad settings are named at once.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lesslib import H2O
from lesslib.attention.fit import model_shape
from lesslib.attention.whole_sequence import dense_attention, evict, recover
from lesslib.bench import stepwise_attention
from lesslib.hf import attention_modules, output_projection
from lesslib.profiles import get_profile
from lesslib.states import Kernels
from lesslib.training import (
    LayerTrainer,
    Recipe,
    capture_layers,
    captured_bytes,
    command,
    features,
    share,
    train,
)

RECIPE = Recipe(kernel_size=4, hidden=8, epochs=2, halve_every=1, lr=3e-3, dropout=0.3, batch=2)
POLICY = H2O(heavy=3, recent=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, max_position_embeddings=64, initializer_range=0.4, **shape)
    ).eval()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(64, (6, 40), generator=torch.Generator().manual_seed(1))


def trainer_of(model, windows, layer=1):
    data = capture_layers(model, windows, [layer], batch=4)[layer]
    return LayerTrainer(data, POLICY, projection_of(model, layer), validation=2, batch=4)


def projection_of(model, layer):
    return output_projection(attention_modules(model)[layer]).weight.detach()


def mean_error_by_hand(difference, projection):
    """The error after W_O, one position [Hq, Dv] at a time."""
    errors = []
    for sequence in difference:
        for t in range(sequence.shape[1]):
            errors.append((projection @ sequence[:, t].flatten()).square().mean())
    return torch.stack(errors).mean()


def assert_same_weights(a, b):
    other = b.state_dict()
    assert a.state_dict().keys() == other.keys()
    for name, weights in a.state_dict().items():
        assert torch.equal(weights, other[name]), name


def test_capture_is_the_models_own_attention_and_is_the_same_from_disk(model, windows, tmp_path):
    held = capture_layers(model, windows, [0, 1], batch=4)
    streamed = capture_layers(model, windows, [0, 1], batch=4, memory_gib=1e-9, folder=tmp_path)
    # Nothing to find for whoever comes after a process that was killed.
    assert not list(tmp_path.iterdir())
    for layer, data in held.items():
        for name in ("q", "k", "v", "out"):
            in_memory = getattr(data, name)
            on_disk = getattr(streamed[layer], name)
            assert torch.equal(in_memory, on_disk)
            assert not in_memory.is_shared()
            assert on_disk.is_shared()
        dense = dense_attention(
            data.q.float(), data.k.float(), data.v.float(), scaling=data.scaling
        )
        # Captured in half precision.
        assert (dense - data.out.float()).norm() < 2e-3 * dense.norm()


def test_capture_beyond_memory_without_a_folder_names_the_fix(model, windows):
    with pytest.raises(ValueError, match="memory_gib=1e-09: give a folder"):
        capture_layers(model, windows, [0], memory_gib=1e-9)


def test_outputs_and_loss_are_those_of_the_whole_sequence_form_past_the_budget(model, windows):
    """Against `recover` and W_O one position at a time, in order of position; gradients too."""
    data = capture_layers(model, windows, [1])[1]
    projection = projection_of(model, 1)
    # Copies: the trainer reorders k and v.
    q, k, v, target = (x.float().clone() for x in (data.q, data.k, data.v, data.out))
    trainer = LayerTrainer(data, POLICY, projection, validation=2, batch=4)
    layer = Kernels.new(model_shape(model), 4, 8, seed=3)[1].eval()
    # Away from the start, where LESS is eviction alone.
    torch.nn.init.constant_(layer.s1, 1.0)
    evicted = evict(POLICY, q, k, v, scaling=data.scaling)
    rows = torch.tensor([0, 3])
    past = range(POLICY.budget + 1, 40)
    expected = recover(evicted, layer.phi(q), layer.psi(k), v)[rows]
    out = trainer.output(layer, rows)
    # What is kept of `sparse` is in half precision.
    assert (out - expected[:, :, past]).norm() < 1e-3 * expected.norm()
    assert (expected - evicted.sparse[rows]).abs().max() > 0.1

    loss_by_hand = mean_error_by_hand((expected - target[rows])[:, :, past], projection)
    loss = trainer.error(out, trainer.target(rows))
    # Heads side by side, as o_proj takes them.
    difference = (out - trainer.target(rows)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(loss, (difference @ projection.T).square().mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, loss_by_hand, rtol=1e-3, atol=0)
    weights = tuple(layer.parameters())
    expected_gradients = torch.autograd.grad(loss_by_hand, weights)
    gradients = torch.autograd.grad(loss, weights)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).norm() < 1e-2 * expected_gradient.norm()

    def validation_error(sparse):
        return trainer.error(sparse[4:, :, past], target[4:, :, past]).item()

    with torch.no_grad():
        plus = evict(POLICY.plus(4), q, k, v, scaling=data.scaling).sparse
        error = validation_error(evicted.sparse)
        assert trainer.sparse_error["validation"] == pytest.approx(error, rel=1e-3)
        assert trainer.plus_error == pytest.approx(validation_error(plus), rel=1e-3)


def test_features_in_half_precision_change_training_little_and_scoring_not_at_all(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    shape = {"layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8}
    layer = Kernels.new(shape, 4, 16, dropout=0.0)[0]
    q, k = torch.randn(2, 1, 2, 30, 8)
    exact = (layer.phi(q), layer.psi(k))
    for is_training in (False, True):
        for x, exact_x in zip(features(layer.train(is_training), q, k), exact, strict=True):
            assert torch.equal(x, exact_x) != is_training
            assert (x - exact_x).norm() < 0.02 * exact_x.norm()
    # Where bfloat16 is slow, training is exact.
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    phi, psi = features(layer.train(), q, k)
    assert torch.equal(phi, exact[0])
    assert torch.equal(psi, exact[1])


def test_untrained_kernels_are_the_sparse_policy_and_training_helps(model, windows):
    trainer = trainer_of(model, windows)
    layer = Kernels.new(model_shape(model), 4, 32, dropout=0.0)[1]
    assert trainer.relative_error(layer) == pytest.approx(1.0, abs=0.02)
    curves = trainer.fit(layer, Recipe(kernel_size=4, hidden=32, epochs=15, lr=1e-2, dropout=0.0))
    assert curves["train"][-1] < 0.9 < curves["validation"][0]
    assert curves["best"] == min(curves["validation"][1:])
    # The best weights are those that are kept.
    assert trainer.relative_error(layer) == pytest.approx(curves["best"], rel=1e-6)


def test_where_no_disk_holds_all_layers_they_are_captured_in_several_passes(
    model, windows, tmp_path, monkeypatch
):
    path = tmp_path / "whole.safetensors"
    whole, _ = train(model, POLICY, windows, RECIPE, path, {}, validation=2)
    passes = []
    shape = model_shape(model)
    usage = shutil.disk_usage(tmp_path)._replace(free=1.9 * captured_bytes(shape, windows))

    def counted(model, windows, layers, **options):
        passes.append(layers)
        return capture_layers(model, windows, layers, **options)

    monkeypatch.setattr(share, "capture_layers", counted)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    path = tmp_path / "parted.safetensors"
    parted, curves = train(model, POLICY, windows, RECIPE, path, {}, validation=2, memory_gib=1e-9)
    assert passes == [[i] for i in range(shape["layers"])]
    assert len(passes) > 1
    assert curves.keys() == {str(i) for i in range(len(passes))}
    assert_same_weights(whole, parted)


def test_interrupted_training_resumes_by_layer_and_ends_the_same(
    model, windows, tmp_path, monkeypatch
):
    path = tmp_path / "whole.safetensors"
    whole, _ = train(model, POLICY, windows, RECIPE, path, {}, validation=2)
    fit = LayerTrainer.fit
    calls = []

    def interrupted(self, kernels, recipe, label, tick):
        calls.append(label)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(self, kernels, recipe, label, tick)

    path = tmp_path / "kernels.safetensors"
    monkeypatch.setattr(LayerTrainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, POLICY, windows, RECIPE, path, {}, validation=2)
    assert not path.exists()
    again, curves = train(model, POLICY, windows, RECIPE, path, {}, validation=2)
    assert [c.split(" layer")[1][:2] for c in calls] == [" 0", " 1", " 1"]
    assert list(curves) == ["0", "1"]
    assert_same_weights(whole, again)
    assert not list(tmp_path.glob("*.parts"))
    loaded = Kernels.load(path)
    assert loaded.header["recipe"]["epochs"] == 2
    assert loaded.header["budget"] == 6


def test_layers_that_train_at_the_same_time_do_not_disturb_each_other(model, windows, tmp_path):
    """With dropout, whose random numbers are each layer's own."""
    threads = torch.get_num_threads()
    trained = []
    for n in (1, 2):
        path = tmp_path / f"{n}.safetensors"
        torch.set_num_threads(n)
        try:
            kernels, _ = train(model, POLICY, windows, RECIPE, path, {}, validation=2)
            assert torch.get_num_threads() == n
        finally:
            torch.set_num_threads(threads)
        trained.append(kernels)
    assert_same_weights(*trained)


def test_a_layer_that_fails_stops_the_others(model, windows, tmp_path, monkeypatch):
    fit = LayerTrainer.fit
    epochs = []

    def fails(self, kernels, recipe, label, tick):
        def counted():
            epochs.append(label)
            tick()

        if label.endswith("layer 0"):
            raise FloatingPointError("the loss is nan")
        return fit(self, kernels, recipe, label, counted)

    monkeypatch.setattr(LayerTrainer, "fit", fails)
    path = tmp_path / "k.safetensors"
    recipe = replace(RECIPE, epochs=200)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        train(model, POLICY, windows, recipe, path, {}, validation=2)
    assert len(epochs) < 190
    assert not path.exists()


def test_a_part_of_another_recipe_is_not_reused_and_a_damaged_one_is_named(
    model, windows, tmp_path
):
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
    [
        ({"dropout": 1.0}, "dropout=1.0: it is a share"),
        ({"epochs": 0}, "epochs=0: it must"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
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
    [
        (["--policy", "snapkv"], "unknown policy 'snapkv'"),
        (["--fraction", "-0.1"], "fraction -0.1"),
        (["--model", "nope"], "unknown model 'nope'"),
        (["--profile", "huge"], "unknown profile 'huge'"),
        (["--epochs", "0"], "epochs=0"),
        (["--training", "x"], "unknown corpus 'x'"),
    ],
)
def test_the_command_line_names_what_is_wrong(arguments, message):
    with pytest.raises(SystemExit, match=message):
        command.main(["--profile", "tiny", *arguments])


def test_the_command_line_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for name in command.SETTINGS:
        assert f"--{name.replace('_', '-')}" in text


def test_the_stepwise_scheme_is_the_same_function_with_the_same_gradients():
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 3, 70, 8, dtype=torch.float64) for _ in range(3))
    phi, psi = (torch.rand(2, 3, 70, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    policy = H2O(heavy=5, recent=4, scores="full")
    slow, target = stepwise_attention(q, k, v, policy, (phi, psi), 8**-0.5)
    fast = recover(evict(policy, q, k, v), phi, psi, v)
    assert (slow - fast).abs().max() < 1e-12
    assert (target - dense_attention(q, k, v)).abs().max() < 1e-12
    weights = torch.randn_like(slow)
    slow_gradients = torch.autograd.grad((slow * weights).sum(), (phi, psi))
    fast_gradients = torch.autograd.grad((fast * weights).sum(), (phi, psi))
    for a, b in zip(slow_gradients, fast_gradients, strict=True):
        assert (a - b).abs().max() < 1e-10


def test_the_command_trains_a_carried_model(tmp_path, capsys):
    small = {
        "profile": "smoke",
        "sequences": 3,
        "validation": 1,
        "epochs": 1,
        "length": 96,
        "hidden": 8,
        "fraction": 0.02,
        "out": tmp_path,
    }
    command.main([f"--{name}={value}" for name, value in small.items()])
    printed = capsys.readouterr().out
    assert "of the sparse error is left" in printed
    assert re.search(r"one by one: capture \d+ s, eviction \d+ s, epochs \d+ s\n", printed)
    header = Kernels.load(tmp_path / "pico-llama" / "h2o-0.02.safetensors").header
    assert json.dumps(header)
    assert header["model"] == "pico-llama"
    assert header["fraction"] == 0.02
    assert header["length"] == 96
    assert header["sequences"] == 3
    for curves in header["curves"].values():
        for part in ("seconds_capture", "seconds_eviction", "seconds"):
            assert curves[part] > 0
    # The layers of one pass share its time.
    assert len({curves["seconds_capture"] for curves in header["curves"].values()}) == 1


def test_cards_from_before_the_parts_were_timed_are_printed(tmp_path, capsys):
    curves = {str(i): {"best": 0.5, "baseline_plus": 0.9, "seconds": 3.0} for i in range(2)}
    command._print_curves(curves, tmp_path)
    printed = capsys.readouterr().out
    assert "all layers, one by one: capture 0 s, eviction 0 s, epochs 6 s" in printed
