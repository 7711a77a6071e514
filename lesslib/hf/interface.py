"""The attention functions and masks that are registered with transformers.

"less" sees whole sequences, "less_cache" decodes with a LessCache. A mask function goes with each:
without it transformers would drop the padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

# Names under which transformers knows the two.
WHOLE_SEQUENCE = "less"
DECODING = "less_cache"

# (layer index, q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], real [B, S] or None, scaling)
# -> [B, Hq, S, Dv]
Attention = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def whole_sequence_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    **kwargs,
) -> tuple[Tensor, None]:
    """q, k, v after RoPE in, [B, S, Hq, Dv] out: calls what `replace_attention` put on the
    module.
    """
    attention = getattr(module, "less_attention", None)
    if attention is None:
        raise RuntimeError(
            f"{type(module).__name__} reached lesslib's attention outside `with less(...)`:"
            " run it within that context"
        )
    check_call(module, kwargs)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "mode='parallel' scores whole sequences, without past_key_values: generate in"
            " `with less(model)` with a LessCache"
        )
    window = kwargs.get("sliding_window")
    if window is not None and window < key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    check_mask(attention_mask)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = attention(module.layer_idx, query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def decoding_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    **kwargs,
) -> tuple[Tensor, None]:
    """New tokens over the module's `less_layer`; a stock layer (sliding window) gets stock
    attention.
    """
    check_call(module, kwargs)
    less_layer = kwargs.pop("less_layer", None)
    if less_layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    check_mask(attention_mask)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = less_layer.attend(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def check_call(module: Any, kwargs: dict[str, Any]) -> None:
    """Raises for what SDPA and our attention would silently leave out."""
    for name, feature in (("softcap", "logit soft-capping"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{feature} ({name}) of {type(module).__name__} is not implemented:"
                " use a model without it"
            )
    if kwargs.get("dropout"):
        raise ValueError(f"attention dropout is {kwargs['dropout']}: call model.eval() first")


def check_mask(attention_mask: Tensor | None) -> None:
    """Raises ValueError for a mask that is not [batch, tokens]."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions: pass a 2D mask [batch, tokens],"
            " 0 for padding"
        )


def whole_sequence_mask(
    *,
    q_length,
    kv_length,
    mask_function=causal_mask_function,
    attention_mask=None,
    local_size=None,
    **kwargs,
) -> Tensor | None:
    """Which tokens are real, [B, S]; sliding-window layers keep their stock mask."""
    if local_size is not None and local_size < kv_length:
        return sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
    if local_size is None:
        is_plain = mask_function is causal_mask_function
    else:
        is_plain = kwargs.get("allow_is_causal_skip", True)
    # A longer kv_length is refused by `whole_sequence_attention`.
    if q_length == kv_length and not is_plain:
        raise NotImplementedError(
            "packed sequences and custom masks are not implemented: score one sequence per row,"
            " padding masked in 2D"
        )
    return real_tokens(attention_mask, q_length)


def decoding_mask(
    *,
    q_length,
    local_size=None,
    mask_function=causal_mask_function,
    attention_mask=None,
    **kwargs,
) -> Tensor | None:
    """Which of the new tokens are real, [B, S]; sliding-window layers keep their stock mask."""
    if local_size is not None:
        return sdpa_mask(
            q_length=q_length,
            local_size=local_size,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if mask_function is not causal_mask_function:
        raise NotImplementedError(
            "packed sequences and custom masks are not implemented: use one sequence per row,"
            " padding masked in 2D"
        )
    return real_tokens(attention_mask, q_length)


def real_tokens(attention_mask: Tensor | None, q_length: int) -> Tensor | None:
    """The last `q_length` columns of a 2D mask as booleans."""
    return None if attention_mask is None else attention_mask[:, -q_length:].bool()


AttentionInterface.register(WHOLE_SEQUENCE, whole_sequence_attention)
AttentionMaskInterface.register(WHOLE_SEQUENCE, whole_sequence_mask)
AttentionInterface.register(DECODING, decoding_attention)
AttentionMaskInterface.register(DECODING, decoding_mask)
