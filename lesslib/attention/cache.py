"""LESS at decode time: a cache whose bytes do not depend on how many tokens were seen.

Here: what fits, layers, bytes. A layer's steps (attend, evict, absorb) are in layer.py; how a state
takes up what left is its own `absorb`, for LESS in lesslib/states/low_rank.py.

with less(model):
    model.generate(**inputs, past_key_values=LessCache(model, H2O(heavy=26, recent=26), kernels))
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from lesslib.attention.fit import check_fit
from lesslib.attention.layer import LessLayer
from lesslib.policies import Policy
from lesslib.states import ModelState, Nothing


class LessCache(Cache):
    """A bounded cache for `model.generate` and for calls of the model, within `with less(model)`.

    `policy` says who leaves; `state` absorbs what leaves: the kernels of
    lesslib.models.load_kernels, or any other `ModelState`; None is the policy alone. (`kernels=`
    is the older name of `state=`.)

    `prefill="dense"` is the paper's: a prompt attends all of itself, then one eviction.
    `"streaming"` sends it through the bounded cache, so that every token sees what the cache kept
    and not all, in time and memory linear in a prompt's length. By default each token is a decode
    step, with the same outcome as if it had been decoded; of a new sequence all of them are
    computed in one pass. With a `chunk` above 1, so many tokens attend each other densely before
    they compete: few large operations, where no kernel takes a sequence. Chunks are cut across the
    batch, so a row that is padded on the left is cut elsewhere than alone, and differs as two
    chunk sizes do. Sliding-window layers of hybrid models keep the layer that transformers gives
    them. The state moves to the model's device.

    Raises ValueError where policy, state and model do not fit, and NotImplementedError for layers
    of another kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        state: ModelState | None = None,
        prefill: Literal["dense", "streaming"] = "dense",
        chunk: int = 1,
        *,
        kernels: ModelState | None = None,
    ) -> None:
        state = state_given(state, kernels)
        check_fit(model, policy, state)
        check_bounded(policy)
        if prefill not in ("dense", "streaming"):
            raise ValueError(f"prefill {prefill!r}: choose 'dense' or 'streaming'")
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk={chunk!r} must be a whole number of tokens, at least 1")
        chunk_size = chunk if prefill == "streaming" else None
        super().__init__(layers=bounded_layers(model, policy, state, chunk_size))
        self.owner = id(model)
        self.policy = policy
        self.state = state
        self._config = model.config
        # Within a call of the model; still set when one was interrupted, and layers disagree on
        # what they saw.
        self.running = False

    @property
    def kernels(self) -> ModelState | None:
        """`state`, by its older name."""
        return self.state

    def less_layers(self) -> list[LessLayer]:
        """The layers that are bounded by the policy."""
        return [layer for layer in self.layers if isinstance(layer, LessLayer)]

    def reset(self) -> None:
        """Forget all tokens.

        The bounded layers keep their tensors; stock ones are new, as their own reset leaves zeros
        behind.
        """
        self.running = False
        for i, fresh in enumerate(DynamicCache(config=self._config).layers):
            layer = self.layers[i]
            if isinstance(layer, LessLayer):
                layer.reset()
            else:
                self.layers[i] = fresh

    def __deepcopy__(self, memo: dict) -> LessCache:
        """A copy with its own tokens, to read a prompt once and go on twice; the state's weights
        are shared.
        """
        memo[id(self.state)] = self.state
        memo[id(self._config)] = self._config
        for layer in self.less_layers():
            memo[id(layer.state)] = layer.state
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def activate_past_recording(self) -> None:
        self.less_layers()[0].crop(0)

    def report(self) -> dict[str, int]:
        """Bytes by what they hold.

        `slots` (keys and values), `bookkeeping` (positions, scores, counters), `state` (what
        absorbed the evicted pairs), `sliding` (stock layers); `cache`, their sum; `kernels` (the
        state's weights, whatever the batch); `full`, what a full cache would hold for the
        `tokens` seen.
        """
        report = {"tokens": 0, "slots": 0, "bookkeeping": 0, "state": 0, "sliding": 0}
        full = 0
        for layer in self.less_layers():
            if not layer.is_initialized:
                continue
            slots = layer.slots
            pairs = slots.keys.nbytes + slots.values.nbytes
            all_slots = sum(tensor.nbytes for tensor in slots.tensors().values())
            report["slots"] += pairs
            report["bookkeeping"] += all_slots - pairs + layer.seen.nbytes
            report["state"] += sum(tensor.nbytes for tensor in layer.memory.values())
            one_pair = slots.keys[:, :, 0].nbytes + slots.values[:, :, 0].nbytes
            full += int(layer.seen) * one_pair
            report["tokens"] = int(self.less_layers()[0].seen)
        stock: list[Any] = [layer for layer in self.layers if not isinstance(layer, LessLayer)]
        for sliding in stock:
            if sliding.is_initialized:
                report["sliding"] += sliding.keys.nbytes + sliding.values.nbytes
        held = ("slots", "bookkeeping", "state", "sliding")
        report["cache"] = sum(report[part] for part in held)
        report["kernels"] = 0
        if self.state is not None:
            report["kernels"] = sum(x.nbytes for x in self.state.state_dict().values())
        report["full"] = full + report["sliding"]
        return report

    def nbytes(self) -> int:
        """Bytes of all tensors held, without the state's weights; see `cache_bytes` for the
        formula.
        """
        return self.report()["cache"]

    def evicted(self, layer: int) -> Tensor:
        """True where a token is in no slot any more, [B, Hkv, T].

        T of the longest row, counted from each row's first real token. Raises ValueError for a
        layer with a sliding window, and before the first token.
        """
        cache = self.layers[layer]
        if not isinstance(cache, LessLayer):
            raise ValueError(
                f"layer {layer} has a sliding window and evicts by age alone: ask a layer of full"
                " attention"
            )
        if not cache.is_initialized:
            raise ValueError("this cache has seen no token yet: run the model first")
        position = cache.slots.position
        count = cache.slots.count[:, None, None]
        T = int(count.max())
        # One column more: empty slots, at position -1, go to the last one, which is cut off.
        is_held = torch.zeros(*position.shape[:2], T + 1, dtype=torch.bool, device=cache.device)
        is_held.scatter_(2, position.long() % (T + 1), True)
        was_seen = torch.arange(T, device=cache.device) < count
        return ~is_held[..., :T] & was_seen


