"""What every state is: tensors of constant size that absorb evicted pairs, and a softmax part
that reads them.

A `State` belongs to one attention layer. It holds no tokens itself: those lie in a `Memory`, one
for every cache, which `empty` makes, `absorb` changes in place and `read` turns into a `Part`
that is merged with the attention over the slots. A `ModelState` is the states of all layers of a
model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lesslib.ops.blocks import gather_tokens
from lesslib.ops.merge import Part, merge
from lesslib.ops.scan import arrivals

# Tensors by name, the batch first; they keep their addresses, so that compiled steps find them.
Memory = dict[str, Tensor]

SHAPE_FIELDS = ("layers", "heads", "kv_heads", "head_dim")


class State(nn.Module):
    """Base of all states of one layer; a state without weights needs no more than the four
    methods below.

    A new state is a subclass under `@register_state` that overrides `numbers`, `empty`, `absorb`
    and `read`. `over_arrivals` runs these along a sequence; a state with a faster way overrides
    it too. Shapes: B batch, Hq query heads, Hkv key-value heads, S tokens, D and Dv sizes of keys
    and values.
    """

    # How it is called in results and on the command line.
    name: ClassVar[str]
    # True for the state that remembers nothing, whose part is left out of the merge.
    is_empty: ClassVar[bool] = False
    # Of phi, psi, read and absorb those that kernels of lesslib.ops have.
    kernel_operations: ClassVar[frozenset[str]] = frozenset()
    # Set by the trainer of layers: while training, features may be computed in half precision.
    trains_in_half: bool = False

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim

    def numbers(self, head_dim: int, value_dim: int) -> int:
        """Scalars held per key-value head of a row, so that tables at equal bytes are computed."""
        raise NotImplementedError

    def empty(self, keys: Tensor, values: Tensor) -> Memory:
        """A memory of nothing yet, for keys like [B, Hkv, S, D] and values like [B, Hkv, S, Dv].

        Tensors of float32 or wider, on the keys' device, zero wherever nothing was absorbed.
        """
        raise NotImplementedError

    def absorb(self, memory: Memory, keys: Tensor, values: Tensor, is_held: Tensor) -> None:
        """Take up evicted pairs, in place: keys [B, Hkv, n, D] and values [B, Hkv, n, Dv].

        `is_held` [B, Hkv, n] is False where a slot was empty. Static shapes, no host
        synchronisation.
        """
        raise NotImplementedError

    def read(self, memory: Memory, queries: Tensor, scaling: float) -> Part:
        """What queries [B, Hq, S, D] find: output [B, Hq, S, Dv] and log-sum-exp [B, Hq, S].

        `scaling` is what the model multiplies its logits with (1/sqrt D, as a rule). The
        log-sum-exp is -inf where nothing was absorbed.
        """
        raise NotImplementedError

    def over_arrivals(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        has_arrived: Tensor,
        scaling: float,
    ) -> Part:
        """`read` before every query of a sequence, of pairs that arrive one before each query.

        queries [B, Hq, S, D]; keys [B, Hkv, S, D] and values [B, Hkv, S, Dv] in order of arrival;
        `has_arrived` [B, Hkv, S] is False where none does. A state that has a faster form than the
        loop of `along_arrivals` overrides it.
        """
        memory = self.empty(keys, values)
        return self.along_arrivals(memory, queries, keys, values, has_arrived, scaling)

    def along_arrivals(
        self,
        memory: Memory,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        has_arrived: Tensor,
        scaling: float,
    ) -> Part:
        """`over_arrivals`, after which `memory`, empty so far, holds all that arrived.

        This is the definition, a loop over queries. A prompt that is read by a bounded cache one
        token at a time takes this way.
        """
        outputs = []
        sums = []
        for t in range(queries.shape[2]):
            now = slice(t, t + 1)
            self.absorb(memory, keys[:, :, now], values[:, :, now], has_arrived[:, :, now])
            part = self.read(memory, queries[:, :, now], scaling)
            # Copies, in case a state hands out a view of its memory, which changes again.
            outputs.append(part.output.clone())
            sums.append(part.logsumexp.clone())
        return Part(torch.cat(outputs, 2), torch.cat(sums, 2))

    def join_over_arrivals(
        self,
        slots: Part,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        has_arrived: Tensor,
        scaling: float,
    ) -> Tensor:
        """Attention over slots and state together, [B, Hq, S, Dv]; arguments of `over_arrivals`.

        A state whose part need not be written out overrides it.
        """
        return merge(slots, self.over_arrivals(queries, keys, values, has_arrived, scaling))

    def over_sequence(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        evicted_at: Tensor,
        scaling: float,
    ) -> Part:
        """What every query of a sequence finds in the state, as decoding would: see
        `over_arrivals`.

        queries [B, Hq, S, D], keys [B, Hkv, S, D] and values [B, Hkv, S, Dv] in order of position;
        `evicted_at` [B, Hkv, S] of a policy.
        """
        arrived = arrivals(evicted_at)
        token = arrived.clamp(min=0)
        return self.over_arrivals(
            queries, gather_tokens(keys, token), gather_tokens(values, token), arrived >= 0, scaling
        )

    @classmethod
    def for_model(cls, shape: dict[str, int], **settings: Any) -> ModelState:
        """The state of all layers of a model of `shape` (see `lesslib.models.model_shape`)."""
        sizes = {field: shape[field] for field in SHAPE_FIELDS if field != "layers"}
        layers = [cls(**sizes, **settings) for _ in range(shape["layers"])]
        return ModelState(model_header(shape), layers)


class ModelState(nn.Module):
    """The states of all layers of a model, with a header that says what they were made for.

    `header` holds at least layers, heads, kv_heads and head_dim.
    """

    def __init__(self, header: dict, layers: list[State]) -> None:
        super().__init__()
        self.header = header
        self.layers = nn.ModuleList(layers)

    def __getitem__(self, layer: int) -> State:
        state = self.layers[layer]
        assert isinstance(state, State)
        return state

    def numbers(self, head_dim: int, value_dim: int) -> int:
        """Scalars that one layer holds per key-value head of a row."""
        return self[0].numbers(head_dim, value_dim)

    def check(self, shape: dict[str, int], identity: dict[str, str] | None = None) -> None:
        """Raises ValueError naming the field in which a model differs, or for NaN weights.

        `shape` and `identity` (model, revision) are of the model that is to be run.
        """
        wanted: dict[str, Any] = {field: shape[field] for field in SHAPE_FIELDS}
        wanted |= identity or {}
        for field, value in wanted.items():
            made_for = self.header.get(field, value)
            if made_for != value:
                raise ValueError(
                    f"{field} is {made_for} in the kernels and {value} in the model:"
                    " train with python -m lesslib.train"
                )
        for tensor in self.state_dict().values():
            if not tensor.isfinite().all():
                raise ValueError(
                    "the kernels hold NaN or infinite weights: load or train them again"
                )


def model_header(shape: dict[str, int], **sizes: int) -> dict[str, Any]:
    """The fields of `shape` that states depend on, and `sizes`.

    Raises ValueError for a size that cannot be.
    """
    header = {field: shape[field] for field in SHAPE_FIELDS} | sizes
    for field, size in header.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{field}={size!r} must be a whole number of at least 1")
    if shape["heads"] % shape["kv_heads"]:
        raise ValueError(
            f"{shape['heads']} query heads do not divide into {shape['kv_heads']} key-value heads"
        )
    return header


class Nothing(State):
    """The empty state: what leaves is forgotten, as by a policy alone."""

    name = "none"
    is_empty = True

    def __init__(self) -> None:
        super().__init__(heads=1, kv_heads=1, head_dim=1)

    def numbers(self, head_dim: int, value_dim: int) -> int:
        return 0

    def empty(self, keys: Tensor, values: Tensor) -> Memory:
        return {}

    def absorb(self, memory: Memory, keys: Tensor, values: Tensor, is_held: Tensor) -> None:
        pass

    def read(self, memory: Memory, queries: Tensor, scaling: float) -> Part:
        raise RuntimeError("the empty state has no part: leave it out of the merge")
