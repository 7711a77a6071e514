"""The learned feature maps phi and psi of LESS, the Performer baseline, and their checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lesslib.util.files import write_bytes

FORMAT = "less-kernels-1"
FEW = 32  # tokens
SCALE_INIT = 1e-4  # of s1 and s2, as in the authors' code
SHAPE_FIELDS = ("layers", "heads", "kv_heads", "head_dim")


def _header(shape: dict[str, int], **sizes: int) -> dict[str, int]:
    """The fields of `shape` that kernels depend on, and `sizes`. Raises ValueError for a size that cannot be."""
    header = {**{f: shape[f] for f in SHAPE_FIELDS}, **sizes}
    for what, n in header.items():
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"{what}={n!r} must be a whole number of at least 1")
    if shape["heads"] % shape["kv_heads"]:
        raise ValueError(
            f"{shape['heads']} query heads do not divide into {shape['kv_heads']} key-value heads"
        )
    return header


class LayerKernels(nn.Module):
    """phi and psi of one attention layer (paper, eqs 1-2), a small MLP per head without biases.

    phi(q) = |gelu(gelu(q W1) W2)|; psi(k) = |u + (u W3) * s2| with u = |s1| * gelu(gelu(k W1) W2). The residual in psi is in
    the authors' code; the paper prints psi without it. `dropout` acts on the first pre-activation while training.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        kernel_size: int = 8,
        hidden: int = 512,
        dropout: float = 0.3,
        generator: torch.Generator | None = None,
    ):
        super().__init__()

        def drawn(*shape: int) -> nn.Parameter:
            weights = torch.randn(shape, generator=generator) * shape[-2] ** -0.5
            return nn.Parameter(
                weights if shape[-2] <= shape[-1] else weights.mT.contiguous().mT
            )  # its sums read in order

        self.dropout = dropout
        self.generator: torch.Generator | None = (
            None  # of dropout; layers that train at the same time have one each
        )
        self.phi_w1, self.phi_w2 = drawn(heads, head_dim, hidden), drawn(heads, hidden, kernel_size)
        self.psi_w1, self.psi_w2 = (
            drawn(kv_heads, head_dim, hidden),
            drawn(kv_heads, hidden, kernel_size),
        )
        self.psi_w3 = drawn(kv_heads, kernel_size, kernel_size)
        self.s1, self.s2 = (
            nn.Parameter(torch.full((kv_heads, 1, kernel_size), SCALE_INIT)) for _ in range(2)
        )

    def _mlp(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        # Of many tokens, features before tokens, [hidden, S] and [R, S]: with R in the last place a CPU's matmuls take three times as long.
        # Of a few, as in decoding, it is the transposed weights that do.
        x, few = x.to(w1.dtype), x.shape[-2] <= FEW
        one = (
            x.shape[:-1].numel() == len(w1) and x.dtype == torch.float32 and x.device.type == "cpu"
        )
        if (
            one and torch.compiler.is_compiling() and not self.training
        ):  # for a matmul of one row it writes loops that take twice as long
            hidden = F.gelu(
                torch.baddbmm(x.new_zeros(()), x.reshape(-1, 1, x.shape[-1]), w1, beta=0)
            )
            hidden = hidden.as_strided(
                hidden.shape, hidden.stride()
            )  # stored: in the sum's loops it would come R times, without SIMD
            return F.gelu((hidden * w2.mT).sum(-1)).reshape(*x.shape[:-1], -1)
        hidden = x @ w1 if few else w1.mT @ x.mT
        if self.training and self.dropout:
            kept = torch.empty_like(hidden).bernoulli_(1 - self.dropout, generator=self.generator)
            hidden = hidden * kept / (1 - self.dropout)
        hidden = F.gelu(hidden)
        return F.gelu(hidden @ w2) if few else F.gelu(w2.mT @ hidden).mT

    def phi(self, q: Tensor) -> Tensor:
        """Features of queries: [B, Hq, S, D] -> [B, Hq, S, R], at least 0."""
        return self._mlp(q, self.phi_w1, self.phi_w2).abs()

    def psi(self, k: Tensor) -> Tensor:
        """Features of keys: [B, Hkv, S, D] -> [B, Hkv, S, R], at least 0."""
        # u + (u W3) * s2 is one product, with |s1| and s2 on the rows and columns of a matrix of R x R
        mix = self.s1.abs().mT * (torch.eye(self.s2.shape[-1]).to(self.s2) + self.psi_w3 * self.s2)
        return (self._mlp(k, self.psi_w1, self.psi_w2) @ mix).abs()


class LayerPerformer(nn.Module):
    """Positive random features of the softmax kernel (Choromanski et al., 2021), the paper's "H2O+Performer": nothing is trained.

    E[phi(q) psi(k)^T] = exp(q k / sqrt D), with R orthogonal Gaussian directions [Hkv, D, R] per key-value head.
    """

    directions: Tensor

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, kernel_size: int, generator: torch.Generator
    ):
        super().__init__()

        def rotation() -> Tensor:
            Q, R = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))
            return (
                Q * R.diagonal().sign()
            )  # QR alone would fix the signs of Q's columns and bias the estimate

        blocks = []
        for _ in range(kv_heads):
            directions = torch.cat(
                [rotation() for _ in range(math.ceil(kernel_size / head_dim))], 1
            )[:, :kernel_size]
            blocks.append(
                directions * torch.randn(head_dim, kernel_size, generator=generator).norm(dim=0)
            )
        self.register_buffer("directions", torch.stack(blocks))
        self.groups = heads // kv_heads

    def _features(self, x: Tensor, directions: Tensor) -> Tensor:
        x = x.to(directions.dtype) * x.shape[-1] ** -0.25
        return (x @ directions - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(
            directions.shape[-1]
        )

    def phi(self, q: Tensor) -> Tensor:
        """Features of queries: [B, Hq, S, D] -> [B, Hq, S, R], above 0."""
        return self._features(q, self.directions.repeat_interleave(self.groups, 0))

    def psi(self, k: Tensor) -> Tensor:
        """Features of keys: [B, Hkv, S, D] -> [B, Hkv, S, R], above 0."""
        return self._features(k, self.directions)


class Kernels(nn.Module):
    """The kernels of all layers of a model, with a header that says what they were made for and from.

    `header` holds at least layers, heads, kv_heads, head_dim, kernel_size (R) and hidden; trained ones add model,
    revision, policy, budget, fraction, data, seed, recipe and the lesslib version.
    """

    def __init__(self, header: dict, layers: list[nn.Module]):
        super().__init__()
        self.header, self.layers = header, nn.ModuleList(layers)

    @classmethod
    def new(
        cls,
        shape: dict[str, int],
        kernel_size: int,
        hidden: int,
        dropout: float = 0.3,
        seed: int = 0,
    ) -> Kernels:
        """Freshly initialised kernels for a model of `shape` (`layers`, `heads`, `kv_heads`, `head_dim`)."""
        header = _header(shape, kernel_size=kernel_size, hidden=hidden)
        sizes = {what: n for what, n in header.items() if what != "layers"}
        own = (
            torch.Generator().manual_seed(seed * 1000 + i) for i in range(shape["layers"])
        )  # one each: layers train anywhere
        layers: list[nn.Module] = [
            LayerKernels(**sizes, dropout=dropout, generator=generator) for generator in own
        ]
        return cls(header | {"seed": seed}, layers)

    @classmethod
    def performer(cls, shape: dict[str, int], kernel_size: int = 8, seed: int = 0) -> Kernels:
        """The Performer baseline for a model of `shape`; its header says `hidden` 0."""
        header, generator = (
            _header(shape, kernel_size=kernel_size),
            torch.Generator().manual_seed(seed),
        )
        sizes = {what: n for what, n in header.items() if what != "layers"}
        layers: list[nn.Module] = [
            LayerPerformer(**sizes, generator=generator) for _ in range(shape["layers"])
        ]
        return cls(header | {"hidden": 0, "seed": seed}, layers)

    def __getitem__(self, layer: int) -> nn.Module:
        return self.layers[layer]

    def check(self, shape: dict[str, int], identity: dict[str, str] | None = None) -> None:
        """Raises ValueError naming the field in which a model of `shape` and `identity` (model, revision) differs, or for NaN weights."""
        for field, have in {**{f: shape[f] for f in SHAPE_FIELDS}, **(identity or {})}.items():
            if (made_for := self.header.get(field, have)) != have:
                raise ValueError(
                    f"{field} is {made_for} in the kernels and {have} in the model: train with python -m lesslib.train"
                )
        if any(not t.isfinite().all() for t in self.state_dict().values()):
            raise ValueError("the kernels hold NaN or infinite weights: load or train them again")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the JSON header, whole or not at all."""
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}
        write_bytes(
            path,
            save(
                tensors,
                metadata={"format": FORMAT, "header": json.dumps(self.header, sort_keys=True)},
            ),
        )

    @classmethod
    def load(cls, path: str | Path) -> Kernels:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for a file that is cut short, foreign or holds NaN."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no kernels at {path}: train them with python -m lesslib.train"
            )
        try:
            with safe_open(path, framework="pt") as f:
                metadata, tensors = (
                    f.metadata() or {},
                    {name: f.get_tensor(name) for name in f.keys()},
                )  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as e:
            raise ValueError(
                f"{path} is not a whole safetensors file ({e}): delete it and train again"
            ) from e
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds format {metadata.get('format')!r}, not {FORMAT!r}: not LESS kernels of this version"
            )
        try:
            header = json.loads(metadata["header"])
            R, hidden = header["kernel_size"], header["hidden"]
            kernels = cls.new(header, R, hidden) if hidden else cls.performer(header, R)
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(
                f"{path}: its header is damaged ({type(e).__name__}: {e}); delete the file and train again"
            ) from e
        wanted, found = (
            {n: tuple(t.shape) for n, t in each.items()} for each in (kernels.state_dict(), tensors)
        )
        for name in sorted(wanted.keys() | found.keys()):
            have, says = found.get(name, "missing"), wanted.get(name, "not to be there")
            if have != says:
                raise ValueError(
                    f"{path}: {name} is {have}, the header says {says}; delete the file and train again"
                )
            if not tensors[name].isfinite().all():
                raise ValueError(
                    f"{path}: {name} holds NaN or infinite weights; delete the file and train again"
                )
        kernels.load_state_dict(tensors)
        kernels.header = header
        return kernels.eval()
