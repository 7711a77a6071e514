"""One function per table or figure: it names its points for a profile and seed, and `results.sweep` computes those that are missing."""

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from lesslib.attention.cache import LessCache
from lesslib.attention.fit import model_shape
from lesslib.bench.benchmarks import SCHEMES, measure
from lesslib.data import load_corpus, training_windows
from lesslib.evaluation import Window, evaluation_windows, perplexity
from lesslib.experiments.sweep import sweep
from lesslib.hf import attention_modules, less, output_projection, replace_attention
from lesslib.models import kernel_path, load_kernels, load_model
from lesslib.policies import Full, Policy, budget_of, get_policy
from lesslib.profiles import get_profile, results_dir, roles
from lesslib.states import Kernels
from lesslib.training import (
    LayerTrainer,
    Recipe,
    capture_layers,
    layer_pool,
    train_for_profile,
)
from lesslib.util.hardware import keep_memory, one_thread
from lesslib.util.paths import ASSETS

METHODS = ("Full", "Baseline", "Baseline+", "LESS (5%)")
LENGTHS = (
    512,
    1024,
    2048,
    4096,
)  # of the windows that training is timed on; S x S weights soon take too much memory
VERSION = 2  # of the code behind the points: raised, it makes every recorded point stale
ABLATION_WINDOWS, FIGURE_3_WINDOWS = 40, 24  # at the most: these two sweeps have many points
PROMPT, CONTINUED, ROWS = (
    384,
    96,
    16,
)  # of notebook 13: tokens of a prompt, tokens after it, windows that prefills are compared on
model_of = functools.lru_cache(maxsize=1)(load_model)
sha256_of = functools.cache(lambda corpus: load_corpus(corpus).sha256)


@functools.lru_cache(maxsize=4)
def windows_of(profile: str, corpus: str, name: str | None = None) -> list[Window]:
    """The evaluation windows of a profile, one context of its model (or of model `name`) long."""
    p, (model, tokenizer) = get_profile(profile), model_of(name or get_profile(profile).model)
    return evaluation_windows(
        load_corpus(corpus),
        tokenizer,
        model_shape(model)["context"],
        p.windows_per_document,
        p.max_windows,
    )


def record(
    name: str,
    profile: str,
    seed: int,
    points: dict[str, dict],
    compute: Callable[..., Any],
    *data_sources: str | Callable[[], dict],
    models: tuple[str, ...] | None = None,
) -> dict:
    """`results.sweep` of an experiment whose points also depend on corpora (or records of other data), the weights of `models` (the
    profile's unless given) and the profile's settings."""

    def data() -> list[dict]:
        settings = json.dumps(asdict(get_profile(profile)), sort_keys=True)
        names = dict.fromkeys((get_profile(profile).model,) if models is None else models)
        loaded = [vars(model_of(model)[0])["less_identity"] for model in names]
        own = {f"model {identity['model']}": identity["revision"] for identity in loaded}
        own[f"profile {profile}"] = hashlib.sha256(settings.encode()).hexdigest()
        read = [
            load_corpus(source).record() if isinstance(source, str) else source()
            for source in data_sources
        ]
        return read + [{"name": name, "sha256": sha256} for name, sha256 in own.items()]

    def share(
        case: dict,
    ) -> bool:  # points that only score; the kernels they need are trained before, here
        if torch.cuda.is_available() or not {"method", "rank"} & case.keys():
            return False
        if "method" in case:
            setting(
                profile,
                case.get("s", seed),
                **{k: case[k] for k in case.keys() & inspect.signature(setting).parameters.keys()},
            )
        return True

    keep_memory()  # also in the processes that share points
    together = (
        ("method", "fraction", "s") if "cases" in inspect.signature(compute).parameters else ()
    )  # see `sweep`
    return sweep(name, profile, seed, points, compute, data, VERSION, share, together)


def kernels_dir(profile: str, kernel_size: int) -> Path:
    """Where a profile's kernels lie: below its results, or in the package if that will do and none were trained here; by R."""
    p, own = get_profile(profile), results_dir(profile) / "kernels"
    folder = ASSETS / "kernels" if p.quick or (p.carried and not own.is_dir()) else own
    return folder if kernel_size == p.kernel_size else folder / f"R{kernel_size}"


