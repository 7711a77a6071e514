"""Benchmarks that print ratios: `python -m lesslib.bench train`, `decode` and `score`, with --help.

`train`: seconds and memory of an epoch of kernel training. `ours` trains from eviction times, sparse outputs and targets computed once;
`stepwise`, after the authors' code, rebuilds at every step the dense weights, the mask token by token and the S x S low-rank weights.
`decode`: milliseconds per step of random models at many contexts, for the full cache and bounded ones; bytes and peak memory.
`score`: seconds and memory of whole sequences through dense attention, a policy alone, and LESS.
"""

import argparse
import contextlib
import ctypes
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from lesslib.attention.cache import LessCache
from lesslib.attention.fit import cache_bytes, model_shape
from lesslib.data import load_corpus, training_windows
from lesslib.hf import attention_modules, less, output_projection
from lesslib.models import load_model
from lesslib.policies import H2O, Full, Policy, budget_of
from lesslib.states import Kernels, LayerKernels
from lesslib.training import LayerTrainer, Recipe, capture_layers, features, layer_pool
from lesslib.util.command_line import options
from lesslib.util.hardware import keep_memory

DEVICE = torch.device(
    "cuda" if torch.cuda.is_available() else "cpu"
)  # everything is timed there, models on a GPU in half precision
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.float32
SCHEMES = ("ours", "stepwise", "stepwise, layers in parallel")
EPOCHS = (
    3  # the fastest counts: the first fills the allocator, and a shared machine is slow at times
)


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


