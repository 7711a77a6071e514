"""Random models that are measured: speed and bytes depend on shapes, not on what weights say."""

from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lesslib.attention.fit import model_shape
from lesslib.bench.timing import DEVICE, DTYPE
from lesslib.states import Kernels

# R of the paper, of all kernels that decode or score here
KERNEL_SIZE = 8


def _shape(vocabulary: int, width: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


MODELS: dict[str, dict[str, Any]] = {
    "pico": _shape(4096, 192, 512, layers=4, heads=6),
    "12x768": _shape(32000, 768, 2048, layers=12, heads=12),
    "llama-2-7b": _shape(32000, 4096, 11008, layers=32, heads=32),
    "llama-2-13b": _shape(32000, 5120, 13824, layers=40, heads=40),
}


def random_model(name: str) -> PreTrainedModel:
    """A Llama of one of `MODELS`' shapes with random weights and a context of 32,768 tokens.

    It attends with SDPA, transformers' default.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], max_position_embeddings=32768)
    model = cast(Any, LlamaForCausalLM(config))
    return model.to(DEVICE, DTYPE).eval()


def random_kernels(model: PreTrainedModel, hidden: int) -> Kernels:
    """Untrained kernels for `model`, `hidden` wide."""
    return Kernels.new(model_shape(model), KERNEL_SIZE, hidden)
