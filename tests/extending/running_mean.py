"""A state of one file: the mean of all evicted pairs, read as one more key and value."""

import torch
from torch import Tensor

from lesslib.ops.merge import Part
from lesslib.states import Memory, State, register_state


@register_state
class RunningMean(State):
    """One mean key and one mean value per key-value head, with the log of their count as a bias.

    A query gives the pair the weight count * exp(q k / sqrt D), as if all that left had the same
    key.
    """

    name = "running-mean"

    def numbers(self, head_dim: int, value_dim: int) -> int:
        return head_dim + value_dim + 1

    def empty(self, keys: Tensor, values: Tensor) -> Memory:
        B, Hkv, _, D = keys.shape
        wide = torch.promote_types(keys.dtype, torch.float32)
        return {
            "key": keys.new_zeros(B, Hkv, D, dtype=wide),
            "value": keys.new_zeros(B, Hkv, values.shape[-1], dtype=wide),
            "count": keys.new_zeros(B, Hkv, dtype=wide),
        }

    def absorb(self, memory: Memory, keys: Tensor, values: Tensor, is_held: Tensor) -> None:
        count = memory["count"]
        is_held = is_held.to(count.dtype)
        arrived = is_held.sum(-1)  # [B, Hkv]
        count.add_(arrived)
        for name, new in (("key", keys), ("value", values)):
            mean = memory[name]
            total = (new.to(mean.dtype) * is_held[..., None]).sum(2)
            # mean += (sum of the new ones - as many old means) / count; nothing where none came
            mean.add_((total - arrived[..., None] * mean) / count.clamp(min=1)[..., None])

    def read(self, memory: Memory, queries: Tensor, scaling: float) -> Part:
        groups = queries.shape[1] // self.kv_heads
        key = memory["key"].repeat_interleave(groups, 1)  # [B, Hq, D]
        value = memory["value"].repeat_interleave(groups, 1)
        count = memory["count"].repeat_interleave(groups, 1)
        logits = (queries.to(key.dtype) @ key[..., None])[..., 0] * scaling  # [B, Hq, S]
        output = value[:, :, None].expand(*logits.shape, -1)
        return Part(output, logits + count.log()[..., None])
