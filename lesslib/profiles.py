"""Profiles: what a run of the notebooks uses.

A notebook has two parameters, `profile` and `seed`; all other settings follow from the profile's
name. The defaults stand in the classes below, what a profile changes in assets/profiles.json.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lesslib.util.paths import ASSETS, ROOT

# Models that were taught stories and tasks, by role.
READERS = {
    "llama": "pico-llama-stories",
    "wide": "pico-llama-wide",
    "falcon": "pico-falcon-stories",
}

# Models of the profile `paper` by role, beside its own.
HUB_MODELS = {
    "wide": "meta-llama/Llama-2-13b-hf",
    "falcon": "tiiuae/falcon-7b",
}


@dataclass(frozen=True)
class Profile:
    """Settings of one profile: sizes in tokens, times in minutes on what `where` names."""

    name: str
    where: str
    model: str = "pico-llama"

    # Corpora that perplexity is measured on, and that kernels are trained on in equal shares.
    evaluation: tuple[str, ...] = ("topics-heldout",)
    training: tuple[str, ...] = ("topics-train",)

    # Evaluation windows: of a document, spread evenly over it; of a corpus; and at once.
    windows_per_document: int = 8
    max_windows: int = 64
    batch: int = 8

    # Budgets, as shares of the model's context.
    fractions: tuple[float, ...] = (0.02, 0.05, 0.1)

    # For tests: fewer points.
    quick: bool = False

    # Content with the kernels in the package, until --fresh.
    carried: bool = False

    # The recipe of kernel training; kernel_size is R.
    kernel_size: int = 8
    hidden: int = 128
    sequences: int = 96
    validation: int = 8
    epochs: int = 12
    halve_every: int = 3
    lr: float = 3e-2
    dropout: float = 0.0
    train_batch: int = 2

    # What must be there before anything is computed.
    disk_gib: float = 1.0
    gpu_gib: float = 0.0

    def of(self, model: str) -> "Profile":
        """The same profile for another model.

        Where the texts are our own, a model that was taught stories trains its kernels on stories.
        """
        trains_on_our_texts = self.training == ("topics-train",)
        if trains_on_our_texts and model in READERS.values():
            return replace(self, model=model, training=("stories-kernels",))
        return replace(self, model=model)


@dataclass(frozen=True)
class Tasks:
    """What notebooks 05, 06 and 09 measure; the names of tasks are those of `lesslib.data`."""

    # (name, shots, examples) of each
    classification: tuple[tuple[str, int, int], ...]

    # (name, shots, tokens to write) of each
    summaries: tuple[tuple[str, int, int], ...]

    # Examples of a classification task at the most.
    choices: int

    # Examples of a summarisation task.
    texts: int

    # Words of a story, and of the prompts of notebook 09; real texts are cut there.
    length: int = 400
    lengths: tuple[int, ...] = (330, 380, 430, 480)

    # Texts written at once. A step of decoding is small, but all their keys and values fit twice.
    at_once: int = 48

    # Examples asked without their text, to see what the question alone gives away.
    withheld: int = 0


def _as_tuples(value: Any) -> Any:
    """A value of JSON with its lists as tuples, which a frozen dataclass can hold."""
    if isinstance(value, list):
        return tuple(_as_tuples(item) for item in value)
    return value


def _fields(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: _as_tuples(value) for name, value in settings.items()}


# {profile: {"profile": fields of Profile, "tasks": fields of Tasks, "loads": of the benchmarks}}
SETTINGS: dict[str, dict] = json.loads((ASSETS / "profiles.json").read_text())

PROFILES = {
    name: Profile(name, **_fields(settings["profile"])) for name, settings in SETTINGS.items()
}
TASKS = {name: Tasks(**_fields(settings["tasks"])) for name, settings in SETTINGS.items()}


def roles(profile: str, tasks: bool = False) -> dict[str, str]:
    """Model names by role: "llama" (the paper's Llama 2 7B), "wide" (13B) and "falcon".

    With `tasks` those that answer questions, else those that read text.
    """
    model = PROFILES[profile].model
    if profile == "paper":
        return {"llama": model, **HUB_MODELS}
    if tasks:
        return READERS
    return {"llama": model, "falcon": "pico-falcon"}


def get_limit() -> int:
    """$LESS_LIMIT, to try a profile out: at most so many windows, examples, sequences and epochs.

    0 is no limit. Raises ValueError for anything but a whole number from 2 on.
    """
    words = os.environ.get("LESS_LIMIT") or "0"
    if not words.isdecimal() or words == "1":
        raise ValueError(f"limit is {words!r}: give a whole number from 2 on, or unset LESS_LIMIT")
    return int(words)


def get_profile(name: str | None = None) -> Profile:
    """The profile called `name`, or the one that $LESS_PROFILE names, or `tiny`; cut to the limit.

    Raises ValueError for any other name.
    """
    name = name or os.environ.get("LESS_PROFILE") or "tiny"
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose from {', '.join(PROFILES)}")
    profile = PROFILES[name]
    limit = get_limit()
    if not limit:
        return profile
    return replace(
        profile,
        windows_per_document=min(limit, profile.windows_per_document),
        max_windows=min(limit, profile.max_windows),
        sequences=min(limit, profile.sequences),
        epochs=min(limit, profile.epochs),
        validation=1,
        disk_gib=0.0,
        gpu_gib=0.0,
    )


def get_tasks(profile: str) -> Tasks:
    """The tasks of a profile, cut to the limit."""
    tasks = TASKS[profile]
    limit = get_limit()
    if not limit:
        return tasks
    return replace(
        tasks,
        choices=min(limit, tasks.choices),
        texts=min(limit, tasks.texts),
        withheld=min(limit, tasks.withheld),
    )


def results_dir(profile: str) -> Path:
    """Where the results of `profile` lie: below $LESS_RESULTS, or the repository's results/.

    Where $LESS_LIMIT cuts the profile short they lie apart.
    """
    results = Path(os.environ.get("LESS_RESULTS") or ROOT / "results")
    limit = get_limit()
    return results / (f"{profile}-limit{limit}" if limit else profile)
