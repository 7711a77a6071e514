"""Train the kernels of LESS, layer by layer: `python -m lesslib.train --help`; under torchrun its ranks share the layers.

One pass of the model (several, where that is too much to hold) captures q, k, v and the attention outputs of all wanted layers. What does
not depend on the kernels is computed once per sequence; an epoch then costs phi, psi and one linear scan. The loss is the squared error
past the budget, after the output projection (paper, section 3.2), over the sparse policy's own: 1 is eviction alone, 0 the full cache.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from lesslib import __version__
from lesslib.attention.fit import model_shape
from lesslib.attention.whole_sequence import evict
from lesslib.data import load_corpus, training_windows
from lesslib.hf import attention_modules, capture, output_projection
from lesslib.models import kernel_path, load_model
from lesslib.ops.blocks import gather_tokens
from lesslib.ops.dispatch import lowrank_attention
from lesslib.ops.scan import arrivals, merge
from lesslib.policies import Policy, get_policy
from lesslib.profiles import Profile, get_profile, results_dir
from lesslib.states import Kernels, LayerKernels
from lesslib.util.command_line import options
from lesslib.util.files import read_torch, write_torch
from lesslib.util.hardware import autocast, keep_memory, one_thread
from lesslib.util.progress import progress
from lesslib.util.ranks import gather, own_device, place


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
        return cls(
            p.kernel_size, p.hidden, p.epochs, p.halve_every, p.lr, p.dropout, p.train_batch, seed
        )

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (0 <= value < 1 if name == "dropout" else value > 0 or name == "seed"):
                raise ValueError(
                    f"recipe {name}={value!r}: {'it is a share in [0, 1)' if name == 'dropout' else 'it must be positive'}"
                )


@dataclass
class LayerData:
    """One layer over N sequences: q, out [N, Hq, S, D or Dv], k, v [N, Hkv, S, D or Dv], and the logits' scaling."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scaling: float = field(default=0.0, init=False)


def captured_bytes(shape: dict[str, int], windows: Tensor) -> int:
    """What `capture_layers` keeps of one layer: four tensors, two bytes a number."""
    return windows.numel() * shape["head_dim"] * 2 * (shape["heads"] + shape["kv_heads"]) * 2


def capture_layers(
    model,
    windows: Tensor,
    layers: list[int],
    batch: int = 8,
    memory_gib: float = 8.0,
    folder: Path | None = None,
) -> dict[int, LayerData]:
    """q, k, v after RoPE and attention outputs of `layers` over token `windows` [N, S], from ONE pass, in half precision.

    Beyond `memory_gib` they are mapped files in `folder`, gone with the tensors; ValueError without a folder that holds them.
    """
    shape, (N, S) = model_shape(model), windows.shape
    heads = {
        "q": shape["heads"],
        "k": shape["kv_heads"],
        "v": shape["kv_heads"],
        "out": shape["heads"],
    }
    dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
    on_disk = (need := len(layers) * captured_bytes(shape, windows)) > memory_gib * 2**30
    if on_disk and (folder is None or shutil.disk_usage(folder).free < need):
        where = (
            "give a folder to stream them to"
            if folder is None
            else f"free that much disk at {folder}, or use fewer sequences"
        )
        raise ValueError(
            f"the captured layers take {need / 2**30:.1f} GiB, above memory_gib={memory_gib:g}: {where}"
        )

    def allocate(layer: int, name: str) -> Tensor:
        size = torch.Size((N, heads[name], S, shape["head_dim"]))
        if not on_disk:
            return torch.empty(size, dtype=dtype)
        mapped = torch.from_file(
            f"{folder}/{layer}-{name}.bin", shared=True, size=size.numel(), dtype=dtype
        ).view(size)
        Path(
            f"{folder}/{layer}-{name}.bin"
        ).unlink()  # the mapping keeps its bytes, and a process that is killed leaves none behind
        return mapped

    data, rows = {i: LayerData(*(allocate(i, name) for name in heads)) for i in layers}, slice(0, 0)

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


