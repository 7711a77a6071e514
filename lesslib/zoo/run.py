"""The course of pretraining: settings, steps and checkpoints, resumable to the step."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesslib.attention.whole_sequence import dense_attention
from lesslib.hf import replace_attention
from lesslib.util.files import read_torch, write_torch
from lesslib.util.hardware import autocast
from lesslib.zoo.grow import merge_heads
from lesslib.zoo.loss import answer_weights, distilled_loss, weighted_loss
from lesslib.zoo.starts import GROWN
from lesslib.zoo.text import Mixture


@dataclass(frozen=True)
class Settings:
    """What a run of pretraining is asked for.

    `start`: a carried model, a folder, a hub name, one of NEW, or GROWN. `out`: the folder of token
    files, the checkpoint and the final model. It ends after `minutes` or `tokens`, whichever comes
    first. `batch` windows make a step; `windows` held-out ones of each corpus are scored. `lr` is
    the peak, `seed` that of the order of windows.
    """

    start: str
    out: Path
    minutes: float
    tokens: int
    batch: int
    lr: float
    seed: int
    windows: int
    # share of the windows that are of storyworld's stories and tasks
    stories: float = 0.0
    # how often a token that follows a colon in its line counts in the loss
    answers: float = 1.0
    # share of the windows that say one stretch over and over
    echoes: float = 0.0
    # a model whose probabilities are learned beside the text; none where empty
    teacher: str = ""
    # share of the tokens within which the heads of a grown model become one
    merge: float = 0.0
    # seconds between checkpoints
    save_every: float = 240

    def check(self) -> None:
        """Raises ValueError for settings that do not fit together."""
        if self.start == GROWN:
            fits = 0 < self.merge < 1 and self.teacher and self.minutes == math.inf
        else:
            fits = self.merge == 0
        if not fits:
            raise ValueError(
                f"--start {self.start} was given --teacher {self.teacher!r} "
                f"--minutes {self.minutes:g} --merge {self.merge:g}: {GROWN} needs a teacher, "
                "--minutes inf and a merge between 0 and 1; no other start takes a merge"
            )


class Run:
    """A model in training: its optimizer, the step it is at, and the seconds it has trained."""

    def __init__(self, settings: Settings, model: Any, tokenizer: Any, teacher: Any, text: Mixture):
        self.settings = settings
        self.model = model
        self.teacher = teacher
        self.text = text
        self.tokens_a_step = settings.batch * model.config.max_position_embeddings
        # steps after which the heads of a grown model are one
        self.merge_steps = int(settings.merge * int(settings.tokens / self.tokens_a_step))
        self.colon = _last_token(tokenizer, "Answer:")
        self.newline = _last_token(tokenizer, "Answer\n")
        self.optimizer = _optimizer(model, settings.lr)
        self.checkpoint = settings.out / "checkpoint.pt"
        self.step = 0
        self.seconds = 0.0

    @property
    def tokens_seen(self) -> int:
        return self.step * self.tokens_a_step

    # ------------------------------------------------------------ checkpoints
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run to go on in it."""
        s = self.settings
        return {
            "batch": s.batch,
            "lr": s.lr,
            "seed": s.seed,
            "stories": s.stories,
            "answers": s.answers,
            "echoes": s.echoes,
            "teacher": self.teacher_identity(),
            "merge": s.merge,
            "merge_steps": self.merge_steps,
            "data": {name: corpus.sha256 for name, corpus in self.text.corpora.items()},
        }

    def teacher_identity(self) -> dict | None:
        """The teacher's name and weights, as `load_model` notes them."""
        if self.teacher is None:
            return None
        return self.teacher.less_identity

    def resume(self) -> None:
        """Go on from the checkpoint, where there is one.

        Raises ValueError for a checkpoint that is damaged or of other settings.
        """
        state = read_torch(self.checkpoint, "delete it to start over", self.model.device)
        if not state:
            return
        # checkpoints of before there were teachers do not name these
        made_with = {"teacher": None, "merge": 0.0, "merge_steps": 0} | state["settings"]
        other = [name for name, value in self.identity().items() if value != made_with[name]]
        if other:
            raise ValueError(
                f"{self.checkpoint} was made with another {', '.join(other)}: repeat its settings, "
                "or give another --out"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.seconds = state["spent"]
        print(f"resumed at step {self.step}", flush=True)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "settings": self.identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": self.seconds,
        }
        write_torch(self.checkpoint, state)

    # ------------------------------------------------------------ steps
    def train(self) -> None:
        """Take steps until tokens or minutes end the run; the last checkpoint is of its end.

        Raises FloatingPointError for a loss that is not finite.
        """
        self.model.train()
        saved = time.time()
        begun = saved - self.seconds
        # Falcon's own attention is slow
        with replace_attention(self.model, _attention):
            while True:
                now = time.time()
                self.seconds = now - begun
                done = self._share_done()
                if done >= 1:
                    self.save()
                    return
                if self.step > 0 and now - saved > self.settings.save_every:
                    self.save()
                    saved = now
                self._set_learning_rate(done)
                loss = self._take_step()
                if self.step % 50 == 0:
                    self._report(loss, done)
                self.step += 1

    def _share_done(self) -> float:
        """How much of the run is over, by tokens or minutes, whichever is further."""
        if self.step == 0:
            return 0.0
        of_tokens = self.tokens_seen / self.settings.tokens
        of_minutes = self.seconds / (60 * self.settings.minutes)
        return max(of_tokens, of_minutes)

    def _set_learning_rate(self, done: float) -> None:
        """Rise over 100 steps; fall to a hundredth, in a grown model once its heads are one."""
        rise = min(1.0, (self.step + 1) / 100)
        fall = 0.01 + 0.99 * min(1.0, (1 - done) / (1 - self.settings.merge))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * rise * fall

    def _take_step(self) -> Tensor:
        """One step of the optimizer on new windows; the loss before it."""
        s = self.settings
        ids = self.text.draw(s.batch, s.echoes, s.seed, self.step).to(self.model.device)
        with autocast(self.model.device):
            loss = self._loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if s.merge:
            steps_to_go = max(1, self.merge_steps - self.step)
            merge_heads(self.model, 1 / steps_to_go)
        return loss

    def _loss(self, ids: Tensor) -> Tensor:
        """The loss on windows [B, S], on a teacher's probabilities too where there is one."""
        weights = answer_weights(ids, self.colon, self.newline, self.settings.answers)
        if self.teacher is None:
            return weighted_loss(self._logits(ids), ids, weights)
        with torch.no_grad():
            teacher_logits = self.teacher(input_ids=ids, use_cache=False).logits
        return distilled_loss(self._logits(ids), ids, weights, teacher_logits)

    def _logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    def _report(self, loss: Tensor, done: float) -> None:
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}: lower --lr from "
                f"{self.settings.lr:g}"
            )
        print(
            f"{self.seconds:.0f} s, step {self.step}, {self.tokens_seen / 1e6:.2f}M tokens, "
            f"loss {loss.item():.3f}, {done:.0%} done",
            flush=True,
        )


def _attention(
    layer: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
) -> Tensor:
    return dense_attention(q, k, v, real, scaling)


def _last_token(tokenizer: Any, text: str) -> int:
    return tokenizer(text, add_special_tokens=False)["input_ids"][-1]


def _optimizer(model: Any, lr: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
