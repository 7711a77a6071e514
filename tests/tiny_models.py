"""What several test files use: tiny random models of many architectures, in float64, kernels for
them, shapes of sequences.
"""

import torch
import transformers as tf
from torch import Tensor

from lesslib.attention.fit import model_shape
from lesslib.ops.blocks import NEVER
from lesslib.states import Kernels

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HYBRID = GROUPED | {
    "head_dim": 8,
    "num_hidden_layers": 3,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "llama-grouped": lambda: tf.LlamaConfig(**GROUPED),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": lambda: tf.GemmaConfig(**SIZES | {"num_key_value_heads": 1}, head_dim=8),
    "phi3": lambda: tf.Phi3Config(**GROUPED),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**SIZES),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "falcon-7b": lambda: tf.FalconConfig(
        **SIZES, multi_query=True, parallel_attn=True, bias=False, alibi=False
    ),
    "falcon-40b": lambda: tf.FalconConfig(
        **SIZES, num_kv_heads=2, new_decoder_architecture=True, bias=False, alibi=False
    ),
}
WITH_GPT2 = CONFIGS | {"gpt2": lambda: tf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)}
WITH_HYBRID = WITH_GPT2 | {
    "gemma3": lambda: tf.Gemma3TextConfig(**HYBRID | {"layer_types": HYBRID["layer_types"][:3]})
}


SHAPES = [
    {"B": 1, "Hq": 1, "Hkv": 1, "S": 1},
    {"B": 2, "Hq": 4, "Hkv": 2, "S": 37},
    {"B": 1, "Hq": 3, "Hkv": 1, "S": 65, "D": 3, "Dv": 7},
    {"B": 1, "Hq": 2, "Hkv": 2, "S": 130, "R": 1},
    {"B": 3, "Hq": 4, "Hkv": 2, "S": 69, "pads": [0, 5, 66]},
]


def build(config):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).double().eval()
    for p in model.parameters():  # initial weights of 0.02 make attention flat
        p.data.add_(torch.randn_like(p) * (0.5 if p.dim() > 1 else 0.1))
    return model


def kernels_of(model, size=1.0):
    kernels = Kernels.new(model_shape(model), kernel_size=3, hidden=8).double()
    for layer in kernels.layers:
        torch.nn.init.constant_(layer.s1, size)  # as if trained: the state must weigh in
    return kernels.eval()


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def retained(times: Tensor, real: Tensor | None = None) -> Tensor:
    """How many tokens are kept before each query, [B, Hkv, S], from the eviction times; `real`
    [B, S] is False for padding.
    """
    S = times.shape[-1]
    entered = (
        torch.ones_like(times, dtype=torch.int64)
        if real is None
        else real[:, None].expand_as(times).long()
    )
    leaving = torch.zeros(*times.shape[:-1], S + 1, dtype=torch.int64, device=times.device)
    leaving.scatter_add_(-1, times.long().clamp(max=S), (times < NEVER).long())
    return entered.cumsum(-1) - entered - leaving[..., :S].cumsum(-1)


def parameter_count(kernels: Kernels) -> int:
    return sum(p.numel() for p in kernels.parameters())
