"""Tables 3 to 5 and Figures 6 to 8: tasks, attention maps, kernel sizes. As in `experiments`, a function each, to results."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lesslib.attention.fit import check_fit, model_shape
from lesslib.data import encode
from lesslib.data.tasks import load_task, task_record
from lesslib.evaluation import Decoding, continuations, option_scores, prompts, rouge
from lesslib.experiments.language import METHODS, model_of, record, score, setting, windows_of
from lesslib.hf import capture, less
from lesslib.policies import simulate
from lesslib.profiles import get_profile, get_tasks, roles
from lesslib.states import Kernels

MAP_TOKENS, MAP_SIZE, MAP_WINDOWS = (
    192,
    64,
    6,
)  # of an attention map: tokens, its pixels, windows that distances are averaged over
SIZES, PAPER_SIZES = (2, 4, 8, 16, 32), (8, 32, 128, 512)  # R of notebook 08; of Figure 7
task_of = functools.lru_cache(maxsize=8)(load_task)


def classify(
    profile: str,
    seed: int,
    name: str,
    task: str,
    shots: int,
    count: int,
    length: int,
    method: str,
    text: bool = True,
    **case,
) -> dict[str, Any]:
    """Accuracy of the likeliest option, whole prompts scored under one method; `text=False` withholds what the questions are about."""
    p, (model, tokenizer) = get_profile(profile), model_of(name)
    examples, shown = task_of(task, count, shots, length=length)
    options = [e.options for e in examples]
    longest = max(len(encode(tokenizer, " " + o)) for chosen in options for o in chosen)
    asked = prompts(examples, shown, tokenizer, model_shape(model)["context"] - longest, text)
    with less(model, *setting(profile, seed, method, name=name, **case), mode="parallel"):
        scores = option_scores(model, tokenizer, asked, options, p.batch)
    right = [int(np.argmax(s) == e.right) for s, e in zip(scores, examples, strict=True)]
    majority = max(Counter(e.right for e in examples).values()) / len(
        examples
    )  # what naming the commonest answer would score
    return {
        "accuracy": sum(right) / len(right),
        "right": right,
        "options": len(options[0]),
        "majority": majority,
    }


def classification(profile: str, seed: int = 0) -> dict:
    """Table 3: two tasks under a Lambda mask at 5% of the context, and what is left of them when the text is withheld."""
    t, name, points = get_tasks(profile), roles(profile, tasks=True)["llama"], dict[str, dict]()
    for task, shots, count in t.classification:
        where = {
            "name": name,
            "task": task,
            "shots": shots,
            "count": min(count, t.choices),
            "length": t.length,
        }
        points |= {
            f"{task}/{m}": where | {"method": m, "policy": "lambda", "fraction": 0.05}
            for m in METHODS
        }
        if t.withheld:
            points[f"{task}/withheld"] = where | {
                "method": "Full",
                "text": False,
                "shots": 0,
                "count": t.withheld,
            }
    tasks = [
        functools.partial(task_record, task, min(n, t.choices), shots, t.length)
        for task, shots, n in t.classification
    ]
    compute, training = (
        functools.partial(classify, profile, seed),
        get_profile(profile).of(name).training,
    )
    return record(
        "classification", profile, seed, points, compute, *training, *tasks, models=(name,)
    )


def summarise(
    profile: str,
    seed: int,
    name: str,
    task: str,
    shots: int,
    new_tokens: int,
    count: int,
    length: int,
    cases: list[dict[str, Any]],
    text: bool = True,
    temperature: float = 0.0,
) -> list[dict[str, Any]]:
    """ROUGE of what model `name` writes under each of the `cases` (of `setting`), prompts read densely; by example, with a few texts."""
    model, tokenizer = model_of(name)
    examples, shown = task_of(task, count, shots, length=length)
    asked = prompts(examples, shown, tokenizer, model_shape(model)["context"] - new_tokens, text)
    methods = [
        setting(profile, c.get("s", seed), name=name, **{k: c[k] for k in c if k != "s"})
        for c in cases
    ]
    references, found = [e.options[0] for e in examples], list[dict[str, Any]]()
    shown_texts = (
        0 if profile == "wild" else 4
    )  # results/wild is published, and holds no words of others
    decoding = Decoding(new_tokens, get_tasks(profile).at_once, temperature, seed)
    for said in continuations(model, tokenizer, asked, decoding, methods):
        scores, other = (
            rouge(said, r) for r in (references, references[1:] + references[:1])
        )  # other: what words alone are worth
        means, chance = (
            {n: float(np.mean(x)) for n, x in each.items()} for each in (scores, other)
        )
        texts = {"said": said[:shown_texts], "references": references[:shown_texts]}
        found.append(
            {
                **means,
                "scores": scores,
                "chance": chance,
                "prompt_tokens": [len(a) for a in asked],
                **texts,
            }
        )
    return found


# by role of a model: the budgets of its table, the percentages that its kernels are trained at, and how many of the tasks
TABLES: dict[str, Any] = {
    "llama": ((0.05, 0.1), (2, 5), 3),
    "wide": ((0.1,), (2, 5), 2),
    "falcon": ((0.05, 0.1, 0.2), (5, 10), 2),
}


def summarization(profile: str, role: str, seed: int = 0) -> dict:
    """Tables 4 and 5 for one model: `role` "llama" (Table 5), "wide" or "falcon" (Table 4; also at the budgets that others reran)."""
    p, t, name, (fractions, trained, tasks) = (
        get_profile(profile),
        get_tasks(profile),
        roles(profile, tasks=True)[role],
        TABLES[role],
    )
    points, data = dict[str, dict](), list[Any](p.of(name).training)
    if p.quick:
        fractions, trained, tasks = fractions[:1], trained[-1:], 1
    for task, shots, new_tokens in t.summaries[:tasks]:
        where = {
            "name": name,
            "task": task,
            "shots": shots,
            "new_tokens": new_tokens,
            "count": t.texts,
            "length": t.length,
        }
        points[f"{task}/Full"] = where | {"method": "Full"}
        for f, m in itertools.product(
            fractions, ("Baseline", "Baseline+", *(f"LESS ({x}%)" for x in trained))
        ):
            points[f"{task}/{f:.0%}/{m}"] = where | {"method": m, "fraction": f}
        if t.withheld:
            points[f"{task}/withheld"] = where | {"method": "Full", "text": False, "shots": 0}
        data.append(functools.partial(task_record, task, t.texts, shots, t.length))
    return record(
        f"summarization_{role}",
        profile,
        seed,
        points,
        functools.partial(summarise, profile, seed),
        *data,
        models=(name,),
    )


def prompt_length(profile: str, seed: int = 0) -> dict:
    """Figure 8: ROUGE-1 against the prompt's length at 5% H2O, by example."""
    t, name, points = get_tasks(profile), roles(profile, tasks=True)["llama"], dict[str, dict]()
    data = list[Any](get_profile(profile).of(name).training)
    for task, shots, new_tokens in t.summaries[:2]:
        for length in t.lengths:
            where = {
                "name": name,
                "task": task,
                "shots": shots,
                "new_tokens": new_tokens,
                "count": t.texts,
                "length": length,
            }
            points |= {
                f"{task}/{length}/{m}": where | {"method": m, "fraction": 0.05} for m in METHODS
            }
            data.append(functools.partial(task_record, task, t.texts, shots, length))
    return record(
        "prompt_length",
        profile,
        seed,
        points,
        functools.partial(summarise, profile, seed),
        *data,
        models=(name,),
    )


