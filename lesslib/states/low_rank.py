"""LESS: what left is summed up in H and z, through two feature maps phi and psi (paper, eqs
1-5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lesslib.ops import dispatch
from lesslib.ops.merge import Part, part_of_sums
from lesslib.states.base import Memory, State
from lesslib.states.registry import register_state
from lesslib.util.hardware import autocast, autocast_dtype

# The first value of the scales s1 and s2, as in the authors' code.
SCALE_INIT = 1e-4
# Up to so many tokens, features are computed with tokens before features.
FEW = 32
# Numbers of a hidden layer that are computed at once: 2 MiB in float32.
TILE_NUMBERS = 2**19


class LowRank(State):
    """A state H = sum of psi(k)^T v and z = sum of psi(k), over the evicted pairs of a key-value
    head.

    A query finds phi(q) H / phi(q) z there, with the weight phi(q) z. Subclasses give the feature
    maps `phi` and `psi`, R features each, at least 0. Holds R (Dv + 1) numbers per key-value
    head: H [B, Hkv, R, Dv] and z [B, Hkv, R].
    """

    kernel_operations = frozenset({"read", "absorb"})

    def __init__(self, heads: int, kv_heads: int, head_dim: int, kernel_size: int) -> None:
        super().__init__(heads, kv_heads, head_dim)
        self.kernel_size = kernel_size

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class with features or parts of its own inherits no shortcut past them."""
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "phi" in own and "fused_phi" not in own:
            cls.fused_phi = LowRank.fused_phi  # type: ignore[method-assign]
        if "psi" in own and "fused_psi" not in own:
            cls.fused_psi = LowRank.fused_psi  # type: ignore[method-assign]
        if "over_arrivals" in own and "join_over_arrivals" not in own:
            cls.join_over_arrivals = State.join_over_arrivals  # type: ignore[method-assign]
        features = {"phi": cls.fused_phi, "psi": cls.fused_psi}
        of_the_base = (LowRank.fused_phi, LowRank.fused_psi)
        fused = {name for name, method in features.items() if method not in of_the_base}
        cls.kernel_operations = LowRank.kernel_operations | fused

    def phi(self, q: Tensor) -> Tensor:
        """Features of queries: [B, Hq, S, D] -> [B, Hq, S, R], at least 0."""
        raise NotImplementedError

    def psi(self, k: Tensor) -> Tensor:
        """Features of keys: [B, Hkv, S, D] -> [B, Hkv, S, R], at least 0."""
        raise NotImplementedError

    def fused_phi(self, kernels: ModuleType, q: Tensor) -> Tensor:
        """`phi` in float32 or wider, by `kernels` of ops.cpu or ops.triton where the subclass has
        them.
        """
        return over_batch(self.phi, q).to(torch.promote_types(q.dtype, torch.float32))

    def fused_psi(self, kernels: ModuleType, k: Tensor) -> Tensor:
        """`psi` in float32 or wider, by `kernels` of ops.cpu or ops.triton where the subclass has
        them.
        """
        return over_batch(self.psi, k).to(torch.promote_types(k.dtype, torch.float32))

    def numbers(self, head_dim: int, value_dim: int) -> int:
        return self.kernel_size * (value_dim + 1)

    def empty(self, keys: Tensor, values: Tensor) -> Memory:
        B, Hkv = keys.shape[:2]
        Dv = values.shape[-1]
        wide = torch.promote_types(keys.dtype, torch.float32)
        return {
            "H": keys.new_zeros(B, Hkv, self.kernel_size, Dv, dtype=wide),
            "z": keys.new_zeros(B, Hkv, self.kernel_size, dtype=wide),
        }

    def absorb(self, memory: Memory, keys: Tensor, values: Tensor, is_held: Tensor) -> None:
        """H += psi(k)^T v and z += psi(k) (paper, eqs 4-5)."""
        H = memory["H"]
        z = memory["z"]
        kernels = dispatch.step_kernels(keys)
        if kernels is not None:
            kernels.absorb(H, z, self.fused_psi(kernels, keys), values, is_held)
            return
        psi = over_batch(self.psi, keys).to(H.dtype) * is_held[..., None]  # [B, Hkv, n, R]
        H.add_(psi.mT @ values.to(H.dtype))
        z.add_(psi.sum(2))

    def read(self, memory: Memory, queries: Tensor, scaling: float) -> Part:
        """phi(q) H / phi(q) z and log phi(q) z: the low-rank part of the paper's eq. 3."""
        H = memory["H"]
        z = memory["z"]
        kernels = dispatch.step_kernels(queries)
        if kernels is not None:
            return kernels.read(self.fused_phi(kernels, queries), H, z)
        phi = over_batch(self.phi, queries).to(H.dtype)  # [B, Hq, S, R]
        phi = phi.unflatten(1, (H.shape[1], -1))  # [B, Hkv, G, S, R]
        numerator = phi @ H[:, :, None]  # [B, Hkv, G, S, Dv]
        denominator = (phi @ z[:, :, None, :, None])[..., 0]  # [B, Hkv, G, S]
        return part_of_sums(numerator.flatten(1, 2), denominator.flatten(1, 2))

    def over_arrivals(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        has_arrived: Tensor,
        scaling: float,
    ) -> Part:
        """Linear attention over the pairs in order of arrival: a chunked scan, O(S R Dv)."""
        phi, psi = self._arriving_features(queries, keys, has_arrived)
        return dispatch.lowrank_part(phi, psi, values.to(phi.dtype))

    def along_arrivals(
        self,
        memory: Memory,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        has_arrived: Tensor,
        scaling: float,
    ) -> Part:
        phi, psi = self._arriving_features(queries, keys, has_arrived)
        v = values.to(phi.dtype)
        memory["H"].add_(psi.mT @ v)
        memory["z"].add_(psi.sum(2))
        return dispatch.lowrank_part(phi, psi, v)

    def join_over_arrivals(
        self,
        slots: Part,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        has_arrived: Tensor,
        scaling: float,
    ) -> Tensor:
        phi, psi = self._arriving_features(queries, keys, has_arrived)
        return dispatch.join(slots, phi, psi, values)

    def _arriving_features(
        self, queries: Tensor, keys: Tensor, has_arrived: Tensor
    ) -> tuple[Tensor, Tensor]:
        """phi [B, Hq, S, R], and psi [B, Hkv, S, R], 0 where nothing arrives; float32 or wider."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        # Half-precision matmuls halve the largest tensors of a training step.
        in_half = self.training and self.trains_in_half
        with autocast(queries.device) if in_half else contextlib.nullcontext():
            phi = self.phi(queries)
            psi = self.psi(keys)
        return phi.to(wide), psi.to(wide) * has_arrived[..., None]


def over_batch(features: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`features` of x [B, H, S, D], with all tokens of a batch as those of one row: [B, H, S, R].

    Weights are per head; with a batch before the heads they would be copied for every row.
    """
    B, H, S, D = x.shape
    one_row = x.transpose(0, 1).reshape(1, H, B * S, D)
    out = features(one_row)  # [1, H, B * S, R]
    return out.reshape(H, B, S, out.shape[-1]).transpose(0, 1)