def features(kernels: LayerKernels, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """phi(q) and psi(k) in float32; while training their matmuls run under `autocast`, which halves the largest tensors of a step."""
    with autocast(q.device, kernels.training):
        phi, psi = kernels.phi(q), kernels.psi(k)
    return phi.float(), psi.float()


class LayerTrainer:
    """Everything that training one layer needs, computed once; only phi, psi and one scan are left to each step.

    What is kept covers the positions past the budget, where each query finds one more evicted token in the state: sparse outputs,
    log-sum-exps, and the evicted keys and values in the order in which they leave, which take the place of k and v in `data`.
    """

    def __init__(
        self,
        data: LayerData,
        policy: Policy,
        projection: Tensor,
        validation: int,
        batch: int = 8,
        plus: int = 4,
    ):
        N, _, S, _ = data.q.shape
        if not 0 < validation < N:
            raise ValueError(
                f"{validation} validation sequences of {N}: leave at least one for training and one for validation"
            )
        assert policy.budget is not None
        self.data, self.batch, self.device, self.positions = (
            data,
            batch,
            projection.device,
            S - policy.budget - 1,
        )
        past = slice(policy.budget + 1, None)
        self.gram = projection.float().T @ projection.float()  # W_O^T W_O, [Hq * Dv, Hq * Dv]
        self.outputs = projection.shape[0]
        self.train_rows, self.validation_rows = torch.arange(N).split([N - validation, validation])
        self.sparse, self.logsumexp = (
            torch.empty_like(data.out[:, :, past]),
            torch.empty(*data.out[:, :, past].shape[:-1]),
        )
        plus_errors = []
        for rows in (*self.train_rows.split(batch), *self.validation_rows.split(batch)):
            q, k, v, target = (
                x[rows].to(self.device, torch.float32) for x in (data.q, data.k, data.v, data.out)
            )
            if rows[0] >= N - validation:
                out = evict(policy.plus(plus), q, k, v, scaling=data.scaling).sparse
                plus_errors.append(
                    self.error(out[:, :, past], target[:, :, past]).item() * len(rows)
                )
            evicted = evict(policy, q, k, v, scaling=data.scaling)
            token = arrivals(evicted.times)[..., past]
            self.sparse[rows] = evicted.sparse[:, :, past].to("cpu", self.sparse.dtype)
            self.logsumexp[rows] = evicted.logsumexp[:, :, past].cpu()
            for into, x in ((data.k, k), (data.v, v)):
                into[rows, :, past] = gather_tokens(x, token).to("cpu", into.dtype)
        sets = {"train": self.train_rows, "validation": self.validation_rows}
        self.sparse_error = {
            name: self._mean_error(lambda r: self._load(self.sparse, r), rows)
            for name, rows in sets.items()
        }
        self.plus_error = sum(plus_errors) / validation

    def _load(self, x: Tensor, rows: Tensor) -> Tensor:
        """`rows` of x at the P positions past the budget (all that x has when it has no more), in float32."""
        x = x.index_select(0, rows)  # on CPU four times as fast as x[rows]
        return x[:, :, -self.positions :].to(self.device, torch.float32)

    def target(self, rows: Tensor) -> Tensor:
        """Dense attention outputs [b, Hq, P, Dv] of sequences `rows`."""
        return self._load(self.data.out, rows)

    def error(self, out: Tensor, target: Tensor) -> Tensor:
        """Mean squared error after W_O; out, target [b, Hq, P, Dv]."""
        difference = (out - target).transpose(1, 2).flatten(2)
        size = difference.shape[0] * difference.shape[1] * self.outputs
        error = (difference * (difference.detach() @ self.gram)).sum() / size  # d^T W_O^T W_O d
        return (
            2 * error - error.detach()
        )  # both factors have the same gradient, so one of them is doubled: a matmul less

    def output(self, kernels: LayerKernels, rows: Tensor) -> Tensor:
        """Attention outputs of LESS [b, Hq, P, Dv] for sequences `rows`."""
        q, k, v = (self._load(x, rows) for x in (self.data.q, self.data.k, self.data.v))
        recovered = lowrank_attention(*features(kernels, q, k), v)
        return merge(self._load(self.sparse, rows), self._load(self.logsumexp, rows), *recovered)

    @torch.no_grad()
    def _mean_error(self, out: Callable[[Tensor], Tensor], rows: Tensor) -> float:
        return sum(
            self.error(out(r), self.target(r)).item() * len(r) for r in rows.split(self.batch)
        ) / len(rows)

    def relative_error(self, kernels: LayerKernels) -> float:
        """Validation error of LESS over the sparse policy's."""
        kernels.eval()
        return (
            self._mean_error(lambda r: self.output(kernels, r), self.validation_rows)
            / self.sparse_error["validation"]
        )

    def epoch(
        self, kernels: LayerKernels, optimizer: torch.optim.Optimizer, rows: Iterable[Tensor]
    ) -> float:
        """One step of `optimizer` for each batch of `rows`; the mean training error over the sparse policy's."""
        losses = []
        for r in rows:
            loss = self.error(self.output(kernels, r), self.target(r)) / self.sparse_error["train"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    def fit(
        self,
        kernels: nn.Module,
        recipe: Recipe,
        label: str = "kernels",
        tick: Callable[[], None] = lambda: None,
    ) -> dict:
        """Train one layer's `kernels` in place, keep the weights of the best validation error, return the curves; `tick` each epoch."""
        assert isinstance(kernels, LayerKernels)
        kernels.to(self.device).generator = torch.Generator(self.device).manual_seed(recipe.seed)
        optimizer = torch.optim.Adam(kernels.parameters(), lr=recipe.lr, fused=True)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.halve_every, gamma=0.5)
        order = torch.Generator().manual_seed(recipe.seed)
        best, best_state, train_curve, begun = float("inf"), {}, [], time.time()
        curve = [self.relative_error(kernels)]
        for epoch in range(recipe.epochs):
            shuffled = self.train_rows[torch.randperm(len(self.train_rows), generator=order)]
            train_curve.append(self.epoch(kernels.train(), optimizer, shuffled.split(recipe.batch)))
            schedule.step()
            curve.append(self.relative_error(kernels))
            if not curve[-1] < float("inf"):
                raise FloatingPointError(
                    f"{label}: the loss is {curve[-1]} after epoch {epoch + 1}; lower --lr from {recipe.lr:g}"
                )
            if curve[-1] < best:
                best, best_state = (
                    curve[-1],
                    {n: t.detach().clone() for n, t in kernels.state_dict().items()},
                )
            tick()
        kernels.load_state_dict(best_state)
        plus = {
            "baseline_plus": self.plus_error / self.sparse_error["validation"],
            "seconds": time.time() - begun,
        }
        return {"train": train_curve, "validation": curve, "best": best} | plus


@contextlib.contextmanager
def layer_pool(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads that each train a layer: on CPU one per core with its operations on that core alone, else a single one.

    A step is many small operations; cores that share each of them spend more time waiting for one another than computing.
    """
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    begin = (
        functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    )  # a thread begins on the first GPU
    with one_thread(), ThreadPoolExecutor(workers, initializer=begin) as pool:
        yield pool


def train(
    model,
    policy: Policy,
    windows: Tensor,
    recipe: Recipe,
    path: Path,
    header: dict,
    validation: int = 8,
    memory_gib: float = 8.0,
) -> tuple[Kernels, dict]:
    """Train and save the kernels of all layers on token `windows` [N, S]; returns them and {layer: curves}.

    Finished layers lie in `<path>.parts/` until all are there; a second call skips those of the same recipe and windows. Under torchrun
    each rank trains its share of the layers, rank 0 writes the file, and all return the same. Raises ValueError before compute for a
    budget that the windows never fill, a damaged part or ranks that differ, RuntimeError where another rank died."""
    shape, (rank, world) = model_shape(model), place()
    policy.check(shape["context"])
    if policy.budget is None or policy.budget + 1 >= windows.shape[1]:
        raise ValueError(
            f"{policy}: windows of {windows.shape[1]} tokens never fill the budget: use a smaller budget or longer windows"
        )
    kernels = Kernels.new(shape, recipe.kernel_size, recipe.hidden, recipe.dropout, recipe.seed)
    identity = getattr(model, "less_identity", {})
    kernels.header |= (
        identity
        | {
            "policy": policy.name,
            "budget": policy.budget,
            "recipe": asdict(recipe),
            "lesslib": __version__,
        }
        | header
    )
    stamp = json.dumps(
        [kernels.header, hashlib.sha256(windows.numpy().tobytes()).hexdigest()], sort_keys=True
    )
    parts = [
        path.with_name(f"{path.name}.parts") / f"layer-{i:03d}.pt" for i in range(shape["layers"])
    ]
    states = {
        i: read_torch(part, "delete it, and that layer is trained again")
        for i, part in enumerate(parts)
    }
    stamps, found = zip(
        *gather((stamp, {i for i, state in states.items() if state and state["stamp"] == stamp})),
        strict=True,
    )
    if odd := [r for r in range(world) if stamps[r] != stamps[0]]:
        raise ValueError(
            f"rank {odd[0]} has another model, recipe or text than rank 0: give all the same arguments, data and lesslib"
        )
    finished = set.intersection(
        *found
    )  # what every rank sees: with a disk for each node, some layers are trained again
    mine = [i for i in range(shape["layers"]) if i not in finished][rank::world]
    parts[0].parent.mkdir(parents=True, exist_ok=True)
    if (
        world > 1
    ):  # one write, line end included: torchrun's processes do not buffer, and others write too
        print(
            f"rank {rank} of {world} on {model.device}: layers {', '.join(map(str, mine)) or 'none'}\n",
            end="",
            flush=True,
        )
    if mine:
        done, stop, label = itertools.count(1), threading.Event(), f"{policy.name} {policy.budget}"
        room: float = min(
            [
                shutil.disk_usage(path.parent).free,
                *[psutil.virtual_memory().total] * (model.device.type == "cuda"),
            ]
        )  # passes are quick
        room = max(memory_gib * 2**30, 0.9 * room / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        at_once = max(1, int(room / captured_bytes(shape, windows)))

        def tick() -> None:
            if stop.is_set():
                raise RuntimeError("another layer failed or was interrupted")
            progress(
                f"{label}: epochs of {'all' if world == 1 else 'its'} layers",
                next(done),
                recipe.epochs * len(mine),
            )

        def fit(i: int) -> None:
            projection = output_projection(attention_modules(model)[i]).weight.detach()
            trainer = LayerTrainer(
                data.pop(i), policy, projection, validation, plus=recipe.kernel_size // 2
            )
            curves = trainer.fit(kernels[i], recipe, f"{label}: layer {i}", tick)
            states[i] = {"stamp": stamp, "weights": kernels[i].cpu().state_dict(), "curves": curves}
            write_torch(parts[i], states[i])

        for some in (mine[a : a + at_once] for a in range(0, len(mine), at_once)):
            with tempfile.TemporaryDirectory(dir=parts[0].parent) as folder:
                data = capture_layers(
                    model, windows, some, memory_gib=memory_gib, folder=Path(folder)
                )
                with layer_pool(model.device) as pool:
                    try:
                        list(pool.map(fit, some))
                    except BaseException:
                        stop.set()
                        raise
    for share in gather(
        {i: states[i] for i in mine}
    ):  # not read from the disk, which may show another node's files late
        states |= share
    for i, state in states.items():
        kernels[i].load_state_dict(state["weights"])
    kernels.header["curves"] = curves = {
        str(i): states[i]["curves"] for i in range(shape["layers"])
    }
    if rank == 0:
        kernels.save(path)
        shutil.rmtree(parts[0].parent)
    gather(None)  # no rank goes on before the file is there
    return kernels.eval(), curves


def train_for_profile(
    profile: Profile,
    policy: str,
    fraction: float,
    path: Path,
    seed=0,
    length: int | None = None,
    memory_gib=8.0,
    device: str | None = None,
) -> dict:
    """Train kernels for `policy` at `fraction` of the context on windows of `length` tokens (default: the context); {layer: curves}."""
    recipe, (model, tokenizer) = (
        Recipe.of(profile, seed),
        load_model(profile.model, own_device(device)),
    )
    chosen = get_policy(policy).from_fraction(fraction, context := model_shape(model)["context"])
    windows = training_windows(
        corpora := [*map(load_corpus, profile.training)],
        tokenizer,
        length or context,
        profile.sequences,
        seed,
    )
    header = {
        "fraction": fraction,
        "data": [c.record() for c in corpora],
        "sequences": len(windows),
        "length": windows.shape[1],
    }
    return train(model, chosen, windows, recipe, path, header, profile.validation, memory_gib)[1]


SETTINGS = {
    "model": "carried model, folder or hub name",
    "training": "corpora to train on, in equal shares",
    "sequences": "token windows, validation included",
    "validation": "windows held out to choose the best epoch",
    "kernel_size": "R, the features of phi and psi",
    "hidden": "width of their hidden layer",
    "epochs": "passes over the windows",
    "halve_every": "epochs after which the learning rate halves",
    "lr": "Adam's learning rate",
    "train_batch": "windows a step",
    "dropout": "on the first pre-activation",
}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m lesslib.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options(
        p,
        policy=("h2o", "h2o, lambda or tova"),
        fraction=(0.05, "budget as a share of the model's context"),
        seed=(0, "of windows, weights, order and dropout"),
        memory_gib=(8.0, "captured tensors beyond this go to disk, per rank"),
    )
    p.add_argument(
        "--profile", help="the source of the defaults below (default: $LESS_PROFILE, else tiny)"
    )
    for name, what in SETTINGS.items():
        kind = type(getattr(Profile, name))
        p.add_argument(
            f"--{name.replace('_', '-')}",
            type=str if kind is tuple else kind,
            nargs="+" if kind is tuple else None,
            help=what,
        )
    p.add_argument("--length", type=int, help="tokens a window (default: the model's context)")
    p.add_argument(
        "--device", help="cpu, cuda, ... (default: the GPU when there is one; of a rank, its own)"
    )
    p.add_argument(
        "--out",
        type=Path,
        help="folder for load_kernels(..., folder=...) (default: results/<profile>/kernels)",
    )
    a = p.parse_args(argv)
    keep_memory()
    try:
        chosen = get_profile(a.profile)
        profile = replace(
            chosen.of(a.model or chosen.model),
            **{n: getattr(a, n) for n in SETTINGS if getattr(a, n) is not None},
        )
        path = kernel_path(
            profile.model,
            a.policy,
            a.fraction,
            a.out or results_dir(profile.name) / "kernels",
            a.seed,
        )
        curves = train_for_profile(
            profile, a.policy, a.fraction, path, a.seed, a.length, a.memory_gib, a.device
        )
    except (ValueError, TypeError, OSError) as e:
        raise SystemExit(f"{p.prog}: {e}") from e
    left = "layer {}: {best:.3f} of the sparse error is left (Baseline+ {baseline_plus:.3f}), {seconds:.0f} s".format
    if place()[0] == 0:
        print("\n".join([*(left(layer, **c) for layer, c in curves.items()), f"saved {path}"]))
