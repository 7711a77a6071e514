"""Whether a policy and kernels fit a model, and what a cache of them weighs."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lesslib.policies import Policy
from lesslib.states import Kernels


def model_shape(model: PreTrainedModel) -> dict[str, int]:
    """`layers`, `heads`, `kv_heads`, `head_dim` and `context` of a model."""
    c = model.config.get_text_config(decoder=True)
    heads = c.num_attention_heads
    kv_heads = getattr(c, "num_key_value_heads", None) or getattr(c, "num_kv_heads", None) or heads
    if getattr(c, "multi_query", False) and not c.new_decoder_architecture:  # Falcon 7B
        kv_heads = 1
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    context = c.max_position_embeddings
    return {
        "layers": c.num_hidden_layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "context": context,
    }


def cache_bytes(
    shape: dict[str, int], policy: Policy, kernel_size: int, batch: int, dtype: torch.dtype
) -> int:
    """Bytes of a LessCache before any is allocated, for a `model_shape` without sliding windows; `kernel_size` 0 for the policy alone.

    Per layer and row, Hkv (C + 1) slots of two vectors of D in `dtype`, a score and a position; Hkv (R D + R) float32 of state; counters.
    """
    if policy.budget is None:
        raise ValueError("Full() has no bound: its bytes grow with the tokens")
    slot = 2 * shape["head_dim"] * dtype.itemsize + 4 + max(4, dtype.itemsize)
    state = kernel_size * (shape["head_dim"] + 1) * max(4, dtype.itemsize)
    return shape["layers"] * (
        batch * (shape["kv_heads"] * ((policy.budget + 1) * slot + state + 8) + 4) + 8
    )


def check_fit(model: PreTrainedModel, policy: Policy, kernels: Kernels | None) -> None:
    """Raises ValueError or TypeError where policy, kernels and model do not fit; else moves the kernels to its device, to evaluate."""
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy is a {type(policy).__name__}; pass Full(), H2O(...), Lambda(...) or TOVA(...)"
        )
    if not (kernels is None or isinstance(kernels, Kernels)):
        raise TypeError(
            f"kernels is a {type(kernels).__name__}; pass what lesslib.models.load_kernels gives, or None for the policy alone"
        )
    policy.check(model_shape(model)["context"])
    if kernels is not None:
        kernels.check(model_shape(model), getattr(model, "less_identity", None))
        kernels.to(model.device).eval()
