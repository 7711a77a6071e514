"""Pretrain the pico models: `python -m lesslib.pretrain --help`.

Real text in, a small causal language model out: AdamW, warm-up then linear decay, bf16 autocast, resumable to the
step, held-out loss by position at the end and in the model card. Runs on CPU or GPU.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from .data import Corpus, Document, encode, load_corpus
from .results import write_json, write_torch

MIX = {"wikipedia": 0.57, "novels": 0.38, "topics-train": 0.05}
HELD_OUT = {"wikipedia": 100, "novels": 3}  # documents never trained on, after a shuffle with seed 0
BINS = (0, 64, 256, 512, 1 << 30)


def split(corpora: dict[str, Corpus]) -> tuple[dict[str, list[Document]], dict[str, list[Document]]]:
    """(training documents, held-out documents) per corpus; the shuffle of seed 0 decides, corpus after corpus."""
    rng, train, held = random.Random(0), {}, {}
    for name, corpus in corpora.items():
        documents = list(corpus.documents)
        if name in HELD_OUT:
            rng.shuffle(documents)
        held[name], train[name] = documents[: HELD_OUT.get(name, 0)], documents[HELD_OUT.get(name, 0) :]
    held["topics"] = list(load_corpus("topics-heldout").documents)
    return train, held


def token_file(path: Path, documents: list[Document], tokenizer) -> np.ndarray:
    """uint16 tokens of all documents, each led by the beginning-of-sequence token; kept at `path` for the next start."""
    if not path.exists():
        parts = []
        for i in range(0, len(documents), 64):
            pieces = [d.text[j : j + 50_000] for d in documents[i : i + 64] for j in range(0, len(d.text), 50_000)]
            heads = [j == 0 for d in documents[i : i + 64] for j in range(0, len(d.text), 50_000)]
            for ids, head in zip(encode(tokenizer, pieces), heads, strict=True):
                parts.append(np.array(ids if head else ids[1:], dtype=np.uint16))
        scratch = path.with_suffix(f".{os.getpid()}.npy")
        np.save(scratch, np.concatenate(parts))
        os.replace(scratch, path)
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
        """`count` windows, or as many as there are, each wholly inside one document, evenly spread: [n, length]."""
        starts = [s for a, b in zip(self.starts, self.ends, strict=True) for s in range(a, b - self.length + 1, self.length)]
        chosen = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, min(count, len(starts)))]
        return np.stack([self.tokens[s : s + self.length].astype(np.int64) for s in chosen])


@torch.no_grad()
def loss_by_position(model, windows: np.ndarray, batch: int = 8) -> dict[str, float]:
    """Mean next-token loss in nats by position of the predicting token, over windows [n, length]."""
    device, total = model.device, 0.0
    for i in range(0, len(windows), batch):
        x = torch.from_numpy(windows[i : i + batch]).to(device)
        logits = model(input_ids=x, use_cache=False).logits[:, :-1].float()
        total = total + F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").double().sum(0).cpu()
    mean = total / len(windows)
    parts = [(a, min(b, len(mean))) for a, b in zip(BINS, BINS[1:], strict=False) if a < len(mean)]
    return {f"{a}-{b - 1}": round(float(mean[a:b].mean()), 4) for a, b in parts} | {"all": round(float(mean.mean()), 4)}


def pretrain(start: str, out: Path, minutes: float, tokens: int, batch: int, lr: float, seed: int, windows: int) -> dict:
    """Continue `start` (a folder with model and tokenizer) into `out`; returns the model card written beside it."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).to(device)
    length, bos = model.config.max_position_embeddings, tokenizer.bos_token_id
    corpora = {name: load_corpus(name) for name in MIX}
    train, held = split(corpora)
    data = {n: Windows(token_file(out / f"{n}.npy", d, tokenizer), length, bos) for n, d in train.items()}
    heldout = {n: Windows(token_file(out / f"held-{n}.npy", d, tokenizer), length, bos).inside(windows) for n, d in held.items() if d}
    before = {n: loss_by_position(model.eval(), w) for n, w in heldout.items()}
    print(json.dumps({"held-out loss before": before}, indent=1), flush=True)

    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    step, spent, checkpoint = 0, 0.0, out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        print(f"resumed at step {step}", flush=True)
    begun, saved = time.time() - spent, time.time()
    model.train()
    while True:
        done = max(step * batch * length / tokens, (time.time() - begun) / (60 * minutes))
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
        step += 1
        if step % 50 == 0:
            seconds = time.time() - begun
            print(f"{seconds:.0f} s, step {step}, {step * batch * length / 1e6:.2f}M tokens, {step * batch * length / seconds:.0f} tokens/s, loss {loss.item():.3f}, {done:.0%} done", flush=True)
        if time.time() - saved > 240:
            write_torch(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": time.time() - begun})
            saved = time.time()

    model.eval().half().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    after = {n: loss_by_position(model.float(), w) for n, w in heldout.items()}
    card = {
        "parameters": sum(p.numel() for p in model.parameters()), "context": length, "vocabulary": model.config.vocab_size,
        "data": {n: c.record() | {"share": MIX[n], "held_out_documents": HELD_OUT.get(n, 0)} for n, c in corpora.items()},
        "tokens_seen_millions": round(step * batch * length / 1e6, 2), "steps": step, "batch": batch, "lr": lr, "seed": seed,
        "minutes": round((time.time() - begun) / 60, 1), "device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "heldout_windows": {n: len(w) for n, w in heldout.items()},
        "heldout_loss_by_position": {"start": before, "this model": after},
        "command": f"python -m lesslib.pretrain --minutes {minutes:g} --tokens {tokens} --batch {batch} --lr {lr:g} --seed {seed}",
    }
    write_json(out / "model" / "card.json", card)
    print(json.dumps(card["heldout_loss_by_position"], indent=1), flush=True)
    return card


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m lesslib.pretrain", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--start", required=True, help="folder of the model to continue (model and tokenizer)")
    p.add_argument("--out", type=Path, required=True, help="folder for token files, the checkpoint and the final model/")
    p.add_argument("--minutes", type=float, default=60, help="stop, and end the learning-rate decay, after this wall time")
    p.add_argument("--tokens", type=int, default=100_000_000, help="or after this many tokens, whichever comes first")
    p.add_argument("--batch", type=int, default=8, help="windows a step")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0, help="of the order of windows")
    p.add_argument("--windows", type=int, default=64, help="held-out windows per corpus")
    a = p.parse_args()
    pretrain(a.start, a.out, a.minutes, a.tokens, a.batch, a.lr, a.seed, a.windows)


if __name__ == "__main__":
    main()
