"""Which form of an operation runs: torch's, the CPU kernels of ops/cpu, or the GPU kernels of
ops/triton.

On a CPU the kernels serve wherever Numba is installed. On a GPU torch's forms do, until
$LESS_TRITON=1 asks for the kernels, which were compiled for GPUs and run in Triton's interpreter,
not on a GPU yet. $LESS_OPS=torch, cpu or triton forces one form, and raises where it cannot serve.
A step that torch.compile traces has the CPU kernels as operators in its graph; of all else that it
traces it makes kernels of its own from the torch forms. Those serve whatever needs gradients that
the kernels do not have, as well: `join` and `mlp` have those of a state's weights.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lesslib.ops import blocks, scan, triton
from lesslib.ops.merge import Part, merge, part_of_sums
from lesslib.ops.rules import EvictionRule

FORMS = ("torch", "cpu", "triton")


@functools.cache
def cpu_kernels() -> ModuleType:
    """ops/cpu, imported when it is first needed: Numba takes half a second."""
    return importlib.import_module("lesslib.ops.cpu")


def forced_form() -> str | None:
    """$LESS_OPS, or None. Raises ValueError for a form that there is not."""
    form = os.environ.get("LESS_OPS") or None
    if form is not None and form not in FORMS:
        raise ValueError(f"LESS_OPS={form!r}: choose one of {', '.join(FORMS)}, or unset it")
    return form


def kernels_for(x: Tensor) -> ModuleType | None:
    """The kernels that run on tensors like x, ops.cpu or ops.triton; None: the torch forms.

    Raises RuntimeError where $LESS_OPS names kernels that do not take x.
    """
    if torch.compiler.is_compiling():
        return None
    return kernels_outside_graphs(x)


def kernels_outside_graphs(x: Tensor) -> ModuleType | None:
    """`kernels_for` where nothing is traced."""
    form = forced_form()
    if form == "torch":
        return None
    wants_triton = form == "triton" or (form is None and os.environ.get("LESS_TRITON") == "1")
    if wants_triton and triton.available(x):
        return triton
    wants_cpu = form == "cpu" or (form is None and x.device.type == "cpu")
    if wants_cpu and cpu_kernels().available(x):
        return cpu_kernels()
    if form is not None:
        raise RuntimeError(
            f"LESS_OPS={form} has no kernels for {x.dtype} on {x.device.type} here:"
            " unset it, or see docs/gpu-and-cluster.md for what each form needs"
        )
    if wants_cpu:
        warn_without_numba()
    return None


@functools.cache
def warn_without_numba() -> None:
    """Say once that the quick form is missing."""
    if importlib.util.find_spec("numba") is None:
        warnings.warn(
            "Numba is not installed: using the slower torch forms (pip install numba)",
            RuntimeWarning,
            stacklevel=5,
        )


def step_kernels(x: Tensor) -> ModuleType | None:
    """The kernels of a step: `decode_step`, `attend_step`, `read`, `absorb`, `phi` and `psi`.

    They keep no gradients, so the torch forms serve wherever gradients are enabled. Raises
    RuntimeError where $LESS_OPS names kernels that cannot serve.
    """
    if torch.is_grad_enabled():
        return None
    if torch.compiler.is_compiling():
        if not traces_cpu_kernels(x.device.type, x.dtype):
            return None
        from lesslib.ops.cpu import operators

        return operators
    return kernels_for(x)


@torch.compiler.assume_constant_result
def traces_cpu_kernels(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a step that torch.compile traces takes the CPU kernels; asked once a graph."""
    form = forced_form()
    if form == "triton":
        raise RuntimeError(
            "LESS_OPS=triton has no kernels for a step that torch.compile traces: unset it, for"
            " torch.compile to make kernels of its own"
        )
    if form == "torch" or (form is None and device_type != "cpu"):
        return False
    return kernels_outside_graphs(torch.empty(0, dtype=dtype, device=device_type)) is not None


