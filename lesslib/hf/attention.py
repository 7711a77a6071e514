"""The only door to transformers' internals: put an attention of our own in place of a model's, for any model on its attention interface.

Two implementations are registered: "less" sees whole sequences, "less_cache" decodes with a LessCache.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.models.falcon import modeling_falcon as falcon

from lesslib.attention.cache import LessCache, LessLayer
from lesslib.attention.fit import check_fit
from lesslib.attention.whole_sequence import dense_attention, less_attention
from lesslib.policies import Policy
from lesslib.states import Kernels

# (layer index, q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], real [B, S] or None, scaling) -> [B, Hq, S, Dv]
Attention = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]

WORKS = "decoders on transformers' attention interface, such as Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, GPT-NeoX and OLMo 2, and Falcon"


def _attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    **kwargs,
):
    """The function registered with transformers: q, k, v after RoPE in, [B, S, Hq, Dv] out."""
    attention = getattr(module, "less_attention", None)
    if attention is None:
        raise RuntimeError(
            f"{type(module).__name__} reached lesslib's attention outside `with less(...)`: run it within that context"
        )
    _check_call(module, dropout, kwargs)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "mode='parallel' scores whole sequences, without past_key_values: generate in `with less(model)` with a LessCache"
        )
    if sliding_window is not None and sliding_window < key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    _check_mask(attention_mask)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention(module.layer_idx, query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def _cached_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, less_layer=None, **kwargs
):
    """As `_attention`, for new tokens that the module's `less_layer` attends; a stock layer (sliding window) gets stock attention."""
    _check_call(module, dropout, kwargs)
    if less_layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    _check_mask(attention_mask)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return less_layer.attend(query, key, value, attention_mask, scaling).transpose(
        1, 2
    ).contiguous(), None


def _check_call(module, dropout, kwargs) -> None:
    """Raises for what SDPA and our attention would silently leave out."""
    for name, what in (("softcap", "logit soft-capping"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{what} ({name}) of {type(module).__name__} is not implemented: use a model without it"
            )
    if dropout:
        raise ValueError(f"attention dropout is {dropout}: call model.eval() first")


def _check_mask(attention_mask) -> None:
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions: pass a 2D mask [batch, tokens], 0 for padding"
        )


def _mask(
    *,
    q_length,
    kv_length,
    mask_function=causal_mask_function,
    attention_mask=None,
    local_size=None,
    **kwargs,
):
    """The mask handed to `_attention`: which tokens are real, [B, S]; sliding-window layers keep their stock mask."""
    if local_size is not None and local_size < kv_length:
        stock = {
            "mask_function": mask_function,
            "attention_mask": attention_mask,
            "local_size": local_size,
            **kwargs,
        }
        return sdpa_mask(q_length=q_length, kv_length=kv_length, **stock)
    plain = (
        kwargs.get("allow_is_causal_skip", True)
        if local_size is not None
        else mask_function is causal_mask_function
    )
    if q_length == kv_length and not plain:  # a longer kv_length is refused by `_attention`
        raise NotImplementedError(
            "packed sequences and custom masks are not implemented: score one sequence per row, padding masked in 2D"
        )
    return None if attention_mask is None else attention_mask[:, -q_length:].bool()


def _cached_mask(
    *, q_length, local_size=None, mask_function=causal_mask_function, attention_mask=None, **kwargs
):
    """The mask handed to `_cached_attention`: which of the new tokens are real, [B, S]; sliding-window layers keep their stock mask."""
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
            "packed sequences and custom masks are not implemented: use one sequence per row, padding masked in 2D"
        )
    return None if attention_mask is None else attention_mask[:, -q_length:].bool()


class FalconLessAttention(falcon.FalconAttention):
    """Falcon's attention through `_attention`, as its own class does not use the attention interface; heads are split by group."""

    def forward(
        self,
        hidden_states,
        alibi,
        attention_mask,
        layer_past=None,
        position_embeddings=None,
        **kwargs,
    ):
        if alibi is not None:
            raise NotImplementedError(
                "Falcon with alibi is not implemented: use one with rotary positions (alibi=False), as 7B and 40B"
            )
        fused = self.query_key_value(hidden_states).unflatten(
            -1, (self.num_kv_heads, -1, self.head_dim)
        )
        q, k, v = (
            x.transpose(1, 2)
            for x in (fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :])
        )
        q, k = falcon.apply_rotary_pos_emb(q, k, *position_embeddings)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        attention = (
            _cached_attention if self.config._attn_implementation == "less_cache" else _attention
        )
        out, weights = attention(
            self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, **kwargs
        )
        return self.dense(out.flatten(2)), weights


