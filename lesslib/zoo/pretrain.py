"""Pretrain the pico models on real text, with AdamW and a linear decay, resumable to the step: `python -m lesslib.pretrain --help`."""

import argparse
import hashlib
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lesslib.attention.whole_sequence import dense_attention
from lesslib.data import Corpus, Document, encode, load_corpus
from lesslib.evaluation.perplexity import Window, perplexity
from lesslib.hf import replace_attention
from lesslib.models import load_model
from lesslib.util.command_line import options
from lesslib.util.files import read_torch, write_json, write_torch
from lesslib.util.hardware import autocast, keep_memory
from lesslib.zoo.grow import check_growable, grown_falcon, merge_heads, multi_query

MIX = {"wikipedia": 0.57, "novels": 0.38, "topics-train": 0.05}
HELD_OUT = {
    "wikipedia": 100,
    "novels": 3,
}  # documents never trained on, after a shuffle with seed 0


def new_falcon(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Falcon 7B (multi-query, parallel block, rotary) with new MLPs, begun from pico-llama's tokenizer, embeddings, norms and
    attention, its key and value heads averaged (Ainslie et al., 2023)."""
    llama, tokenizer = load_model("pico-llama", "cpu")
    c = llama.config
    torch.manual_seed(seed)
    falcon: Any = FalconForCausalLM(
        FalconConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            max_position_embeddings=c.max_position_embeddings,
            multi_query=True,
            parallel_attn=True,
            bias=False,
            alibi=False,
            bos_token_id=c.bos_token_id,
            eos_token_id=c.eos_token_id,
            pad_token_id=c.pad_token_id,
        )
    )
    falcon.get_input_embeddings().load_state_dict(llama.get_input_embeddings().state_dict())
    falcon.transformer.ln_f.weight.data.copy_(llama.model.norm.weight)
    for mine, its in zip(falcon.transformer.h, llama.model.layers, strict=True):
        a = its.self_attn
        one_head = [
            projection.weight.unflatten(0, (c.num_attention_heads, -1)).mean(0)
            for projection in (a.k_proj, a.v_proj)
        ]
        mine.self_attention.query_key_value.weight.data.copy_(
            torch.cat([a.q_proj.weight, *one_head])
        )
        mine.self_attention.dense.weight.data.copy_(a.o_proj.weight)
        mine.input_layernorm.weight.data.copy_(its.input_layernorm.weight)
    return falcon, tokenizer


def new_wide(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """pico-llama-stories with twice the heads and MLPs 2.5 times as wide, which computes the same function until it is trained: what is
    added to an attention or MLP is drawn anew but for its output's weights, which are 0."""
    llama, tokenizer = load_model("pico-llama-stories", "cpu")
    heads = 2 * llama.config.num_attention_heads
    torch.manual_seed(seed)
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": llama.config.intermediate_size * 5 // 2,
    }
    wide: Any = LlamaForCausalLM(LlamaConfig(**llama.config.to_dict() | sizes))
    for name, old in llama.named_parameters():
        new = wide.get_parameter(name).data
        new *= not name.endswith(("o_proj.weight", "down_proj.weight"))
        new[tuple(slice(n) for n in old.shape)] = old.data
    return wide, tokenizer


NEW = {"new-falcon": new_falcon, "new-wide": new_wide}
GROWN = "grown-falcon"  # out of the teacher
TRUTH = 0.25  # what the text's own next token weighs beside a teacher's probabilities


def split(
    corpora: dict[str, Corpus],
) -> tuple[dict[str, list[Document]], dict[str, list[Document]]]:
    """(training documents, held-out documents) per corpus. Raises ValueError where holding out leaves nothing to train on."""
    rng, train = (
        random.Random(0),
        {name: list(corpus.documents) for name, corpus in corpora.items()},
    )
    held = {
        name.removesuffix("-train"): list(load_corpus(name.replace("-train", "-heldout")).documents)
        for name in corpora
        if name.endswith("-train")
    }
    for name, out in HELD_OUT.items():
        rng.shuffle(train[name])
        held[name], train[name] = train[name][:out], train[name][out:]
        if not train[name]:
            raise ValueError(
                f"corpus {name!r} has {len(held[name])} documents and {out} are held out: use a whole copy of it"
            )
    return train, held


