"""Pretrain the pico models: `python -m lesslib.pretrain --help`.

Real text in, a small causal language model out: AdamW, warm-up then linear decay, bf16 autocast, resumable to the
step, held-out loss by position at the end and in the model card. Runs on CPU or GPU.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .data import Corpus, Document, encode, load_corpus
from .models import keep_memory, load_model
from .results import write_bytes, write_json, write_torch

MIX = {"wikipedia": 0.57, "novels": 0.38, "topics-train": 0.05}
HELD_OUT = {"wikipedia": 100, "novels": 3}  # documents never trained on, after a shuffle with seed 0
BINS = (0, 64, 256, 512, 1 << 30)


def split(corpora: dict[str, Corpus]) -> tuple[dict[str, list[Document]], dict[str, list[Document]]]:
    """(training documents, held-out documents) per corpus; the shuffle of seed 0 decides, corpus after corpus.

    Raises ValueError where holding out leaves nothing to train on.
    """
    rng, train, held = random.Random(0), {}, {}
    for name, corpus in corpora.items():
        documents = list(corpus.documents)
        if name in HELD_OUT:
            rng.shuffle(documents)
        out = HELD_OUT.get(name, 0)
        if len(documents) <= out:
            raise ValueError(f"corpus {name!r} has {len(documents)} documents and {out} are held out: use a whole copy of it")
        held[name], train[name] = documents[:out], documents[out:]
    held["topics"] = list(load_corpus("topics-heldout").documents)
    return train, held


def token_file(folder: Path, name: str, documents: list[Document], tokenizer) -> np.ndarray:
    """uint16 tokens of all documents, each led by the beginning-of-sequence token; kept in `folder` for the next start.

    The file's name carries a hash of text and vocabulary, so that a change of either is never met with old tokens.
    """
    digest = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for d in documents:
        digest.update(d.text.encode())
    path = folder / f"{name}-{digest.hexdigest()[:12]}.npy"
    if not path.exists():
        parts = []
        for d in documents:
            pieces = encode(tokenizer, [d.text[j : j + 50_000] for j in range(0, len(d.text), 50_000)])
            parts += [np.array(ids if i == 0 else ids[1:], dtype=np.uint16) for i, ids in enumerate(pieces)]
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(parts))
        write_bytes(path, buffer.getvalue())
    return np.load(path, mmap_mode="r")


class Windows:
    """Random windows that stay inside one document where it is long enough, so that distant tokens are worth attending."""

    def __init__(self, tokens: np.ndarray, length: int, bos: int):
        self.tokens, self.length = tokens, length
        self.starts = np.flatnonzero(tokens == bos)
        self.ends = np.append(self.starts[1:], len(tokens))

    def at(self, position: int) -> np.ndarray:
        d = int(np.searchsorted(self.starts, position, side="right")) - 1
        start = min(position, int(self.ends[d]) - self.length) if self.ends[d] - self.starts[d] >= self.length else int(self.starts[d])
        start = max(0, min(start, len(self.tokens) - self.length))
        return self.tokens[start : start + self.length].astype(np.int64)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return self.at(int(rng.integers(0, len(self.tokens))))

    def inside(self, count: int) -> np.ndarray:
        """`count` windows, or as many as there are, each wholly inside one document, evenly spread: [n, length].

        Raises ValueError where no document fills one window.
        """
        starts = [s for a, b in zip(self.starts, self.ends, strict=True) for s in range(a, b - self.length + 1, self.length)]
        if not starts:
            raise ValueError(f"no held-out document fills a window of {self.length} tokens: use longer documents")
        chosen = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, min(count, len(starts)))]
        return np.stack([self.tokens[s : s + self.length].astype(np.int64) for s in chosen])


@torch.no_grad()
def loss_by_position(model, windows: np.ndarray, batch: int = 8) -> dict[str, float]:
    """Mean next-token loss in nats by position of the predicting token, over windows [n, length]."""
    total = torch.zeros(windows.shape[1] - 1, dtype=torch.float64)
    for i in range(0, len(windows), batch):
        x = torch.from_numpy(windows[i : i + batch]).to(model.device)
        logits = model(input_ids=x, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").double().sum(0).cpu()
    mean = total / len(windows)
    parts = [(a, min(b, len(mean))) for a, b in pairwise(BINS) if a < len(mean)]
    return {f"{a}-{b - 1}": round(float(mean[a:b].mean()), 4) for a, b in parts} | {"all": round(float(mean.mean()), 4)}


def pretrain(
    start: str, out: Path, minutes: float, tokens: int, batch: int, lr: float, seed: int, windows: int, save_every: float = 240
) -> dict:
    """Continue `start` (a carried model, a folder or a hub name) into `out`; returns the model card written beside the weights.

    A second call resumes at the last checkpoint, written every `save_every` seconds. On CPU the weights are the same
    whether or not a run was interrupted, as long as the limit on tokens is what ends it: the learning rate follows
    whichever limit is nearer. Raises ValueError for a checkpoint that is damaged or was made with other settings.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(start, device, torch.float32)
    length, bos = model.config.max_position_embeddings, tokenizer.bos_token_id
    if bos is None or len(tokenizer) > 1 << 16:
        raise ValueError(f"{start}: a vocabulary of {len(tokenizer)}, beginning of sequence {bos}; needed are at most 65,536 and a token")
    corpora = {name: load_corpus(name) for name in MIX}
    train, held = split(corpora)
    data = {n: Windows(token_file(out, n, d, tokenizer), length, bos) for n, d in train.items()}
    heldout = {n: Windows(token_file(out, f"held-{n}", d, tokenizer), length, bos).inside(windows) for n, d in held.items() if d}
    before = {n: loss_by_position(model, w) for n, w in heldout.items()}
    print(json.dumps({"held-out loss before": before}, indent=1), flush=True)

    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    settings = {"batch": batch, "lr": lr, "seed": seed, "data": {n: c.sha256 for n, c in corpora.items()}}
    step, spent, checkpoint = 0, 0.0, out / "checkpoint.pt"
    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, map_location=device, weights_only=True)
        except Exception as e:  # of many types, and torch names no file
            raise ValueError(f"{checkpoint} is damaged ({type(e).__name__}): delete it to start over") from e
        if other := [k for k in settings if settings[k] != state.get("settings", settings)[k]]:
            raise ValueError(f"{checkpoint} was made with another {', '.join(other)}: repeat its settings, or give another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        print(f"resumed at step {step}", flush=True)

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": time.time() - begun}
        write_torch(checkpoint, state | {"settings": settings})

    begun, saved = time.time() - spent, time.time()
    model.train()
    while True:
        seconds, seen = time.time() - begun, step * batch * length
        done = max(seen / tokens, seconds / (60 * minutes)) if step else 0.0
        if done >= 1:
            break
        for g in optimizer.param_groups:
            g["lr"] = lr * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * (1 - done))
        rng = np.random.default_rng((seed, step))  # by step, so that a resumed run draws what an uninterrupted one would
        names = rng.choice(list(MIX), size=batch, p=list(MIX.values()))
        x = torch.from_numpy(np.stack([data[n].draw(rng) for n in names])).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower --lr from {lr:g}")
            speed = f"{seen / 1e6:.2f}M tokens, {seen / seconds:.0f} tokens/s"
            print(f"{seconds:.0f} s, step {step}, {speed}, loss {loss.item():.3f}, {done:.0%} done", flush=True)
        step += 1
        if time.time() - saved > save_every:
            save()
            saved = time.time()

    save()
    model.eval().half().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    after = {n: loss_by_position(model.float(), w) for n, w in heldout.items()}
    card = {
        "parameters": sum(p.numel() for p in model.parameters()), "context": length, "vocabulary": model.config.vocab_size,
        "data": {n: c.record() | {"share": MIX[n], "held_out_documents": HELD_OUT.get(n, 0)} for n, c in corpora.items()},
        "tokens_seen_millions": round(step * batch * length / 1e6, 2), "steps": step, "batch": batch, "lr": lr, "seed": seed,
        "minutes": round((time.time() - begun) / 60, 1), "device": str(device), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "heldout_windows": {n: len(w) for n, w in heldout.items()},
        "heldout_loss_by_position": {"start": before, "this model": after},
        "command": f"python -m lesslib.pretrain --start {Path(start).name} --out OUT --minutes {minutes:g} --tokens {tokens} "
        f"--batch {batch} --lr {lr:g} --seed {seed} --windows {windows}",
    }  # fmt: skip
    write_json(out / "model" / "card.json", card)
    print(json.dumps(card["heldout_loss_by_position"], indent=1), flush=True)
    return card


def main() -> None:
    form = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(prog="python -m lesslib.pretrain", description=__doc__, formatter_class=form)
    p.add_argument("--start", required=True, help="model to continue: a carried one, a folder or a hub name")
    p.add_argument("--out", type=Path, required=True, help="folder for token files, the checkpoint and the final model/")
    p.add_argument("--minutes", type=float, default=60, help="stop, and end the learning-rate decay, after this wall time (inf: no limit)")
    p.add_argument("--tokens", type=int, default=100_000_000, help="or after this many tokens, whichever comes first")
    p.add_argument("--batch", type=int, default=8, help="windows a step")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0, help="of the order of windows")
    p.add_argument("--windows", type=int, default=64, help="held-out windows per corpus, each inside one document")
    p.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints")
    keep_memory()
    pretrain(**vars(p.parse_args()))


if __name__ == "__main__":
    main()
