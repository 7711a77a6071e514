"""What a model answers: the likelihood of options, summaries and their ROUGE; and paired intervals for the difference of two methods."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lesslib.attention.cache import LessCache
from lesslib.data import encode
from lesslib.data.storyworld import Example
from lesslib.hf import fill, less
from lesslib.policies import TOVA, Full, Policy
from lesslib.states import Kernels
from lesslib.util.progress import progress


def prompts(
    examples: list[Example], shots: list[Example], tokenizer, room: int, text: bool = True
) -> list[list[int]]:
    """Token ids of every example's prompt: as many of the shots as fit into `room` tokens before it, then its text and what it asks.

    Where the text alone is too long, its end is left out. `text=False` withholds it: the question remains. ValueError if that does not fit.
    """
    shown = [shot.shown(answer=True) for shot in shots]
    found = []
    for e in examples:
        kept = list(shown)
        while (
            len(ids := encode(tokenizer, "\n\n".join([*kept, e.shown(text=text)]))) > room and kept
        ):
            kept.pop()
        if len(ids) > room:
            asked = len(encode(tokenizer, e.shown(text=False)))
            body = tokenizer(e.text, add_special_tokens=False)["input_ids"][
                : max(0, room - asked - 2)
            ]
            ids = encode(tokenizer, replace(e, text=tokenizer.decode(body)).shown(text=text))
        if len(ids) > room:
            raise ValueError(
                f"a question of {len(ids)} tokens does not fit into {room}: use a model with a longer context"
            )
        found.append(ids)
    return found


@torch.no_grad()
def option_scores(
    model, tokenizer, asked: list[list[int]], options: list[tuple[str, ...]], batch: int = 8
) -> list[list[float]]:
    """The log-likelihood (nats) of every option after its prompt, whatever attention `model` runs under. Options share a forward
    where only their last tokens differ. Raises FloatingPointError for one that is not finite."""
    rows: dict[
        tuple[int, ...], list[tuple[int, int, int]]
    ] = {}  # input tokens -> (example, option, where the option begins)
    ids = [
        [tokenizer(" " + o, add_special_tokens=False)["input_ids"] for o in chosen]
        for chosen in options
    ]
    for i, (prompt, chosen) in enumerate(zip(asked, ids, strict=True)):
        for j, option in enumerate(chosen):
            rows.setdefault((*prompt, *option[:-1]), []).append((i, j, len(prompt)))
    scores = [[0.0] * len(chosen) for chosen in options]
    ordered = sorted(rows.items(), key=lambda row: -len(row[0]))
    for start in range(0, len(ordered), batch):
        progress("rows", start, len(ordered))
        part = ordered[start : start + batch]
        inputs = pad_sequence([torch.tensor(row) for row, _ in part], batch_first=True).to(
            model.device
        )  # causal: no need of a mask
        keep = (
            max(len(row) for row, _ in part)
            - min(begin for _, uses in part for *_, begin in uses)
            + 1
        )
        logits = (
            model(input_ids=inputs, use_cache=False, logits_to_keep=keep)
            .logits.float()
            .log_softmax(-1)
        )
        skipped = inputs.shape[1] - logits.shape[1]
        for row, uses in enumerate(part):
            for i, j, begin in uses[1]:
                option = torch.tensor(ids[i][j], device=logits.device)
                at = logits[row, begin - 1 - skipped : begin - 1 - skipped + len(option)]
                scores[i][j] = at.gather(1, option[:, None]).sum().item()
    if not np.isfinite([s for chosen in scores for s in chosen]).all():
        raise FloatingPointError(
            f"likelihoods are not finite in {model.dtype}: load the model in float32, or check its weights"
        )
    progress("rows", len(ordered), len(ordered))
    return scores


@torch.no_grad()
def continuations(
    model,
    tokenizer,
    asked: list[list[int]],
    new_tokens: int,
    methods: Sequence[tuple[Policy, Kernels | None]] = ((Full(), None),),
    batch: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[str]]:
    """By (policy, kernels) of `methods`, what `model` writes after each prompt, up to a line's end or `new_tokens`: greedy, or sampled at
    a `temperature`. Prompts are padded on the left, and read densely, once: ValueError unless policies but Full are of one class."""
    said, order = (
        [[""] * len(asked) for _ in methods],
        sorted(range(len(asked)), key=lambda i: -len(asked[i])),
    )
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    stop = [t for t in (tokenizer.eos_token_id, newline) if t is not None]
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    kind: type[Policy] = next(
        (type(policy) for policy, _ in methods if policy.budget is not None), TOVA
    )
    whole = kind.from_budget(max(map(len, asked), default=1) + new_tokens)

    def write(ids: Tensor, cache: LessCache, count: int) -> Tensor:
        """Ids [B, S], where -1 is padding, and at most `count` tokens after them."""
        torch.manual_seed(seed + start)
        given = {
            "attention_mask": (ids >= 0).long(),
            "eos_token_id": stop,
            "pad_token_id": newline,
            **sampling,
        }
        out = cast(Any, model).generate(
            ids.clamp(min=0), past_key_values=cache, max_new_tokens=count, **given
        )
        return torch.cat([ids, out[:, ids.shape[1] :]], 1)

    with torch.random.fork_rng(), less(model):
        for start in range(0, len(order), batch):
            rows, reader = order[start : start + batch], LessCache(model, whole)
            ids = (
                pad_sequence(
                    [torch.tensor(asked[i][::-1]) for i in rows], batch_first=True, padding_value=-1
                )
                .flip(1)
                .to(model.device)
            )
            begun = write(ids, reader, 1)
            for done, (policy, kernels) in enumerate(methods):
                progress("summaries", start + done * len(rows) // len(methods), len(order))
                fill(
                    cache := LessCache(model, whole if policy.budget is None else policy, kernels),
                    reader,
                )
                out = write(begun, cache, new_tokens - 1) if new_tokens > 1 else begun
                for i, row in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                    written = [*itertools.takewhile(lambda token: token not in stop, row)]
                    said[done][i] = (
                        tokenizer.decode(written, skip_special_tokens=True).strip().split("\n")[0]
                    )
    progress("summaries", len(order), len(order))
    return said


def rouge(said: list[str], references: list[str]) -> dict[str, list[float]]:
    """ROUGE-1, -2 and -L in percent, by example."""
    import evaluate

    metric: Any = evaluate.load(str(Path(__file__).with_name("rouge.py")))
    scores: dict[str, list[float]] = metric.compute(predictions=said, references=references)
    return {name: [round(s, 3) for s in values] for name, values in scores.items()}


def paired(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """mean(a) - mean(b) over the same examples, with a 95% interval of a paired bootstrap. Raises ValueError for unequal lengths."""
    if len(a) != len(b) or not a:
        raise ValueError(
            f"{len(a)} and {len(b)} examples cannot be paired: compute both on the same ones"
        )
    difference = np.subtract(a, b)
    draws = np.random.default_rng(0).integers(0, len(a), (4000, len(a)))
    low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)
