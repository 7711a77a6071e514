"""Random models that are measured: speed and bytes depend on shapes, not on what weights say."""

from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lesslib.attention.fit import model_shape
from lesslib.bench.timing import DEVICE, DTYPE
from lesslib.states import Kernels

# R of the paper, of all kernels that decode or score here
KERNEL_SIZE = 8
# tokens that a random model's context has
CONTEXT = 32768


def _shape(
    vocabulary: int, width: int, mlp: int, layers: int, heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


# grouped heads, and one table for the input's and the output's embeddings
_GROUPED_AND_TIED = {"num_key_value_heads": 3, "tie_word_embeddings": True}

MODELS: dict[str, dict[str, Any]] = {
    "pico": _shape(4096, 192, 512, layers=4, heads=6),
    "12x768": _shape(32000, 768, 2048, layers=12, heads=12),
    "smollm2-135m": _shape(49152, 576, 1536, layers=30, heads=9, **_GROUPED_AND_TIED),
    "llama-2-7b": _shape(32000, 4096, 11008, layers=32, heads=32),
    "llama-2-13b": _shape(32000, 5120, 13824, layers=40, heads=40),
}


def random_model(name: str) -> PreTrainedModel:
    """A Llama of one of `MODELS`' shapes with random weights and a context of 32,768 tokens.

    It attends with SDPA, transformers' default.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], max_position_embeddings=CONTEXT)
    model = cast(Any, LlamaForCausalLM(config))
    return model.to(DEVICE, DTYPE).eval()


def random_kernels(model: PreTrainedModel, hidden: int) -> Kernels:
    """Untrained kernels for `model`, `hidden` wide."""
    return Kernels.new(model_shape(model), KERNEL_SIZE, hidden)
