"""Runs in the environment of a peer, as a script: kvpress serves the loads that its parent sends.

It imports torch, transformers and kvpress, and nothing of lesslib but what needs torch alone, as
its transformers may be another one. It reads a JSON object a line: first the model and the press,
then a prompt each; it answers each with one line of JSON. Open `serve` first.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from typing import Any, TextIO

import kvpress
import safetensors.torch
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lesslib.util.hardware import keep_memory

# of what its parent records
PACKAGES = ("kvpress", "torch", "transformers")


def model_of(order: dict[str, Any]) -> Any:
    """The parent's model: its configuration, and the weights that it wrote."""
    torch.set_num_threads(order["threads"])
    model: Any = LlamaForCausalLM(LlamaConfig(**order["config"]))
    weights = safetensors.torch.load_file(order["weights"])
    missing = model.load_state_dict(weights, strict=False).missing_keys
    model.tie_weights()
    # of tied embeddings one table is written
    allowed = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if set(missing) - allowed:
        raise ValueError(f"{order['weights']} lacks {', '.join(sorted(missing))}")
    return model.eval()


def press_of(method: str, prompt: int, budget: int, interval: int) -> Any:
    """A press that holds `budget` tokens after each compression, every `interval` steps.

    Its scores are those of the example in kvpress' README, the norms of keys, which need no hidden
    states. "DecodingPress" leaves the prompt whole until its first compression;
    "PrefillDecodingPress" compresses it, too, once it was read.
    """
    while_decoding = kvpress.DecodingPress(
        base_press=kvpress.KnormPress(),
        compression_interval=interval,
        target_size=budget,
        hidden_states_buffer_size=0,
    )
    if method == "DecodingPress":
        return while_decoding
    # half a token more: it rounds what it keeps down
    ratio = max(0.0, 1 - (budget + 0.5) / prompt)
    return kvpress.PrefillDecodingPress(
        prefilling_press=kvpress.KnormPress(compression_ratio=ratio),
        decoding_press=while_decoding,
    )


def cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def answer(model: Any, press: Any, ids: Tensor, generate: int) -> dict[str, Any]:
    """Seconds of the prompt `ids` [batch, S] and of `generate` tokens after it; bytes at each."""
    B, S = ids.shape
    cache = DynamicCache(config=model.config)
    decode = 0.0
    with press(model):
        begun = time.perf_counter()
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        prompt = time.perf_counter() - begun
        held = [cache_bytes(cache)]
        for i in range(generate - 1):
            begun = time.perf_counter()
            # the cache no longer tells how many tokens it has seen
            position = torch.full((B, 1), S + i)
            output = model(token, past_key_values=cache, position_ids=position, logits_to_keep=1)
            token = output.logits.argmax(-1)
            decode += time.perf_counter() - begun
            held.append(cache_bytes(cache))
    return {"prompt": prompt, "decode": decode, "bytes": held, "first": logits[:, -1, 0].tolist()}


def serve(orders: TextIO, answers: TextIO) -> None:
    """Answer every line of `orders` with one of `answers`, until there are no more."""
    keep_memory()
    order = json.loads(orders.readline())
    model = model_of(order)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    print(json.dumps(versions), file=answers, flush=True)
    for line in orders:
        task = json.loads(line)
        press = press_of(task["method"], len(task["ids"][0]), task["budget"], task["interval"])
        found = answer(model, press, torch.tensor(task["ids"]), task["generate"])
        print(json.dumps(found), file=answers, flush=True)


def main() -> None:
    # libraries print what they like; the parent reads what we write alone
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with contextlib.redirect_stdout(sys.stderr):
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
