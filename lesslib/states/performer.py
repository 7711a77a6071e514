"""Performer: random features in place of learned ones, the paper's "H2O+Performer"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lesslib.states.low_rank import LowRank
from lesslib.states.registry import register_state


@register_state
class LayerPerformer(LowRank):
    """Positive random features of the softmax kernel (Choromanski et al., 2021); nothing is
    trained.

    E[phi(q) psi(k)^T] = exp(q k / sqrt D), with R orthogonal Gaussian directions [Hkv, D, R] per
    key-value head, drawn from `generator`.
    """

    name = "performer"
    directions: Tensor

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        kernel_size: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(heads, kv_heads, head_dim, kernel_size)
        blocks_per_head = math.ceil(kernel_size / head_dim)
        heads_directions = []
        for _ in range(kv_heads):
            rotations = [random_rotation(head_dim, generator) for _ in range(blocks_per_head)]
            directions = torch.cat(rotations, 1)[:, :kernel_size]
            lengths = torch.randn(head_dim, kernel_size, generator=generator).norm(dim=0)
            heads_directions.append(directions * lengths)
        self.register_buffer("directions", torch.stack(heads_directions))

    def phi(self, q: Tensor) -> Tensor:
        groups = self.heads // self.kv_heads
        return self._features(q, self.directions.repeat_interleave(groups, 0))

    def psi(self, k: Tensor) -> Tensor:
        return self._features(k, self.directions)

    def _features(self, x: Tensor, directions: Tensor) -> Tensor:
        """exp(w x - |x|^2 / 2) / sqrt R for every direction w, with x scaled by D^(-1/4)."""
        x = x.to(directions.dtype) * x.shape[-1] ** -0.25
        exponent = x @ directions - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(directions.shape[-1])


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A rotation drawn uniformly, [size, size]."""
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator))
    # QR alone fixes the signs of Q's columns, which would bias the estimate.
    return Q * R.diagonal().sign()
