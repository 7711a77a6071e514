"""Whether a policy and a state fit a model, and how many bytes a cache of them holds."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lesslib.policies import Policy
from lesslib.states import ModelState


def model_shape(model: PreTrainedModel) -> dict[str, int]:
    """`layers`, `heads`, `kv_heads`, `head_dim` and `context` of a model."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = (
        getattr(config, "num_key_value_heads", None)
        or getattr(config, "num_kv_heads", None)
        or heads
    )
    # Falcon 7B
    if getattr(config, "multi_query", False) and not config.new_decoder_architecture:
        kv_heads = 1
    return {
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "context": config.max_position_embeddings,
    }


def cache_bytes(
    shape: dict[str, int],
    policy: Policy,
    state: ModelState | int,
    batch: int,
    dtype: torch.dtype,
) -> int:
    """Bytes of a LessCache before any is allocated, for a `model_shape` without sliding windows.

    `state`: a state, or R for the low-rank state with kernels of that size, 0 for the policy alone.
    Per layer and row: Hkv (C + 1) slots of two vectors of D in `dtype`, a score and a position; Hkv
    times the state's numbers in float32 or wider; counters.
    """
    if policy.budget is None:
        raise ValueError("Full() has no bound: its bytes grow with the tokens")
    D = shape["head_dim"]
    wide = max(4, dtype.itemsize)
    numbers = state * (D + 1) if isinstance(state, int) else state.numbers(D, D)
    position = 4
    slot = 2 * D * dtype.itemsize + position + wide
    free = 8
    per_head = (policy.budget + 1) * slot + numbers * wide + free
    count = 4
    per_row = shape["kv_heads"] * per_head + count
    seen = 8
    return shape["layers"] * (batch * per_row + seen)


def check_fit(model: PreTrainedModel, policy: Policy, state: ModelState | None) -> None:
    """Raises ValueError or TypeError where policy, state and model do not fit.

    Else moves the state to the model's device, to evaluate.
    """
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy is a {type(policy).__name__}; pass Full(), H2O(...), Lambda(...) or TOVA(...)"
        )
    if not (state is None or isinstance(state, ModelState)):
        raise TypeError(
            f"kernels is a {type(state).__name__}; pass what lesslib.models.load_kernels gives,"
            " or None for the policy alone"
        )
    shape = model_shape(model)
    policy.check(shape["context"])
    if state is not None:
        state.check(shape, getattr(model, "less_identity", None))
        state.to(model.device).eval()
