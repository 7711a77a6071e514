"""Pretrain a small model from its start to its card: `pretrain`, and its command line.

A run begins a model, mixes its text, trains (see `run.py`), and writes weights and a card.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lesslib.evaluation import perplexity
from lesslib.models import load_model
from lesslib.util.command_line import options
from lesslib.util.files import write_json
from lesslib.util.hardware import keep_memory
from lesslib.zoo.grow import check_growable, grown_falcon, multi_query
from lesslib.zoo.run import Run, Settings
from lesslib.zoo.starts import GROWN, NEW
from lesslib.zoo.text import HELD_OUT, Mixture

DESCRIPTION = (
    "Pretrain the pico models on real text, with AdamW and a linear decay, resumable to the step: "
    "`python -m lesslib.pretrain --help`."
)


def pretrain(settings: Settings) -> dict:
    """Continue `settings.start` into `settings.out`; returns the model card beside the weights.

    With a teacher, a model of the same vocabulary, the loss is on its probabilities too. A Falcon
    grown out of it becomes multi-query within the first `merge` of the tokens, and the learning
    rate decays after that. A second call resumes at the last checkpoint; on CPU with the same
    weights as an uninterrupted run that the limit on tokens ends.

    Raises ValueError for settings that do not fit and for a checkpoint that is damaged or of other
    ones, FloatingPointError for a loss that is not finite.
    """
    settings.check()
    begun = _begin(settings)
    model = begun.model
    context = model.config.max_position_embeddings
    text = Mixture.load(settings.stories, settings.out, begun.tokenizer, context)
    if settings.start == GROWN:
        model = _grown(model, settings, text)
    losses = {"start": heldout_losses(model, text, settings.windows)}
    run = Run(settings, model, begun.tokenizer, begun.teacher, text)
    run.resume()
    run.train()

    if settings.merge:
        model = multi_query(model)
    folder = settings.out / "model"
    model.eval().half().save_pretrained(folder)
    begun.tokenizer.save_pretrained(folder)
    # of the weights as saved
    model.float()
    losses["this model"] = heldout_losses(model, text, settings.windows)
    card = model_card(run, model, losses)
    write_json(folder / "card.json", card)
    print(json.dumps(losses), flush=True)
    return card


@dataclass(frozen=True)
class _Begun:
    """What a run begins with; a model to grow out of where that is the start."""

    model: Any
    tokenizer: Any
    teacher: Any | None


def _begin(settings: Settings) -> _Begun:
    """The model to train and its teacher. Raises ValueError where they do not fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher: Any = None
    teacher_tokenizer: Any = None
    if settings.teacher:
        teacher, teacher_tokenizer = load_model(settings.teacher, device, torch.float32)
    model: Any
    tokenizer: Any
    if settings.start == GROWN:
        model = teacher
        tokenizer = teacher_tokenizer
        check_growable(model)
    elif settings.start in NEW:
        model, tokenizer = NEW[settings.start](settings.seed)
    else:
        model, tokenizer = load_model(settings.start, "cpu", torch.float32)
    if teacher_tokenizer and teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"teacher {settings.teacher!r} has another vocabulary than {settings.start!r}: give "
            "one of the same tokenizer"
        )
    return _Begun(model.to(device), tokenizer, teacher)


def _grown(llama: Any, settings: Settings, text: Mixture) -> Any:
    """A Falcon grown out of `llama`, made to fit on 25 batches of the text."""
    batches = (text.draw(8, settings.echoes, 99, step).to(llama.device) for step in range(25))
    with torch.random.fork_rng():
        return grown_falcon(llama, batches, settings.seed)


def heldout_losses(model: Any, text: Mixture, windows: int) -> dict[str, dict]:
    """By corpus, the mean loss over at most so many held-out `windows`: of all, by position."""
    losses = {}
    for name, heldout in text.heldout.items():
        scores = perplexity(model, heldout.inside(windows))
        losses[name] = {"all": scores["log_ppl"], "by_position": scores["by_position"]}
    return losses


# ---------------------------------------------------------------- the card
def model_card(run: Run, model: Any, losses: dict[str, dict]) -> dict[str, Any]:
    """How a model was made, and its held-out `losses` before and after."""
    data = {}
    for name, corpus in run.text.corpora.items():
        data[name] = {
            **corpus.record(),
            "share": round(run.text.shares[name], 4),
            "held_out_documents": HELD_OUT.get(name, 0),
        }
    return {
        "command": _command(run),
        "data": data,
        "parameters": model.num_parameters(),
        "context": model.config.max_position_embeddings,
        "vocabulary": model.config.vocab_size,
        "seed": run.settings.seed,
        "steps": run.step,
        "tokens_seen_millions": round(run.tokens_seen / 1e6, 2),
        "minutes": round(run.seconds / 60, 1),
        "teacher": run.teacher_identity(),
        "device": str(model.device),
        "torch": torch.__version__,
        "heldout_loss_by_position": losses,
    }


def _command(run: Run) -> str:
    """The command that repeats the run; options that may be left out are named where they act."""
    s = run.settings
    command = (
        f"python -m lesslib.pretrain --start {Path(s.start).name} --out OUT "
        f"--minutes {s.minutes:g} --tokens {s.tokens} --batch {s.batch} --lr {s.lr:g} "
        f"--seed {s.seed} --windows {s.windows}"
    )
    if s.stories != 0:
        command += f" --stories {s.stories:g}"
    if s.answers != 1:
        command += f" --answers {s.answers:g}"
    if s.echoes != 0:
        command += f" --echoes {s.echoes:g}"
    if s.merge != 0:
        command += f" --merge {s.merge:g}"
    teacher = run.teacher_identity()
    if teacher is not None:
        command += f" --teacher {teacher['model']}"
    return command


# ---------------------------------------------------------------- the command line
def main() -> None:
    parser = argparse.ArgumentParser("python -m lesslib.pretrain", description=DESCRIPTION)
    parser.add_argument(
        "--start",
        required=True,
        help=f"model to continue: a carried one, a folder, a hub name, {', '.join(NEW)}, {GROWN}",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for token files, the checkpoint and the final model/",
    )
    options(
        parser,
        minutes=(60.0, "end the run and the learning-rate decay after this wall time (or inf)"),
        tokens=(100_000_000, "or after this many tokens, whichever comes first"),
        batch=(8, "windows a step"),
        lr=(2e-3, "peak learning rate"),
        seed=(0, "of the order of windows"),
        windows=(64, "held-out windows per corpus"),
        stories=(0.0, "share of the windows that are of storyworld's stories and tasks"),
        answers=(1.0, "how often a token that follows a colon in its line counts in the loss"),
        echoes=(0.0, "share of the windows that say one stretch over and over, to learn copying"),
        teacher=("", "model whose probabilities are learned beside the text"),
        merge=(0.0, f"share of the tokens within which heads of {GROWN} become one"),
        save_every=(240.0, "seconds between checkpoints"),
    )
    keep_memory()
    pretrain(Settings(**vars(parser.parse_args())))
