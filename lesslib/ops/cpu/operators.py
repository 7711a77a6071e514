"""The kernels of a decode step as operators of torch, which `torch.compile` puts into its graphs.

A tracer cannot look into a kernel that takes addresses. It meets these functions instead, of the
same names and signatures: each is an operator that says what its results look like, and which
tensors it changes ("!"). They are registered by `Library`, which costs less at every call than
`torch.library.custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lesslib.ops.cpu import decode, features, low_rank
from lesslib.ops.cpu.decode import STEP_RULES, slots_of
from lesslib.ops.merge import Part
from lesslib.ops.rules import EvictionRule
from lesslib.ops.slots import AttendResult, Slots, StepResult

__all__ = ["STEP_RULES", "absorb", "attend_step", "decode_step", "phi", "psi", "read"]

LIBRARY = torch.library.Library("lesslib", "DEF")
# A step's slots, in the order of the fields of `Slots`, then its token and the parts to merge
CHANGED_SLOTS = (
    "Tensor(a!) keys, Tensor(b!) values, Tensor(c!) position, Tensor(d!) score, Tensor(e!) free,"
    " Tensor(f!) count"
)
ENTERED_SLOTS = (
    "Tensor(a!) keys, Tensor(b!) values, Tensor(c!) position, Tensor(d!) score, Tensor free,"
    " Tensor count"
)
TOKEN = (
    "Tensor q, Tensor k, Tensor v, Tensor[] outputs, Tensor[] logsumexps, Tensor? is_real,"
    " float scaling"
)


def operator(schema: str, run: Callable, like: Callable) -> Any:
    """An operator that is computed by `run`, and whose results look like those of `like`."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"lesslib::{name}", like, lib=LIBRARY)
    return getattr(torch.ops.lesslib, name).default


# ---------------------------------------------------------------- a step
def token_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    outputs: list[Tensor],
    logsumexps: list[Tensor],
    is_real: Tensor | None,
    scaling: float,
) -> tuple:
    """What an operator is given of a token, but for the slots, as `decode_step` takes it."""
    parts = [Part(*part) for part in zip(outputs, logsumexps, strict=True)]
    return q, k, v, parts, is_real, scaling


def given(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[Part],
    is_real: Tensor | None,
    scaling: float,
) -> tuple:
    """The reverse of `token_of`."""
    outputs = [part.output for part in parts]
    logsumexps = [part.logsumexp for part in parts]
    return q, k, v, outputs, logsumexps, is_real, scaling


def run_decode_step(name: Any, recent: int, sinks: int, *tensors: Any) -> tuple[Tensor, ...]:
    slots = Slots(*tensors[:6])
    q, k, v, parts, is_real, scaling = token_of(*tensors[6:])
    rule = EvictionRule(name, recent, sinks)
    return tuple(decode.decode_step(rule, q, k, v, slots, parts, is_real, scaling))


def like_decode_step(name: Any, recent: int, sinks: int, *tensors: Any) -> tuple[Tensor, ...]:
    free = tensors[4]
    q, k, v = tensors[6:9]
    output = v.new_empty(*q.shape[:3], v.shape[-1])
    is_held = free.new_empty(free.shape, dtype=torch.bool)
    return output, k.new_empty(k.shape), v.new_empty(v.shape), is_held


def run_attend_step(*tensors: Any) -> tuple[Tensor, ...]:
    slots = Slots(*tensors[:6])
    q, k, v, parts, is_real, scaling = token_of(*tensors[6:])
    return tuple(decode.attend_step(q, k, v, slots, parts, is_real, scaling))


def like_attend_step(*tensors: Any) -> tuple[Tensor, ...]:
    score = tensors[3]
    q, _, v = tensors[6:9]
    B, Hkv, N = score.shape
    output = v.new_empty(*q.shape[:3], v.shape[-1])
    return output, score.new_empty(B, Hkv, q.shape[1] // Hkv, N)


DECODE_STEP = operator(
    f"decode_step(str rule, int recent, int sinks, {CHANGED_SLOTS}, {TOKEN})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    run_decode_step,
    like_decode_step,
)
ATTEND_STEP = operator(
    f"attend_step({ENTERED_SLOTS}, {TOKEN}) -> (Tensor, Tensor)", run_attend_step, like_attend_step
)


def decode_step(
    rule: EvictionRule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Slots,
    parts: Sequence[Part],
    is_real: Tensor | None,
    scaling: float,
) -> StepResult:
    token = given(q, k, v, parts, is_real, scaling)
    return StepResult(*DECODE_STEP(rule.name, rule.recent, rule.sinks, *slots_of(slots), *token))


def attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Slots,
    parts: Sequence[Part],
    is_real: Tensor | None,
    scaling: float,
) -> AttendResult:
    token = given(q, k, v, parts, is_real, scaling)
    return AttendResult(*ATTEND_STEP(*slots_of(slots), *token))


# ---------------------------------------------------------------- the state
def run_read(phi: Tensor, H: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(low_rank.read(phi, H, z))  # type: ignore[return-value]


def like_read(phi: Tensor, H: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    tokens = phi.shape[:3]
    return H.new_empty(*tokens, H.shape[-1]), H.new_empty(tokens)


def like_absorb(H: Tensor, z: Tensor, psi: Tensor, v: Tensor, is_held: Tensor) -> None:
    pass


def like_features(x: Tensor, w1: Tensor, w2: Tensor, *weights: Tensor) -> Tensor:
    return w1.new_empty(*x.shape[:3], w2.shape[-1], dtype=features.sums_dtype(w1))


READ = operator("read(Tensor phi, Tensor H, Tensor z) -> (Tensor, Tensor)", run_read, like_read)
absorb = operator(
    "absorb(Tensor(a!) H, Tensor(b!) z, Tensor psi, Tensor v, Tensor is_held) -> ()",
    low_rank.absorb,
    like_absorb,
)
phi = operator("phi(Tensor q, Tensor w1, Tensor w2) -> Tensor", features.phi, like_features)
psi = operator(
    "psi(Tensor k, Tensor w1, Tensor w2, Tensor w3, Tensor s1, Tensor s2) -> Tensor",
    features.psi,
    like_features,
)


def read(phi: Tensor, H: Tensor, z: Tensor) -> Part:
    return Part(*READ(phi, H, z))
