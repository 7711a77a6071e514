"""New models to start from: made of carried ones, so that they know something already."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lesslib.models import load_model
from lesslib.zoo.grow import falcon_config


def new_falcon(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Falcon 7B (multi-query, parallel block, rotary) with new MLPs, and its tokenizer.

    It begins from pico-llama's tokenizer, embeddings, norms and attention, its key and value heads
    averaged (Ainslie et al., 2023).
    """
    llama, tokenizer = load_model("pico-llama", "cpu")
    layers = llama.config.num_hidden_layers
    torch.manual_seed(seed)
    falcon: Any = FalconForCausalLM(falcon_config(llama.config, layers, multi_query=True))
    falcon.get_input_embeddings().load_state_dict(llama.get_input_embeddings().state_dict())
    falcon.transformer.ln_f.weight.data.copy_(llama.model.norm.weight)
    heads = llama.config.num_attention_heads
    for new, old in zip(falcon.transformer.h, llama.model.layers, strict=True):
        attention = old.self_attn
        key = _mean_over_heads(attention.k_proj.weight, heads)
        value = _mean_over_heads(attention.v_proj.weight, heads)
        qkv = torch.cat([attention.q_proj.weight, key, value])
        new.self_attention.query_key_value.weight.data.copy_(qkv)
        new.self_attention.dense.weight.data.copy_(attention.o_proj.weight)
        new.input_layernorm.weight.data.copy_(old.input_layernorm.weight)
    return falcon, tokenizer


def _mean_over_heads(weight: Tensor, heads: int) -> Tensor:
    """[D, E] of a projection's weight [heads D, E]."""
    return weight.unflatten(0, (heads, -1)).mean(0)


def new_wide(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """pico-llama-stories with twice the heads and MLPs 2.5 times as wide, and its tokenizer.

    It computes the same function until it is trained: what is added to an attention or MLP is drawn
    anew but for its output's weights, which are 0.
    """
    llama, tokenizer = load_model("pico-llama-stories", "cpu")
    heads = 2 * llama.config.num_attention_heads
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": llama.config.intermediate_size * 5 // 2,
    }
    torch.manual_seed(seed)
    wide: Any = LlamaForCausalLM(LlamaConfig(**llama.config.to_dict() | sizes))
    for name, old in llama.named_parameters():
        new = wide.get_parameter(name).data
        is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
        if is_output:
            new.zero_()
        # the old weights are the first of every dimension
        first = tuple(slice(size) for size in old.shape)
        new[first] = old.data
    return wide, tokenizer


NEW = {"new-falcon": new_falcon, "new-wide": new_wide}
# out of the teacher: see `grow.py`
GROWN = "grown-falcon"
