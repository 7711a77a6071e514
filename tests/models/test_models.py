"""The model zoo: what loads, what is refused and how it is said; a model's kernels."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from lesslib import H2O, less
from lesslib.attention.fit import model_shape
from lesslib.models import carried_models, kernel_path, load_kernels, load_model
from lesslib.states import Kernels
from lesslib.util.hardware import keep_memory
from lesslib.util.paths import ASSETS


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(ASSETS / "pico-llama", tmp_path / "mine"))


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    # The discard port: refused at once.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


# ---------------------------------------------------------------- models
def test_every_carried_model_loads_offline_for_evaluation(no_hub):
    assert "pico-llama" in carried_models()
    for name in carried_models():
        model, tokenizer = load_model(name, "cpu")
        assert not model.training
        assert model.dtype == torch.float32
        assert model.less_identity["model"] == name
        ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
        assert ids.max() < model.config.vocab_size
        assert model(ids).logits.isfinite().all()


def test_a_folder_loads_like_the_carried_model_and_its_revision_follows_the_weights(folder):
    carried, _ = load_model("pico-llama", "cpu")
    copy, _ = load_model(folder, "cpu", torch.bfloat16)
    revision = carried.less_identity["revision"]
    assert copy.less_identity == {"model": "mine", "revision": revision}
    assert copy.dtype == torch.bfloat16
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changed, _ = load_model(folder, "cpu")
    assert changed.less_identity["revision"] != revision


def test_a_hub_name_below_less_models_needs_no_hub_and_keeps_its_name(
    folder, no_hub, monkeypatch, tmp_path
):
    with pytest.raises(FileNotFoundError, match="the hub cannot be reached"):
        load_model("org/model", "cpu")
    shutil.copytree(folder, tmp_path / "zoo" / "org" / "model")
    monkeypatch.setenv("LESS_MODELS", str(tmp_path / "zoo"))
    model, _ = load_model("org/model", "cpu")
    carried, _ = load_model("pico-llama", "cpu")
    assert model.less_identity == {
        "model": "org/model",
        "revision": carried.less_identity["revision"],
    }
    assert torch.equal(model.lm_head.weight, carried.lm_head.weight)


def test_loading_draws_no_bar_and_leaves_the_bars_of_others_alone(capfd, folder):
    def hook(factory, args, kwargs):
        calls.append(kwargs.get("desc"))
        return factory(*args, **kwargs)

    calls = []
    load_model("pico-llama", "cpu")
    assert "Loading weights" not in capfd.readouterr().err
    # Ours is gone.
    assert logging.set_tqdm_hook(hook) is None
    try:
        load_model("pico-llama", "cpu")
        # A hook set by the user stays in charge, also after an error.
        assert calls
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="weights"):
            load_model(folder, "cpu")
    finally:
        assert logging.set_tqdm_hook(None) is hook


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def edit(change):
    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "its weights could not be loaded.*incomplete"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "its weights could not be loaded"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            r"its weights could not be loaded.*model\.safetensors",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "its tokenizer could not be loaded"),
        (
            lambda f: (f / "tokenizer.json").write_text('{"version"'),
            "its tokenizer could not be loaded",
        ),
        (lambda f: (f / "config.json").write_text("{"), "could not be loaded.*JSON"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "foo"}'),
            "could not be loaded.*foo",
        ),
        (
            edit(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
            r"weights lack model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (
            edit(lambda w: w.update({"model.norm.weight": torch.ones(3)})),
            "its weights could not be loaded",
        ),
        (edit(lambda w: w["model.norm.weight"].fill_(torch.nan)), r"model\.norm\.weight holds NaN"),
        (
            edit(lambda w: w["model.norm.weight"].fill_(torch.inf)),
            r"model\.norm\.weight holds NaN or infinite",
        ),
    ],
)
def test_a_damaged_folder_is_refused_with_what_is_wrong(folder, damage, says):
    damage(folder)
    with pytest.raises(ValueError, match=says) as e:
        load_model(folder, "cpu")
    assert str(folder) in str(e.value)
    assert "again" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["pico-lama", "", "no/such/folder", "."])
def test_an_unknown_name_lists_the_carried_models(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"unknown model.*pico-llama.*hub name"):
        load_model(name)


def test_a_hub_name_without_the_hub_says_so_in_one_line(no_hub, capfd):
    with pytest.raises(
        FileNotFoundError, match=r"'nobody/nothing'.*the hub cannot be reached.*give a folder"
    ):
        load_model("nobody/nothing")
    assert "Retrying" not in capfd.readouterr().err


# ---------------------------------------------------------------- kernels
@pytest.fixture
def kernels():
    model, _ = load_model("pico-llama", "cpu")
    made = Kernels.new(model_shape(model), 4, 8)
    made.header |= model.less_identity | {"policy": "h2o", "fraction": 0.05}
    return made


def test_kernels_are_found_by_model_policy_fraction_and_seed(kernels, tmp_path):
    for seed in (0, 2):
        kernels.header["seed"] = seed
        kernels.save(kernel_path("pico-llama", "h2o", 0.05, tmp_path, seed))
        loaded = load_kernels("pico-llama", "H2O", 0.05, tmp_path, seed)
        assert loaded.header["seed"] == seed
        assert torch.equal(loaded[0].phi_w1, kernels[0].phi_w1)
    path = kernel_path("meta-llama/Llama-2-7b-hf", "tova", 0.1, tmp_path)
    assert path.relative_to(tmp_path).parts[0] == "meta-llama--Llama-2-7b-hf"


def test_missing_kernels_list_what_there_is_and_the_command(kernels, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"there are none; train them with python -m lesslib\.train --model pico-llama",
    ):
        load_kernels("pico-llama", "tova", 0.1, tmp_path)
    kernels.save(kernel_path("pico-llama", "h2o", 0.05, tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match=r"no kernels tova-0\.1 .*there are h2o-0\.05;.*--policy tova --fraction 0\.1",
    ):
        load_kernels("pico-llama", "tova", 0.1, tmp_path)


def test_kernels_that_do_not_belong_are_refused(kernels, tmp_path):
    path = kernel_path("pico-llama", "h2o", 0.05, tmp_path)
    kernels.header["revision"] = "0123456789ab"
    kernels.save(path)
    with pytest.raises(
        ValueError, match=r"revision 0123456789ab of 'pico-llama', the package carries [0-9a-f]{12}"
    ):
        load_kernels("pico-llama", "h2o", 0.05, tmp_path)
    model, _ = load_model("pico-llama", "cpu")
    foreign = Kernels.load(path)
    with (
        pytest.raises(
            ValueError, match=r"revision is 0123456789ab in the kernels and [0-9a-f]{12}"
        ),
        less(model, H2O(4, 4), foreign),
    ):
        pass
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_kernels("pico-llama", "h2o", 0.05, tmp_path)
    with pytest.raises(ValueError, match=r"unknown policy 'h3o': choose from .*h2o"):
        load_kernels("pico-llama", "h3o", 0.05, tmp_path)


# ---------------------------------------------------------------- memory
FAULTS = """
import resource, torch
from lesslib.models import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        a = torch.ones(8 << 20)
        (a + a).exp().sum()
        del a
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), keep_memory())
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults under glibc")
def test_keep_memory_ends_the_page_faults_of_large_buffers():
    command = [sys.executable, "-c", FAULTS]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ASSETS.parents[1])
    before, kept, after = run.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert int(after) < int(before) / 10


def test_keep_memory_does_nothing_where_the_c_library_has_no_mallopt(monkeypatch):
    monkeypatch.setattr(ctypes, "pythonapi", object())
    assert keep_memory() is False