def stepwise_attention(
    q: Tensor, k: Tensor, v: Tensor, policy: H2O, phi: Tensor, psi: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(LESS, dense attention), [B, H, S, Dv] each, through S x S weights; q, k [B, H, S, D], v [B, H, S, Dv], phi, psi [B, H, S, R]."""
    lowest, tiny = torch.finfo(q.dtype).min, torch.finfo(q.dtype).tiny
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    logits = torch.where(causal, q @ k.transpose(-1, -2) * scaling, lowest)
    target = logits.softmax(-1) @ v
    keep = stepwise_mask(logits, policy)
    sparse, evicted = torch.where(keep, logits, lowest), causal & ~keep
    features = (phi @ psi.transpose(-1, -2)) * evicted
    total = torch.logaddexp(
        features.sum(-1, keepdim=True).clamp(min=tiny).log(), sparse.logsumexp(-1, keepdim=True)
    )
    weights = (torch.where(evicted, features.clamp(min=tiny).log(), sparse) - total).exp()
    return weights @ v, target


def now() -> float:
    """Seconds, once the device has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(reset: bool = False) -> float | None:
    """The most MiB that this process held at once since the last reset, of a GPU's memory if it uses one; None where there is no Linux."""
    if DEVICE.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        return next(
            int(line.split()[1]) / 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
    except (OSError, AttributeError):
        return None


def epoch(
    scheme: str,
    length: int,
    sequences: int,
    fraction: float,
    recipe: Recipe,
    model_name: str = "pico-llama",
) -> dict:
    """Train all layers for an epoch of `sequences` windows of `length` tokens; seconds and peak MiB above what the process held before.

    `scheme` is "ours", "stepwise" (one layer after the other, as its authors do) or "stepwise, layers in parallel", as ours are.
    """
    model, tokenizer = load_model(model_name, DEVICE, torch.float32)
    windows = training_windows(
        [load_corpus("topics-train")], tokenizer, length, sequences, recipe.seed
    )
    policy, modules = H2O.from_budget(budget_of(fraction, length)), attention_modules(model)
    kernels = Kernels.new(
        model_shape(model), recipe.kernel_size, recipe.hidden, recipe.dropout, recipe.seed
    ).to(DEVICE)
    projections = {i: output_projection(module).weight.detach() for i, module in modules.items()}
    optimizers = {
        i: torch.optim.Adam(kernels[i].parameters(), lr=recipe.lr, fused=True) for i in modules
    }
    data, batches = (
        capture_layers(model, windows, list(modules)),
        torch.arange(sequences).split(recipe.batch),
    )
    trainers, layers = {}, [cast(LayerKernels, layer.train()) for layer in kernels.layers]
    epochs = (
        EPOCHS if scheme == "ours" or length <= 1024 or DEVICE.type == "cuda" else 1
    )  # of 20 s on a CPU: no warming up shows

    def prepare(i: int) -> None:
        trainers[i] = LayerTrainer(
            data[i], policy, projections[i], validation=1, batch=recipe.batch
        )

    def ours(i: int) -> None:
        trainers[i].epoch(layers[i], optimizers[i], batches)

    def stepwise(i: int) -> None:
        for rows in batches:
            q, k, v = (x[rows].to(DEVICE, torch.float32) for x in (data[i].q, data[i].k, data[i].v))
            out, target = stepwise_attention(
                q, k, v, policy, *features(layers[i], q, k), data[i].scaling
            )
            loss = (
                (
                    (out - target)[:, :, policy.budget :].transpose(1, 2).flatten(2)
                    @ projections[i].T
                )
                .square()
                .mean()
            )
            optimizers[i].zero_grad()
            loss.backward()
            optimizers[i].step()

    def seconds(run: Callable, work: Callable[[int], None]) -> float:
        begun = now()
        list(run(work, modules))
        return now() - begun

    held, once = peak_memory(reset=True), 0.0
    if scheme == "stepwise":
        taken = min(seconds(map, stepwise) for _ in range(epochs))
    else:
        with layer_pool(model.device) as pool:
            once = seconds(pool.map, prepare) if scheme == "ours" else 0.0
            taken = min(
                seconds(pool.map, ours if scheme == "ours" else stepwise) for _ in range(epochs)
            )
    peak_mib = None if held is None or (peak := peak_memory()) is None else round(peak - held, 1)
    return {"seconds_epoch": round(taken, 4), "seconds_once": round(once, 4), "peak_mib": peak_mib}


def fresh_process() -> ProcessPoolExecutor:
    """A pool of one process with nothing of this one but its environment, so that its peak memory is its own."""
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if (
        sys.platform == "linux"
    ):  # they fork from one that has loaded nearly all, which takes longer than some of what they time
        context.set_forkserver_preload(
            ["lesslib.train"]
        )  # not this module: `python -m` would warn that it is there twice
    return ProcessPoolExecutor(1, context, _begin, (dict(os.environ),))


def _begin(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    keep_memory()


def measure(scheme: str, length: int, sequences: int, fraction: float, **recipe) -> dict:
    """`epoch` in a fresh process, so that its peak memory is its own."""
    with fresh_process() as pool:
        return pool.submit(epoch, scheme, length, sequences, fraction, Recipe(**recipe)).result()


MODELS: dict[str, dict[str, Any]] = {  # shapes of random models
    name: {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    for name, vocab, width, mlp, layers, heads in (
        ("pico", 4096, 192, 512, 4, 6),
        ("12x768", 32000, 768, 2048, 12, 12),
        ("llama-2-7b", 32000, 4096, 11008, 32, 32),
        ("llama-2-13b", 32000, 5120, 13824, 40, 40),
    )
}
METHODS = ("Full", "Baseline", "Baseline+", "LESS")
FILL = 512  # random tokens that a cache is filled with at once
RUN = 4  # steps timed in a row, before the next method or context has its turn: a machine's slow moments then meet all alike


def random_model(name: str) -> PreTrainedModel:
    """A Llama of one of `MODELS`' shapes with random weights, context 32,768, that attends with SDPA, transformers' default."""
    torch.manual_seed(0)
    return (
        cast(Any, LlamaForCausalLM(LlamaConfig(**MODELS[name], max_position_embeddings=32768)))
        .to(DEVICE, DTYPE)
        .eval()
    )


def filled_cache(
    model: PreTrainedModel,
    method: str,
    policy: H2O,
    kernels: Kernels,
    batch: int,
    context: int,
    room: int,
) -> Any:
    """The cache of `method` after `context` random tokens, which passed through its attention layers alone.

    The full cache is transformers' StaticCache with `room` for more tokens, the quicker of its full caches on long contexts.
    """
    shape, generator = model_shape(model), torch.Generator().manual_seed(context)
    cache: Any = None
    if method == "Full":
        cache = StaticCache(config=model.config, max_cache_len=context + room)
    else:
        used = policy.plus(kernels.header["kernel_size"] // 2) if method == "Baseline+" else policy
        cache = LessCache(model, used, kernels if method == "LESS" else None, prefill="streaming")

    for i, a in itertools.product(range(shape["layers"]), range(0, context, FILL)):
        heads, D, S, layer = (
            shape["kv_heads"],
            shape["head_dim"],
            min(FILL, context - a),
            cache.layers[i],
        )
        q, k, v = (
            torch.randn(batch, h, S, D, generator=generator).to(DEVICE, DTYPE)
            for h in (shape["heads"], heads, heads)
        )
        layer.armed = True
        cache.update(k, v, i)
        if method != "Full":
            layer.attend(q, k, v, None, D**-0.5)
    return cache


@torch.no_grad()
def decode_times(
    model: PreTrainedModel,
    policy: H2O,
    kernels: Kernels,
    batch: int,
    contexts: list[int],
    steps: int,
    compiled: bool,
    methods: tuple[str, ...],
) -> dict[tuple[str, int], list[float]]:
    """Milliseconds of each of `steps` decode steps, by (method, context), after as many as warm up."""
    caches = {
        (m, n): filled_cache(model, m, policy, kernels, batch, n, 2 * steps + RUN)
        for m in methods
        for n in contexts
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in caches}
    tokens = torch.randint(0, model.config.vocab_size, (batch, 1), device=DEVICE)
    calls = {
        m: torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        for m in methods
    }  # their slots differ
    for _ in range(-(-2 * steps // RUN)):
        for (method, n), cache in caches.items():
            with contextlib.nullcontext() if method == "Full" else less(model):
                for _ in range(RUN):
                    begun = now()
                    calls[method](tokens, past_key_values=cache)
                    times[method, n].append(1000 * (now() - begun))
    return {key: values[len(values) // 2 :] for key, values in times.items()}


def print_decode(
    a: argparse.Namespace, name: str, hidden: int, batch: int, compiled: bool, dtype: str
) -> None:
    """A table of medians, each with its ratio to the full cache at that context, and the two ratios that matter; see `main` for `a`."""
    model, policy = random_model(name), H2O.from_budget(a.budget)
    kernels = Kernels.new(model_shape(model), 8, hidden).to(DEVICE, getattr(torch, dtype))
    contexts, methods = (a.contexts[:1], METHODS[1:]) if compiled else (a.contexts, METHODS)
    torch._dynamo.reset()
    times = decode_times(model, policy, kernels, batch, contexts, a.steps, compiled, methods)
    median = {key: statistics.median(values) for key, values in times.items()}
    how = f"{name}, batch {batch}, budget {policy.budget}, kernels {hidden} wide in {dtype}, {'compiled' if compiled else 'eager'}"
    print(f"\n{how}: ms per step" + " (times full)" * ("Full" in methods))
    print(f"{'context':>10}" + "".join(f"{n:>18,}" for n in contexts) + f"{'longest/shortest':>18}")
    for m in methods:
        ratios = [
            f" ({median[m, n] / median['Full', n]:.2f})" if "Full" in methods else ""
            for n in contexts
        ]
        cells = [f"{median[m, n]:.2f}{ratio}" for n, ratio in zip(contexts, ratios, strict=True)]
        flat = max(median[m, n] for n in contexts) / min(median[m, n] for n in contexts)
        print(f"{m:>10}" + "".join(f"{cell:>18}" for cell in cells) + f"{flat:18.2f}")
    over = [median["LESS", n] / median["Baseline+", n] for n in contexts]
    print(f"LESS / Baseline+ per step: {', '.join(f'{x:.3f}' for x in over)}", flush=True)


@torch.no_grad()
def scoring(
    name: str, length: int, batch: int, method: str, hidden: int, runs: int
) -> tuple[float, float | None]:
    """Seconds of a forward over `batch` whole sequences of `length` random tokens, best of `runs`, H2O at 5%; peak MiB above the start."""
    keep_memory()
    model = random_model(name)
    policy: Policy = Full() if method == "Full" else H2O.from_fraction(0.05, length)
    kernels = Kernels.new(model_shape(model), 8, hidden) if method == "LESS" else None
    ids, seconds = (
        torch.randint(0, model.config.vocab_size, (batch, length), device=DEVICE),
        list[float](),
    )
    with less(model, policy, kernels, mode="parallel"):
        model(ids[:, :64], use_cache=False)
        held = peak_memory(reset=True)
        for _ in range(runs):
            begun = now()
            model(ids, use_cache=False, logits_to_keep=1)
            seconds.append(now() - begun)
    return min(seconds), None if held is None or (peak := peak_memory()) is None else peak - held


def print_scoring(a: argparse.Namespace) -> None:
    """A table of `scoring`, every case in a fresh process, with its ratio to dense attention; see `main` for `a`."""
    print(
        f"{'model':>10} {'tokens':>7} {'method':>9} {'seconds':>9} {'times Full':>11} {'peak MiB':>9}"
    )
    for name, length in itertools.product(a.models, a.lengths):
        dense = 0.0
        for method in ("Full", "Baseline", "LESS"):
            with fresh_process() as pool:
                seconds, peak = pool.submit(
                    scoring, name, length, a.batch, method, a.hidden, a.runs
                ).result()
            dense = dense or seconds
            print(
                f"{name:>10} {length:7,} {method:>9} {seconds:9.2f} {seconds / dense:11.2f} {peak or 0:9.0f}",
                flush=True,
            )


def print_memory(policy: H2O, hidden: int, at: list[int]) -> None:
    """Bytes held and peak memory while a model of pico-llama's shape generates max(at) tokens, beside what a full cache would hold."""
    model: Any = random_model("pico")
    kernels = Kernels.new(model_shape(model), 8, hidden)
    cache, rows = LessCache(model, policy, kernels), list[tuple[int, int, float | None]]()

    def note(ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """A stopping criterion that never stops, and notes bytes and peak memory after some numbers of tokens."""
        if (generated := ids.shape[1] - 1) in at:
            rows.append((generated, cache.nbytes(), peak_memory()))
        return torch.zeros(len(ids), dtype=torch.bool, device=DEVICE)

    with less(model):
        model.generate(
            torch.ones(1, 1, dtype=torch.int64, device=DEVICE),
            past_key_values=cache,
            max_new_tokens=max(at),
            do_sample=False,
            stopping_criteria=[note],
            eos_token_id=None,
            pad_token_id=0,
        )
    formula, report = cache_bytes(model_shape(model), policy, 8, 1, DTYPE), cache.report()
    print(
        f"\npico, batch 1, budget {policy.budget}: the formula says {formula:,} bytes; the kernels' weights are {report['kernels']:,}"
    )
    print(f"{'tokens':>10}{'LESS bytes':>14}{'full bytes':>14}{'peak MiB':>12}")
    for n, held, peak in rows:
        print(f"{n:10,}{held:14,}{n * (report['full'] // report['tokens']):14,}{peak or 0:12.1f}")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        "python -m lesslib.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = p.add_subparsers(dest="which", required=True)
    t, d, s = (which.add_parser(name) for name in ("train", "decode", "score"))
    options(
        t,
        lengths=((512, 1024, 2048), "tokens a window"),
        schemes=(SCHEMES, "ratios are of the first", SCHEMES),
        sequences=(8, "windows an epoch"),
        fraction=(0.05, "H2O's budget as a share of the window"),
        hidden=(128, "width of the kernels"),
        dropout=(0.0, "on the first pre-activation"),
    )
    options(
        d,
        models=(("pico", "12x768"), "shapes of random models", MODELS),
        batches=((1, 8), "rows decoded together"),
        contexts=((1024, 4096, 16384), "tokens seen before"),
        budget=(204, "H2O's slots: 204 is 5%% of Llama 2's context"),
        hidden=((128, 512), "width of the kernels"),
        steps=(24, "decode steps timed for each entry, after as many that warm up"),
        kernel_dtypes=(
            ("float32", "bfloat16"),
            "of the kernels; eager steps take the first",
            ("float32", "bfloat16", "float16"),
        ),
        compiled=(["12x768"], "models that torch.compile is timed on, without Full", MODELS),
        generate=([64, 1024, 16384], "tokens after which bytes and peak memory are read"),
    )
    options(
        s,
        models=(("12x768",), "shapes of random models", MODELS),
        lengths=((1024, 2048, 4096), "tokens a sequence"),
        batch=(1, "sequences at once"),
        hidden=(128, "width of the kernels"),
        runs=(3, "of which the quickest counts"),
    )
    a = p.parse_args(argv)
    if a.which != "decode":
        return {"train": print_training, "score": print_scoring}[a.which](a)
    keep_memory()
    print(f"{torch.get_num_threads()} threads, {DEVICE}, torch {torch.__version__}, {DTYPE}")
    if a.generate:
        print_memory(H2O.from_budget(a.budget), a.hidden[0], a.generate)
    for name, hidden, batch in itertools.product(a.models, a.hidden, a.batches):
        print_decode(a, name, hidden, batch, False, a.kernel_dtypes[0])
        for dtype in a.kernel_dtypes if name in a.compiled else ():
            print_decode(a, name, hidden, batch, True, dtype)


def print_training(a: argparse.Namespace) -> None:
    """A table of `measure` by scheme, each with its ratio to the first; see `main` for `a`."""
    print(
        f"{'tokens':>6} {'scheme':>28} {'s/epoch':>9} {'once s':>7} {'peak MiB':>9} {'times ' + a.schemes[0]:>23}"
    )
    for length in a.lengths:
        rows = {
            s: measure(s, length, a.sequences, a.fraction, hidden=a.hidden, dropout=a.dropout)
            for s in a.schemes
        }
        for scheme, r in rows.items():
            times = r["seconds_epoch"] / rows[a.schemes[0]]["seconds_epoch"]
            print(
                f"{length:6d} {scheme:>28} {r['seconds_epoch']:9.3f} {r['seconds_once']:7.2f} {r['peak_mib'] or 0:9.0f} {times:23.1f}"
            )