def prompt_kernels(x: Tensor) -> ModuleType | None:
    """The kernels of a whole prompt: `column_sums`, of Triton alone.

    On a CPU a prompt's time goes into matmuls: a Numba kernel of column sums took 2.3 times as long
    as the matmuls of `blocks.logit_blocks`, of which `weigh_rows` does the rest.
    """
    kernels = kernels_for(x)
    return kernels if kernels is triton else None


def weigh_rows(logits: Tensor, is_counted: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """`blocks.weigh_rows`, by either form. No gradients."""
    kernels = step_kernels(logits)
    if kernels is None or kernels is triton:
        return blocks.weigh_rows(logits, is_counted, columns)
    return kernels.weigh_rows(logits, is_counted, columns)


def sequence_kernels(
    rule: EvictionRule | None, q: Tensor, k: Tensor, v: Tensor
) -> ModuleType | None:
    """The kernels that take all steps of a sequence at once; None: the torch forms.

    They serve policies with a rule, without gradients. Raises RuntimeError where $LESS_OPS names
    kernels that do not know the rule.
    """
    if wants_gradients(q, k, v):
        return None
    kernels = kernels_for(q)
    if kernels is None:
        return None
    if rule is not None and rule.name in kernels.SEQUENCE_RULES:
        return kernels
    if forced_form() is not None:
        name = "a policy without a rule" if rule is None else f"the rule {rule.name!r}"
        raise RuntimeError(
            f"LESS_OPS={forced_form()} has no kernel of a whole sequence for {name}:"
            " unset it, or choose another policy"
        )
    return None


def lowrank_part(phi: Tensor, psi: Tensor, v: Tensor) -> Part:
    """`scan.lowrank_attention` as a part, by either form."""
    kernels = kernels_for(phi)
    if kernels is triton:
        return part_of_sums(*triton.lowrank_attention(phi, psi, v))
    return part_of_sums(*scan.lowrank_attention(phi, psi, v))


def join(slots: Part, phi: Tensor, psi: Tensor, v: Tensor) -> Tensor:
    """Attention over slots and a low-rank state together, [B, Hq, S, Dv]: their parts merged.

    phi, psi and v as in `scan.lowrank_attention`. The CPU kernel has gradients of phi and psi
    alone.
    """
    kernels = kernels_for(phi)
    if kernels is None or kernels is triton or wants_gradients(*slots, v):
        return merge(slots, lowrank_part(phi, psi, v.to(phi.dtype)))
    return kernels.join(slots, phi, psi, v)


def mlp_kernels(x: Tensor) -> ModuleType | None:
    """The kernels of the MLP of many tokens, `mlp`; None: the torch forms.

    They have no gradients of x, and on a GPU torch's matmuls serve.
    """
    if wants_gradients(x) or x.dtype == torch.float16:
        return None
    kernels = kernels_for(x)
    return None if kernels is triton else kernels


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether what is computed from the tensors may be asked for their gradients."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def name_of(kernels: ModuleType | None) -> str:
    """How $LESS_OPS calls a form."""
    if kernels is None:
        return "torch"
    return "triton" if kernels is triton else "cpu"


@torch.no_grad()
def chosen(model: Any, policy: Any, state: Any = None) -> dict[str, str]:
    """Which form runs every operation for a model, a policy and a state: "torch", "cpu" or
    "triton".

        chosen(model, H2O(25, 25), kernels)["a decode step's attention"]

    Without gradients, which keep to torch, and of what torch.compile does not trace. Raises as
    the operations would.
    """
    x = torch.empty(0, dtype=model.dtype, device=model.device)
    rule = policy.rule()
    step = step_kernels(x)
    knows_rule = step is not None and rule is not None and rule.name in step.STEP_RULES
    forms = {
        "a sequence's steps": name_of(sequence_kernels(rule, x, x, x)),
        "a prompt's column sums": name_of(step),
        "a decode step's attention": name_of(step),
        "a decode step's eviction": name_of(step if knows_rule else None),
    }
    if state is None:
        return forms
    own: frozenset[str] = getattr(state[0], "kernel_operations", frozenset())
    for operation in ("phi", "psi", "read", "absorb"):
        forms[operation] = name_of(step if operation in own else None)
    forms["a sequence's state"] = "torch" if step is not triton else name_of(step)
    return forms