def bounded_layers(
    model: PreTrainedModel, policy: Policy, state: ModelState | None, chunk: int | None
) -> list[Any]:
    """The layers of transformers' own cache, with a LessLayer in place of each that would grow."""
    layers: list[Any] = list(DynamicCache(config=model.config).layers)
    for i, layer in enumerate(layers):
        if type(layer).__name__ == "DynamicLayer":
            layers[i] = LessLayer(policy, Nothing() if state is None else state[i], chunk)
        elif not getattr(layer, "is_sliding", False) or not isinstance(layer, CacheLayerMixin):
            raise NotImplementedError(
                f"layer {i} of {type(model).__name__} keeps a {type(layer).__name__}: only"
                " attention layers, full or with a sliding window, are implemented"
            )
    if not any(isinstance(layer, LessLayer) for layer in layers):
        raise ValueError(
            f"every layer of {type(model).__name__} has a sliding window, so its cache is bounded"
            " already: use transformers' own"
        )
    return layers


def check_bounded(policy: Policy) -> None:
    """Raises ValueError for a policy that no bounded cache can run."""
    if policy.budget is None:
        raise ValueError(
            "Full() has no bound: use transformers' DynamicCache outside `with less(model)`, or"
            " another policy"
        )
    if policy.needs_full_rows:
        raise ValueError(
            f"{policy}: full rows need every key, which a bounded cache no longer has: use"
            " scores='cache'"
        )


def state_given(state: ModelState | None, kernels: ModelState | None) -> ModelState | None:
    """The state that a caller gave, under its name or the older one. Raises TypeError for both."""
    if state is not None and kernels is not None:
        raise TypeError("state and kernels are two names of one argument: give one of them")
    return kernels if state is None else state
