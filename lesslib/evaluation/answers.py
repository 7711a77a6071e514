"""What a model answers: prompts of tasks, the likelihood of options, and texts that it writes.

All of it under whatever attention the model runs, or under several caches at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lesslib.attention.cache import LessCache
from lesslib.data import encode
from lesslib.data.storyworld import Example
from lesslib.hf import fill, less
from lesslib.policies import TOVA, Full, Policy
from lesslib.states import ModelState
from lesslib.util.progress import progress


# ---------------------------------------------------------------- prompts
def prompts(
    examples: list[Example], shots: list[Example], tokenizer, room: int, text: bool = True
) -> list[list[int]]:
    """Token ids of every example's prompt, at most `room` of them.

    As many of the shots as fit come first, then the example's text and what it asks. Where the text
    alone is too long, its end is left out; `text=False` withholds it: the question remains. Raises
    ValueError if that does not fit.
    """
    shown = [shot.shown(answer=True) for shot in shots]
    prompt_ids = []
    for example in examples:
        ids = _with_shots(example.shown(text=text), shown, tokenizer, room)
        if len(ids) > room:
            shortened = _shortened(example, tokenizer, room)
            ids = encode(tokenizer, shortened.shown(text=text))
        if len(ids) > room:
            raise ValueError(
                f"a question of {len(ids)} tokens does not fit into {room}: use a model with a "
                "longer context"
            )
        prompt_ids.append(ids)
    return prompt_ids


def _with_shots(question: str, shots: list[str], tokenizer, room: int) -> list[int]:
    """Token ids of a question after the first of the shots, as many as fit into `room`."""
    kept = list(shots)
    ids = encode(tokenizer, "\n\n".join([*kept, question]))
    while len(ids) > room and kept:
        kept.pop()
        ids = encode(tokenizer, "\n\n".join([*kept, question]))
    return ids


def _shortened(example: Example, tokenizer, room: int) -> Example:
    """The example with as much of its text as leaves room for its question."""
    question_length = len(encode(tokenizer, example.shown(text=False)))
    # two tokens for the joint of text and question
    text_length = max(0, room - question_length - 2)
    text_ids = tokenizer(example.text, add_special_tokens=False)["input_ids"][:text_length]
    return replace(example, text=tokenizer.decode(text_ids))


# ---------------------------------------------------------------- likelihoods
@dataclass(frozen=True)
class _Scored:
    """An option to score in a row of input tokens: whose it is, its ids, and where it begins."""

    example: int
    option: int
    ids: list[int]
    begin: int


# input tokens, and the options that are scored in them
_Row = tuple[tuple[int, ...], list[_Scored]]


@torch.no_grad()
def option_scores(
    model, tokenizer, prompt_ids: list[list[int]], options: list[tuple[str, ...]], batch: int = 8
) -> list[list[float]]:
    """The log-likelihood (nats) of every option after its prompt, by example.

    Options share a forward where only their last tokens differ. Raises FloatingPointError for one
    that is not finite.
    """
    rows = _rows_to_score(tokenizer, prompt_ids, options)
    scores = [[0.0] * len(choices) for choices in options]
    for start in range(0, len(rows), batch):
        progress("rows", start, len(rows))
        _score_rows(model, rows[start : start + batch], scores)
    if not np.isfinite(list(itertools.chain(*scores))).all():
        raise FloatingPointError(
            f"likelihoods are not finite in {model.dtype}: load the model in float32, or check its "
            "weights"
        )
    progress("rows", len(rows), len(rows))
    return scores


def _rows_to_score(
    tokenizer, prompt_ids: list[list[int]], options: list[tuple[str, ...]]
) -> list[_Row]:
    """Every row of input tokens with its options, the longest first."""
    scored_by_inputs: dict[tuple[int, ...], list[_Scored]] = {}
    for i, (prompt, choices) in enumerate(zip(prompt_ids, options, strict=True)):
        for j, choice in enumerate(choices):
            ids = tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
            # nothing is read off an option's last token
            inputs = (*prompt, *ids[:-1])
            scored_by_inputs.setdefault(inputs, []).append(_Scored(i, j, ids, len(prompt)))
    return sorted(scored_by_inputs.items(), key=lambda row: -len(row[0]))


def _score_rows(model, rows: list[_Row], scores: list[list[float]]) -> None:
    """One forward of some rows; puts the likelihood of their options into `scores`."""
    sequences = [torch.tensor(inputs) for inputs, _ in rows]
    # padded on the right: attention is causal, so there is no need of a mask
    inputs = pad_sequence(sequences, batch_first=True).to(model.device)  # [B, S]
    all_scored = itertools.chain(*(scored for _, scored in rows))
    first_begin = min(scored.begin for scored in all_scored)
    # the first token of an option is read off the one before it
    kept = inputs.shape[1] - first_begin + 1
    output = model(input_ids=inputs, use_cache=False, logits_to_keep=kept)
    logits = output.logits.float().log_softmax(-1)  # [B, kept, V]
    skipped = inputs.shape[1] - logits.shape[1]
    for row, (_, scored_options) in enumerate(rows):
        for scored in scored_options:
            ids = torch.tensor(scored.ids, device=logits.device)
            first = scored.begin - 1 - skipped
            of_option = logits[row, first : first + len(ids)]
            likelihood = of_option.gather(1, ids[:, None]).sum().item()
            scores[scored.example][scored.option] = likelihood


# ---------------------------------------------------------------- texts
@dataclass(frozen=True)
class Decoding:
    """How texts are written: `new_tokens` at most, `batch` prompts at once.

    At temperature 0 the likeliest token is taken, else one is sampled by `seed`.
    """

    new_tokens: int
    batch: int = 8
    temperature: float = 0.0
    seed: int = 0


FULL_CACHE: tuple[Policy, ModelState | None] = (Full(), None)


@torch.no_grad()
def continuations(
    model,
    tokenizer,
    prompt_ids: list[list[int]],
    decoding: Decoding,
    methods: Sequence[tuple[Policy, ModelState | None]] = (FULL_CACHE,),
) -> list[list[str]]:
    """By (policy, kernels) of `methods`, what `model` writes after each prompt.

    A text ends with its line or after `decoding.new_tokens`. Prompts are padded on the left, and
    read densely, once for all methods: ValueError unless policies but Full are of one class.
    """
    texts = [[""] * len(prompt_ids) for _ in methods]
    longest_first = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    longest = max(map(len, prompt_ids), default=1)
    whole = _unbounded_like(methods, longest + decoding.new_tokens)
    writer = _Writer(model, tokenizer, decoding)
    with torch.random.fork_rng(), less(model):
        for start in range(0, len(longest_first), decoding.batch):
            rows = longest_first[start : start + decoding.batch]
            seed = decoding.seed + start
            reader = LessCache(model, whole)
            ids = _left_padded([prompt_ids[i] for i in rows]).to(model.device)  # [B, S]
            begun = writer.write(ids, reader, 1, seed)
            for number, (policy, kernels) in enumerate(methods):
                done = start + number * len(rows) // len(methods)
                progress("summaries", done, len(longest_first))
                cache = LessCache(model, whole if policy.budget is None else policy, kernels)
                fill(cache, reader)
                written = begun
                if decoding.new_tokens > 1:
                    written = writer.write(begun, cache, decoding.new_tokens - 1, seed)
                for i, row in zip(rows, written[:, ids.shape[1] :].tolist(), strict=True):
                    texts[number][i] = writer.line(row)
    progress("summaries", len(longest_first), len(longest_first))
    return texts


def _unbounded_like(methods: Sequence[tuple[Policy, ModelState | None]], tokens: int) -> Policy:
    """A policy that keeps all of so many `tokens`, of the class that the bounded methods have."""
    for policy, _ in methods:
        if policy.budget is not None:
            return type(policy).from_budget(tokens)
    return TOVA.from_budget(tokens)


def _left_padded(prompt_ids: list[list[int]]) -> Tensor:
    """[B, S], with -1 before the shorter prompts."""
    backwards = [torch.tensor(ids[::-1]) for ids in prompt_ids]
    return pad_sequence(backwards, batch_first=True, padding_value=-1).flip(1)


class _Writer:
    """Writes on with a model, as `Decoding` says, up to the end of a line."""

    def __init__(self, model, tokenizer, decoding: Decoding):
        self.model = model
        self.tokenizer = tokenizer
        self.newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        self.stop = [self.newline]
        if tokenizer.eos_token_id is not None:
            self.stop = [tokenizer.eos_token_id, self.newline]
        self.sampling: dict[str, bool | float] = {"do_sample": False}
        if decoding.temperature:
            self.sampling = {
                "do_sample": True,
                "temperature": decoding.temperature,
                "top_p": 1.0,
                "top_k": 0,
            }

    def write(self, ids: Tensor, cache: LessCache, count: int, seed: int) -> Tensor:
        """Ids [B, S], where -1 is padding, and at most `count` tokens after them."""
        torch.manual_seed(seed)
        out = self.model.generate(
            ids.clamp(min=0),
            past_key_values=cache,
            max_new_tokens=count,
            attention_mask=(ids >= 0).long(),
            eos_token_id=self.stop,
            pad_token_id=self.newline,
            **self.sampling,
        )
        return torch.cat([ids, out[:, ids.shape[1] :]], 1)

    def line(self, row: list[int]) -> str:
        """The text of new tokens, up to the first that stops it."""
        written = list(itertools.takewhile(lambda token: token not in self.stop, row))
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return text.strip().split("\n")[0]
