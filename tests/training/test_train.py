"""Kernel training: the loss is what it says, an interrupted run ends where an uninterrupted one does, bad settings are named at once."""

from __future__ import annotations

import json
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
from lesslib.training import train as training
from lesslib.training.train import (
    LayerTrainer,
    Recipe,
    capture_layers,
    captured_bytes,
    features,
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
    return LayerTrainer(
        data,
        POLICY,
        output_projection(attention_modules(model)[layer]).weight.detach(),
        validation=2,
        batch=4,
    )


def test_capture_is_the_models_own_attention_and_is_the_same_from_disk(model, windows, tmp_path):
    held = capture_layers(model, windows, [0, 1], batch=4)
    streamed = capture_layers(model, windows, [0, 1], batch=4, memory_gib=1e-9, folder=tmp_path)
    assert not list(
        tmp_path.iterdir()
    )  # nothing to find for whoever comes after a process that was killed
    for i, d in held.items():
        for name in ("q", "k", "v", "out"):
            assert torch.equal(getattr(d, name), getattr(streamed[i], name))
            assert (getattr(d, name).is_shared(), getattr(streamed[i], name).is_shared()) == (
                False,
                True,
            )  # the second is mapped
        dense = dense_attention(d.q.float(), d.k.float(), d.v.float(), scaling=d.scaling)
        assert (dense - d.out.float()).norm() < 2e-3 * dense.norm()  # captured in half precision


def test_capture_beyond_memory_without_a_folder_names_the_fix(model, windows):
    with pytest.raises(ValueError, match="memory_gib=1e-09: give a folder"):
        capture_layers(model, windows, [0], memory_gib=1e-9)


def test_outputs_and_loss_are_those_of_the_whole_sequence_form_past_the_budget(model, windows):
    """Against `recover` and W_O one position at a time, on the captured q, k, v in order of position; gradients too."""
    data, projection = (
        capture_layers(model, windows, [1])[1],
        output_projection(attention_modules(model)[1]).weight.detach(),
    )
    q, k, v, target = (
        x.float().clone() for x in (data.q, data.k, data.v, data.out)
    )  # the trainer reorders k and v
    trainer, layer = (
        LayerTrainer(data, POLICY, projection, validation=2, batch=4),
        Kernels.new(model_shape(model), 4, 8, seed=3)[1].eval(),
    )
    torch.nn.init.constant_(layer.s1, 1.0)  # away from the start, where LESS is eviction alone
    evicted, rows, past = (
        evict(POLICY, q, k, v, scaling=data.scaling),
        torch.tensor([0, 3]),
        range(POLICY.budget + 1, 40),
    )
    expected = recover(evicted, layer.phi(q), layer.psi(k), v)[rows]
    out = trainer.output(layer, rows)
    assert (
        out - expected[:, :, past]
    ).norm() < 1e-3 * expected.norm()  # what is kept of `sparse` is in half precision
    assert (expected - evicted.sparse[rows]).abs().max() > 0.1
    by_hand = [
        (projection @ (expected - target[rows])[b, :, t].flatten()).square().mean()
        for b in range(2)
        for t in past
    ]
    loss = trainer.error(out, trainer.target(rows))
    difference = (
        (out - trainer.target(rows)).transpose(1, 2).flatten(2)
    )  # heads side by side, as o_proj takes them
    torch.testing.assert_close(loss, (difference @ projection.T).square().mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), rtol=1e-3, atol=0)
    wanted = torch.autograd.grad(torch.stack(by_hand).mean(), tuple(layer.parameters()))
    for got, want in zip(torch.autograd.grad(loss, tuple(layer.parameters())), wanted, strict=True):
        assert (got - want).norm() < 1e-2 * want.norm()
    with torch.no_grad():
        plus = evict(POLICY.plus(4), q, k, v, scaling=data.scaling).sparse
        for found, out in (
            (trainer.sparse_error["validation"], evicted.sparse),
            (trainer.plus_error, plus),
        ):
            error = trainer.error(out[4:, :, past], target[4:, :, past])
            assert found == pytest.approx(error.item(), rel=1e-3)


