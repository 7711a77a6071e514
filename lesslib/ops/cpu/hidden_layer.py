"""The MLP inside phi and psi over many tokens, W2^T gelu(W1^T x), and its gradients.

The hidden layer is the largest tensor of training by far, hundreds of numbers a token and head.
Here all is done with a few heads of a sequence before the next ones, so that their hidden layer
stays in the processor's caches from one step to the next. Products are torch's; a kernel computes
gelu and its slope together, which share what is dear in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from lesslib.ops.cpu.common import array, jit, over_rows
from lesslib.ops.cpu.elementary import gelu_and_slope, narrowed, widened, zero_like

# Hidden numbers that are worked on together: calls cost little beside them, and a core's caches
# hold them.
TOGETHER = 2**19
# Hidden numbers in a piece of work of a thread.
PIECE = 2**16


@jit
def gelu_backward_kernel(
    first,  # of the numbers
    last,
    hidden,  # [n], before activation, may be bfloat16
    gradient,  # [n], of gelu(hidden); becomes that of hidden
    active,  # [n], written: gelu(hidden)
):
    before = hidden[first:last]
    towards = gradient[first:last]
    after = active[first:last]
    for i in range(before.shape[0]):
        value, slope = gelu_and_slope(widened(before[i]))
        after[i] = narrowed(value, before[i])
        towards[i] = narrowed(widened(towards[i]) * slope, before[i])


@jit
def drop_kernel(
    first,  # of the numbers
    last,
    hidden,  # [n], changed, may be bfloat16
    is_kept,  # [n]
    gain,  # what is kept is multiplied with it
):
    numbers = hidden[first:last]
    kept = is_kept[first:last]
    for i in range(numbers.shape[0]):
        number = widened(numbers[i]) * gain
        numbers[i] = narrowed(number if kept[i] else zero_like(number), numbers[i])


def gelu_backward(hidden: Tensor, gradient: Tensor) -> Tensor:
    """gelu(hidden), in a new tensor; `gradient`, of that, becomes the gradient of `hidden`.

    Both contiguous, in bfloat16, float32 or float64.
    """
    active = torch.empty_like(hidden)
    arrays = [array(x.view(-1)) for x in (hidden, gradient, active)]
    over_rows(gelu_backward_kernel, hidden.numel(), *arrays, at_once=PIECE)
    return active


def drop(hidden: Tensor, is_kept: Tensor, share: float) -> None:
    """hidden * is_kept / share, in place; `share` of all numbers are kept."""
    gain = array(torch.tensor([1 / share], dtype=sums_dtype(hidden)))[0]
    arrays = [array(x.view(-1)) for x in (hidden, is_kept)]
    over_rows(drop_kernel, hidden.numel(), *arrays, gain, at_once=PIECE)


class MLP(torch.autograd.Function):
    """W2^T gelu(dropout(W1^T x)), and the gradients of W1 and W2."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, is_kept: Tensor, share: float
    ) -> Tensor:
        hidden_layers: list[Tensor] = []
        out = features(x, w1, w2, is_kept, share, hidden_layers.append)
        ctx.save_for_backward(x, w1, w2, is_kept, *hidden_layers)
        ctx.share = share
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, is_kept, *hidden_layers = ctx.saved_tensors
        dout = dout.to(x.dtype)
        by_unit = w2.to(x.dtype).contiguous()  # [H, hidden, R]
        dw1 = w1.new_zeros(w1.mT.shape)  # [H, hidden, D]
        dw2 = w2.new_zeros(w2.shape)
        for part, hidden in zip(parts(x, w1), hidden_layers, strict=True):
            _, heads = part
            dhidden = torch.bmm(by_unit[heads], dout[part])
            active = gelu_backward(hidden, dhidden)
            if ctx.share < 1:
                drop(dhidden, is_kept[part], ctx.share)
            dw1[heads] += torch.bmm(dhidden, x[part])
            dw2[heads] += torch.bmm(active, dout[part].mT)
        return None, dw1.mT, dw2, None, None


def features(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    is_kept: Tensor,
    share: float,
    keep: Callable[[Tensor], None],
) -> Tensor:
    """`mlp` without gradients; `keep` is handed the hidden layer of each of the `parts`."""
    B, H, S, _ = x.shape
    # [H, hidden, D] and [H, R, hidden]
    to_hidden = w1.mT.to(x.dtype).contiguous()
    to_features = w2.mT.to(x.dtype).contiguous()
    out = x.new_empty(B, H, w2.shape[-1], S)
    for part in parts(x, w1):
        _, heads = part
        hidden = torch.bmm(to_hidden[heads], x[part].mT)  # [heads, hidden, S]
        if share < 1:
            drop(hidden, is_kept[part], share)
        out[part] = torch.bmm(to_features[heads], gelu(hidden))
        keep(hidden)
    return out


def forget(hidden: Tensor) -> None:
    """What is done with a hidden layer that no gradients need."""


def parts(x: Tensor, w1: Tensor) -> Iterator[tuple[int, slice]]:
    """Sequences and heads, a few of which are worked on together; x [B, H, S, D]."""
    B, H, S, _ = x.shape
    at_once = max(1, TOGETHER // (S * w1.shape[-1]))
    for b in range(B):
        for first in range(0, H, at_once):
            yield b, slice(first, min(first + at_once, H))


def mlp(x: Tensor, w1: Tensor, w2: Tensor, is_kept: Tensor, share: float) -> Tensor:
    """W2^T gelu(W1^T x), [B, H, R, S]: features before tokens, in the dtype of x, as is the hidden
    layer.

    x [B, H, S, D] in bfloat16, float32 or float64; w1 [H, D, hidden], w2 [H, hidden, R]. Dropout
    keeps `share` of the hidden layer, where `is_kept` [B, H, hidden, S] is True; of a share of 1 it
    is not read. Differentiable in w1 and w2.
    """
    x = x.contiguous()
    if torch.is_grad_enabled() and (w1.requires_grad or w2.requires_grad):
        return MLP.apply(x, w1, w2, is_kept, share)
    return features(x, w1, w2, is_kept, share, forget)


def sums_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