for _name, _function, _mask_function in (
    ("less", _attention, _mask),
    ("less_cache", _cached_attention, _cached_mask),
):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(
        _name, _mask_function
    )  # without it transformers would drop the padding
    falcon.FALCON_ATTENTION_CLASSES[_name] = FalconLessAttention


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The model's causal attention modules by layer index. Raises TypeError for a model outside the attention interface."""
    fits = isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder
    fits = fits and (
        model._can_set_attn_implementation() or isinstance(model, falcon.FalconPreTrainedModel)
    )
    causal = (
        [module for module in model.modules() if getattr(module, "is_causal", False)]
        if fits
        else []
    )
    found = {
        i: module for module in causal if isinstance(i := getattr(module, "layer_idx", None), int)
    }
    if not found:
        raise TypeError(
            f"{type(model).__name__} is not a decoder on transformers' attention interface; lesslib works with {WORKS}"
        )
    return found


def output_projection(module: nn.Module) -> nn.Linear:
    """The linear map W_O after attention, whatever the architecture calls it. Raises TypeError when there is none."""
    for name in ("o_proj", "dense", "out_proj", "c_proj"):
        if isinstance(projection := getattr(module, name, None), nn.Linear):
            return projection
    raise TypeError(
        f"{type(module).__name__} has no output projection called o_proj, dense, out_proj or c_proj"
    )


@contextlib.contextmanager
def replace_attention(model: PreTrainedModel, attention: Attention) -> Iterator[PreTrainedModel]:
    """Within the context every attention layer of `model` calls `attention`; afterwards the model is as it was.

    Sliding-window layers whose window is shorter than the sequence keep their stock attention. Raises TypeError for a
    model outside the attention interface and RuntimeError when it is replaced already.
    """
    modules = attention_modules(model)
    with _implementation(model, modules, "less"):
        try:
            for module in modules.values():
                vars(module)["less_attention"] = attention
            yield model
        finally:
            for module in modules.values():
                del module.less_attention


@contextlib.contextmanager
def _implementation(
    model: PreTrainedModel, modules: dict[int, nn.Module], name: str
) -> Iterator[None]:
    """Within the context `model` runs the implementation `name`. Falcon, which cannot change it, gets the class in its registry."""

    def change(name: str) -> None:
        if isinstance(model, falcon.FalconPreTrainedModel):
            model.config._attn_implementation = name
            for module in modules.values():
                module.__class__ = falcon.FALCON_ATTENTION_CLASSES[name]
        else:
            model.set_attn_implementation(name)

    before = model.config._attn_implementation
    if before in ("less", "less_cache"):
        raise RuntimeError(
            "this model's attention is already replaced: leave the first `with less(...)` before entering another"
        )
    try:
        change(name)
        yield
    finally:
        change(before)