@register_state
class LayerKernels(LowRank):
    """The learned phi and psi of one attention layer (paper, eqs 1-2), a small MLP per head, no
    biases.

    phi(q) = |gelu(gelu(q W1) W2)|; psi(k) = |u + (u W3) * s2| with u = |s1| * gelu(gelu(k W1)
    W2). The residual in psi is in the authors' code; the paper prints psi without it. `dropout`
    acts on the first pre-activation while training. phi is per query head, psi per key-value
    head.
    """

    name = "less"

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        kernel_size: int = 8,
        hidden: int = 512,
        dropout: float = 0.3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(heads, kv_heads, head_dim, kernel_size)
        self.dropout = dropout
        # Of dropout; layers that train at the same time have one each.
        self.generator: torch.Generator | None = None

        def drawn(*shape: int) -> nn.Parameter:
            weights = torch.randn(shape, generator=generator) * shape[-2] ** -0.5
            if shape[-2] > shape[-1]:
                # The same numbers, stored so that the sums over the long side read in order.
                weights = weights.mT.contiguous().mT
            return nn.Parameter(weights)

        self.phi_w1 = drawn(heads, head_dim, hidden)
        self.phi_w2 = drawn(heads, hidden, kernel_size)
        self.psi_w1 = drawn(kv_heads, head_dim, hidden)
        self.psi_w2 = drawn(kv_heads, hidden, kernel_size)
        self.psi_w3 = drawn(kv_heads, kernel_size, kernel_size)
        self.s1 = nn.Parameter(torch.full((kv_heads, 1, kernel_size), SCALE_INIT))
        self.s2 = nn.Parameter(torch.full((kv_heads, 1, kernel_size), SCALE_INIT))

    def phi(self, q: Tensor) -> Tensor:
        return self._mlp(q, self.phi_w1, self.phi_w2).abs()

    def psi(self, k: Tensor) -> Tensor:
        # u + (u W3) * s2 is one product, with |s1| and s2 on the rows and columns of an R x R
        # matrix.
        identity = torch.eye(self.kernel_size, dtype=self.s2.dtype, device=self.s2.device)
        mix = self.s1.abs().mT * (identity + self.psi_w3 * self.s2)
        return (self._mlp(k, self.psi_w1, self.psi_w2) @ mix).abs()

    def fused_phi(self, kernels: ModuleType, q: Tensor) -> Tensor:
        return kernels.phi(q, self.phi_w1, self.phi_w2)

    def fused_psi(self, kernels: ModuleType, k: Tensor) -> Tensor:
        return kernels.psi(k, self.psi_w1, self.psi_w2, self.psi_w3, self.s1, self.s2)

    def _mlp(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        """gelu(gelu(x W1) W2), [B, H, S, R], in the weights' dtype: in the layout that is
        quickest.
        """
        x = x.to(w1.dtype)
        heads = len(w1)
        if torch.compiler.is_compiling() and not self.training:
            is_one_token = x.shape[:-1].numel() == heads
            if is_one_token and x.dtype == torch.float32 and x.device.type == "cpu":
                return _mlp_of_one_token(x, w1, w2)
        if x.shape[-2] <= FEW:
            hidden = F.gelu(self._dropped(x @ w1))
            return F.gelu(hidden @ w2)
        # Of many tokens: features before tokens, [hidden, S] and [R, S]. With R in the last place a
        # CPU's matmuls take three times as long.
        narrow = x.to(autocast_dtype(x))
        kernels = dispatch.mlp_kernels(narrow)
        if kernels is not None:
            is_kept = self._drawn(narrow, w1)
            return F.gelu(kernels.mlp(narrow, w1, w2, is_kept, self._kept_share)).mT
        if self.training:
            hidden = F.gelu(self._dropped(w1.mT @ x.mT))
            return F.gelu(w2.mT @ hidden).mT
        # A tile of tokens at a time, whose hidden layer stays in a CPU's caches.
        numbers_of_token = x.shape[:-2].numel() * w1.shape[-1]
        tile = max(FEW, TILE_NUMBERS // numbers_of_token)
        tiles = [F.gelu(w2.mT @ F.gelu(w1.mT @ tokens)) for tokens in x.mT.split(tile, -1)]
        return torch.cat(tiles, -1).mT

    @property
    def _kept_share(self) -> float:
        """The share of the hidden layer that dropout keeps."""
        return 1 - self.dropout if self.training else 1.0

    def _dropped(self, hidden: Tensor) -> Tensor:
        share = self._kept_share
        if share == 1:
            return hidden
        return hidden * kept_at_random(hidden.shape, share, hidden.device, self.generator) / share

    def _drawn(self, x: Tensor, w1: Tensor) -> Tensor:
        """What dropout keeps of the hidden layer of x [B, H, S, D], by the random numbers that
        `_dropped` would draw: [B, H, hidden, S]; empty where all is kept.
        """
        share = self._kept_share
        if share == 1:
            return torch.empty(0, dtype=torch.bool)
        B, H, S, _ = x.shape
        size = torch.Size((B, H, w1.shape[-1], S))
        return kept_at_random(size, share, x.device, self.generator)


def kept_at_random(
    size: torch.Size, share: float, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Booleans of a size, a `share` of them True, to one in 65,536.

    A CPU draws four of them from one random number: `bernoulli_` takes ten times as long, longer
    than all else in a step of training.
    """
    count = size.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    # From the lowest number on: otherwise the sign's bit would always be 0.
    words.random_(-(2**63), None, generator=generator)
    draws = words.view(torch.int16)[:count].view(size)
    # The lowest draw is -2^15, and the highest one must be a limit, too.
    limit = min(round(share * 2**16), 2**16 - 1) - 2**15
    return draws < limit


def _mlp_of_one_token(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The MLP of one token per head in compiled code on a CPU.

    For a matmul of one row the compiler writes loops that take twice as long as these operations.
    """
    rows = x.reshape(-1, 1, x.shape[-1])  # [H, 1, D]
    hidden = F.gelu(torch.baddbmm(x.new_zeros(()), rows, w1, beta=0))
    # Stored: inside the sum's loops it would be computed R times, without SIMD.
    hidden = hidden.as_strided(hidden.shape, hidden.stride())
    return F.gelu((hidden * w2.mT).sum(-1)).reshape(*x.shape[:-1], -1)
