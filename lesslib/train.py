"""Train the kernels of LESS, layer by layer: `python -m lesslib.train --help`.

One pass of the model captures q, k, v and the attention outputs of all wanted layers. Eviction times, the sparse
outputs, their log-sum-exps and the targets do not depend on the kernels, so each is computed once per sequence; an epoch
then costs phi, psi and one linear scan. The loss is the squared error after the output projection, at positions past the
budget (paper, section 3.2), divided by the sparse policy's own: 1 is no better than eviction alone, 0 is the full cache.
"""
from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import __version__
from .data import load_corpus, training_windows
from .hf import attention_modules, capture, model_shape, output_projection
from .kernels import Kernels, LayerKernels
from .models import kernel_path, load_model
from .parallel import Evicted, dense_attention, evict, recover
from .policies import Policy, budget_of, get_policy
from .profiles import Profile, get_profile
from .results import progress, write_torch


@dataclass(frozen=True)
class Recipe:
    """Settings of kernel training; `Recipe.of(profile)` takes a profile's. The paper's are those of the `paper` profile."""

    kernel_size: int = 8
    hidden: int = 512
    epochs: int = 40
    halve_every: int = 10
    lr: float = 1e-3
    dropout: float = 0.3
    batch: int = 2
    seed: int = 0

    @classmethod
    def of(cls, profile: Profile, **changes) -> Recipe:
        p = profile
        return replace(cls(p.kernel_size, p.hidden, p.epochs, p.halve_every, p.lr, p.dropout, p.train_batch), **changes)


