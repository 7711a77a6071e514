"""Train the kernels of LESS, layer by layer: `python -m lesslib.train --help`.

One pass of the model captures q, k, v and the attention outputs of all wanted layers. What does not depend on the kernels is
computed once per sequence; an epoch then costs phi, psi and one linear scan. The loss is the squared error after the output
projection at positions past the budget (paper, section 3.2) over the sparse policy's own: 1 is eviction alone, 0 the full cache.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import __version__
from .data import load_corpus, training_windows
from .hf import attention_modules, capture, model_shape, output_projection
from .kernels import Kernels, LayerKernels
from .models import keep_memory, kernel_path, load_model
from .parallel import Evicted, evict, recover
from .policies import Policy, get_policy
from .profiles import Profile, get_profile
from .results import progress, read_torch, results_dir, write_torch


@dataclass(frozen=True)
class Recipe:
    """Settings of kernel training; the defaults are the paper's, `Recipe.of(profile, seed)` takes a profile's."""

    kernel_size: int = 8
    hidden: int = 512
    epochs: int = 40
    halve_every: int = 10
    lr: float = 1e-3
    dropout: float = 0.3
    batch: int = 2
    seed: int = 0

    @classmethod
    def of(cls, p: Profile, seed: int) -> Recipe:
        return cls(p.kernel_size, p.hidden, p.epochs, p.halve_every, p.lr, p.dropout, p.train_batch, seed)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (0 <= value < 1 if name == "dropout" else value > 0 or name == "seed"):
                raise ValueError(f"recipe {name}={value!r}: {'it is a share in [0, 1)' if name == 'dropout' else 'it must be positive'}")


@dataclass
class LayerData:
    """One layer over N sequences: q, out [N, Hq, S, D or Dv], k, v [N, Hkv, S, D or Dv], and the logits' scaling."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scaling: float = field(default=0.0, init=False)


def capture_layers(
    model, windows: Tensor, layers: list[int], batch: int = 8, memory_gib: float = 8.0, folder: Path | None = None
) -> dict[int, LayerData]:
    """q, k, v after RoPE and attention outputs of `layers` over token `windows` [N, S], from ONE pass, in half precision.

    Beyond `memory_gib` they are mapped files in `folder`, which the caller deletes; ValueError without a folder that holds them.
    """
    shape, (N, S) = model_shape(model), windows.shape
    heads = {"q": shape["heads"], "k": shape["kv_heads"], "v": shape["kv_heads"], "out": shape["heads"]}
    dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
    need = len(layers) * N * S * shape["head_dim"] * sum(heads.values()) * dtype.itemsize
    on_disk = need > memory_gib * 2**30
    if on_disk and (folder is None or shutil.disk_usage(folder).free < need):
        where = "give a folder to stream them to" if folder is None else f"free that much disk at {folder}, or use fewer sequences"
        raise ValueError(f"the captured layers take {need / 2**30:.1f} GiB, above memory_gib={memory_gib:g}: {where}")

    def allocate(layer: int, name: str) -> Tensor:
        size = torch.Size((N, heads[name], S, shape["head_dim"]))
        if not on_disk:
            return torch.empty(size, dtype=dtype)
        return torch.from_file(f"{folder}/{layer}-{name}.bin", shared=True, size=size.numel(), dtype=dtype).view(size)

    data = {i: LayerData(*(allocate(i, name) for name in heads)) for i in layers}
    rows = slice(0, 0)

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scaling: float) -> None:
        if d := data.get(layer):
            d.scaling = scaling
            for into, x in ((d.q, q), (d.k, k), (d.v, v), (d.out, out)):
                into[rows] = x.to("cpu", dtype)

    with capture(model, keep):
        for start in range(0, N, batch):
            rows = slice(start, min(start + batch, N))
            model(input_ids=windows[rows].to(model.device), use_cache=False, logits_to_keep=1)
            progress("capturing q, k, v", rows.stop, N)
    return data


