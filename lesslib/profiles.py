"""Profiles: what a run of the notebooks uses. A notebook's parameters are `profile` and `seed`, no more."""
import os
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Profile:
    """Settings of one profile; sizes in tokens, times in minutes on the hardware named in `where`."""

    name: str
    where: str
    model: str = "pico-llama"
    evaluation: tuple[str, ...] = ("topics-heldout",)  # corpora that perplexity is measured on
    training: tuple[str, ...] = ("topics-train",)  # corpora that kernels are trained on, in equal shares
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


PROFILES = {p.name: p for p in (
    Profile("smoke", "two CPU cores, offline, 30 s a notebook", windows_per_document=8, max_windows=16, fractions=(0.05,),
            quick=True, carried=True, sequences=12, validation=4, epochs=3, halve_every=1),
    Profile("tiny", "two CPU cores, offline, 15 min", carried=True),
    Profile("wild", "two CPU cores, 60 min, $LESS_DATA or the hub", evaluation=("wikitext2", "books"), training=("c4",),
            windows_per_document=6, max_windows=60, sequences=208, validation=16, epochs=6, halve_every=2, disk_gib=3.0),
    Profile("paper", "one 80 GiB GPU, the hub, hours", model="meta-llama/Llama-2-7b-hf",
            evaluation=("wikitext2", "books"), training=("c4",), windows_per_document=4, max_windows=10_000, batch=8,
            hidden=512, sequences=512, validation=32, epochs=40, halve_every=10, lr=1e-3, dropout=0.3, train_batch=2,
            disk_gib=200.0, gpu_gib=70.0),
)}  # fmt: skip


READERS = {"llama": "pico-llama-stories", "wide": "pico-llama-wide", "falcon": "pico-falcon-stories"}  # were taught stories and tasks
HUB_MODELS = {"wide": "meta-llama/Llama-2-13b-hf", "falcon": "tiiuae/falcon-7b"}  # of the profile paper, beside its own


def roles(profile: str, tasks: bool = False) -> dict[str, str]:
    """Model names by role: "llama" (the paper's Llama 2 7B), "wide" (13B) and "falcon"; those that answer `tasks`, or that read text."""
    llama = {"llama": PROFILES[profile].model}
    return llama | HUB_MODELS if profile == "paper" else READERS if tasks else llama | {"falcon": "pico-falcon"}


@dataclass(frozen=True)
class Tasks:
    """Which tasks notebooks 05, 06 and 09 measure: (name, shots, examples) of `lesslib.data.tasks`, and (name, shots, tokens to write)."""

    classification: tuple[tuple[str, int, int], ...]
    summaries: tuple[tuple[str, int, int], ...]
    choices: int  # examples of a classification task at the most
    texts: int  # examples of a summarisation task
    length: int = 400  # words of a story; real texts are cut there
    lengths: tuple[int, ...] = (330, 380, 430, 480)  # the same, of notebook 09's prompts
    at_once: int = 48  # texts written at once; a step of decoding is small, but all their keys and values must fit
    withheld: int = 0  # examples asked without their text, to see what the question alone gives away


STORIES = (("summary", 0, 80), ("sentence", 0, 40), ("tellings", 0, 80))
REAL = (("cnn_dailymail", 0, 64), ("xsum", 0, 32), ("multi_news", 0, 64))
TASKS = {
    "smoke": Tasks((("yes_no", 1, 8), ("reply", 0, 8)), STORIES, choices=8, texts=4, length=330, lengths=(330,)),
    "tiny": Tasks((("yes_no", 2, 300), ("reply", 1, 100)), STORIES, choices=300, texts=48, withheld=1000),
    "wild": Tasks((("boolq", 1, 200), ("mutual", 1, 100)), REAL, choices=200, texts=24),
    "paper": Tasks((("boolq", 10, 1000), ("mutual", 16, 1000)), (("cnn_dailymail", 5, 128), ("xsum", 5, 64), ("multi_news", 1, 256)),
                   choices=1000, texts=1000, length=100_000, lengths=(100_000,), at_once=8),
}  # fmt: skip


def get_limit() -> int:
    """$LESS_LIMIT, to try a profile out: at most so many windows, examples, sequences and epochs; 0 is none. ValueError for other words."""
    words = os.environ.get("LESS_LIMIT") or "0"
    if not words.isdecimal() or words == "1":
        raise ValueError(f"limit is {words!r}: give a whole number from 2 on, or unset LESS_LIMIT")
    return int(words)


def _cut(settings: Any, *names: str, **more: Any) -> Any:
    return replace(settings, **{n: min(limit, getattr(settings, n)) for n in names}, **more) if (limit := get_limit()) else settings


def get_profile(name: str | None = None) -> Profile:
    """The profile called `name`, or the one that $LESS_PROFILE names, or `tiny`; cut to the limit. Raises ValueError for any other name."""
    name = name or os.environ.get("LESS_PROFILE") or "tiny"
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose from {', '.join(PROFILES)}")
    return _cut(PROFILES[name], "windows_per_document", "max_windows", "sequences", "epochs", validation=1, disk_gib=0.0, gpu_gib=0.0)


def get_tasks(profile: str) -> Tasks:
    """The tasks of a profile, cut to the limit."""
    return _cut(TASKS[profile], "choices", "texts", "withheld")