def fit(
    profile: str,
    seed: int,
    policy: str = "h2o",
    fraction: float = 0.05,
    name: str | None = None,
    kernel_size: int = 0,
) -> dict:
    """Train one set of kernels, or take those that the package carries (see `kernels_dir`): their curves by layer."""
    p = get_profile(profile)
    p = replace(p.of(name or p.model), kernel_size=kernel_size or p.kernel_size)
    folder = kernels_dir(profile, p.kernel_size)
    if folder.is_relative_to(ASSETS):
        return {
            "layers": load_kernels(
                p.model, policy, fraction, folder, 0 if p.quick else seed
            ).header["curves"],
            "carried": True,
        }
    return {
        "layers": train_for_profile(
            p, policy, fraction, kernel_path(p.model, policy, fraction, folder, seed), seed
        )
    }


def setting(
    profile: str,
    seed: int,
    method: str,
    policy: str = "h2o",
    fraction: float = 1.0,
    carried: bool = False,
    name: str | None = None,
    kernel_size: int | None = None,
) -> tuple[Policy, Kernels | None]:
    """(policy, kernels) of one method: Full, Baseline, Baseline+, Performer, or LESS (p%) with kernels trained at p%, now if need be.

    `kernel_size`: R, of the profile's unless given. `carried`: only kernels of the package. Kernels of the same recipe and texts are not
    trained again; `load_kernels` and `check_fit` refuse those of other weights.
    """
    p, kernels = get_profile(profile), None
    p = replace(p.of(name or p.model), kernel_size=kernel_size or p.kernel_size)
    shape = model_shape(model_of(p.model)[0])
    chosen: Policy = (
        Full() if method == "Full" else get_policy(policy).from_fraction(fraction, shape["context"])
    )
    if method == "Baseline+":
        chosen = chosen.plus(p.kernel_size // 2)
    elif method == "Performer":
        kernels = Kernels.performer(shape, p.kernel_size, seed)
    elif method.startswith("LESS"):
        folder, percent = kernels_dir(profile, p.kernel_size), float(method[6:-2]) / 100
        if not (carried or folder.is_relative_to(ASSETS)):
            path = kernel_path(p.model, policy, percent, folder, seed)
            made = Kernels.load(path).header if path.is_file() else {}
            same = made.get("sequences") == p.sequences and made.get("recipe") == asdict(
                Recipe.of(p, seed)
            )
            if not same or [d["sha256"] for d in made.get("data", [])] != [
                sha256_of(c) for c in p.training
            ]:
                fit(profile, seed, policy, percent, name, p.kernel_size)
        kernels = load_kernels(
            p.model, policy, percent, *(() if carried else (folder, 0 if p.quick else seed))
        )
    return chosen, kernels


def score(
    profile: str, seed: int, corpus: str, method: str, name: str | None = None, **case
) -> dict:
    """Perplexity on `corpus` of one method; see `setting` for it and for `case`."""
    p = get_profile(profile)
    model, chosen = model_of(name or p.model)[0], setting(profile, seed, method, name=name, **case)
    with less(model, *chosen, mode="parallel"):
        return perplexity(model, windows_of(profile, corpus, name), p.batch)


def tour(profile: str, seed: int = 0) -> dict:
    """The effect in four rows, with the kernels that the package carries, or else trained: H2O at 5% of the context."""
    p = get_profile(profile)
    corpus, carried = p.evaluation[0], kernel_path(p.model, "h2o", 0.05).is_file()
    points = {
        f"{corpus}/5%/{m}": {"corpus": corpus, "fraction": 0.05, "carried": carried, "method": m}
        for m in METHODS
    }
    return record("tour", profile, seed, points, functools.partial(score, profile, seed), corpus)


def language_modeling(profile: str, seed: int = 0) -> dict:
    """Table 2: H2O at several budgets; all methods, and LESS trained at each budget and tested at every one."""
    p = get_profile(profile)
    methods = ("Baseline", "Baseline+", "Performer", *(f"LESS ({f:.0%})" for f in p.fractions))
    points: dict[str, dict] = {f"{c}/Full": {"corpus": c, "method": "Full"} for c in p.evaluation}
    for c, f, m in itertools.product(p.evaluation, p.fractions, methods):
        points[f"{c}/{f:.0%}/{m}"] = {"corpus": c, "method": m, "fraction": f}
    return record(
        "language_modeling",
        profile,
        seed,
        points,
        functools.partial(score, profile, seed),
        *p.evaluation,
    )


def multi_query(profile: str, seed: int = 0) -> dict:
    """Rows like Table 2's for Falcon's architecture, where all query heads share one key-value head: H2O at 5%, kernels trained for it."""
    p, name = get_profile(profile), roles(profile)["falcon"]
    points: dict[str, dict] = {} if p.quick else {"kernels": {"name": name}}
    for c, m in itertools.product(
        p.evaluation, ("Full", "Baseline", "Baseline+", "Performer", "LESS (5%)")
    ):
        points[f"{c}/Full" if m == "Full" else f"{c}/5%/{m}"] = {
            "corpus": c,
            "method": m,
            "fraction": 0.05,
            "name": name,
        }

    def compute(name: str, **case) -> dict:
        return score(profile, seed, name=name, **case) if case else fit(profile, seed, name=name)

    return record(
        "multi_query", profile, seed, points, compute, *p.evaluation, *p.training, models=(name,)
    )


def generation(profile: str, seed: int = 0) -> dict:
    """Notebook 13: what each method says after the same prompt, the bytes its cache holds, which tokens left, and what a prefill costs.

    Points by kind. text: the greedy continuation. bytes: (tokens, bytes) token by token. evicted: for every token of a prompt, the share of
    all layers' key-value heads that no longer hold it. prefill: nats a token of what really follows prompts, read densely or in chunks.
    """
    p = get_profile(profile)
    corpus = p.evaluation[0]
    points = {
        f"{what}/{m}": {"what": what, "method": m} for what in ("text", "bytes") for m in METHODS
    }
    points |= {
        f"evicted/{name}": {"what": "evicted", "method": "Baseline", "policy": name}
        for name in ("h2o", "lambda", "tova")
    }
    for m, prefill in (
        ("Full", "dense"),
        *itertools.product(("Baseline", "LESS (5%)"), ("dense", "streaming")),
    ):
        points[f"prefill/{m}/{prefill}"] = {"what": "prefill", "method": m, "prefill": prefill}

    def compute(what: str, method: str, policy: str = "h2o", prefill: Any = "dense") -> dict:
        model, tokenizer = model_of(p.model)
        chosen, kernels = setting(profile, seed, method, policy, 0.05)
        cache: Any = (
            DynamicCache(config=model.config)
            if method == "Full"
            else LessCache(model, chosen, kernels, prefill)
        )
        windows = [w.ids for w in windows_of(profile, corpus) if len(w.ids) >= PROMPT + CONTINUED]
        windows = windows[:: -(-len(windows) // ROWS)]
        ids = torch.tensor([w[: PROMPT + CONTINUED] for w in windows], device=model.device)
        with torch.no_grad(), contextlib.nullcontext() if method == "Full" else less(model):
            if what == "text":
                arguments = {
                    "max_new_tokens": CONTINUED,
                    "do_sample": False,
                    "repetition_penalty": 1.2,
                    "eos_token_id": None,
                }
                middle = ids[len(ids) // 2, :PROMPT]
                said = cast(Any, model).generate(middle[None], past_key_values=cache, **arguments)[
                    0
                ]
                text = {
                    "prompt": tokenizer.decode(middle[1:]),
                    "text": tokenizer.decode(said[PROMPT:]),
                }
                return text | {"tokens": said[PROMPT:].tolist()}
            if what == "bytes":
                held = []
                for t in range(len(windows[0]) if not p.quick else 256):
                    model(ids.new_tensor(windows[0][t : t + 1])[None], past_key_values=cache)
                    if (t + 1) % 32 == 0:
                        full = method == "Full"
                        held.append(
                            [
                                t + 1,
                                sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
                                if full
                                else cache.nbytes(),
                            ]
                        )
                return {
                    "bytes": held,
                    "kernels": 0 if method == "Full" else cache.report()["kernels"],
                }
            logits = [model(ids[:, :PROMPT], past_key_values=cache).logits[:, -1]]
            if what == "evicted":
                bounded = [
                    i for i, layer in enumerate(cache.layers) if layer in cache.less_layers()
                ]
                gone = torch.cat([cache.evicted(i)[0].double() for i in bounded]).mean(0)
                return {
                    "tokens": [tokenizer.decode([t]) for t in windows[0][:PROMPT]],
                    "gone": gone.numpy().round(4).tolist(),
                }
            for t in range(PROMPT, PROMPT + CONTINUED - 1):
                logits.append(model(ids[:, t : t + 1], past_key_values=cache).logits[:, 0])
        losses = (
            -torch.stack(logits, 1)
            .float()
            .log_softmax(-1)
            .gather(2, ids[:, PROMPT:, None])[..., 0]
            .double()
        )
        return {"nats": losses.mean().item(), "by_window": losses.mean(1).numpy().round(5).tolist()}

    return record("generation", profile, seed, points, compute, corpus)


def sparse_policies(profile: str, seed: int = 0) -> dict:
    """Table 7 and the first column of Table 3: Lambda and TOVA at 5%; Full and H2O stand in `language_modeling`."""
    corpora = get_profile(profile).evaluation
    cells = itertools.product(corpora, ("lambda", "tova"), ("Baseline", "Baseline+", "LESS (5%)"))
    points = {
        f"{c}/{p}/{m}": {"corpus": c, "method": m, "policy": p, "fraction": 0.05}
        for c, p, m in cells
    }
    return record(
        "sparse_policies", profile, seed, points, functools.partial(score, profile, seed), *corpora
    )


def layer_trainers(
    profile: str, seed: int, fraction: float, layers: tuple[int, ...], count: int
) -> dict[int, LayerTrainer]:
    """What the kernels of some `layers` (-1 is the last) for H2O are trained with, from `count` windows."""
    p, (model, tokenizer) = get_profile(profile), model_of(get_profile(profile).model)
    windows = training_windows(
        [load_corpus(c) for c in p.training], tokenizer, model_shape(model)["context"], count, seed
    )
    policy, modules = (
        get_policy("h2o").from_fraction(fraction, windows.shape[1]),
        attention_modules(model),
    )
    captured = capture_layers(model, windows, [sorted(modules)[i] for i in layers])
    return {
        i: LayerTrainer(d, policy, output_projection(modules[i]).weight.detach(), p.validation)
        for i, d in captured.items()
    }


def training_kernels(profile: str, seed: int = 0) -> dict:
    """Every set of kernels that notebooks 03 and 04 use, trained or carried: their curves by layer; and then one layer trained here."""
    p = get_profile(profile)
    sets = [("h2o", f) for f in p.fractions] + (
        [] if p.quick else [("lambda", 0.05), ("tova", 0.05)]
    )
    points: dict[str, dict] = {
        f"{policy} {fraction:.0%}": {"policy": policy, "fraction": fraction}
        for policy, fraction in sets
    }
    if p.carried:
        points["h2o 5%, here"] = {"layer": 0}

    def compute(policy: str = "h2o", fraction: float = 0.05, layer: int | None = None) -> dict:
        if layer is None:
            return fit(profile, seed, policy, fraction)
        recipe, shape = Recipe.of(p, seed), model_shape(model_of(p.model)[0])
        trainer = layer_trainers(profile, seed, fraction, (layer,), p.sequences)[layer]
        with one_thread():
            return {
                "layers": {
                    str(layer): trainer.fit(
                        Kernels.new(shape, p.kernel_size, p.hidden, p.dropout, seed)[layer], recipe
                    )
                }
            }

    return record("training_kernels", profile, seed, points, compute, *p.training)


def recipes(profile: str, seed: int = 0) -> dict:
    """The ablation behind the small profiles' recipe: one setting changed at a time, H2O at the smallest budget, first and last layer."""
    p = get_profile(profile)
    base = asdict(Recipe.of(p, seed))
    changes = {
        "lr": (1e-3, 3e-3, 1e-2, 3e-2),
        "dropout": (0.0, 0.3),
        "hidden": (128, 512),
        "batch": (2, 8),
    }
    points = {"this profile": base}
    for name, values in ({"lr": (1e-3,)} if p.quick else changes).items():
        points |= {
            f"{name} {value:g}": base | {name: value} for value in values if value != base[name]
        }
    trainers = functools.cache(
        lambda: layer_trainers(
            profile, seed, min(p.fractions), (0, -1), min(p.sequences, ABLATION_WINDOWS)
        )
    )

    def compute(**recipe) -> dict:
        r, model, layers = Recipe(**recipe), model_of(p.model)[0], trainers()
        kernels = Kernels.new(model_shape(model), r.kernel_size, r.hidden, r.dropout, r.seed)
        with layer_pool(model.device) as pool:
            curves = pool.map(lambda i: layers[i].fit(kernels[i], r), layers)
            return {"error_left": {str(i): c["best"] for i, c in zip(layers, curves, strict=True)}}

    return record("recipes", profile, seed, points, compute, *p.training)


def training_speed(profile: str, seed: int = 0) -> dict:
    """Seconds and peak memory of one epoch, ours and the step-by-step scheme, each case in a fresh process."""
    p = get_profile(profile)
    case = {
        "sequences": 8,
        "fraction": 0.05,
        "hidden": p.hidden,
        "dropout": p.dropout,
        "seed": seed,
    }
    cases = [
        (s, n)
        for s, longest in zip(SCHEMES, (4096, 2048, 1024), strict=True)
        for n in LENGTHS
        if n <= longest
    ]
    points = {
        f"{s} {n}": {"scheme": s, "length": n, **case}
        for s, n in cases
        if n == LENGTHS[0] or not p.quick
    }
    return record("training_speed", profile, seed, points, measure, "topics-train")


def topk_outputs(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, count: int
) -> tuple[Tensor, Tensor]:
    """Dense causal attention and attention over each query's own top `count` keys, both [B, Hq, S, Dv]."""
    groups, S = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    future = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    logits = (q @ k.transpose(-1, -2) * scaling).masked_fill_(future, -torch.inf)
    threshold, full = (
        logits.topk(min(count, S), -1, sorted=False).values.amin(-1, keepdim=True),
        logits.softmax(-1) @ v,
    )
    return full, logits.masked_fill_(logits < threshold, -torch.inf).softmax(-1) @ v


def best_of_rank(x: Tensor, rank: int) -> Tensor:
    """The closest matrices of `rank` to x [..., S, D], by its right singular vectors."""
    vectors = torch.linalg.eigh(x.transpose(-1, -2) @ x).eigenvectors[..., x.shape[-1] - rank :]
    return x @ vectors @ vectors.transpose(-1, -2)


def low_rank_residuals(profile: str, seed: int = 0) -> dict:
    """Figure 3: singular values of attention outputs and of what top-k leaves out; perplexity of top-k with that added at rank r."""
    p = get_profile(profile)
    corpus, fractions = p.evaluation[0], (0.05,) if p.quick else (0.02, 0.05, 0.125)

    def compute(what: str, fraction: float, rank: int = 0) -> dict:
        model, windows = model_of(p.model)[0], windows_of(profile, corpus)
        windows = windows[:: -(-len(windows) // FIGURE_3_WINDOWS)]
        count = budget_of(fraction, model_shape(model)["context"])
        spectra: dict[str, list[Tensor]] = defaultdict(list)

        def attention(
            layer: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
        ) -> Tensor:
            full, sparse = topk_outputs(q.float(), k.float(), v.float(), scaling, count)
            if what == "singular values":
                values = torch.linalg.svdvals(torch.stack([full, full - sparse]))
                spectra[str(layer)].append(
                    (values / values[:1, ..., :1]).mean((1, 2))
                )  # over heads, by the largest of full
                return full.to(v.dtype)
            return (sparse + best_of_rank(full - sparse, rank) if rank else sparse).to(v.dtype)

        if what == "singular values":
            windows = [w for w in windows if len(w.ids) == max(len(x.ids) for x in windows)][
                : p.batch
            ]
        with replace_attention(model, attention):
            scored = perplexity(model, windows, min(p.batch, 4))
        if what == "perplexity":
            return scored
        means = {
            i: torch.stack(s).mean(0).double().numpy().round(6).tolist() for i, s in spectra.items()
        }
        return {
            "layers": {
                i: {"full": full, "residual": residual} for i, (full, residual) in means.items()
            }
        }

    points = {
        "singular values": {"what": "singular values", "fraction": 0.125},
        "full": {"what": "perplexity", "fraction": 1.0},
    }
    for f in fractions:
        points |= {
            f"top {f:.1%}, rank {r}": {"what": "perplexity", "fraction": f, "rank": r}
            for r in (0, 1, 2, 4, 8)
        }
    return record("low_rank_residuals", profile, seed, points, compute, corpus)
