"""The only door to transformers' internals: put an attention of our own in place of a model's, for any model on its attention interface."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.models.falcon import modeling_falcon as falcon

from .kernels import Kernels
from .parallel import dense_attention, less_attention
from .policies import Policy

# (layer index, q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], real [B, S] or None, scaling) -> [B, Hq, S, Dv]
Attention = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]

WORKS = "decoders on transformers' attention interface, such as Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, GPT-NeoX and OLMo 2, and with Falcon"


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, **kwargs):
    """The function registered with transformers: q, k, v after RoPE in, [B, S, Hq, Dv] out."""
    attention = getattr(module, "less_attention", None)
    if attention is None:
        raise RuntimeError(f"{type(module).__name__} reached lesslib's attention outside `with less(...)`: run it within that context")
    for name, what in (("softcap", "logit soft-capping"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{what} ({name}) of {type(module).__name__} is not implemented: use a model without it")
    if dropout:
        raise ValueError(f"attention dropout is {dropout}: call model.eval() first")
    if query.shape[2] != key.shape[2]:
        raise ValueError("mode='parallel' scores whole sequences, without past_key_values: generate outside this context")
    if sliding_window is not None and sliding_window < key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions: pass a 2D mask [batch, tokens], 0 for padding")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention(module.layer_idx, query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def _mask(*, q_length, kv_length, mask_function=causal_mask_function, attention_mask=None, local_size=None, **kwargs):
    """The mask handed to `_attention`: which tokens are real, [B, S]; sliding-window layers keep their stock mask."""
    if local_size is not None and local_size < kv_length:
        stock = {"mask_function": mask_function, "attention_mask": attention_mask, "local_size": local_size, **kwargs}
        return sdpa_mask(q_length=q_length, kv_length=kv_length, **stock)
    plain = kwargs.get("allow_is_causal_skip", True) if local_size is not None else mask_function is causal_mask_function
    if q_length == kv_length and not plain:  # a longer kv_length is refused by `_attention`
        raise NotImplementedError("packed sequences and custom masks are not implemented: score one sequence per row, padding masked in 2D")
    return None if attention_mask is None else attention_mask[:, -q_length:].bool()


class FalconLessAttention(falcon.FalconAttention):
    """Falcon's attention through `_attention`, as its own class does not use the attention interface; heads are split by group."""

    def forward(self, hidden_states, alibi, attention_mask, layer_past=None, position_embeddings=None, **kwargs):
        if alibi is not None:
            raise NotImplementedError("Falcon with alibi is not implemented: use a Falcon with rotary positions (alibi=False), such as 7B or 40B")
        fused = self.query_key_value(hidden_states).unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        q, k, v = (x.transpose(1, 2) for x in (fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]))
        q, k = falcon.apply_rotary_pos_emb(q, k, *position_embeddings)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out, weights = _attention(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.dense(out.flatten(2)), weights


falcon.FALCON_ATTENTION_CLASSES["less"] = FalconLessAttention
AttentionInterface.register("less", _attention)
AttentionMaskInterface.register("less", _mask)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The model's causal attention modules by layer index. Raises TypeError for a model outside the attention interface."""
    fits = isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder
    fits = fits and (model._can_set_attn_implementation() or isinstance(model, falcon.FalconPreTrainedModel))
    causal = [module for module in model.modules() if getattr(module, "is_causal", False)] if fits else []
    found = {i: module for module in causal if isinstance(i := getattr(module, "layer_idx", None), int)}
    if not found:
        raise TypeError(f"{type(model).__name__} is not a decoder on transformers' attention interface; lesslib works with {WORKS}")
    return found


def output_projection(module: nn.Module) -> nn.Linear:
    """The linear map W_O after attention, whatever the architecture calls it. Raises TypeError when there is none."""
    for name in ("o_proj", "dense", "out_proj", "c_proj"):
        if isinstance(projection := getattr(module, name, None), nn.Linear):
            return projection
    raise TypeError(f"{type(module).__name__} has no output projection called o_proj, dense, out_proj or c_proj")


def model_shape(model: PreTrainedModel) -> dict[str, int]:
    """`layers`, `heads`, `kv_heads`, `head_dim` and `context` of a model."""
    c = model.config.get_text_config(decoder=True)
    heads = c.num_attention_heads
    kv_heads = getattr(c, "num_key_value_heads", None) or getattr(c, "num_kv_heads", None) or heads
    if getattr(c, "multi_query", False) and not c.new_decoder_architecture:  # Falcon 7B
        kv_heads = 1
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    context = c.max_position_embeddings
    return {"layers": c.num_hidden_layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "context": context}


@contextlib.contextmanager
def replace_attention(model: PreTrainedModel, attention: Attention) -> Iterator[PreTrainedModel]:
    """Within the context every attention layer of `model` calls `attention`; afterwards the model is as it was.

    Sliding-window layers whose window is shorter than the sequence keep their stock attention. Raises TypeError for a
    model outside the attention interface and RuntimeError when it is replaced already.
    """
    modules, before = attention_modules(model), model.config._attn_implementation
    if before == "less":
        raise RuntimeError("this model's attention is already replaced: leave the first `with less(...)` before entering another")
    try:
        for module in modules.values():
            vars(module)["less_attention"] = attention
        _set_implementation(model, modules, "less")
        yield model
    finally:
        _set_implementation(model, modules, before)
        for module in modules.values():
            del module.less_attention


def _set_implementation(model: PreTrainedModel, modules: dict[int, nn.Module], name: str) -> None:
    """`model.set_attn_implementation`, which Falcon lacks: its modules take the class in its registry, which has the same weights."""
    if isinstance(model, falcon.FalconPreTrainedModel):
        model.config._attn_implementation = name
        for module in modules.values():
            module.__class__ = falcon.FALCON_ATTENTION_CLASSES[name]
    else:
        model.set_attn_implementation(name)


@contextlib.contextmanager
def less(model: PreTrainedModel, policy: Policy, kernels: Kernels | None = None, mode: str = "parallel") -> Iterator[PreTrainedModel]:
    """Run `model` under an eviction policy, with LESS where `kernels` are given (None: the sparse baseline).

        with less(model, H2O.from_fraction(0.05, 1024), kernels, mode="parallel"):
            logits = model(input_ids, attention_mask).logits

    mode="parallel" scores whole sequences in one forward, as decoding token by token would; the kernels move to the model's
    device, in evaluation mode. Raises ValueError when the budget exceeds the model's context, or the kernels were made for
    another model or hold NaN, and TypeError for a model outside transformers' attention interface.
    """
    if mode != "parallel":
        raise ValueError(f"unknown mode {mode!r}: choose 'parallel'")
    if not isinstance(policy, Policy):
        raise TypeError(f"policy is a {type(policy).__name__}; pass Full(), H2O(...), Lambda(...) or TOVA(...)")
    if not (kernels is None or isinstance(kernels, Kernels)):
        raise TypeError(f"kernels is a {type(kernels).__name__}; pass what lesslib.models.load_kernels gives, or None for the policy alone")
    attention_modules(model)
    policy.check(model_shape(model)["context"])
    if kernels is not None:
        kernels.check(model_shape(model), getattr(model, "less_identity", None))
        kernels.to(model.device).eval()

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float) -> Tensor:
        return less_attention(q, k, v, policy, None if kernels is None else kernels[layer], real, scaling)

    with replace_attention(model, attention):
        yield model


@contextlib.contextmanager
def capture(model: PreTrainedModel, keep: Callable[[int, Tensor, Tensor, Tensor, Tensor, float], None]) -> Iterator[PreTrainedModel]:
    """Dense attention that hands every layer's q, k, v (after RoPE), output and scaling to `keep(layer, q, k, v, out, scaling)`.

    Shapes as in `Attention`, without gradients. Raises as `replace_attention` does.
    """

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float) -> Tensor:
        out = dense_attention(q, k, v, real, scaling)
        keep(layer, q, k, v, out, scaling)
        return out

    with torch.no_grad(), replace_attention(model, attention):
        yield model
