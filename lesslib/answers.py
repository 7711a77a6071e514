"""What a model answers: the likelihood of options, summaries and their ROUGE; and paired intervals for the difference of two methods."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import StaticCache

from .data import encode
from .data.storyworld import Example
from .hf import less
from .results import progress


def prompts(examples: list[Example], shots: list[Example], tokenizer, room: int, text: bool = True) -> list[list[int]]:
    """Token ids of every example's prompt: as many of the shots as fit into `room` tokens before it, then its text and what it asks.

    Where the text alone is too long, its end is left out. `text=False` withholds it: only the question remains. Raises ValueError when
    not even the question fits.
    """
    shown = [shot.shown(answer=True) for shot in shots]
    found = []
    for e in examples:
        kept = list(shown)
        while len(ids := encode(tokenizer, "\n\n".join([*kept, e.shown(text=text)]))) > room and kept:
            kept.pop()
        if len(ids) > room:
            asked = len(encode(tokenizer, e.shown(text=False)))
            body = tokenizer(e.text, add_special_tokens=False)["input_ids"][: max(0, room - asked - 2)]
            ids = encode(tokenizer, replace(e, text=tokenizer.decode(body)).shown(text=text))
        if len(ids) > room:
            raise ValueError(f"a question of {len(ids)} tokens does not fit into {room}: use a model with a longer context")
        found.append(ids)
    return found


@torch.no_grad()
def option_scores(model, tokenizer, asked: list[list[int]], options: list[tuple[str, ...]], batch: int = 8) -> list[list[float]]:
    """The log-likelihood (nats) of every option after its prompt, whatever attention `model` runs under. Options share a forward
    where only their last tokens differ. Raises FloatingPointError for one that is not finite."""
    rows: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}  # input tokens -> (example, option, where the option begins)
    ids = [[tokenizer(" " + o, add_special_tokens=False)["input_ids"] for o in chosen] for chosen in options]
    for i, (prompt, chosen) in enumerate(zip(asked, ids, strict=True)):
        for j, option in enumerate(chosen):
            rows.setdefault((*prompt, *option[:-1]), []).append((i, j, len(prompt)))
    scores = [[0.0] * len(chosen) for chosen in options]
    ordered = sorted(rows.items(), key=lambda row: -len(row[0]))
    for start in range(0, len(ordered), batch):
        progress("rows", start, len(ordered))
        part = ordered[start : start + batch]
        inputs = pad_sequence([torch.tensor(row) for row, _ in part], batch_first=True).to(model.device)  # causal: no need of a mask
        keep = max(len(row) for row, _ in part) - min(begin for _, uses in part for *_, begin in uses) + 1
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=keep).logits.float().log_softmax(-1)
        skipped = inputs.shape[1] - logits.shape[1]
        for row, uses in enumerate(part):
            for i, j, begin in uses[1]:
                option = torch.tensor(ids[i][j], device=logits.device)
                at = logits[row, begin - 1 - skipped : begin - 1 - skipped + len(option)]
                scores[i][j] = at.gather(1, option[:, None]).sum().item()
    if not np.isfinite([s for chosen in scores for s in chosen]).all():
        raise FloatingPointError(f"likelihoods are not finite in {model.dtype}: load the model in float32, or check its weights")
    progress("rows", len(ordered), len(ordered))
    return scores


@torch.no_grad()
def continuations(
    model, tokenizer, asked: list[list[int]], new_tokens: int, cache: Callable[[], Any] | None = None, batch: int = 8,
    temperature: float = 0.0, seed: int = 0,
) -> list[str]:  # fmt: skip
    """What `model` writes after each prompt, up to a line's end or `new_tokens`: greedy, or sampled at a `temperature`.

    `cache()` makes the LessCache of one batch; None is the full cache. The prompt attends as that cache's prefill says. Prompts are padded
    on the left to their batch's longest.
    """
    said, order = [""] * len(asked), sorted(range(len(asked)), key=lambda i: -len(asked[i]))
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    stop = [t for t in (tokenizer.eos_token_id, newline) if t is not None]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {"do_sample": False}
    with torch.random.fork_rng(), contextlib.nullcontext() if cache is None else less(model):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch):
            progress("summaries", start, len(order))
            rows = order[start : start + batch]
            ids = pad_sequence([torch.tensor(asked[i][::-1]) for i in rows], batch_first=True, padding_value=-1).flip(1).to(model.device)
            arguments = {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(), "max_new_tokens": new_tokens, **sampling}
            arguments |= {"eos_token_id": stop, "pad_token_id": newline}
            if cache is not None:
                arguments["past_key_values"] = cache()
            elif model.device.type == "cpu":  # quicker than one that grows; on a GPU generate would compile for every length
                arguments["past_key_values"] = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new_tokens)
            out = cast(Any, model).generate(**arguments)[:, ids.shape[1] :]
            for i, row in zip(rows, out, strict=True):
                said[i] = tokenizer.decode(row, skip_special_tokens=True).strip().split("\n")[0]
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
        raise ValueError(f"{len(a)} and {len(b)} examples cannot be paired: compute both on the same ones")
    difference = np.subtract(a, b)
    draws = np.random.default_rng(0).integers(0, len(a), (4000, len(a)))
    low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)
