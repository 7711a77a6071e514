"""LESS at decode time: C slots and a low-rank state per key-value head, whose bytes do not depend on how many tokens were seen.

    with less(model):
        model.generate(**inputs, past_key_values=LessCache(model, policy=H2O(heavy=26, recent=26), kernels=kernels))

Shapes: B batch, Hq query heads, Hkv key-value heads, S new tokens, N = C + 1 slots, D head size, R kernel size. The newest token is
attended on top of the budget C, hence one slot more; it is the one that the last eviction freed.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from lesslib.attention.fit import cache_bytes as cache_bytes
from lesslib.attention.fit import check_fit
from lesslib.attention.whole_sequence import dense_attention
from lesslib.ops import dispatch as fused
from lesslib.ops import triton
from lesslib.ops.blocks import BLOCK, gather_tokens
from lesslib.ops.scan import merge
from lesslib.policies import H2O, Policy
from lesslib.states import Kernels

ABSORB = 1024  # evicted tokens that go through psi at once
BUFFERS = ("keys", "values", "position", "score", "free", "count", "H", "z")


class LessLayer(CacheLayerMixin):
    """The cache of one attention layer. `update` only announces new tokens; `attend` attends, evicts and absorbs.

    keys [B, Hkv, N, D], values [B, Hkv, N, Dv] (keys keep their RoPE positions); position [B, Hkv, N] counts from the row's first real
    token, -1 for an empty slot; score [B, Hkv, N] of the policy; free [B, Hkv, 1], the slot that the next token takes; count [B] of
    real tokens seen; H [B, Hkv, R, Dv] and z [B, Hkv, R]. Scores and state are float32 or wider.
    """

    is_compileable = True
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    keys: Any
    values: Any

    def __init__(self, policy: Policy, kernels: Any, kernel_size: int, chunk: int | None):
        super().__init__()
        self.policy, self.kernels, self.kernel_size, self.chunk = (
            policy,
            kernels,
            kernel_size,
            chunk,
        )
        self.budget: Any = policy.budget
        self.seen = torch.zeros(
            (), dtype=torch.int64
        )  # a tensor, so that a compiled step is not compiled again for every length
        self.armed = (
            False  # set by the hook of `with less(model)` just before an attention layer runs
        )

    def lazy_initialization(self, k: Tensor, v: Tensor) -> None:
        """Allocate all buffers for keys like k [B, Hkv, S, D] and values like v [B, Hkv, S, Dv]."""
        (B, Hkv, _, D), Dv, N = k.shape, v.shape[-1], self.budget + 1
        self.dtype, self.device, self.batch_size = k.dtype, k.device, B
        if isinstance(self.kernels, nn.Module):
            self.kernels.to(k.device)  # layers of one model may lie on several devices
        wide = torch.promote_types(k.dtype, torch.float32)
        self.keys, self.values = k.new_zeros(B, Hkv, N, D), v.new_zeros(B, Hkv, N, Dv)
        self.position = torch.full((B, Hkv, N), -1, dtype=torch.int32, device=k.device)
        self.score = torch.zeros(B, Hkv, N, dtype=wide, device=k.device)
        self.free = torch.full((B, Hkv, 1), N - 1, dtype=torch.int64, device=k.device)
        self.count = torch.zeros(B, dtype=torch.int32, device=k.device)
        self.H = torch.zeros(B, Hkv, self.kernel_size, Dv, dtype=wide, device=k.device)
        self.z = torch.zeros(B, Hkv, self.kernel_size, dtype=wide, device=k.device)
        self.seen = self.seen.to(k.device)
        if (
            not torch.compiler.is_compiling()
        ):  # fixed addresses let compiled steps (and CUDA graphs) write in place
            for buffer in (*self.buffers(), self.seen):
                torch._dynamo.mark_static_address(buffer)
        self.is_initialized = True

    def buffers(self) -> list[Tensor]:
        """All tensors that grow with the batch, in the order of `BUFFERS`."""
        return [getattr(self, name) for name in BUFFERS]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Announce new keys [B, Hkv, S, D] and values [B, Hkv, S, Dv]; they enter the slots in `attend`.

        Raises RuntimeError outside `with less(model)`, where an attention that knows nothing of slots would use them as if they were all,
        and where gradients are asked for; ValueError for another batch, dtype or device than the cache holds.
        """
        armed, self.armed = self.armed, False
        if not armed:
            raise RuntimeError(
                "LessCache was used outside `with less(model)`: wrap the call, as in `with less(model): model.generate()`"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError(
                "LessCache is for inference and keeps no gradients: call the model within torch.no_grad()"
            )
        given = len(key_states), key_states.dtype, key_states.device
        if self.is_initialized and given != (mine := (self.batch_size, self.dtype, self.device)):
            if self.seen > 0:
                holds, got = ("{} rows of {} on {}".format(*what) for what in (mine, given))
                raise ValueError(
                    f"this LessCache holds {holds} and was given {got}: call reset(), or make a new cache"
                )
            self.is_initialized = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen.add_(key_states.shape[2])
        return key_states, value_states

    def get_seq_length(self):
        """Tokens seen, padding included, as RoPE counts them; not the number held."""
        return self.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # the mask tells which NEW tokens are real; slots know themselves

    def reset(self) -> None:
        """Forget all tokens; the buffers stay."""
        if self.is_initialized:
            for buffer in (self.score, self.count, self.H, self.z, self.seen):
                buffer.zero_()
            self.position.fill_(-1)
            self.free.fill_(self.budget)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was (beam search)."""
        for buffer in self.buffers() if self.is_initialized else ():
            buffer.copy_(buffer.index_select(0, beam_idx.to(self.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (numbers or a mask)."""
        for name in BUFFERS if self.is_initialized else ():
            setattr(self, name, getattr(self, name)[indices.to(self.device)])
            self.batch_size = len(getattr(self, name))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "evicted tokens cannot be brought back, so LessCache does no assisted decoding and no crop(): do without"
        )

    @torch.no_grad()
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
    ) -> Tensor:
        """Attention [B, Hq, S, Dv] of q [B, Hq, S, D] over the slots, the state and the new k, v; then the policy evicts down to C.

        `real` [B, S] is False for padding, which leaves no trace. One token is a decode step, exactly as `naive_attention` does it. Several
        attend each other causally and densely, and then one eviction follows: on an empty cache that is the paper's prefill
        (section 3), later a chat turn; with `chunk`, they come that many at a time.
        """
        if q.shape[2] == 1:
            return self._step(q, k, v, real, scaling).to(v.dtype)
        real = (
            torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
            if real is None
            else real
        )
        begun = torch.cat([(self.count > 0)[:, None], real], 1).cummax(1).values[:, :-1]
        if bool((begun & ~real).any()):
            raise ValueError(
                "padding follows a real token: pad on the left (tokenizer.padding_side = 'left')"
            )
        size = self.chunk or q.shape[2]
        parts = zip(
            q.split(size, 2), k.split(size, 2), v.split(size, 2), real.split(size, 1), strict=True
        )
        return torch.cat([self._block(*part, scaling).to(v.dtype) for part in parts], 2)

    def _recover(self, q: Tensor, sparse: Tensor, logsumexp: Tensor) -> Tensor:
        """Add what the state holds (paper, eqs 3-5): `sparse` [B, Hkv, G, S, Dv], `logsumexp` [B, Hkv, G, S] -> [B, Hq, S, Dv]."""
        if self.kernels is None:
            return sparse.flatten(1, 2)
        # rows as tokens of one row: with a batch before the heads, the weights would be copied for every row
        phi = (
            self.kernels.phi(q.transpose(0, 2))
            .transpose(0, 2)
            .to(self.H.dtype)
            .unflatten(1, (self.H.shape[1], -1))
        )
        numerator, denominator = (
            phi @ self.H[:, :, None],
            (phi @ self.z[:, :, None, :, None])[..., 0],
        )
        return merge(sparse, logsumexp, numerator, denominator).flatten(1, 2)

    def _absorb(self, k: Tensor, v: Tensor, some: Tensor) -> None:
        """H += psi(k)^T v, z += psi(k) for k [B, Hkv, n, D] and v [B, Hkv, n, Dv] where `some` [B, Hkv, n] is True."""
        if self.kernels is not None:
            psi = (
                self.kernels.psi(k.transpose(0, 2)).transpose(0, 2).to(self.H.dtype)
                * some[..., None]
            )
            self.H.add_(psi.mT @ v.to(self.H.dtype))
            self.z.add_(psi.sum(2))

    def _step(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float) -> Tensor:
        """One token: it takes the free slot, attends, is scored, and one slot is freed. Static shapes, no host synchronisation."""
        if fused.wanted(k):
            return fused.step(self, q, k, v, real, scaling)
        B, Hkv = self.position.shape[:2]
        now = self.count[:, None, None].expand(B, Hkv, 1)
        self.keys.scatter_(2, self.free[..., None].expand(-1, -1, -1, k.shape[-1]), k)
        self.values.scatter_(2, self.free[..., None].expand(-1, -1, -1, v.shape[-1]), v)
        self.position.scatter_(2, self.free, now)
        self.score.scatter_(2, self.free, 0.0)
        wide = self.score.dtype
        logits = (
            q.unflatten(1, (Hkv, -1)).squeeze(3).to(wide) @ self.keys.to(wide).mT * scaling
        )  # [B, Hkv, G, N]
        logits = logits.masked_fill((self.position < 0)[:, :, None], -math.inf)
        total = logits.logsumexp(-1, keepdim=True)
        probabilities = (logits - total).exp()
        out = self._recover(q, (probabilities @ self.values.to(wide))[:, :, :, None], total)
        if real is not None:  # a padded token attended itself; now it goes
            probabilities = probabilities * real[:, None, None]
            self.position.scatter_(2, self.free, torch.where(real[:, None], now, -1))
        self._absorb(*self._evict(probabilities, now))
        self.position.scatter_(2, self.free, -1)
        self.count.add_(1 if real is None else real[:, 0].int())  # last, as `now` is a view of it
        return out

    def _evict(self, probabilities: Tensor, now: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score the slots by what the newest query gave them, and free one: its key, its value, and whether it held a token."""
        self.score.copy_(self.policy.observe(self.score, probabilities))
        self.free.copy_(self.policy.first_out(self.score, self.position, now))
        return (
            gather_tokens(self.keys, self.free),
            gather_tokens(self.values, self.free),
            self.position.gather(2, self.free) >= 0,
        )

    def _block(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, scaling: float) -> Tensor:
        """Several tokens: dense among themselves, then one eviction. Works in blocks of queries, so nothing of size S x S is stored."""
        (B, Hkv, S), wide, policy = k.shape[:3], self.score.dtype, self.policy
        old = (self.budget + 1) * bool(self.count.any())  # slots, before the new tokens
        position = (self.count[:, None] + real.cumsum(1, dtype=torch.int32) - 1).masked_fill(
            ~real, -1
        )
        now = position.amax(1)[
            :, None, None
        ]  # of a row that is all padding: -1, and it holds nothing
        position = position[:, None].expand(B, Hkv, S)
        score = torch.zeros(B, Hkv, S, dtype=wide, device=k.device)
        if old:
            k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
            position, score = (
                torch.cat([self.position, position], 2),
                torch.cat([self.score, score], 2),
            )

        start = (
            0
            if old or (policy.needs_probabilities and policy.sums_queries)
            else S - 1
            if policy.needs_probabilities
            else S
        )
        columns, outputs = (
            torch.zeros(B, Hkv, q.shape[1] // Hkv, old + S, dtype=wide, device=k.device),
            [],
        )
        if start == 0 and not old and fused.wanted(q):
            columns, start = triton.column_sums(q, k, real, scaling), S
        for a in range(start, S, BLOCK):
            b = min(a + BLOCK, S)
            logits = (q[:, :, a:b].to(wide) * scaling).unflatten(1, (Hkv, -1)) @ k[
                :, :, : old + b
            ].to(wide).mT[:, :, None]
            j, t = (
                torch.arange(-old, b, device=k.device),
                torch.arange(a, b, device=k.device)[:, None],
            )
            seen = ((j <= t) & (position[:, :, None, : old + b] >= 0)) | (
                j == t
            )  # [B, Hkv, b - a, old + b]
            logits.masked_fill_(~seen[:, :, None], -math.inf)
            probabilities = logits.softmax(-1)
            if old:
                sparse = probabilities @ v[:, :, None, : old + b].to(wide)
                outputs.append(self._recover(q[:, :, a:b], sparse, logits.logsumexp(-1)))
            asked = (real[:, a:b] & (policy.sums_queries | (t[:, 0] == S - 1)))[
                :, None, None, None
            ].to(wide)
            columns[..., : old + b] += (asked @ probabilities)[
                ..., 0, :
            ]  # summed over the queries that count
        out = torch.cat(outputs, 2) if old else dense_attention(q, k, v, real, scaling)
        score = policy.observe(score, columns) if policy.needs_probabilities else score
        self.count.add_(real.sum(1, dtype=torch.int32))
        self.take(k, v, position, score, now)
        return out

    def take(self, k: Tensor, v: Tensor, position: Tensor, score: Tensor, now: Tensor) -> None:
        """Of n tokens [B, Hkv, n, ...], as buffers of these names hold them, keep the C that the policy lets go last; absorb the others."""
        C, order = self.budget, self.policy.out_order(score, position, now)
        leaving, staying = (
            order[..., : max(0, order.shape[-1] - C)],
            order[..., -C:].sort(-1).values,
        )
        for part in leaving.split(ABSORB, -1):
            self._absorb(
                gather_tokens(k, part), gather_tokens(v, part), position.gather(2, part) >= 0
            )
        n = staying.shape[-1]
        self.keys[:, :, :n], self.values[:, :, :n] = (
            gather_tokens(k, staying),
            gather_tokens(v, staying),
        )
        self.position.fill_(-1)
        self.position[:, :, :n], self.score[:, :, :n] = (
            position.gather(2, staying),
            score.gather(2, staying),
        )
        self.free.fill_(C)


class LessCache(Cache):
    """A bounded cache for `model.generate` and for calls of the model, within `with less(model)`.

    `policy` says who leaves; `kernels` (of lesslib.models.load_kernels) absorb what leaves, None is the policy alone. `prefill="dense"`
    is the paper's: a prompt attends all of itself, then one eviction. `"streaming"` sends it through the bounded cache `chunk` tokens
    at a time, so that attention's memory is bounded however long a prompt is; later chunks then see what the cache kept, not all.
    Chunks are cut across the batch, so a row that is padded on the left is cut elsewhere than alone, and differs as two chunk sizes do.
    Sliding-window layers of hybrid models keep the layer that transformers gives them. The kernels move to the model's device. Raises
    ValueError where policy, kernels and model do not fit, and NotImplementedError for layers of another kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        kernels: Kernels | None = None,
        prefill: Literal["dense", "streaming"] = "dense",
        chunk: int = 64,
    ):
        check_fit(model, policy, kernels)
        if policy.budget is None:
            raise ValueError(
                "Full() has no bound: use transformers' DynamicCache outside `with less(model)`, or another policy"
            )
        if isinstance(policy, H2O) and policy.scores == "full":
            raise ValueError(
                f"{policy}: full rows need every key, which a bounded cache no longer has: use scores='cache'"
            )
        if prefill not in ("dense", "streaming"):
            raise ValueError(f"prefill {prefill!r}: choose 'dense' or 'streaming'")
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk={chunk!r} must be a whole number of tokens, at least 1")
        R = 0 if kernels is None else kernels.header["kernel_size"]
        layers: list[Any] = list(DynamicCache(config=model.config).layers)
        for i, layer in enumerate(layers):
            if type(layer).__name__ == "DynamicLayer":
                layers[i] = LessLayer(
                    policy,
                    None if kernels is None else kernels[i],
                    R,
                    chunk if prefill == "streaming" else None,
                )
            elif not getattr(layer, "is_sliding", False) or not isinstance(layer, CacheLayerMixin):
                what = f"layer {i} of {type(model).__name__} keeps a {type(layer).__name__}"
                raise NotImplementedError(
                    f"{what}: only attention layers, full or with a sliding window, are implemented"
                )
        if not any(isinstance(layer, LessLayer) for layer in layers):
            every = f"every layer of {type(model).__name__} has a sliding window"
            raise ValueError(f"{every}, so its cache is bounded already: use transformers' own")
        super().__init__(layers=layers)
        self.owner, self.policy, self.kernels, self._config = (
            id(model),
            policy,
            kernels,
            model.config,
        )
        self.running = False  # within a call of the model; still set when one was interrupted, and layers disagree on what they saw

    def less_layers(self) -> list[LessLayer]:
        """The layers that are bounded by the policy."""
        return [layer for layer in self.layers if isinstance(layer, LessLayer)]

    def reset(self) -> None:
        """Forget all tokens. The bounded layers keep their buffers; stock ones are new, as their own reset leaves zeros behind."""
        self.running = False
        for i, fresh in enumerate(DynamicCache(config=self._config).layers):
            if isinstance(layer := self.layers[i], LessLayer):
                layer.reset()
            else:
                self.layers[i] = fresh

    def __deepcopy__(self, memo: dict) -> LessCache:
        """A copy with its own tokens (to read a prompt once and go on twice); kernels and configuration are shared."""
        for shared in (
            self.kernels,
            self._config,
            *(layer.kernels for layer in self.less_layers()),
        ):
            memo[id(shared)] = shared
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def activate_past_recording(self) -> None:
        self.less_layers()[0].crop(0)

    def report(self) -> dict[str, int]:
        """Bytes: `slots` (keys and values), `bookkeeping` (positions, scores, counters), `state` (H and z), `sliding` (stock layers);
        `cache`, their sum; `kernels` (weights, whatever the batch); `full`, what a full cache would hold for the `tokens` seen."""
        mine, full = [layer for layer in self.less_layers() if layer.is_initialized], 0
        parts = {"slots": 0, "bookkeeping": 0, "state": 0}
        for layer in mine:
            names = {"keys": "slots", "values": "slots", "H": "state", "z": "state"}
            for name, buffer in zip(
                (*BUFFERS, "seen"), (*layer.buffers(), layer.seen), strict=True
            ):
                parts[names.get(name, "bookkeeping")] += buffer.nbytes
            full += int(layer.seen) * (layer.keys[:, :, 0].nbytes + layer.values[:, :, 0].nbytes)
        stock: list[Any] = [layer for layer in self.layers if not isinstance(layer, LessLayer)]
        parts["sliding"] = sum(
            layer.keys.nbytes + layer.values.nbytes for layer in stock if layer.is_initialized
        )
        weights = (
            0 if self.kernels is None else sum(t.nbytes for t in self.kernels.state_dict().values())
        )
        tokens = int(mine[0].seen) if mine else 0
        return {
            "tokens": tokens,
            **parts,
            "cache": sum(parts.values()),
            "kernels": weights,
            "full": full + parts["sliding"],
        }

    def nbytes(self) -> int:
        """Bytes of all tensors held, without the kernels' weights; see `cache_bytes` for the formula."""
        return self.report()["cache"]

    def evicted(self, layer: int) -> Tensor:
        """True where a token is in no slot any more, [B, Hkv, T]: T of the longest row, counted from each row's first real token."""
        cache = self.layers[layer]
        if not isinstance(cache, LessLayer):
            raise ValueError(
                f"layer {layer} has a sliding window and evicts by age alone: ask a layer of full attention"
            )
        if not cache.is_initialized:
            raise ValueError("this cache has seen no token yet: run the model first")
        T = int(cache.count.max())
        held = torch.zeros(*cache.position.shape[:2], T + 1, dtype=torch.bool, device=cache.device)
        held.scatter_(
            2, cache.position.long() % (T + 1), True
        )  # empty slots go to the column that is cut off
        return ~held[..., :T] & (torch.arange(T, device=cache.device) < cache.count[:, None, None])