def attention_rows(
    q: Tensor, k: Tensor, scaling: float, times: Tensor | None = None, kernels: Any = None
) -> Tensor:
    """Attention probabilities [B, Hq, S, S]: dense, over what eviction `times` [B, Hkv, S] keep, or with the low-rank part too.

    The `kernels` of a layer give an evicted token j the weight phi(q_t) psi(k_j), as eq. 3 does. O(S^2) memory: for pictures.
    """
    S, groups = q.shape[2], q.shape[1] // k.shape[1]
    t = torch.arange(S, device=q.device)
    seen = (t <= t[:, None]).expand(q.shape[0], q.shape[1], S, S)
    kept = (
        seen
        if times is None
        else seen & (t[:, None] < times.repeat_interleave(groups, 1)[:, :, None])
    )
    logits = (q.float() @ k.repeat_interleave(groups, 1).float().mT * scaling).masked_fill(
        ~kept, -torch.inf
    )
    if kernels is None:
        return logits.softmax(-1)
    features = kernels.phi(q).float() @ kernels.psi(k).repeat_interleave(groups, 1).float().mT
    return torch.where(kept, logits, features.log().masked_fill(~seen, -torch.inf)).softmax(-1)


def hellinger(p: Tensor, q: Tensor) -> Tensor:
    """Hellinger distance of distributions along the last dimension: 0 for equal ones, 1 for disjoint ones."""
    return (1 - (p * q).sqrt().sum(-1)).clamp(min=0).sqrt()


