"""Decoding: hooks that hand each attention module its layer of a LessCache; one prompt for many
caches.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lesslib.attention.cache import LessCache
from lesslib.attention.layer import LessLayer
from lesslib.attention.prompt import Candidates
from lesslib.hf.interface import DECODING
from lesslib.hf.replace import attention_modules, implementation


@contextlib.contextmanager
def decoding(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within the context `model` runs on a LessCache, in `generate` or called with it."""

    def hand_over(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Before an attention module runs: give it its layer, whose `update` may pass now."""
        cache = cache_of_call(kwargs, model)
        layer = cache.layers[module.layer_idx]  # type: ignore[index]
        if isinstance(layer, LessLayer):
            layer.armed = True
            kwargs["less_layer"] = layer
        return args, kwargs

    modules = attention_modules(model)
    with implementation(model, modules, DECODING):
        hooks = [
            module.register_forward_pre_hook(hand_over, with_kwargs=True)
            for module in modules.values()
        ]
        hooks.append(model.register_forward_pre_hook(begin_call, with_kwargs=True))
        hooks.append(model.register_forward_hook(end_call, with_kwargs=True))
        try:
            yield model
        finally:
            for hook in hooks:
                hook.remove()


def cache_of_call(kwargs: dict[str, Any], model: PreTrainedModel) -> LessCache:
    """The cache that a call brings. Raises ValueError for one of another kind or another model."""
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    if not isinstance(cache, LessCache):
        raise ValueError(
            "within `with less(model)` the model needs past_key_values=LessCache(model, ...),"
            f" not {type(cache).__name__}; to score whole sequences without a cache, enter"
            " `with less(model, policy, kernels)`"
        )
    if cache.owner != id(model):
        raise ValueError(
            "this LessCache was made for another model: make one with LessCache(model, ...) of"
            " the model that runs"
        )
    return cache


def begin_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before the model runs. Raises RuntimeError for a cache left half written."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, LessCache):
        return
    if cache.running:
        raise RuntimeError(
            "an earlier call stopped midway and left this LessCache half written: call its"
            " reset(), or make another"
        )
    cache.running = True


def end_call(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: object) -> None:
    """After the model ran, unless it raised."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, LessCache):
        cache.running = False


@torch.no_grad()
def fill(cache: LessCache, reader: LessCache) -> None:
    """Put the tokens that `reader` holds into the empty `cache`, as if it had read them.

    So one prompt serves many budgets and states. Raises ValueError where models or classes of
    policy differ, `reader` has no room for all it saw or stopped midway, or `cache` saw some.
    """
    n = int(reader.get_seq_length())
    is_same_kind = cache.owner == reader.owner and type(cache.policy) is type(reader.policy)
    holds_all = not reader.running and n <= reader.less_layers()[0].budget
    if not is_same_kind or not holds_all or cache.get_seq_length():
        raise ValueError(
            f"a cache of {cache.policy} that saw {cache.get_seq_length()} tokens cannot take {n}"
            f" from one of {reader.policy}: give an empty one of the same model and class of"
            " policy, and a reader that kept all in calls that ended"
        )
    for i, read in enumerate(reader.layers):
        layer = cache.layers[i]
        if not isinstance(layer, LessLayer):
            cache.layers[i] = copy.deepcopy(read)
            continue
        assert isinstance(read, LessLayer)
        # All slots, as a token that came alone lies after those of a prompt; empty ones go first.
        held = Candidates.of_slots(read.slots)
        layer.armed = True
        layer.update(held.keys, held.values)
        layer.seen.copy_(read.seen)
        layer.slots.count.copy_(read.slots.count)
        layer.take(held, now=read.slots.count[:, None, None] - 1)
