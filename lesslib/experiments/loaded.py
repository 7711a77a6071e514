"""What experiments load once and use at many points: a model, its evaluation windows, texts."""

from __future__ import annotations

import functools

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lesslib.data import load_corpus
from lesslib.data.storyworld import Example
from lesslib.data.tasks import load_task
from lesslib.evaluation import Window, evaluation_windows
from lesslib.models import load_model, model_shape
from lesslib.profiles import get_profile


@functools.lru_cache(maxsize=1)
def model_of(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) by name; the last one stays in memory."""
    return load_model(name)


@functools.cache
def sha256_of(corpus: str) -> str:
    """What identifies the texts of a corpus."""
    return load_corpus(corpus).sha256


@functools.lru_cache(maxsize=4)
def windows_of(profile: str, corpus: str, model_name: str | None = None) -> list[Window]:
    """The evaluation windows of a profile, one context of its model (or of another) long."""
    p = get_profile(profile)
    model, tokenizer = model_of(model_name or p.model)
    return evaluation_windows(
        load_corpus(corpus),
        tokenizer,
        model_shape(model)["context"],
        p.windows_per_document,
        p.max_windows,
    )


@functools.lru_cache(maxsize=8)
def examples_of(
    task: str, count: int, shots: int, length: int
) -> tuple[list[Example], list[Example]]:
    """(examples to measure on, shots to show before each) of a task: see `load_task`."""
    return load_task(task, count, shots, length=length)
