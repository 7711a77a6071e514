"""Benchmarks that print ratios: `python -m lesslib.bench --help`. Here: seconds and memory of one epoch of kernel training.

`ours` trains from eviction times, sparse outputs and targets that were computed once. `stepwise`, written from the description of
the authors' code, rebuilds at every step the dense weights, the policy's mask token by token and the S x S low-rank weights.
"""
import argparse
import ctypes
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .data import load_corpus, training_windows
from .hf import attention_modules, output_projection
from .kernels import Kernels, LayerKernels
from .models import keep_memory, load_model, model_shape
from .policies import H2O, budget_of
from .train import LayerTrainer, Recipe, capture_layers, features, layer_pool

SCHEMES = ("ours", "stepwise", "stepwise, layers in parallel")
EPOCHS = 3  # the fastest counts: the first fills the allocator, and a shared machine is slow at times


@torch.no_grad()
def stepwise_mask(logits: Tensor, policy: H2O) -> Tensor:
    """H2O's kept set, [B, H, S, S], one query after the other from dense causal `logits`: the `heavy` best scores and the newest tokens."""
    S, rows = logits.shape[-1], []
    score = logits[:, :, : policy.budget].softmax(-1).sum(2)
    for t in range(policy.budget, S):
        heaviest = score[..., : t - policy.recent].topk(policy.heavy, -1).indices
        keep = torch.zeros_like(score, dtype=torch.bool).scatter(-1, heaviest, True)
        keep[..., t - policy.recent : t + 1] = True
        score = (score + logits[:, :, t].softmax(-1)) * keep
        rows.append(keep)
    first = torch.ones(policy.budget, S, dtype=torch.bool, device=logits.device).tril()
    return torch.cat([first.expand(*logits.shape[:2], -1, -1), torch.stack(rows, 2)], 2)


def stepwise_attention(q: Tensor, k: Tensor, v: Tensor, policy: H2O, phi: Tensor, psi: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(LESS, dense attention), [B, H, S, Dv] each, through S x S weights; q, k [B, H, S, D], v [B, H, S, Dv], phi, psi [B, H, S, R]."""
    lowest, tiny = torch.finfo(q.dtype).min, torch.finfo(q.dtype).tiny
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    logits = torch.where(causal, q @ k.transpose(-1, -2) * scaling, lowest)
    target = logits.softmax(-1) @ v
    keep = stepwise_mask(logits, policy)
    sparse, evicted = torch.where(keep, logits, lowest), causal & ~keep
    features = (phi @ psi.transpose(-1, -2)) * evicted
    total = torch.logaddexp(features.sum(-1, keepdim=True).clamp(min=tiny).log(), sparse.logsumexp(-1, keepdim=True))
    weights = (torch.where(evicted, features.clamp(min=tiny).log(), sparse) - total).exp()
    return weights @ v, target


def peak_memory(reset: bool = False) -> float | None:
    """The most MiB that this process held at once since the last reset; None where the system is not Linux."""
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, AttributeError):
        return None


def epoch(scheme: str, length: int, sequences: int, fraction: float, recipe: Recipe, model_name: str = "pico-llama") -> dict:
    """Train all layers for an epoch of `sequences` windows of `length` tokens; seconds and peak MiB above what the process held before.

    `scheme` is "ours", "stepwise" (one layer after the other, as its authors do) or "stepwise, layers in parallel", as ours are.
    """
    model, tokenizer = load_model(model_name, "cpu")
    windows = training_windows([load_corpus("topics-train")], tokenizer, length, sequences, recipe.seed)
    policy, modules = H2O.from_budget(budget_of(fraction, length)), attention_modules(model)
    kernels = Kernels.new(model_shape(model), recipe.kernel_size, recipe.hidden, recipe.dropout, recipe.seed)
    projections = {i: output_projection(module).weight.detach() for i, module in modules.items()}
    optimizers = {i: torch.optim.Adam(kernels[i].parameters(), lr=recipe.lr, fused=True) for i in modules}
    data, batches = capture_layers(model, windows, list(modules)), torch.arange(sequences).split(recipe.batch)
    trainers = {}

    def prepare(i: int) -> None:
        trainers[i] = LayerTrainer(data[i], policy, projections[i], validation=1, batch=recipe.batch)

    def ours(i: int) -> None:
        trainers[i].epoch(layer(i), optimizers[i], batches)

    def stepwise(i: int) -> None:
        for rows in batches:
            q, k, v = (x[rows].float() for x in (data[i].q, data[i].k, data[i].v))
            out, target = stepwise_attention(q, k, v, policy, *features(layer(i), q, k), data[i].scaling)
            loss = ((out - target)[:, :, policy.budget :].transpose(1, 2).flatten(2) @ projections[i].T).square().mean()
            optimizers[i].zero_grad()
            loss.backward()
            optimizers[i].step()

    def layer(i: int) -> LayerKernels:
        found = kernels[i].train()
        assert isinstance(found, LayerKernels)
        return found

    def seconds(run: Callable, work: Callable[[int], None]) -> float:
        begun = time.perf_counter()
        list(run(work, modules))
        return time.perf_counter() - begun

    held, once = peak_memory(reset=True), 0.0
    if scheme == "stepwise":
        taken = min(seconds(map, stepwise) for _ in range(EPOCHS))
    else:
        with layer_pool(model.device) as pool:
            once = seconds(pool.map, prepare) if scheme == "ours" else 0.0
            taken = min(seconds(pool.map, ours if scheme == "ours" else stepwise) for _ in range(EPOCHS))
    peak = peak_memory()
    peak_mib = None if held is None or peak is None else round(peak - held, 1)
    return {"seconds_epoch": round(taken, 4), "seconds_once": round(once, 4), "peak_mib": peak_mib}


def measure(scheme: str, length: int, sequences: int, fraction: float, **recipe) -> dict:
    """`epoch` in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), keep_memory) as pool:
        return pool.submit(epoch, scheme, length, sequences, fraction, Recipe(**recipe)).result()


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser("python -m lesslib.bench", None, __doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens a window")
    p.add_argument("--sequences", type=int, default=8, help="windows an epoch")
    p.add_argument("--fraction", type=float, default=0.05, help="H2O's budget as a share of the window")
    p.add_argument("--hidden", type=int, default=128, help="width of the kernels' hidden layer")
    p.add_argument("--dropout", type=float, default=0.0, help="on the first pre-activation")
    a = p.parse_args(argv)
    print(f"{'tokens':>6} {'scheme':>28} {'s/epoch':>9} {'once s':>7} {'peak MiB':>9} {'times slower than ours':>23}")
    for length in a.lengths:
        rows = {s: measure(s, length, a.sequences, a.fraction, hidden=a.hidden, dropout=a.dropout) for s in SCHEMES}
        for scheme, r in rows.items():
            slower = r["seconds_epoch"] / rows["ours"]["seconds_epoch"]
            print(f"{length:6d} {scheme:>28} {r['seconds_epoch']:9.3f} {r['seconds_once']:7.2f} {r['peak_mib'] or 0:9.0f} {slower:23.1f}")


if __name__ == "__main__":
    main()
