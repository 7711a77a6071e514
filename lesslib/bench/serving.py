"""What serving costs (paper, Tables 6 and 8): latency, throughput and bytes of a prompt and what is written after it, by method, and the
parts of a decode step: `python -m lesslib.serving --help`.

All methods of a load run in one process, in turn, so that a machine's slow moments meet all alike and every ratio is of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lesslib.attention.cache import LessCache, LessLayer
from lesslib.attention.fit import cache_bytes, model_shape
from lesslib.bench.benchmarks import DEVICE, DTYPE, MODELS, now, random_model
from lesslib.hf import less
from lesslib.policies import H2O
from lesslib.states import Kernels
from lesslib.util.command_line import options
from lesslib.util.files import write_json
from lesslib.util.hardware import keep_memory
from lesslib.util.progress import progress

METHODS = ("Full, dynamic", "Full, static", "Baseline", "Baseline+", "LESS")
WARM_UP, RUNS = 8, 3  # tokens written before anything is timed; times that everything is
PARTS = (
    "decoding",
    "eviction",
    "kernels",
    "synthesis",
    "update",
)  # of Table 8; decoding: all that is none of the others


@dataclass(frozen=True)
class Load:
    """One row of a table: a prompt of `prompt` random tokens in `batch` rows, and `generate` tokens that are written after it.

    `model`: a shape of `bench.MODELS`, with random weights. `fraction`: H2O's budget as a share of prompt + generate. `hidden`: width of
    the kernels. `cache_mib`: instead of `batch`, as many rows as each method's cache fits into so many MiB, fewer where a GPU's memory
    ends before. `compiled`: decode steps through torch.compile, on a GPU as CUDA graphs.
    """

    model: str
    prompt: int
    generate: int
    batch: int = 0
    fraction: float = 0.05
    hidden: int = 128
    cache_mib: int = 0
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"unknown shape {self.model!r}: choose from {', '.join(MODELS)}")
        if short := [
            f"{name} is {getattr(self, name)}"
            for name in ("prompt", "generate")
            if getattr(self, name) < 2
        ]:
            raise ValueError(f"{short[0]}: give at least 2 tokens")
        if (self.batch > 0) == (self.cache_mib > 0):
            raise ValueError(
                f"batch {self.batch} and cache_mib {self.cache_mib}: give one of the two, above 0"
            )

    def __str__(self) -> str:
        rows = f"batch {self.batch}" if self.batch else f"{self.cache_mib} MiB of cache"
        return f"{self.model} {self.prompt}+{self.generate}, {rows}" + ", compiled" * self.compiled


class Bench:
    """A random model of a load's shape on this machine's device, its kernels, and the caches of each method."""

    def __init__(self, load: Load):
        self.load, self.model = load, cast(Any, random_model(load.model))
        self.shape = model_shape(self.model)
        self.policy = H2O.from_budget(
            max(4, int(load.fraction * (load.prompt + load.generate)) // 2 * 2)
        )
        self.kernels = Kernels.new(self.shape, 8, load.hidden).to(DEVICE, DTYPE)
        graphs = "reduce-overhead" if DEVICE.type == "cuda" else None
        self.step: Any = (
            torch.compile(self.model, fullgraph=True, dynamic=False, mode=graphs)
            if load.compiled
            else self.model
        )

    def settings(self, method: str) -> tuple[H2O, Kernels | None]:
        return self.policy.plus(
            4
        ) if method == "Baseline+" else self.policy, self.kernels if method == "LESS" else None

    def cache(self, method: str) -> Any:
        """An empty cache of `method`."""
        if method.startswith("Full"):
            length = self.load.prompt + self.load.generate
            config = self.model.config
            return (
                StaticCache(config=config, max_cache_len=length)
                if method.endswith("static")
                else DynamicCache(config=config)
            )
        return LessCache(self.model, *self.settings(method))

    def row_bytes(self, method: str) -> float:
        """Bytes that the cache of `method` holds for each row at the end, by the formula, without what all rows share."""
        if method.startswith("Full"):
            s = self.shape
            return (
                2
                * s["layers"]
                * s["kv_heads"]
                * s["head_dim"]
                * (self.load.prompt + self.load.generate)
                * DTYPE.itemsize
            )
        policy, kernels = self.settings(method)
        one, two = (
            cache_bytes(self.shape, policy, 8 if kernels else 0, rows, DTYPE) for rows in (1, 2)
        )
        return two - one

    def weights(self, method: str) -> int:
        """Bytes of weights that every step reads: the model's, but for the table of input embeddings, and the kernels'."""
        kernels = self.settings(method)[1] if not method.startswith("Full") else None
        read = (
            sum(p.nbytes for p in self.model.parameters())
            - self.model.get_input_embeddings().weight.nbytes
        )
        return read + (sum(p.nbytes for p in kernels.parameters()) if kernels else 0)

    def rows(self, method: str) -> int:
        return self.load.batch or max(1, int(self.load.cache_mib * 2**20 / self.row_bytes(method)))

    def attention(self, method: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if method.startswith("Full") else less(self.model)

    def run(self, method: str, generate: int, batch: int) -> dict[str, float]:
        """Seconds of the prompt and of `generate` tokens after it in `batch` rows, and the bytes that the cache then holds."""
        cache, held = self.cache(method), 0
        ids = torch.randint(
            0, self.model.config.vocab_size, (batch, self.load.prompt), device=DEVICE
        )
        with torch.no_grad(), self.attention(method):
            begun = now()
            token = (
                self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            )
            read = now()
            step = (
                self.model if method == "Full, dynamic" else self.step
            )  # a cache that grows would be compiled again at every length
            for _ in range(generate - 1):
                token = step(token, past_key_values=cache).logits.argmax(-1)
            written = now()
        if method.startswith("Full"):
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return {"prompt": read - begun, "decode": written - read, "bytes": held or cache.nbytes()}


def copy_bandwidth(mib: int = 256) -> float:
    """Bytes a second that the device reads and writes in a copy of `mib` MiB, best of five."""
    source = torch.ones(mib << 18, device=DEVICE)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        begun = now()
        target.copy_(source)
        best = min(best, now() - begun)
    return 2 * source.nbytes / best


def serve(load: Load, methods: tuple[str, ...] = METHODS, runs: int = RUNS) -> dict[str, dict]:
    """By method: rows, seconds of every run's prompt and decoding, tokens a second, milliseconds a step, bytes held, their formula, and
    the milliseconds that one step's weights and cache take at the bandwidth of a copy (`floor_ms`).

    A method that runs out of a GPU's memory starts again with an eighth of its rows less under a load that gives `cache_mib`; under
    others, and where no row fits, it has {"rows", "out_of_memory": True} instead.
    """
    bench, found = Bench(load), dict[str, dict]()
    bandwidth = copy_bandwidth()
    for run, method in ((run, method) for run in range(runs + 1) for method in methods):
        progress("runs", run * len(methods) + methods.index(method), (runs + 1) * len(methods))
        row = found.setdefault(method, {"rows": bench.rows(method), "prompt_s": [], "decode_s": []})
        while "out_of_memory" not in row:
            with contextlib.suppress(torch.OutOfMemoryError):
                took = bench.run(
                    method, load.generate if run else min(WARM_UP, load.generate), row["rows"]
                )
                break
            torch.cuda.empty_cache()
            fewer = row["rows"] * 7 // 8 if load.cache_mib else 0
            row = found[method] = (
                {"rows": fewer, "prompt_s": [], "decode_s": []}
                if fewer
                else {"rows": row["rows"], "out_of_memory": True}
            )
        else:
            continue
        if run:
            row["prompt_s"].append(round(took["prompt"], 4))
            row["decode_s"].append(round(took["decode"], 4))
            row["bytes"] = took["bytes"]
    for method, row in ((m, r) for m, r in found.items() if "bytes" in r):
        seconds = statistics.median(
            a + b for a, b in zip(row["prompt_s"], row["decode_s"], strict=True)
        )
        moved = bench.weights(method) + row["rows"] * bench.row_bytes(method)
        row |= {
            "seconds": round(seconds, 4),
            "tokens_per_s": round(row["rows"] * load.generate / seconds, 2),
            "step_ms": round(1000 * statistics.median(row["decode_s"]) / (load.generate - 1), 4),
            "formula_bytes": round(row["rows"] * bench.row_bytes(method)),
            "floor_ms": round(1000 * moved / bandwidth, 4),
        }
    progress("runs", 1, 1)
    return found


class Clock:
    """Seconds by part: a function that `timed` wraps counts for its part, less what wrapped functions inside it took."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.seconds, self.inner = now, defaultdict[str, float](float), 0.0

    def timed(self, part: str, function: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            outer, self.inner = self.inner, 0.0
            begun = self.now()
            result = function(*args, **kwargs)
            took = self.now() - begun
            self.seconds[part] += took - self.inner
            self.inner = outer + took
            return result

        return wrapped


@contextlib.contextmanager
def parts_timed(cache: Any, clock: Clock) -> Iterator[None]:
    """Within the context `clock` times what the layers of a LessCache do besides attending their slots; other caches have no such parts."""
    objects: list[tuple[Any, str, str]] = []
    for layer in (layer for layer in cache.layers if isinstance(layer, LessLayer)):
        objects.append((layer, "_evict", "eviction"))
        if layer.kernels is not None:
            objects += [
                (layer, "_recover", "synthesis"),
                (layer, "_absorb", "update"),
                (layer.kernels, "phi", "kernels"),
                (layer.kernels, "psi", "kernels"),
            ]
    for thing, name, part in objects:
        vars(thing)[name] = clock.timed(part, getattr(thing, name))
    try:
        yield
    finally:
        for thing, name, _ in objects:
            del vars(thing)[name]


def parts(
    load: Load, methods: tuple[str, ...] = ("Full, static", "Baseline+", "LESS"), steps: int = 32
) -> dict[str, dict]:
    """By method: milliseconds of each of PARTS and in `total`, medians of `steps` decode steps after the prompt, the methods in turn; and
    `unobserved_ms` of a step that nothing inside it times. Steps are not compiled: a compiled one has no parts."""
    if load.generate < 2 * (WARM_UP + steps):
        raise ValueError(
            f"generate is {load.generate}: {steps} steps timed in two ways need at least {2 * (WARM_UP + steps)}"
        )
    bench = Bench(load)
    caches, tokens = {m: bench.cache(m) for m in methods}, dict[str, Tensor]()
    times = {m: {part: list[float]() for part in (*PARTS, "total", "unobserved")} for m in methods}
    with torch.no_grad():
        for m in methods:
            ids = torch.randint(
                0, bench.model.config.vocab_size, (bench.rows(m), load.prompt), device=DEVICE
            )
            with bench.attention(m):
                tokens[m] = (
                    bench.model(ids, past_key_values=caches[m], logits_to_keep=1)
                    .logits[:, -1:]
                    .argmax(-1)
                )
        for i, m in ((i, m) for i in range(WARM_UP + steps) for m in methods):
            progress("steps", i, WARM_UP + steps)
            clock = Clock(now)
            with bench.attention(m), parts_timed(caches[m], clock):
                clock.timed("decoding", bench.model)(tokens[m], past_key_values=caches[m])
            with bench.attention(m):
                begun = now()
                bench.model(tokens[m], past_key_values=caches[m])
                whole = now() - begun
            if i >= WARM_UP:
                for part, seconds in {
                    **clock.seconds,
                    "total": sum(clock.seconds.values()),
                    "unobserved": whole,
                }.items():
                    times[m][part].append(1000 * seconds)
    progress("steps", 1, 1)
    return {
        m: {
            f"{part}_ms": round(statistics.median(values), 4)
            for part, values in t.items()
            if values
        }
        for m, t in times.items()
    }


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser("python -m lesslib.serving", description=__doc__)
    options(
        p,
        model=("pico", "shape of a random model", MODELS),
        prompt=(512, "tokens read"),
        generate=(512, "tokens written after them"),
        batch=(0, "rows at once"),
        cache_mib=(0, "instead: as many rows as each method's cache fits into so many MiB"),
        fraction=(0.05, "H2O's budget as a share of prompt + generate"),
        hidden=(128, "width of the kernels; the paper's is 512"),
        compiled=(False, "decode steps through torch.compile, on a GPU as CUDA graphs"),
        runs=(RUNS, "after a few tokens that warm up"),
        methods=(METHODS, "ratios are of the first", METHODS),
        parts=(False, "the parts of a step (Table 8) instead"),
    )
    p.add_argument("--out", type=Path, help="also write JSON there")
    a = p.parse_args(argv)
    keep_memory()
    try:
        load = Load(**{name: getattr(a, name) for name in asdict(Load("pico", 2, 2, 1))})
        found = parts(load) if a.parts else serve(load, tuple(a.methods), a.runs)
    except ValueError as e:
        p.error(str(e))
    print(f"{load}; {torch.get_num_threads()} threads, torch {torch.__version__}")
    first = next(iter(found.values()))
    for method, row in found.items():
        ratio = {
            k: f" ({v / first[k]:.2f})"
            for k, v in row.items()
            if isinstance(v, float) and first.get(k)
        }
        print(f"{method:>14}: " + ", ".join(f"{k} {v}{ratio.get(k, '')}" for k, v in row.items()))
    if a.out:
        write_json(a.out, {"load": asdict(load), "methods": found})
