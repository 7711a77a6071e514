"""A random model that serves a load by each of the methods compared, and what each holds."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lesslib.attention.cache import LessCache
from lesslib.attention.fit import cache_bytes, model_shape
from lesslib.bench.load import Load
from lesslib.bench.shapes import KERNEL_SIZE, random_kernels, random_model
from lesslib.bench.timing import DEVICE, DTYPE, now
from lesslib.hf import less
from lesslib.policies import H2O
from lesslib.states import Kernels

# transformers' two full caches: one that grows, one that is allocated at once
FULL_DYNAMIC = "Full, dynamic"
FULL_STATIC = "Full, static"
# the latter with steps that are compiled, whatever the load says
FULL_COMPILED = "Full, compiled"
FULL = (FULL_DYNAMIC, FULL_STATIC, FULL_COMPILED)
# LESS whose policy already evicts while it reads the prompt, which no query then sees as a whole
LESS_STREAMING = "LESS, streaming"
METHODS = (FULL_DYNAMIC, FULL_STATIC, "Baseline", "Baseline+", "LESS")


def is_full(method: str) -> bool:
    return method in FULL


def has_state(method: str) -> bool:
    return method in ("LESS", LESS_STREAMING)


class ServedModel:
    """A random model of a load's shape on this machine's device, its kernels, and its caches."""

    def __init__(self, load: Load):
        self.load = load
        self.model = cast(Any, random_model(load.model))
        self.shape = model_shape(self.model)
        self.policy = H2O.from_budget(load.budget)
        self.kernels = random_kernels(self.model, load.hidden).to(DEVICE, DTYPE)
        # nothing is compiled before its first call
        mode = "reduce-overhead" if DEVICE.type == "cuda" else None
        self.compiled = torch.compile(self.model, fullgraph=True, dynamic=False, mode=mode)

    def step(self, method: str) -> Any:
        """The model, as a decode step of `method` calls it."""
        # a cache that grows would be compiled again at every length
        may_compile = method != FULL_DYNAMIC
        is_compiled = method == FULL_COMPILED or self.load.compiled
        return self.compiled if may_compile and is_compiled else self.model

    def policy_of(self, method: str) -> H2O:
        """The policy of a bounded method; Baseline+ spends the bytes of LESS's state on slots."""
        return self.policy.plus(KERNEL_SIZE // 2) if method == "Baseline+" else self.policy

    def kernels_of(self, method: str) -> Kernels | None:
        return self.kernels if has_state(method) else None

    def cache(self, method: str) -> Any:
        """An empty cache of `method`."""
        if method == FULL_DYNAMIC:
            return DynamicCache(config=self.model.config)
        if is_full(method):
            return StaticCache(config=self.model.config, max_cache_len=self.load.length)
        prefill: Literal["dense", "streaming"] = "dense"
        if method == LESS_STREAMING:
            prefill = "streaming"
        return LessCache(
            self.model, self.policy_of(method), self.kernels_of(method), prefill=prefill
        )

    def row_bytes(self, method: str) -> float:
        """Bytes that the cache holds for each row at the end, by the formula.

        Without what all rows share.
        """
        if is_full(method):
            vectors = 2 * self.shape["layers"] * self.shape["kv_heads"] * self.load.length
            return vectors * self.shape["head_dim"] * DTYPE.itemsize
        policy = self.policy_of(method)
        kernel_size = KERNEL_SIZE if has_state(method) else 0
        one_row = cache_bytes(self.shape, policy, kernel_size, 1, DTYPE)
        two_rows = cache_bytes(self.shape, policy, kernel_size, 2, DTYPE)
        return two_rows - one_row

    def weight_bytes(self, method: str) -> int:
        """Bytes of weights that every step reads: the model's and the kernels'.

        The table of input embeddings does not count, as a step reads one row of it, unless it is
        the output's as well.
        """
        model = sum(p.nbytes for p in self.model.parameters())
        if not self.model.config.tie_word_embeddings:
            model -= self.model.get_input_embeddings().weight.nbytes
        kernels = self.kernels_of(method)
        if kernels is None:
            return model
        return model + sum(p.nbytes for p in kernels.parameters())

    def rows(self, method: str) -> int:
        """The load's batch, or as many rows as its `cache_mib` holds, at least one."""
        if self.load.batch:
            return self.load.batch
        return max(1, int(self.load.cache_mib * 2**20 / self.row_bytes(method)))

    def attention(self, method: str) -> contextlib.AbstractContextManager[Any]:
        """The context in which the model attends the cache of `method`."""
        return contextlib.nullcontext() if is_full(method) else less(self.model)

    def random_prompt(self, batch: int) -> Tensor:
        """Token ids [batch, prompt]."""
        size = (batch, self.load.prompt)
        return torch.randint(0, self.model.config.vocab_size, size, device=DEVICE)

    def read_prompt(self, ids: Tensor, cache: Any) -> Tensor:
        """Put `ids` through the model; the token [batch, 1] that follows."""
        logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def run(self, method: str, generate: int, batch: int) -> dict[str, float]:
        """`answer` to a random prompt of the load's length in `batch` rows."""
        return self.answer(method, self.random_prompt(batch), generate)

    def answer(self, method: str, ids: Tensor, generate: int) -> dict[str, float]:
        """Seconds of the prompt `ids` [batch, S] and of `generate` tokens after it.

        And the bytes that the cache then holds.
        """
        cache = self.cache(method)
        step = self.step(method)
        with torch.no_grad(), self.attention(method):
            begun = now()
            token = self.read_prompt(ids, cache)
            read = now()
            for _ in range(generate - 1):
                token = step(token, past_key_values=cache).logits.argmax(-1)
            written = now()
        return {
            "prompt": read - begun,
            "decode": written - read,
            "bytes": held_bytes(method, cache),
        }


def held_bytes(method: str, cache: Any) -> int:
    """Bytes of keys, values, and all else that a cache of `method` holds."""
    if is_full(method):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return cache.nbytes()
