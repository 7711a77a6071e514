"""One attention layer while decoding: C slots under a policy, and a state that absorbs what
leaves them.

Shapes: B batch, Hq query heads, Hkv key-value heads, G = Hq / Hkv, S new tokens, N = C + 1 slots,
D and Dv sizes of keys and values. The newest token is attended on top of the budget C, hence one
slot more; it is the one that the last eviction freed.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lesslib.attention.prompt import Candidates, attend_candidates, attend_prompt
from lesslib.attention.streaming import Rows, leaving_last, observed, staying
from lesslib.attention.whole_sequence import Evicted, evict
from lesslib.ops import dispatch
from lesslib.ops.blocks import gather_tokens
from lesslib.ops.merge import Part, merge
from lesslib.ops.scan import arrivals
from lesslib.ops.slots import Slots
from lesslib.policies import Policy
from lesslib.states import Memory, State

# Evicted tokens that the state absorbs at once.
ABSORB = 1024


class LessLayer(CacheLayerMixin):
    """The cache of one layer. `update` only announces new tokens; `attend` attends, evicts,
    absorbs.

    `slots` holds what the policy keeps, `memory` what the state knows of all others; both are there
    once the first token has come.
    """

    is_compileable = True
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    keys: Any
    values: Any
    slots: Slots
    memory: Memory

    def __init__(self, policy: Policy, state: State, chunk: int | None) -> None:
        super().__init__()
        assert policy.budget is not None
        self.policy = policy
        self.state = state
        # Tokens of a prompt that attend at once, 1: as decoding would; None: all of them.
        self.chunk = chunk
        self.budget: int = policy.budget
        # A tensor, so that a compiled step is not compiled again for every length.
        self.seen = torch.zeros((), dtype=torch.int64)
        # Set by the hook of `with less(model)` just before an attention layer runs.
        self.armed = False

    # ------------------------------------------------------------------ what transformers calls
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all tensors for keys like [B, Hkv, S, D] and values like [B, Hkv, S, Dv]."""
        self.dtype = key_states.dtype
        self.device = key_states.device
        self.batch_size = len(key_states)
        # Layers of one model may lie on several devices.
        self.state.to(self.device)
        self.slots = Slots.empty(key_states, value_states, self.budget)
        self.memory = self.state.empty(key_states, value_states)
        self.seen = self.seen.to(self.device)
        self._show_keys()
        if not torch.compiler.is_compiling():
            # Fixed addresses let compiled steps (and CUDA graphs) write in place.
            for tensor in (*self.tensors().values(), self.seen):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that grow with the batch, by name."""
        return self.slots.tensors() | self.memory

    def _show_keys(self) -> None:
        """`keys` and `values` are where transformers looks for them."""
        self.keys = self.slots.keys
        self.values = self.slots.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Announce new keys [B, Hkv, S, D] and values [B, Hkv, S, Dv]; `attend` puts them into
        slots.

        Raises RuntimeError outside `with less(model)`, where an attention that knows nothing of
        slots would use them as if they were all, and where gradients are asked for; ValueError
        for another batch, dtype or device than the cache holds.
        """
        was_armed = self.armed
        self.armed = False
        if not was_armed:
            raise RuntimeError(
                "LessCache was used outside `with less(model)`: wrap the call, as in"
                " `with less(model): model.generate()`"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError(
                "LessCache is for inference and keeps no gradients: call the model within"
                " torch.no_grad()"
            )
        if self.is_initialized:
            self._check_like_before(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen.add_(key_states.shape[2])
        return key_states, value_states

    def _check_like_before(self, keys: Tensor) -> None:
        """Raises ValueError for keys unlike those held; an empty cache begins anew for them."""
        now = (len(keys), keys.dtype, keys.device)
        before = (self.batch_size, self.dtype, self.device)
        if now == before:
            return
        if self.seen > 0:
            holds = "{} rows of {} on {}".format(*before)
            was_given = "{} rows of {} on {}".format(*now)
            raise ValueError(
                f"this LessCache holds {holds} and was given {was_given}: call reset(), or make a"
                " new cache"
            )
        self.is_initialized = False

    def get_seq_length(self):
        """Tokens seen, padding included, as RoPE counts them; not the number held."""
        return self.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # The mask tells which NEW tokens are real; slots know themselves.
        return query_length, 0

    def reset(self) -> None:
        """Forget all tokens; the tensors stay."""
        if not self.is_initialized:
            return
        self.slots.clear()
        for name, fresh in self.state.empty(self.slots.keys, self.slots.values).items():
            self.memory[name].copy_(fresh)
        self.seen.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was (beam search)."""
        if not self.is_initialized:
            return
        rows = beam_idx.to(self.device)
        for tensor in self.tensors().values():
            tensor.copy_(tensor.index_select(0, rows))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (numbers or a mask)."""
        if not self.is_initialized:
            return
        rows = indices.to(self.device)
        self.slots = Slots(**{name: x[rows] for name, x in self.slots.tensors().items()})
        self.memory = {name: x[rows] for name, x in self.memory.items()}
        self.batch_size = len(self.slots.count)
        self._show_keys()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            rows = torch.arange(self.batch_size).repeat_interleave(repeats)
            self.batch_select_indices(rows)

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "evicted tokens cannot be brought back, so LessCache does no assisted decoding and no"
            " crop(): do without"
        )

    # ------------------------------------------------------------------ attention
    @torch.no_grad()
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
    ) -> Tensor:
        """Attention [B, Hq, S, Dv] over slots, state and the new k, v; then the policy evicts
        down to C.

        q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]; `real` [B, S] is False for padding,
        which leaves no trace. One token is a decode step, exactly as `naive_attention` does it.
        Several attend each other causally and densely, and then one eviction follows: on an empty
        cache that is the paper's prefill (section 3), later a chat turn; with `chunk`, they come
        that many at a time, and with a chunk of 1 each is a decode step. Raises ValueError for
        padding that follows a real token.
        """
        if q.shape[2] == 1:
            return self._step(q, k, v, real, scaling).to(v.dtype)
        if real is None:
            real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        self._check_padding(real)
        if self.chunk == 1:
            return self._stream(q, k, v, real, scaling).to(v.dtype)
        size = self.chunk or q.shape[2]
        outputs = []
        for start in range(0, q.shape[2], size):
            now = slice(start, start + size)
            block = (q[:, :, now], k[:, :, now], v[:, :, now], real[:, now])
            outputs.append(self._block(*block, scaling).to(v.dtype))
        return torch.cat(outputs, 2)

    def _check_padding(self, real: Tensor) -> None:
        has_tokens = (self.slots.count > 0)[:, None]
        has_begun = torch.cat([has_tokens, real], 1).cummax(1).values[:, :-1]
        if bool((has_begun & ~real).any()):
            raise ValueError(
                "padding follows a real token: pad on the left (tokenizer.padding_side = 'left')"
            )

    def _with_state(self, q: Tensor, part: Part, scaling: float) -> Tensor:
        """The slots' `part` merged with what the state holds for q [B, Hq, S, D]: [B, Hq, S,
        Dv].
        """
        if self.state.is_empty:
            return part.output
        return merge(part, self.state.read(self.memory, q, scaling))

    def _absorb(self, keys: Tensor, values: Tensor, is_held: Tensor) -> None:
        """The state takes up what left: keys [B, Hkv, n, D], values, where `is_held` [B, Hkv,
        n].
        """
        self.state.absorb(self.memory, keys, values, is_held)

    def _absorb_candidates(self, candidates: Candidates, leaving: Tensor) -> None:
        """The state takes up the candidates at index `leaving` [B, Hkv, n]."""
        if self.state.is_empty:
            return
        for index in leaving.split(ABSORB, -1):
            is_held = candidates.position.gather(2, index) >= 0
            keys = gather_tokens(candidates.keys, index)
            values = gather_tokens(candidates.values, index)
            self._absorb(keys, values, is_held)

    # ------------------------------------------------------------------ one token
    def _step(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float) -> Tensor:
        """One token takes the free slot, attends, is scored, and one slot is freed.

        Static shapes, no host synchronisation.
        """
        kernels = dispatch.step_kernels(k)
        if kernels is not None:
            return self._fused_step(kernels, q, k, v, real, scaling)
        slots = self.slots
        B, Hkv = slots.position.shape[:2]
        now = slots.count[:, None, None].expand(B, Hkv, 1)
        self._enter(k, v, now)
        part, probabilities = self._attend_slots(q, scaling)
        out = self._with_state(q, part, scaling)
        if real is not None:
            # A padded token attended itself; now it goes.
            probabilities = probabilities * real[:, None, None]
            slots.position.scatter_(2, slots.free, torch.where(real[:, None], now, -1))
        self._absorb(*self._evict(probabilities, now))
        slots.position.scatter_(2, slots.free, -1)
        # Last, as `now` is a view of it.
        slots.count.add_(1 if real is None else real[:, 0].int())
        return out

    def _enter(self, k: Tensor, v: Tensor, now: Tensor) -> None:
        """Put the newest token, k [B, Hkv, 1, D] and v, into the free slot."""
        slots = self.slots
        slot = slots.free[..., None]
        slots.keys.scatter_(2, slot.expand(-1, -1, -1, k.shape[-1]), k)
        slots.values.scatter_(2, slot.expand(-1, -1, -1, v.shape[-1]), v)
        slots.position.scatter_(2, slots.free, now)
        slots.score.scatter_(2, slots.free, 0.0)

    def _attend_slots(self, q: Tensor, scaling: float) -> tuple[Part, Tensor]:
        """Softmax over the slots: its part, [B, Hq, 1, ...], and the probabilities [B, Hkv, G,
        N].
        """
        slots = self.slots
        wide = slots.score.dtype
        queries = q.unflatten(1, (slots.keys.shape[1], -1)).squeeze(3)  # [B, Hkv, G, D]
        logits = queries.to(wide) @ slots.keys.to(wide).mT * scaling  # [B, Hkv, G, N]
        logits = logits.masked_fill((slots.position < 0)[:, :, None], -math.inf)
        total = logits.logsumexp(-1, keepdim=True)
        probabilities = (logits - total).exp()
        output = probabilities @ slots.values.to(wide)  # [B, Hkv, G, Dv]
        part = Part(output.flatten(1, 2)[:, :, None], total.flatten(1, 2))
        return part, probabilities

    def _evict(self, probabilities: Tensor, now: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score the slots by what the newest query gave them, and free one.

        Returns its key, its value, and whether it held a token.
        """
        slots = self.slots
        slots.score.copy_(self.policy.observe(slots.score, probabilities))
        slots.free.copy_(self.policy.first_out(slots.score, slots.position, now))
        key = gather_tokens(slots.keys, slots.free)
        value = gather_tokens(slots.values, slots.free)
        return key, value, slots.position.gather(2, slots.free) >= 0

    def _fused_step(
        self,
        kernels: ModuleType,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """`_step` in the `kernels` of ops.cpu or ops.triton; a policy whose rule they do not know
        has its attention there alone.
        """
        slots = self.slots
        parts = [] if self.state.is_empty else [self.state.read(self.memory, q, scaling)]
        rule = self.policy.rule()
        if rule is not None and rule.name in kernels.STEP_RULES:
            done = kernels.decode_step(rule, q, k, v, slots, parts, real, scaling)
            self._absorb(done.key, done.value, done.is_held)
            return done.output
        attended = kernels.attend_step(q, k, v, slots, parts, real, scaling)
        now = slots.count[:, None, None].expand(*slots.position.shape[:2], 1)
        self._absorb(*self._evict(attended.probabilities, now))
        slots.position.scatter_(2, slots.free, -1)
        slots.count.add_(1 if real is None else real[:, 0].int())
        return attended.output

    # ------------------------------------------------------------------ several steps
    def _stream(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, scaling: float) -> Tensor:
        """Several tokens as so many decode steps, [B, Hq, S, Dv].

        The beginning of a sequence is computed in one pass, for policies with a rule: their scores
        follow from the rows that `observed` looks at.
        """
        has_begun = bool(self.slots.count.any())
        if has_begun or self.policy.rule() is None:
            return self._steps(q, k, v, real, scaling)
        if q.shape[2] <= self.budget:
            # Nobody leaves.
            return self._block(q, k, v, real, scaling)
        return self._sequence(q, k, v, real, scaling)

    def _steps(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, scaling: float) -> Tensor:
        """A decode step for every token."""
        outputs = []
        for t in range(q.shape[2]):
            now = slice(t, t + 1)
            step = (q[:, :, now], k[:, :, now], v[:, :, now], real[:, now])
            outputs.append(self._step(*step, scaling))
        return torch.cat(outputs, 2)

    def _sequence(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, scaling: float) -> Tensor:
        """All steps of an empty cache in one pass: eviction times say who is where at the end."""
        prompt = Candidates.arriving(k.contiguous(), v.contiguous(), real, self.slots)
        evicted = evict(self.policy, q, prompt.keys, prompt.values, real, scaling)
        out = self._with_leavers(q, prompt, evicted, scaling)
        tokens = staying(evicted.times, real, self.budget)
        held = prompt.at(tokens)
        rows = Rows(q * scaling, evicted.logsumexp, real)
        held.score = observed(self.policy, rows, held, tokens)
        self._hold(held)
        self.slots.count.add_(real.sum(1, dtype=torch.int32))
        return out

    def _with_leavers(
        self, q: Tensor, prompt: Candidates, evicted: Evicted, scaling: float
    ) -> Tensor:
        """The sparse part of a prompt merged with what every query finds of those that left, [B,
        Hq, S, Dv]; then the state holds them all.
        """
        if self.state.is_empty:
            return evicted.sparse
        arrived = arrivals(evicted.times)
        token = arrived.clamp(min=0)
        keys = gather_tokens(prompt.keys, token)
        values = gather_tokens(prompt.values, token)
        part = self.state.along_arrivals(self.memory, q, keys, values, arrived >= 0, scaling)
        # No query comes after the last of all leaves.
        token, has_left = leaving_last(evicted.times)
        last = prompt.at(token)
        self._absorb(last.keys, last.values, has_left)
        return merge(evicted.part, part)

    # ------------------------------------------------------------------ several tokens
    def _block(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, scaling: float) -> Tensor:
        """Several tokens: dense among themselves, then one eviction."""
        # Models lay tokens before heads; what follows reads one head at a time.
        new = Candidates.arriving(k.contiguous(), v.contiguous(), real, self.slots)
        # Of a row that is all padding: -1, and it holds nothing.
        now = new.position[:, :1].amax(2, keepdim=True)
        if bool(self.slots.count.any()):
            candidates = Candidates.of_slots(self.slots).followed_by(new)
            attended = attend_candidates(self.policy, q, candidates, real, scaling)
            columns = attended.columns
            out = self._with_state(q, attended.part, scaling)
        else:
            candidates = new
            out, columns = attend_prompt(self.policy, q, candidates, real, scaling)
        if self.policy.needs_probabilities:
            candidates.score = self.policy.observe(candidates.score, columns)
        self.slots.count.add_(real.sum(1, dtype=torch.int32))
        self.take(candidates, now)
        return out

    def take(self, candidates: Candidates, now: Tensor) -> None:
        """Keep the C candidates that the policy lets go last; the state absorbs the others.

        `now` [B, 1, 1] is the position of the newest token.
        """
        c = candidates
        order = self.policy.out_order(c.score, c.position, now)  # [B, Hkv, n]
        leaving = order[..., : max(0, order.shape[-1] - self.budget)]
        self._absorb_candidates(c, leaving)
        self._hold(c.at(order[..., -self.budget :].sort(-1).values))

    def _hold(self, held: Candidates) -> None:
        """The slots hold these, C at most, and nothing else."""
        slots = self.slots
        n = held.position.shape[-1]
        slots.keys[:, :, :n] = held.keys
        slots.values[:, :, :n] = held.values
        slots.position.fill_(-1)
        slots.position[:, :, :n] = held.position
        slots.score[:, :, :n] = held.score
        slots.free.fill_(self.budget)