def test_features_in_half_precision_change_training_little_and_scoring_not_at_all(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    layer, (q, k) = (
        Kernels.new({"layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8}, 4, 16, dropout=0.0)[0],
        torch.randn(2, 1, 2, 30, 8),
    )
    exact = layer.phi(q), layer.psi(k)
    for training_it in (False, True):
        for got, want in zip(features(layer.train(training_it), q, k), exact, strict=True):
            assert torch.equal(got, want) != training_it
            assert (got - want).norm() < 0.02 * want.norm()
    monkeypatch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"
    )  # where bfloat16 is slow, training is exact
    assert all(
        torch.equal(got, want)
        for got, want in zip(features(layer.train(), q, k), exact, strict=True)
    )


def test_untrained_kernels_are_the_sparse_policy_and_training_helps(model, windows):
    trainer = trainer_of(model, windows)
    layer = Kernels.new(model_shape(model), 4, 32, dropout=0.0)[1]
    assert trainer.relative_error(layer) == pytest.approx(1.0, abs=0.02)
    curves = trainer.fit(layer, Recipe(kernel_size=4, hidden=32, epochs=15, lr=1e-2, dropout=0.0))
    assert curves["train"][-1] < 0.9 < curves["validation"][0]
    assert curves["best"] == min(curves["validation"][1:])
    assert trainer.relative_error(layer) == pytest.approx(
        curves["best"], rel=1e-6
    )  # the best weights are those that are kept


def test_where_no_disk_holds_all_layers_they_are_captured_in_several_passes(
    model, windows, tmp_path, monkeypatch
):
    whole, _ = train(
        model, POLICY, windows, RECIPE, tmp_path / "whole.safetensors", {}, validation=2
    )
    passes, usage = [], shutil.disk_usage(tmp_path)
    captured = training.capture_layers
    monkeypatch.setattr(
        training,
        "capture_layers",
        lambda m, w, layers, **more: passes.append(layers) or captured(m, w, layers, **more),
    )
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: usage._replace(free=1.9 * captured_bytes(model_shape(model), windows)),
    )
    parted, curves = train(
        model,
        POLICY,
        windows,
        RECIPE,
        tmp_path / "parted.safetensors",
        {},
        validation=2,
        memory_gib=1e-9,
    )
    assert passes == [[i] for i in range(model_shape(model)["layers"])]
    assert len(passes) > 1
    assert curves.keys() == {str(i) for i in range(len(passes))}
    assert all(
        torch.equal(whole.state_dict()[name], weights)
        for name, weights in parted.state_dict().items()
    )


def test_interrupted_training_resumes_by_layer_and_ends_the_same(
    model, windows, tmp_path, monkeypatch
):
    whole, _ = train(
        model, POLICY, windows, RECIPE, tmp_path / "whole.safetensors", {}, validation=2
    )
    fit, calls = LayerTrainer.fit, []

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
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not list(tmp_path.glob("*.parts"))
    loaded = Kernels.load(path)
    assert loaded.header["recipe"]["epochs"] == 2
    assert loaded.header["budget"] == 6


def test_layers_that_train_at_the_same_time_do_not_disturb_each_other(model, windows, tmp_path):
    """With dropout, whose random numbers are each layer's own."""
    threads, found = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        try:
            found.append(
                train(
                    model, POLICY, windows, RECIPE, tmp_path / f"{n}.safetensors", {}, validation=2
                )[0]
            )
            assert torch.get_num_threads() == n
        finally:
            torch.set_num_threads(threads)
    for (name, a), b in zip(
        found[0].state_dict().items(), found[1].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_layer_that_fails_stops_the_others(model, windows, tmp_path, monkeypatch):
    fit, epochs = LayerTrainer.fit, []

    def fails(self, kernels, recipe, label, tick):
        if label.endswith("layer 0"):
            raise FloatingPointError("the loss is nan")
        return fit(self, kernels, recipe, label, lambda: (epochs.append(label), tick()))

    monkeypatch.setattr(LayerTrainer, "fit", fails)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        train(
            model,
            POLICY,
            windows,
            replace(RECIPE, epochs=200),
            tmp_path / "k.safetensors",
            {},
            validation=2,
        )
    assert len(epochs) < 190
    assert not (tmp_path / "k.safetensors").exists()


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
    slow, target = stepwise_attention(q, k, v, policy, (phi, psi), 8**-0.5)
    fast = recover(evict(policy, q, k, v), phi, psi, v)
    assert (slow - fast).abs().max() < 1e-12
    assert (target - dense_attention(q, k, v)).abs().max() < 1e-12
    weights = torch.randn_like(slow)
    for a, b in zip(
        *(torch.autograd.grad((x * weights).sum(), (phi, psi)) for x in (slow, fast)), strict=True
    ):
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
    training.main([f"--{name}={value}" for name, value in small.items()])
    assert "of the sparse error is left" in capsys.readouterr().out
    header = Kernels.load(tmp_path / "pico-llama" / "h2o-0.02.safetensors").header
    assert json.dumps(header)
    assert (header["model"], header["fraction"], header["length"], header["sequences"]) == (
        "pico-llama",
        0.02,
        96,
        3,
    )