class LayerTrainer:
    """Everything that training one layer needs, computed once: eviction times, sparse outputs, log-sum-exps, errors."""

    def __init__(self, data: LayerData, policy: Policy, projection: Tensor, validation: int, batch: int = 8, plus: int = 4):
        self.data, self.policy, self.batch, self.device = data, policy, batch, projection.device
        self.projection = projection.float()  # W_O [d_model, Hq * Dv]
        N = len(data.q)
        if not 0 < validation < N:
            raise ValueError(f"{validation} validation sequences of {N}: leave at least one for training and one for validation")
        self.train_rows, self.validation_rows = torch.arange(N).split([N - validation, validation])
        parts = [self._evict(policy, rows) for rows in torch.arange(N).split(batch)]
        once = [(e.times.cpu(), e.sparse.to("cpu", data.q.dtype), e.logsumexp.cpu()) for e in parts]
        self.times, self.sparse, self.logsumexp = (torch.cat(each) for each in zip(*once, strict=True))
        sets = {"train": self.train_rows, "validation": self.validation_rows}
        self.sparse_error = {name: self._mean_error(lambda r: self.evicted(r).sparse, rows) for name, rows in sets.items()}
        self.plus_error = self._mean_error(lambda r: self._evict(policy.plus(plus), r).sparse, self.validation_rows)

    def _load(self, rows: Tensor) -> list[Tensor]:
        return [x[rows].to(self.device, torch.float32) for x in (self.data.q, self.data.k, self.data.v, self.data.out)]

    def _evict(self, policy: Policy, rows: Tensor) -> Evicted:
        q, k, v, _ = self._load(rows)
        return evict(policy, q, k, v, scaling=self.data.scaling)

    def evicted(self, rows: Tensor) -> Evicted:
        times, sparse, logsumexp = (x[rows].to(self.device) for x in (self.times, self.sparse, self.logsumexp))
        return Evicted(times, sparse.float(), logsumexp)

    def error(self, out: Tensor, target: Tensor) -> Tensor:
        """Mean squared error after W_O at the positions past the budget; out, target [b, Hq, S, Dv]."""
        past = (out - target)[:, :, self.policy.budget :].transpose(1, 2).flatten(2)
        return (past @ self.projection.T).square().mean()

    def output(self, kernels: LayerKernels, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(LESS, target) attention outputs [b, Hq, S, Dv] of sequences `rows`."""
        q, k, v, target = self._load(rows)
        return recover(self.evicted(rows), kernels.phi(q), kernels.psi(k), v), target

    @torch.no_grad()
    def _mean_error(self, out: Callable[[Tensor], Tensor], rows: Tensor) -> float:
        return sum(self.error(out(r), self._load(r)[3]).item() * len(r) for r in rows.split(self.batch)) / len(rows)

    def relative_error(self, kernels: LayerKernels) -> float:
        """Validation error of LESS over the sparse policy's."""
        kernels.eval()
        return self._mean_error(lambda r: self.output(kernels, r)[0], self.validation_rows) / self.sparse_error["validation"]

    def fit(self, kernels: nn.Module, recipe: Recipe, label: str = "kernels") -> dict:
        """Train one layer's `kernels` in place, keep the weights of the best validation error, return the curves."""
        assert isinstance(kernels, LayerKernels)
        kernels.to(self.device)
        optimizer = torch.optim.Adam(kernels.parameters(), lr=recipe.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.halve_every, gamma=0.5)
        order = torch.Generator().manual_seed(recipe.seed)
        best, best_state, train_curve, begun = float("inf"), {}, [], time.time()
        curve = [self.relative_error(kernels)]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(recipe.seed)  # of dropout
            for epoch in range(recipe.epochs):
                kernels.train()
                losses = []
                for rows in self.train_rows[torch.randperm(len(self.train_rows), generator=order)].split(recipe.batch):
                    loss = self.error(*self.output(kernels, rows)) / self.sparse_error["train"]
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
                schedule.step()
                train_curve.append(sum(losses) / len(losses))
                curve.append(self.relative_error(kernels))
                if not curve[-1] < float("inf"):
                    raise FloatingPointError(f"{label}: the loss is {curve[-1]} after epoch {epoch + 1}; lower --lr from {recipe.lr:g}")
                if curve[-1] < best:
                    best, best_state = curve[-1], {n: t.detach().clone() for n, t in kernels.state_dict().items()}
                progress(label, epoch + 1, recipe.epochs)
        kernels.load_state_dict(best_state)
        plus = self.plus_error / self.sparse_error["validation"]
        return {"train": train_curve, "validation": curve, "best": best, "baseline_plus": plus, "seconds": time.time() - begun}


def train(
    model, policy: Policy, windows: Tensor, recipe: Recipe, path: Path, header: dict, validation: int = 8, memory_gib: float = 8.0
) -> tuple[Kernels, dict]:
    """Train and save the kernels of all layers on token `windows` [N, S]; returns them and {layer: curves}.

    Finished layers lie in `<path>.parts/` until all are there; a second call skips those of the same recipe and windows.
    Raises ValueError before compute for a budget that the windows never fill or a damaged part.
    """
    shape = model_shape(model)
    policy.check(shape["context"])
    if policy.budget is None or policy.budget >= windows.shape[1]:
        raise ValueError(f"{policy}: windows of {windows.shape[1]} tokens never fill the budget: use a smaller budget or longer windows")
    kernels = Kernels.new(shape, recipe.kernel_size, recipe.hidden, recipe.dropout, recipe.seed)
    identity = getattr(model, "less_identity", {})
    kernels.header |= identity | {"policy": policy.name, "budget": policy.budget, "recipe": asdict(recipe), "lesslib": __version__} | header
    stamp = json.dumps([kernels.header, hashlib.sha256(windows.numpy().tobytes()).hexdigest()], sort_keys=True)
    parts = [path.with_name(f"{path.name}.parts") / f"layer-{i:03d}.pt" for i in range(shape["layers"])]
    curves: dict[str, dict] = {}
    for i, part in enumerate(parts):
        state = read_torch(part, "delete it, and that layer is trained again")
        if state and state["stamp"] == stamp:
            kernels[i].load_state_dict(state["weights"])
            curves[str(i)] = state["curves"]
    parts[0].parent.mkdir(parents=True, exist_ok=True)
    if todo := [i for i in range(shape["layers"]) if str(i) not in curves]:
        with tempfile.TemporaryDirectory(dir=parts[0].parent) as folder:
            data = capture_layers(model, windows, todo, memory_gib=memory_gib, folder=Path(folder))
            for n, i in enumerate(todo, 1):
                projection = output_projection(attention_modules(model)[i]).weight.detach()
                trainer = LayerTrainer(data.pop(i), policy, projection, validation, plus=recipe.kernel_size // 2)
                curves[str(i)] = trainer.fit(kernels[i], recipe, f"{policy.name} {policy.budget}: layer {i} ({n}/{len(todo)})")
                write_torch(parts[i], {"stamp": stamp, "weights": kernels[i].cpu().state_dict(), "curves": curves[str(i)]})
    kernels.header["relative_error"] = {i: round(c["best"], 4) for i, c in curves.items()}
    kernels.save(path)
    shutil.rmtree(parts[0].parent)
    return kernels.eval(), curves


def train_for_profile(
    profile: Profile, policy: str, fraction: float, path: Path, seed: int = 0, length: int | None = None,
    memory_gib: float = 8.0, device: str | None = None,
) -> dict:  # fmt: skip
    """Train kernels for `policy` at `fraction` of the context on windows of `length` tokens (default: the context); {layer: curves}."""
    recipe, (model, tokenizer) = Recipe.of(profile, seed), load_model(profile.model, device)
    context = model_shape(model)["context"]
    chosen, corpora = get_policy(policy).from_fraction(fraction, context), [load_corpus(name) for name in profile.training]
    windows = training_windows(corpora, tokenizer, length or context, profile.sequences, seed)
    header = {"fraction": fraction, "data": [c.record() for c in corpora], "sequences": len(windows), "length": windows.shape[1]}
    return train(model, chosen, windows, recipe, path, header, profile.validation, memory_gib)[1]


SETTINGS = {
    "model": "carried model, folder or hub name", "training": "corpora to train on, in equal shares",
    "sequences": "token windows, validation included", "validation": "windows held out to choose the best epoch",
    "kernel_size": "R, the features of phi and psi", "hidden": "width of their hidden layer", "epochs": "passes over the windows",
    "halve_every": "epochs after which the learning rate halves", "lr": "Adam's learning rate", "train_batch": "windows a step",
    "dropout": "on the first pre-activation",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m lesslib.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", default="h2o", help="h2o, lambda or tova (default: %(default)s)")
    p.add_argument("--fraction", type=float, default=0.05, help="budget as a share of the model's context (default: %(default)s)")
    p.add_argument("--profile", help="the source of the defaults below (default: $LESS_PROFILE, else tiny)")
    for name, what in SETTINGS.items():
        kind = type(getattr(Profile, name))
        p.add_argument(f"--{name.replace('_', '-')}", type=str if kind is tuple else kind, nargs="+" if kind is tuple else None, help=what)
    p.add_argument("--length", type=int, help="tokens a window (default: the model's context)")
    p.add_argument("--seed", type=int, default=0, help="of windows, initial weights, order and dropout (default: %(default)s)")
    p.add_argument("--memory-gib", type=float, default=8.0, help="captured tensors beyond this are streamed to disk (default: %(default)s)")
    p.add_argument("--device", help="cpu, cuda, ... (default: the GPU when there is one)")
    p.add_argument("--out", type=Path, help="folder for load_kernels(..., folder=...) (default: results/<profile>/kernels)")
    a = p.parse_args(argv)
    keep_memory()
    try:
        profile = replace(get_profile(a.profile), **{n: getattr(a, n) for n in SETTINGS if getattr(a, n) is not None})
        path = kernel_path(profile.model, a.policy, a.fraction, a.out or results_dir(profile.name) / "kernels", a.seed)
        curves = train_for_profile(profile, a.policy, a.fraction, path, a.seed, a.length, a.memory_gib, a.device)
    except (ValueError, TypeError, OSError) as e:
        raise SystemExit(f"{p.prog}: {e}") from e
    for layer, c in curves.items():
        print(f"layer {layer}: {c['best']:.3f} of the sparse error is left (Baseline+ {c['baseline_plus']:.3f}), {c['seconds']:.0f} s")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