def attention_maps(profile: str, seed: int = 0) -> dict:
    """Figure 6: distance of attention rows to the original by layer. Figures 9 to 11: maps of one head, original, sparse and LESS.

    Every layer reads what the dense model gives it, so that its distance is its own and not the sum of the layers below.
    """
    p = get_profile(profile)
    cases = [("llama", "h2o", 0.05)] + (
        [] if p.quick else [("llama", "lambda", 0.05), ("falcon", "h2o", 0.1)]
    )
    points = {
        f"{role}/{policy} {f:.0%}": {"name": roles(profile)[role], "policy": policy, "fraction": f}
        for role, policy, f in cases
    }

    def compute(name: str, policy: str, fraction: float) -> dict:
        model, _ = model_of(name)
        chosen, kernels = setting(
            profile, seed, f"LESS ({fraction:.0%})", policy, fraction, name=name
        )
        check_fit(model, chosen, kernels)
        windows = windows_of(profile, p.evaluation[0], name)
        windows = windows[:: -(-len(windows) // MAP_WINDOWS)]
        distances: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        maps: dict[str, list] = {}

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scaling: float) -> None:
            times = simulate(
                chosen,
                q,
                k,
                torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device),
                scaling,
            )
            rows = {
                "original": attention_rows(q, k, scaling),
                "sparse": attention_rows(q, k, scaling, times),
            }
            rows["LESS"] = attention_rows(q, k, scaling, times, cast(Kernels, kernels)[layer])
            for label in ("sparse", "LESS"):
                distances[str(layer)][label].append(
                    hellinger(rows["original"], rows[label])[:, :, chosen.budget :].mean().item()
                )
            if (
                layer == model_shape(model)["layers"] // 2 and not maps
            ):  # of the first text's head 0
                pooled = {
                    label: F.avg_pool2d(
                        x[:1, :1, -MAP_TOKENS:, -MAP_TOKENS:], MAP_TOKENS // MAP_SIZE
                    )
                    for label, x in rows.items()
                }
                maps.update(
                    {
                        label: x[0, 0].double().numpy(force=True).round(4).tolist()
                        for label, x in pooled.items()
                    }
                )

        with capture(model, keep):
            for window in windows:
                model(input_ids=torch.tensor([window.ids], device=model.device), use_cache=False)
        return {"distances": distances, "maps": maps}

    return record(
        "attention_maps",
        profile,
        seed,
        points,
        compute,
        p.evaluation[0],
        models=tuple(roles(profile)[c[0]] for c in cases),
    )


def kernel_size(profile: str, seed: int = 0) -> dict:
    """Figure 7: perplexity against R, beside the policy with R/2 more tokens, which hold as many bytes; H2O at 2% and 5%."""
    p = get_profile(profile)
    corpus, points, sizes = (
        p.evaluation[0],
        dict[str, dict](),
        PAPER_SIZES if profile == "paper" else SIZES,
    )
    for f, R in itertools.product(
        (0.05,) if p.quick else (0.02, 0.05), (p.kernel_size,) if p.quick else sizes
    ):
        points |= {
            f"{f:.0%}/{R}/{m}": {"fraction": f, "kernel_size": R, "method": m}
            for m in ("Baseline+", f"LESS ({f:.0%})")
        }
    return record(
        "kernel_size",
        profile,
        seed,
        points,
        functools.partial(score, profile, seed, corpus),
        corpus,
        *p.training,
    )


def seeds(profile: str, seed: int = 0, count: int = 3) -> dict:
    """The headline rows again with kernels of other seeds: perplexity and ROUGE of LESS (5%) at 5% H2O."""
    p, t, reader = get_profile(profile), get_tasks(profile), roles(profile, tasks=True)["llama"]
    corpora, every, at = (
        p.evaluation,
        range(seed, seed + count),
        {"method": "LESS (5%)", "fraction": 0.05},
    )
    points = {
        f"{c}/{s}": at | {"s": s, "name": p.model, "corpus": c}
        for c, s in itertools.product(corpora, every)
    }
    for (task, shots, new_tokens), s in itertools.product(t.summaries, every):
        where = {"s": s, "name": reader, "task": task, "shots": shots, "new_tokens": new_tokens}
        points[f"{task}/{s}"] = at | where | {"count": t.texts, "length": t.length}
    data = [
        functools.partial(task_record, task, t.texts, shots, t.length)
        for task, shots, _ in t.summaries
    ]

    def compute(cases: list[dict], corpus: str = "", **case) -> list[dict]:
        if not corpus:
            return summarise(profile, seed, cases=cases, **case)
        return [score(profile, corpus=corpus, seed=c.pop("s"), **c, **case) for c in cases]

    texts = dict.fromkeys((*corpora, *p.training, *p.of(reader).training))
    return record("seeds", profile, seed, points, compute, *texts, *data, models=(p.model, reader))
