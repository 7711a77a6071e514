"""A model's attention layers, found and replaced for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lesslib.attention.whole_sequence import dense_attention
from lesslib.hf.falcon import FALCON_CLASSES, is_falcon
from lesslib.hf.interface import DECODING, WHOLE_SEQUENCE, Attention

WORKS = (
    "decoders on transformers' attention interface, such as Llama, Mistral, Qwen2, Qwen3, Gemma,"
    " Phi-3, GPT-NeoX and OLMo 2, and Falcon"
)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The model's causal attention modules by layer index.

    Raises TypeError for a model outside the attention interface.
    """
    modules: dict[int, nn.Module] = {}
    if _has_attention_interface(model):
        for module in model.modules():
            index = getattr(module, "layer_idx", None)
            if getattr(module, "is_causal", False) and isinstance(index, int):
                modules[index] = module
    if not modules:
        raise TypeError(
            f"{type(model).__name__} is not a decoder on transformers' attention interface;"
            f" lesslib works with {WORKS}"
        )
    return modules


def _has_attention_interface(model: PreTrainedModel) -> bool:
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return False
    return model._can_set_attn_implementation() or is_falcon(model)


def output_projection(module: nn.Module) -> nn.Linear:
    """The linear map W_O after attention, whatever the architecture calls it.

    Raises TypeError when there is none.
    """
    for name in ("o_proj", "dense", "out_proj", "c_proj"):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Linear):
            return projection
    raise TypeError(
        f"{type(module).__name__} has no output projection called o_proj, dense, out_proj or c_proj"
    )


@contextlib.contextmanager
def implementation(
    model: PreTrainedModel, modules: dict[int, nn.Module], name: str
) -> Iterator[None]:
    """Within the context `model` runs the attention registered as `name`.

    Falcon, which cannot change it, gets the class in its registry. Raises RuntimeError when it is
    replaced already.
    """

    def change(name: str) -> None:
        if is_falcon(model):
            model.config._attn_implementation = name
            for module in modules.values():
                module.__class__ = FALCON_CLASSES[name]
        else:
            model.set_attn_implementation(name)

    before = model.config._attn_implementation
    if before in (WHOLE_SEQUENCE, DECODING):
        raise RuntimeError(
            "this model's attention is already replaced: leave the first `with less(...)` before"
            " entering another"
        )
    try:
        change(name)
        yield
    finally:
        change(before)


@contextlib.contextmanager
def replace_attention(model: PreTrainedModel, attention: Attention) -> Iterator[PreTrainedModel]:
    """Within the context every attention layer of `model` calls `attention`; then it is as it was.

    Sliding-window layers whose window is shorter than the sequence keep their stock attention.
    Raises TypeError for a model outside the attention interface and RuntimeError when it is
    replaced already.
    """
    modules = attention_modules(model)
    with implementation(model, modules, WHOLE_SEQUENCE):
        try:
            for module in modules.values():
                vars(module)["less_attention"] = attention
            yield model
        finally:
            for module in modules.values():
                del module.less_attention


@contextlib.contextmanager
def capture(
    model: PreTrainedModel, keep: Callable[[int, Tensor, Tensor, Tensor, Tensor, float], None]
) -> Iterator[PreTrainedModel]:
    """Dense attention that hands every layer's tensors to `keep(layer, q, k, v, out, scaling)`.

    q, k (after RoPE), v and the attention output, in the shapes of `Attention`, without gradients;
    in the model's dtype, and attention computed in it, even where autocast has others.
    Raises as `replace_attention` does.
    """

    def attention(
        layer: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
    ) -> Tensor:
        q = q.to(model.dtype)
        k = k.to(model.dtype)
        v = v.to(model.dtype)
        with torch.autocast(q.device.type, enabled=False):
            out = dense_attention(q, k, v, real, scaling)
        keep(layer, q, k, v, out, scaling)
        return out

    with torch.no_grad(), replace_attention(model, attention):
        yield model