@contextlib.contextmanager
def _decoding(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within the context `model` runs on a LessCache, in `generate` or called with it."""

    def hand_over(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if not isinstance(cache, LessCache):
            needs = f"within `with less(model)` the model needs past_key_values=LessCache(model, ...), not {type(cache).__name__}"
            raise ValueError(
                f"{needs}; to score whole sequences without a cache, enter `with less(model, policy, kernels)`"
            )
        if cache.owner != id(model):
            raise ValueError(
                "this LessCache was made for another model: make one with LessCache(model, ...) of the model that runs"
            )
        layer = cache.layers[module.layer_idx]  # type: ignore[index]
        if isinstance(layer, LessLayer):
            layer.armed = True
            kwargs["less_layer"] = layer
        return args, kwargs

    def begin(model: nn.Module, args: tuple, kwargs: dict) -> None:
        if isinstance(cache := kwargs.get("past_key_values"), LessCache):
            if cache.running:
                raise RuntimeError(
                    "an earlier call stopped midway and left this LessCache half written: call its reset(), or make another"
                )
            cache.running = True

    def end(model: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if isinstance(cache := kwargs.get("past_key_values"), LessCache):
            cache.running = False

    modules = attention_modules(model)
    with _implementation(model, modules, "less_cache"):
        hooks = [
            module.register_forward_pre_hook(hand_over, with_kwargs=True)
            for module in modules.values()
        ]
        hooks += [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end, with_kwargs=True),
        ]
        try:
            yield model
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def fill(cache: LessCache, reader: LessCache) -> None:
    """Put the tokens that `reader` holds into the empty `cache`, as if it had read them: one prompt serves many budgets and kernels.

    Raises ValueError where models or classes of policy differ, `reader` has no room for all it saw or stopped midway, or `cache` saw some.
    """
    alike, n = (
        (cache.owner, type(cache.policy)) == (reader.owner, type(reader.policy)),
        int(reader.get_seq_length()),
    )
    if not alike or reader.running or n > reader.less_layers()[0].budget or cache.get_seq_length():
        what = f"a cache of {cache.policy} that saw {cache.get_seq_length()} tokens cannot take {n} from one of {reader.policy}"
        raise ValueError(
            f"{what}: give an empty one of the same model and class of policy, and a reader that kept all in calls that ended"
        )
    cache.layers = [
        own if isinstance(own, LessLayer) else copy.deepcopy(its)
        for own, its in zip(cache.layers, reader.layers, strict=True)
    ]
    for mine, its in zip(cache.less_layers(), reader.less_layers(), strict=True):
        k, v, position, score = (buffer[:, :, :n] for buffer in its.buffers()[:4])
        mine.armed = True
        mine.update(k, v)
        mine.count.copy_(its.count)
        mine.take(k, v, position, score, its.count[:, None, None] - 1)


@contextlib.contextmanager
def less(
    model: PreTrainedModel,
    policy: Policy | None = None,
    kernels: Kernels | None = None,
    mode: str | None = None,
) -> Iterator[PreTrainedModel]:
    """Run `model` with LESS: over whole sequences, or token by token with a bounded cache.

        with less(model, H2O.from_fraction(0.05, 1024), kernels):  # mode="parallel"
            logits = model(input_ids, attention_mask).logits
        with less(model):  # mode="decode"
            model.generate(**inputs, past_key_values=LessCache(model, policy, kernels))

    mode="parallel" scores whole sequences in one forward, as decoding token by token from an empty cache would; kernels=None is
    the policy alone. mode="decode" leaves policy and kernels to the cache. The default is the mode that fits the arguments. Raises
    ValueError when the budget exceeds the model's context, or the kernels were made for another model or hold NaN, and TypeError for
    a model outside transformers' attention interface.
    """
    mode = mode or ("decode" if policy is None and kernels is None else "parallel")
    if mode not in ("parallel", "decode"):
        raise ValueError(f"unknown mode {mode!r}: choose 'parallel' or 'decode'")
    if mode == "decode":
        if policy is not None or kernels is not None:
            raise ValueError(
                "mode='decode' takes no policy and no kernels: give them to LessCache(model, policy, kernels)"
            )
        with _decoding(model):
            yield model
        return
    attention_modules(model)
    if policy is None:
        raise TypeError(
            "mode='parallel' needs a policy: pass Full(), H2O(...), Lambda(...) or TOVA(...)"
        )
    check_fit(model, policy, kernels)

    def attention(
        layer: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
    ) -> Tensor:
        return less_attention(
            q, k, v, policy, None if kernels is None else kernels[layer], real, scaling
        )

    with replace_attention(model, attention):
        yield model


@contextlib.contextmanager
def capture(
    model: PreTrainedModel, keep: Callable[[int, Tensor, Tensor, Tensor, Tensor, float], None]
) -> Iterator[PreTrainedModel]:
    """Dense attention that hands every layer's q, k, v (after RoPE), output and scaling to `keep(layer, q, k, v, out, scaling)`.

    Shapes as in `Attention`, without gradients. Raises as `replace_attention` does.
    """

    def attention(
        layer: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
    ) -> Tensor:
        out = dense_attention(q, k, v, real, scaling)
        keep(layer, q, k, v, out, scaling)
        return out

    with torch.no_grad(), replace_attention(model, attention):
        yield model
