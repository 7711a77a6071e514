"""Profiles: what a run of the notebooks uses. A notebook's parameters are `profile` and `seed`, no more. And a command line's options."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lesslib.util.paths import ASSETS, ROOT


@dataclass(frozen=True)
class Profile:
    """Settings of one profile; sizes in tokens, times in minutes on the hardware named in `where`."""

    name: str
    where: str
    model: str = "pico-llama"
    evaluation: tuple[str, ...] = ("topics-heldout",)  # corpora that perplexity is measured on
    training: tuple[str, ...] = (
        "topics-train",
    )  # corpora that kernels are trained on, in equal shares
    windows_per_document: int = 8  # evaluation windows, spread evenly over each document
    max_windows: int = 64  # evaluation windows per corpus
    batch: int = 8  # evaluation windows at once
    fractions: tuple[float, ...] = (0.02, 0.05, 0.1)  # budgets, as shares of the model's context
    quick: bool = False  # for tests: fewer points
    carried: bool = False  # content with the kernels in the package, until --fresh
    kernel_size: int = 8  # R; from here to train_batch: the recipe of kernel training
    hidden: int = 128
    sequences: int = 96
    validation: int = 8
    epochs: int = 12
    halve_every: int = 3
    lr: float = 3e-2
    dropout: float = 0.0
    train_batch: int = 2
    disk_gib: float = 1.0  # what must be there before anything is computed
    gpu_gib: float = 0.0

    def of(self, model: str) -> "Profile":
        """The same for another model; where the texts are our own, one that was taught stories trains its kernels on stories."""
        own = self.training == ("topics-train",) and model in READERS.values()
        return replace(self, model=model, training=("stories-kernels",) if own else self.training)


READERS = {
    "llama": "pico-llama-stories",
    "wide": "pico-llama-wide",
    "falcon": "pico-falcon-stories",
}  # were taught stories and tasks
HUB_MODELS = {
    "wide": "meta-llama/Llama-2-13b-hf",
    "falcon": "tiiuae/falcon-7b",
}  # of the profile paper, beside its own


def roles(profile: str, tasks: bool = False) -> dict[str, str]:
    """Model names by role: "llama" (the paper's Llama 2 7B), "wide" (13B) and "falcon"; those that answer `tasks`, or that read text."""
    llama = {"llama": PROFILES[profile].model}
    return (
        llama | HUB_MODELS
        if profile == "paper"
        else READERS
        if tasks
        else llama | {"falcon": "pico-falcon"}
    )


@dataclass(frozen=True)
class Tasks:
    """Which tasks notebooks 05, 06 and 09 measure: (name, shots, examples) of `lesslib.data.tasks`, and (name, shots, tokens to write)."""

    classification: tuple[tuple[str, int, int], ...]
    summaries: tuple[tuple[str, int, int], ...]
    choices: int  # examples of a classification task at the most
    texts: int  # examples of a summarisation task
    length: int = 400  # words of a story; real texts are cut there
    lengths: tuple[int, ...] = (330, 380, 430, 480)  # the same, of notebook 09's prompts
    at_once: int = 48  # texts written at once; a step of decoding is small, but all their keys and values must fit twice
    withheld: int = (
        0  # examples asked without their text, to see what the question alone gives away
    )


def _frozen(x: Any) -> Any:
    return tuple(map(_frozen, x)) if isinstance(x, list) else x


SETTINGS: dict[str, dict] = json.loads(
    (ASSETS / "profiles.json").read_text()
)  # beside the defaults above
PROFILES = {
    name: Profile(name, **{k: _frozen(v) for k, v in s["profile"].items()})
    for name, s in SETTINGS.items()
}
TASKS = {
    name: Tasks(**{k: _frozen(v) for k, v in s["tasks"].items()}) for name, s in SETTINGS.items()
}


def get_limit() -> int:
    """$LESS_LIMIT, to try a profile out: at most so many windows, examples, sequences and epochs; 0 is none. ValueError for other words."""
    words = os.environ.get("LESS_LIMIT") or "0"
    if not words.isdecimal() or words == "1":
        raise ValueError(f"limit is {words!r}: give a whole number from 2 on, or unset LESS_LIMIT")
    return int(words)


def _cut(settings: Any, *names: str, **more: Any) -> Any:
    return (
        replace(settings, **{n: min(limit, getattr(settings, n)) for n in names}, **more)
        if (limit := get_limit())
        else settings
    )


def get_profile(name: str | None = None) -> Profile:
    """The profile called `name`, or the one that $LESS_PROFILE names, or `tiny`; cut to the limit. Raises ValueError for any other name."""
    name = name or os.environ.get("LESS_PROFILE") or "tiny"
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose from {', '.join(PROFILES)}")
    return _cut(
        PROFILES[name],
        "windows_per_document",
        "max_windows",
        "sequences",
        "epochs",
        validation=1,
        disk_gib=0.0,
        gpu_gib=0.0,
    )


def get_tasks(profile: str) -> Tasks:
    """The tasks of a profile, cut to the limit."""
    return _cut(TASKS[profile], "choices", "texts", "withheld")


def results_dir(profile: str) -> Path:
    """Where `profile`'s results lie: below $LESS_RESULTS, or the repository's results/; apart from them where $LESS_LIMIT cuts it short."""
    limit = get_limit()
    return Path(os.environ.get("LESS_RESULTS") or ROOT / "results") / (
        f"{profile}-limit{limit}" if limit else profile
    )