def token_file(folder: Path, name: str, documents: list[Document], tokenizer) -> np.ndarray:
    """uint16 tokens of all documents, by `encode`; kept in `folder` under a hash of text and vocabulary. ValueError for a damaged file."""
    identity = json.dumps([tokenizer.get_vocab(), [d.text for d in documents]], sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.pt"
    if (tokens := read_torch(path, "delete it, and it is made again")) is None:
        tokens = torch.from_numpy(
            np.concatenate(
                [np.array(encode(tokenizer, d.text), dtype=np.uint16) for d in documents]
            )
        )
        write_torch(path, tokens)
    return tokens.numpy()


class Windows:
    """Stretches of `length` tokens, led by the beginning-of-sequence token, inside one document where it is long enough."""

    def __init__(self, tokens: np.ndarray, length: int, bos: int):
        self.tokens, self.length, self.bos = tokens, length, bos
        self.starts = np.flatnonzero(tokens == bos)
        self.ends = np.append(self.starts[1:], len(tokens))

    def at(self, position: int) -> np.ndarray:
        """The window, [length], that starts at `position`, or before it where the document or the text ends too early."""
        d = np.searchsorted(self.starts, position, side="right") - 1
        start = min(
            max(self.starts[d], min(position, self.ends[d] - self.length)),
            len(self.tokens) - self.length,
        )
        return np.append(self.bos, self.tokens[start + 1 : start + self.length]).astype(np.int64)

    def inside(self, count: int) -> list[Window]:
        """At most `count` windows, evenly spread, each inside one document, words not counted. Raises ValueError where none fits."""
        spans = enumerate(zip(self.starts, self.ends, strict=True))
        fit = [
            (d, start)
            for d, (a, b) in spans
            for start in range(a, b - self.length + 1, self.length)
        ]
        if not fit:
            raise ValueError(
                f"no held-out document fills a window of {self.length} tokens: use longer documents"
            )
        chosen = [fit[int(i)] for i in np.linspace(0, len(fit) - 1, min(count, len(fit)))]
        return [Window(d, tuple(self.at(start).tolist()), words=0) for d, start in chosen]


def weighted_loss(
    logits: torch.Tensor,
    ids: torch.Tensor,
    colon: int,
    newline: int,
    weight: float,
    teacher: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of logits [B, S, V] on ids [B, S]; what follows a colon in its line, as answers do, counts `weight` times.

    With a `teacher`'s logits [B, S, V]: that on its probabilities, and `TRUTH` times that on ids.
    """
    at = [
        torch.where(ids == token, torch.arange(ids.shape[1], device=ids.device), -1)
        for token in (colon, newline)
    ]
    weights = torch.where(
        at[0].cummax(1).values > at[1].cummax(1).values, weight, 1.0
    )  # the last one so far
    weights[:, -1] = 0  # nothing follows; kept, since logits without a row would have to be copied
    target = ids.roll(-1, 1).flatten()
    if teacher is not None:
        probabilities = teacher.float().softmax(-1).flatten(0, 1)
        target = probabilities.scatter_add_(
            1, target[:, None], torch.full_like(probabilities[:, :1], TRUTH)
        )
    losses = F.cross_entropy(logits.flatten(0, 1).float(), target, reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def pretrain(
    start: str,
    out: Path,
    minutes: float,
    tokens: int,
    batch: int,
    lr: float,
    seed: int,
    windows: int,
    stories: float = 0.0,
    answers: float = 1.0,
    echoes: float = 0.0,
    teacher: str = "",
    merge: float = 0.0,
    save_every: float = 240,
) -> dict:
    """Continue `start` (a carried model, a folder, a hub name, one of NEW, or GROWN) into `out`; returns the model card beside the weights.

    With a `teacher`, a model of the same vocabulary, the loss is on its probabilities too (see `weighted_loss`). A Falcon grown out of it
    becomes multi-query within the first `merge` of the tokens, and the learning rate decays after that. A second call resumes at the
    last checkpoint; on CPU with the same weights as an uninterrupted run that the limit on tokens ends. Raises ValueError for settings
    that do not fit and for a checkpoint that is damaged or of other ones, FloatingPointError for a loss that is not finite.
    """
    if not (0 < merge < 1 and teacher and minutes == math.inf if start == GROWN else merge == 0):
        given = f"--start {start} was given --teacher {teacher!r} --minutes {minutes:g} --merge {merge:g}"
        raise ValueError(
            f"{given}: {GROWN} needs a teacher, --minutes inf and a merge between 0 and 1; no other start takes a merge"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    guide: Any = load_model(teacher, device, torch.float32) if teacher else None
    begun_from: Any = (
        guide
        if start == GROWN
        else NEW[start](seed)
        if start in NEW
        else load_model(start, "cpu", torch.float32)
    )
    model, tokenizer = begun_from[0].to(device), begun_from[1]
    if start == GROWN:
        check_growable(model)
    if guide and guide[1].get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"teacher {teacher!r} has another vocabulary than {start!r}: give one of the same tokenizer"
        )
    mix = {name: (1 - stories) * share for name, share in MIX.items()} | (
        {"stories-train": stories} if stories else {}
    )
    length, corpora = (
        model.config.max_position_embeddings,
        {name: load_corpus(name) for name in mix},
    )
    train, held = (
        {
            n: Windows(token_file(out, n, d, tokenizer), length, tokenizer.bos_token_id)
            for n, d in part.items()
        }
        for part in split(corpora)
    )

    def draw(step: int, batch: int = batch, seed: int = seed) -> torch.Tensor:
        """The windows of a step, [batch, length]."""
        rng = np.random.default_rng(
            (seed, step)
        )  # by step, so that a resumed run draws what an uninterrupted one would
        texts = [train[n] for n in rng.choice(list(mix), size=batch, p=list(mix.values()))]
        rows = np.stack([t.at(int(rng.integers(len(t.tokens)))) for t in texts])
        for i in np.flatnonzero(rng.random(batch) < echoes):
            rows[i, 1:] = np.resize(rows[i, 1 : 2 + int(rng.integers(length // 4))], length - 1)
        return torch.from_numpy(rows).to(device)

    if start == GROWN:
        with torch.random.fork_rng():
            model = grown_falcon(model, (draw(step, 8, 99) for step in range(25)), seed)

    def heldout_losses() -> dict[str, dict]:
        scores = {name: perplexity(model, text.inside(windows)) for name, text in held.items()}
        return {
            name: {"all": s["log_ppl"], "by_position": s["by_position"]}
            for name, s in scores.items()
        }

    losses = {"start": heldout_losses()}
    groups = [
        {
            "params": [p for p in model.parameters() if (p.dim() > 1) == matrix],
            "weight_decay": 0.1 * matrix,
        }
        for matrix in (1, 0)
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    settings: dict[str, Any] = {
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "stories": stories,
        "answers": answers,
        "echoes": echoes,
    }
    settings |= {"teacher": guide[0].less_identity if guide else None, "merge": merge}
    settings |= {
        "merge_steps": int(merge * int(tokens / (batch * length))),
        "data": {n: c.sha256 for n, c in corpora.items()},
    }
    step, spent, checkpoint = 0, 0.0, out / "checkpoint.pt"
    if state := read_torch(checkpoint, "delete it to start over", model.device):
        made = {"teacher": None, "merge": 0.0, "merge_steps": 0} | state["settings"]
        if other := [k for k in settings if settings[k] != made[k]]:
            raise ValueError(
                f"{checkpoint} was made with another {', '.join(other)}: repeat its settings, or give another --out"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        print(f"resumed at step {step}", flush=True)

    model.train()
    colon, newline = (
        tokenizer(f"Answer{sign}", add_special_tokens=False)["input_ids"][-1]
        for sign in (":", "\n")
    )
    saved, begun = time.time(), time.time() - spent
    with replace_attention(
        model, lambda layer, q, k, v, real, scaling: dense_attention(q, k, v, real, scaling)
    ):  # Falcon's own is slow
        while True:
            now, seen = time.time(), step * batch * length
            done = max(seen / tokens, (now - begun) / (60 * minutes)) if step else 0.0
            if done >= 1 or (step > 0 and now - saved > save_every):
                state = {
                    "settings": settings,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                write_torch(checkpoint, state | {"step": step, "spent": now - begun})
                saved = now
            if done >= 1:
                break
            for g in optimizer.param_groups:
                g["lr"] = (
                    lr
                    * min(1.0, (step + 1) / 100)
                    * (0.01 + 0.99 * min(1.0, (1 - done) / (1 - merge)))
                )
            x = draw(step)
            with autocast(device):
                with torch.no_grad():
                    shown = guide[0](input_ids=x, use_cache=False).logits if guide else None
                loss = weighted_loss(
                    model(input_ids=x, use_cache=False).logits, x, colon, newline, answers, shown
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if merge:
                merge_heads(model, 1 / max(1, settings["merge_steps"] - step))
            if step % 50 == 0:
                if not loss.isfinite():
                    raise FloatingPointError(
                        f"the loss is {loss.item()} at step {step}: lower --lr from {lr:g}"
                    )
                print(
                    f"{now - begun:.0f} s, step {step}, {seen / 1e6:.2f}M tokens, loss {loss.item():.3f}, {done:.0%} done",
                    flush=True,
                )
            step += 1

    model = multi_query(model) if merge else model
    model.eval().half().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    model.float()  # of the weights as saved
    losses["this model"] = heldout_losses()
    card = {
        "command": f"python -m lesslib.pretrain --start {Path(start).name} --out OUT --minutes {minutes:g} --tokens {tokens} "
        f"--batch {batch} --lr {lr:g} --seed {seed} --windows {windows}"
        + "".join(
            f" --{x} {settings[x]:g}"
            for x in ("stories", "answers", "echoes", "merge")
            if settings[x] != (x == "answers")
        )
        + (f" --teacher {guide[0].less_identity['model']}" if guide else ""),
        "data": {
            n: c.record() | {"share": round(mix[n], 4), "held_out_documents": HELD_OUT.get(n, 0)}
            for n, c in corpora.items()
        },
        "parameters": model.num_parameters(),
        "context": length,
        "vocabulary": model.config.vocab_size,
        "seed": seed,
        "steps": step,
        "tokens_seen_millions": round(seen / 1e6, 2),
        "minutes": round((now - begun) / 60, 1),
        "teacher": settings["teacher"],
        "device": str(model.device),
        "torch": torch.__version__,
        "heldout_loss_by_position": losses,
    }
    write_json(out / "model" / "card.json", card)
    print(json.dumps(losses), flush=True)
    return card


def main() -> None:
    p = argparse.ArgumentParser("python -m lesslib.pretrain", description=__doc__)
    p.add_argument(
        "--start",
        required=True,
        help=f"model to continue: a carried one, a folder, a hub name, {', '.join(NEW)}, {GROWN}",
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for token files, the checkpoint and the final model/",
    )
    options(
        p,
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
    pretrain(**vars(p.parse_args()))
