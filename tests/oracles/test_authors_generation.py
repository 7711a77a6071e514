"""LessCache against the authors' released generation code: same weights, kernels and tokens, same
logits.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from lesslib import H2O, Lambda, LessCache, less
from lesslib.models import model_shape
from lesslib.states import Kernels

FILE = Path(__file__).with_name("authors_generation.safetensors")
TOLERANCE = 2e-5  # float32; the logits' standard deviation is 2.3
# Our names of a layer's weights, by those of the file.
WEIGHTS = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
KERNEL_WEIGHTS = ("phi_w1", "phi_w2", "psi_w1", "psi_w2", "psi_w3", "s1", "s2")


@pytest.fixture(scope="module")
def oracle():
    with safe_open(FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return file.metadata(), tensors


def the_model(metadata, tensors):
    config = transformers.LlamaConfig(**json.loads(metadata["config"]))
    model = transformers.LlamaForCausalLM(config).eval()
    state = model.state_dict()
    state["model.embed_tokens.weight"] = tensors["weights.emb"]
    state["lm_head.weight"] = tensors["weights.head"]
    for layer in range(config.num_hidden_layers):
        for ours, theirs in WEIGHTS.items():
            state[f"model.layers.{layer}.{ours}.weight"] = tensors[f"weights.{layer}.{theirs}"]
    model.load_state_dict(state)
    return model


def the_kernels(model, metadata, tensors):
    sizes = {"kernel_size": int(metadata["kernel_size"]), "hidden": int(metadata["hidden"])}
    kernels = Kernels.new(model_shape(model), **sizes)
    state = {}
    for layer in range(model.config.num_hidden_layers):
        for name in KERNEL_WEIGHTS:
            state[f"layers.{layer}.{name}"] = tensors[f"weights.{layer}.{name}"]
    kernels.load_state_dict(state)
    return kernels.eval()


@torch.no_grad()
@pytest.mark.parametrize("case", ["h2o-less", "h2o-sparse", "lambda-less"])
def test_logits_are_those_of_the_released_code(case, oracle):
    metadata, tensors = oracle
    model = the_model(metadata, tensors)
    policy = (H2O if case.startswith("h2o") else Lambda)(**json.loads(metadata["cases"])[case])
    kernels = the_kernels(model, metadata, tensors) if case.endswith("less") else None
    cache = LessCache(model, policy, kernels)
    ids = tensors["weights.ids"]
    prompt = int(metadata["prompt"])
    with less(model):
        logits = [model(ids[:, :prompt], past_key_values=cache).logits]
        for t in range(prompt, ids.shape[1]):
            logits.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    difference = (torch.cat(logits, 1) - tensors[f"logits.{case}"]).abs().max().item()
    assert difference <= TOLERANCE
    # The comparison can fail: the cache evicts, and another budget gives other logits.
    assert cache.evicted(0).any()
