"""`with less(...)`: a model run with a policy and a state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from lesslib.attention.cache import state_given
from lesslib.attention.fit import check_fit
from lesslib.attention.whole_sequence import less_attention
from lesslib.hf.decode import decoding
from lesslib.hf.replace import attention_modules, replace_attention
from lesslib.policies import Policy
from lesslib.states import ModelState


@contextlib.contextmanager
def less(
    model: PreTrainedModel,
    policy: Policy | None = None,
    state: ModelState | None = None,
    mode: Literal["parallel", "decode"] | None = None,
    *,
    kernels: ModelState | None = None,
) -> Iterator[PreTrainedModel]:
    """Run `model` with LESS: over whole sequences, or token by token with a bounded cache.

        with less(model, H2O.from_fraction(0.05, 1024), kernels):  # mode="parallel"
            logits = model(input_ids, attention_mask).logits
        with less(model):  # mode="decode"
            model.generate(**inputs, past_key_values=LessCache(model, policy, kernels))

    mode="parallel" scores whole sequences in one forward, as decoding token by token from an
    empty cache would; `state` is what remembers the evicted pairs (LESS's kernels, or another
    state), None the policy alone (`kernels=` is its older name). mode="decode" leaves policy and
    state to the cache. The default is the mode that fits the arguments.

    Raises ValueError when the budget exceeds the model's context, or the state was made for
    another model or holds NaN, and TypeError for a model outside transformers' attention
    interface.
    """
    state = state_given(state, kernels)
    is_bare = policy is None and state is None
    if mode is None:
        mode = "decode" if is_bare else "parallel"
    if mode not in ("parallel", "decode"):
        raise ValueError(f"unknown mode {mode!r}: choose 'parallel' or 'decode'")
    if mode == "decode":
        if not is_bare:
            raise ValueError(
                "mode='decode' takes no policy and no kernels: give them to"
                " LessCache(model, policy, kernels)"
            )
        with decoding(model):
            yield model
        return
    attention_modules(model)
    if policy is None:
        raise TypeError(
            "mode='parallel' needs a policy: pass Full(), H2O(...), Lambda(...) or TOVA(...)"
        )
    chosen = policy
    check_fit(model, chosen, state)

    def attention(
        layer: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
    ) -> Tensor:
        layer_state = None if state is None else state[layer]
        return less_attention(q, k, v, chosen, layer_state, real, scaling)

    with replace_attention(model, attention):
        yield model