@dataclass
class LayerData:
    """One layer's tensors over N sequences: q [N, Hq, S, D], k [N, Hkv, S, D], v [N, Hkv, S, Dv], out [N, Hq, S, Dv], and the logits' scaling."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scaling: float


def capture_layers(model, windows: Tensor, layers: list[int], batch: int = 8, memory_gib: float = 8.0, folder: Path | None = None) -> dict[int, LayerData]:
    """q, k, v after RoPE and dense attention outputs of `layers` over token `windows` [N, S], in ONE pass of the model.

    Kept in half precision (bfloat16 for a bfloat16 model). Beyond `memory_gib` they are files in `folder`, mapped into
    memory, which the caller deletes.
    """
    shape, (N, S) = model_shape(model), windows.shape
    heads = {"q": shape["heads"], "k": shape["kv_heads"], "v": shape["kv_heads"], "out": shape["heads"]}
    dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
    need = len(layers) * N * S * shape["head_dim"] * sum(heads.values()) * dtype.itemsize
    if need > memory_gib * 2**30 and folder is None:
        raise ValueError(f"the captured layers take {need / 2**30:.1f} GiB, above memory_gib={memory_gib:g}: give a folder to stream them to")

    def allocate(layer: int, name: str) -> Tensor:
        size = (N, heads[name], S, shape["head_dim"])
        if need <= memory_gib * 2**30:
            return torch.empty(size, dtype=dtype)
        return torch.from_file(f"{folder}/{layer}-{name}.bin", shared=True, size=torch.Size(size).numel(), dtype=dtype).view(size)

    data = {i: LayerData(*(allocate(i, name) for name in ("q", "k", "v", "out")), scaling=0.0) for i in layers}
    rows = slice(0, 0)

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scaling: float) -> None:
        if layer in data:
            d = data[layer]
            d.q[rows], d.k[rows], d.v[rows], d.out[rows], d.scaling = q.to("cpu", dtype), k.to("cpu", dtype), v.to("cpu", dtype), out.to("cpu", dtype), scaling

    with capture(model, keep):
        for start in range(0, N, batch):
            rows = slice(start, min(start + batch, N))
            model(input_ids=windows[rows].to(model.device), use_cache=False, logits_to_keep=1)
            progress("capturing q, k, v", rows.stop, N)
    return data


class LayerTrainer:
    """Everything that training one layer needs, computed once: eviction times, sparse outputs, log-sum-exps, errors."""

    def __init__(self, data: LayerData, policy: Policy, projection: Tensor, validation: int, batch: int = 8, plus: int = 4):
        self.data, self.policy, self.device = data, policy, projection.device
        self.projection = projection.float()  # W_O [d_model, Hq * Dv]
        N = len(data.q)
        if not 0 < validation < N:
            raise ValueError(f"{validation} validation sequences of {N}: leave at least one for training and one for validation")
        self.train_rows, self.validation_rows = torch.arange(N - validation), torch.arange(N - validation, N)
        parts = [self._evict(policy, torch.arange(i, min(i + batch, N))) for i in range(0, N, batch)]
        self.times = torch.cat([p.times.cpu() for p in parts])
        self.sparse = torch.cat([p.sparse.to("cpu", data.q.dtype) for p in parts])
        self.logsumexp = torch.cat([p.logsumexp.cpu() for p in parts])
        self.sparse_error = {rows: self._mean_error(lambda r: self.evicted(r).sparse, which, batch) for rows, which in (("train", self.train_rows), ("validation", self.validation_rows))}
        self.plus_error = self._mean_error(lambda r: self._evict(policy.plus(plus), r).sparse, self.validation_rows, batch)

    def _load(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d = self.data
        return tuple(x[rows].to(self.device, torch.float32) for x in (d.q, d.k, d.v, d.out))  # type: ignore[return-value]

    def _evict(self, policy: Policy, rows: Tensor) -> Evicted:
        q, k, v, _ = self._load(rows)
        return evict(policy, q, k, v, scaling=self.data.scaling)

    def evicted(self, rows: Tensor) -> Evicted:
        return Evicted(self.times[rows].to(self.device), self.sparse[rows].to(self.device, torch.float32), self.logsumexp[rows].to(self.device))

    def error(self, out: Tensor, target: Tensor) -> Tensor:
        """Mean squared error after W_O at the positions past the budget; out, target [b, Hq, S, Dv]."""
        past = (out - target)[:, :, self.policy.budget :].transpose(1, 2).flatten(2)
        return (past @ self.projection.T).square().mean()

    def output(self, kernels: LayerKernels, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(LESS, target) attention outputs [b, Hq, S, Dv] of sequences `rows`."""
        q, k, v, target = self._load(rows)
        return recover(self.evicted(rows), kernels.phi(q), kernels.psi(k), v), target

    @torch.no_grad()
    def _mean_error(self, out, rows: Tensor, batch: int) -> float:
        parts = [self.error(out(r), self._load(r)[3]).item() * len(r) for r in rows.split(batch)]
        return sum(parts) / len(rows)

    def relative_error(self, kernels: LayerKernels, batch: int = 8) -> float:
        """Validation error of LESS over the sparse policy's."""
        kernels.eval()
        with torch.no_grad():
            return self._mean_error(lambda r: self.output(kernels, r)[0], self.validation_rows, batch) / self.sparse_error["validation"]

    def fit(self, kernels: LayerKernels, recipe: Recipe, label: str = "kernels") -> dict:
        """Train `kernels` in place, keep the weights of the best validation error, return the curves."""
        kernels.to(self.device)
        optimizer = torch.optim.Adam(kernels.parameters(), lr=recipe.lr)
        generator = torch.Generator().manual_seed(recipe.seed)
        best, best_state, train_curve, begun = float("inf"), {}, [], time.time()
        curve = [self.relative_error(kernels)]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(recipe.seed)  # of dropout
            for epoch in range(recipe.epochs):
                for g in optimizer.param_groups:
                    g["lr"] = recipe.lr * 0.5 ** (epoch // recipe.halve_every)
                kernels.train()
                losses = []
                for rows in self.train_rows[torch.randperm(len(self.train_rows), generator=generator)].split(recipe.batch):
                    loss = self.error(*self.output(kernels, rows)) / self.sparse_error["train"]
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
                train_curve.append(sum(losses) / len(losses))
                curve.append(self.relative_error(kernels))
                if not curve[-1] < float("inf"):
                    raise FloatingPointError(f"{label}: the loss is {curve[-1]} after epoch {epoch + 1}; lower --lr from {recipe.lr:g}")
                if curve[-1] < best:
                    best, best_state = curve[-1], {n: t.detach().clone() for n, t in kernels.state_dict().items()}
                progress(label, epoch + 1, recipe.epochs)
        kernels.load_state_dict(best_state)
        kernels.eval()
        return {"train": train_curve, "validation": curve, "best": best, "baseline_plus": self.plus_error / self.sparse_error["validation"], "seconds": time.time() - begun}


def train(model, policy: Policy, windows: Tensor, recipe: Recipe, path: Path, header: dict, validation: int = 8, memory_gib: float = 8.0) -> tuple[Kernels, dict]:
    """Train and save the kernels of all layers; returns them and {layer: curves}.

    `path` is the checkpoint; every finished layer lies beside it in `<path>.parts/` until all are there, and a second call
    skips those that were trained with the same recipe on the same windows.
    """
    shape = model_shape(model)
    policy.check(shape["context"])
    if policy.budget is None or policy.budget >= windows.shape[1]:
        raise ValueError(f"{policy}: windows of {windows.shape[1]} tokens never fill the budget, so nothing would be learnt; use a smaller budget or longer windows")
    kernels = Kernels.new({k: shape[k] for k in ("layers", "heads", "kv_heads", "head_dim")}, recipe.kernel_size, recipe.hidden, recipe.dropout, recipe.seed)
    kernels.header |= getattr(model, "less_identity", {}) | {"policy": policy.name, "budget": policy.budget, "recipe": asdict(recipe), "lesslib": __version__} | header
    stamp = json.dumps([kernels.header, list(windows.shape), int(windows.sum())], sort_keys=True)
    parts = path.with_name(path.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    curves: dict[str, dict] = {}
    for i in range(shape["layers"]):
        part = parts / f"layer-{i:03d}.pt"
        if part.exists():
            state = torch.load(part, map_location="cpu", weights_only=True)
            if state["stamp"] == stamp:
                kernels[i].load_state_dict(state["weights"])
                curves[str(i)] = state["curves"]
    todo = [i for i in range(shape["layers"]) if str(i) not in curves]
    if todo:
        with tempfile.TemporaryDirectory(dir=parts) as folder:
            data = capture_layers(model, windows, todo, memory_gib=memory_gib, folder=Path(folder))
            for n, i in enumerate(todo):
                trainer = LayerTrainer(data.pop(i), policy, output_projection(attention_modules(model)[i]).weight.detach(), validation, plus=recipe.kernel_size // 2)
                layer = kernels[i]
                assert isinstance(layer, LayerKernels)
                curves[str(i)] = trainer.fit(layer, recipe, f"{policy.name} {policy.budget} layer {i} ({n + 1}/{len(todo)})")
                write_torch(parts / f"layer-{i:03d}.pt", {"stamp": stamp, "weights": layer.cpu().state_dict(), "curves": curves[str(i)]})
    kernels.header["relative_error"] = {i: round(c["best"], 4) for i, c in curves.items()}
    kernels.save(path)
    for part in parts.glob("layer-*.pt"):
        part.unlink()
    parts.rmdir()
    return kernels.eval(), curves
