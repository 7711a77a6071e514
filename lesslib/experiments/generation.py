"""Figure 1 and notebook 13: what a user of `model.generate` gets from each method. After the same
prompt: the text, the bytes that the cache holds, which tokens left, and what a prefill costs.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor
from transformers import DynamicCache

from lesslib.attention.cache import LessCache
from lesslib.experiments.claims import Verdict
from lesslib.experiments.experiment import Experiment, Point
from lesslib.experiments.loaded import model_of, windows_of
from lesslib.experiments.method import Method, four_methods
from lesslib.experiments.records import FULL, PLUS, rows
from lesslib.hf import less
from lesslib.models import cache_bytes, load_model, model_shape
from lesslib.policies import H2O
from lesslib.profiles import get_profile
from lesslib.reporting import plots

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

FRACTION = 0.05
METHODS = four_methods(FRACTION)
LESS = Method.less(FRACTION)
POLICIES = ("h2o", "lambda", "tova")

# Tokens of a prompt, tokens after it, and windows that prefills are compared on.
PROMPT = 384
CONTINUED = 96
WINDOWS = 16
# Tokens of a streamed prompt that are read together.
CHUNK = 64

# Tokens between two looks at the cache's bytes, and at the most where the profile is quick.
BYTES_EVERY = 32
QUICK_BYTES_UNTIL = 256

WRITING = {
    "max_new_tokens": CONTINUED,
    "do_sample": False,
    "repetition_penalty": 1.2,
    "eos_token_id": None,
}


# ---------------------------------------------------------------------- points
class Generation(Experiment):
    """Points by kind, the parameter "what".

    text: the greedy continuation. bytes: (tokens, bytes) token by token. evicted: for every token
    of a prompt, the share of all layers' key-value heads that no longer hold it. prefill: nats a
    token of what really follows prompts, which were read densely or in chunks.
    """

    name = "generation"
    shares_points = True

    def points(self) -> list[Point]:
        points = []
        for what in ("text", "bytes"):
            for method in METHODS:
                parameters = {"what": what, "method": method.label}
                points.append(Point(f"{what}/{method.label}", parameters, method))
        for policy in POLICIES:
            method = Method.baseline(FRACTION, policy)
            parameters = {"what": "evicted", "method": method.label, "policy": policy}
            points.append(Point(f"evicted/{policy}", parameters, method))
        for method in (Method.full(), Method.baseline(FRACTION), LESS):
            prefills = ("dense",) if method == Method.full() else ("dense", "streaming")
            for prefill in prefills:
                key = f"prefill/{method.label}/{prefill}"
                parameters = {"what": "prefill", "method": method.label, "prefill": prefill}
                points.append(Point(key, parameters, method))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.evaluation[:1]

    def compute(self, point: Point) -> dict[str, Any]:
        model, _ = model_of(self.profile.model)
        what = point.parameters["what"]
        cache = self._cache(point)
        # Full decodes as transformers does without us.
        decoding = contextlib.nullcontext() if point.method == Method.full() else less(model)
        with torch.no_grad(), decoding:
            if what == "text":
                return self._text(cache)
            if what == "bytes":
                return self._bytes(cache)
            if what == "evicted":
                return self._evicted(cache)
            return self._prefill(cache)

    def _cache(self, point: Point) -> Any:
        """An empty cache of the point's method: transformers' own for Full."""
        model, _ = model_of(self.profile.model)
        policy, state = self.setting(point)
        if point.method == Method.full():
            return DynamicCache(config=model.config)
        prefill: Any = point.parameters.get("prefill", "dense")
        return LessCache(model, policy, state, prefill, CHUNK)

    def _windows(self) -> list[tuple[int, ...]]:
        """Token ids of at most WINDOWS windows that hold a prompt and what follows it, evenly
        spread.
        """
        windows = windows_of(self.profile.name, self.profile.evaluation[0])
        long_enough = [w.ids for w in windows if len(w.ids) >= PROMPT + CONTINUED]
        step = -(-len(long_enough) // WINDOWS)
        return long_enough[::step]

    def _token_ids(self) -> Tensor:
        """Prompts and what follows them, [windows, PROMPT + CONTINUED]."""
        model, _ = model_of(self.profile.model)
        token_ids = [window[: PROMPT + CONTINUED] for window in self._windows()]
        return torch.tensor(token_ids, device=model.device)

    def _text(self, cache: Any) -> dict[str, Any]:
        """What is written after the prompt of the middle window."""
        model, tokenizer = model_of(self.profile.model)
        token_ids = self._token_ids()
        prompt = token_ids[len(token_ids) // 2, :PROMPT]
        written = cast(Any, model).generate(prompt[None], past_key_values=cache, **WRITING)[0]
        return {
            # Without the beginning-of-sequence token.
            "prompt": tokenizer.decode(prompt[1:]),
            "text": tokenizer.decode(written[PROMPT:]),
            "tokens": written[PROMPT:].tolist(),
        }

    def _bytes(self, cache: Any) -> dict[str, Any]:
        """The bytes of all tensors that the cache holds, while the first window is read."""
        model, _ = model_of(self.profile.model)
        window = torch.tensor(self._windows()[0], device=model.device)
        tokens = QUICK_BYTES_UNTIL if self.profile.quick else len(window)
        held = []
        for t in range(tokens):
            model(window[t : t + 1][None], past_key_values=cache)
            if (t + 1) % BYTES_EVERY == 0:
                held.append([t + 1, bytes_held(cache)])
        kernels = cache.report()["kernels"] if isinstance(cache, LessCache) else 0
        return {"bytes": held, "kernels": kernels}

    def _evicted(self, cache: LessCache) -> dict[str, Any]:
        """Which tokens of the first window's prompt left, after a dense prefill of all prompts."""
        model, tokenizer = model_of(self.profile.model)
        prompts = self._token_ids()[:, :PROMPT]
        model(prompts, past_key_values=cache)
        bounded = cache.less_layers()
        is_evicted = []
        for number, layer in enumerate(cache.layers):
            if layer in bounded:
                is_evicted.append(cache.evicted(number)[0].double())
        share_of_heads = torch.cat(is_evicted).mean(0)
        return {
            "tokens": [tokenizer.decode([token]) for token in prompts[0].tolist()],
            "gone": share_of_heads.numpy().round(4).tolist(),
        }

    def _prefill(self, cache: Any) -> dict[str, Any]:
        """Losses on what follows the prompts, decoded token by token."""
        model, _ = model_of(self.profile.model)
        token_ids = self._token_ids()
        logits = [model(token_ids[:, :PROMPT], past_key_values=cache).logits[:, -1]]
        for t in range(PROMPT, PROMPT + CONTINUED - 1):
            logits.append(model(token_ids[:, t : t + 1], past_key_values=cache).logits[:, 0])
        log_probabilities = torch.stack(logits, 1).float().log_softmax(-1)
        following = token_ids[:, PROMPT:, None]
        losses = -log_probabilities.gather(2, following)[..., 0]  # [windows, CONTINUED]
        losses = losses.double()
        by_window = losses.mean(1).numpy().round(5).tolist()
        return {"nats": losses.mean().item(), "by_window": by_window}


def bytes_held(cache: Any) -> int:
    """Bytes of all tensors that a cache holds, ours or transformers'."""
    if isinstance(cache, LessCache):
        return cache.nbytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of notebook 13."""
    return Generation(profile, seed).run()


# ---------------------------------------------------------------------- verdicts
def verdicts(record: dict, tokens: int = 512) -> list[Verdict]:
    """What decoding with a bounded cache must show: flat bytes, fewer than the full cache's after
    `tokens` tokens, and a prefill that LESS gains from.
    """
    return [*_verdicts_of_bytes(record, tokens), *_verdicts_of_prefills(record)]


def _verdicts_of_bytes(record: dict, tokens: int) -> list[Verdict]:
    # By label: bytes by tokens seen.
    held = {label: dict(entry["bytes"]) for label, entry in rows(record, "bytes", METHODS).items()}
    at = max(t for t in held[FULL] if t <= tokens)
    every_length = held[LESS.label].values()
    less_bytes = held[LESS.label][at]
    full_bytes = held[FULL][at]
    plus_bytes = held[PLUS][at]
    return [
        Verdict(
            "the bytes that LESS holds are the same at every length",
            len(set(every_length)) == 1,
            f"{min(every_length):,} to {max(every_length):,} bytes",
        ),
        Verdict(
            "LESS holds less than a quarter of the full cache",
            less_bytes < full_bytes / 4,
            f"{less_bytes:,} of {full_bytes:,} bytes after {at} tokens",
        ),
        Verdict(
            "its state costs no more than Baseline+'s tokens (within 2%)",
            less_bytes <= 1.02 * plus_bytes,
            f"{less_bytes:,} against {plus_bytes:,} bytes",
        ),
    ]


def _verdicts_of_prefills(record: dict) -> list[Verdict]:
    nats = prefill_nats(record)
    in_words = {
        "dense": "a prompt read densely, as the paper's",
        "streaming": "a prompt streamed through the bounded cache",
    }
    verdicts = []
    for prefill, words in in_words.items():
        lost = nats["Baseline", prefill] - nats[FULL, "dense"]
        back = (nats["Baseline", prefill] - nats[LESS.label, prefill]) / lost
        claim = f"after {words}, LESS gives back at least half of what eviction costs"
        verdicts.append(Verdict(claim, back >= 0.5, f"{back:.1%} of {lost:.3f} nats a token"))
    return verdicts


def prefill_nats(record: dict) -> dict[tuple[str, str], float]:
    """Nats a token after a prompt, by label and prefill."""
    nats = {}
    for key, entry in record["points"].items():
        what, _, rest = key.partition("/")
        if what == "prefill":
            label, prefill = rest.split("/")
            nats[label, prefill] = entry["nats"]
    return nats


# ---------------------------------------------------------------------- tables
def bytes_formula(profile: str) -> int:
    """Bytes of LESS's cache by the formula, before any is allocated."""
    p = get_profile(profile)
    model, _ = load_model(p.model)
    shape = model_shape(model)
    policy = H2O.from_fraction(FRACTION, shape["context"])
    return cache_bytes(shape, policy, p.kernel_size, 1, model.dtype)


def bytes_table(record: dict) -> Markdown:
    """Bytes held at four lengths, and the kernels' weights."""
    entries = rows(record, "bytes", METHODS)
    step = max(1, len(entries[FULL]["bytes"]) // 4)
    lengths = [f"{tokens} tokens" for tokens, _ in entries[FULL]["bytes"][::step]]
    lines = []
    for label, entry in entries.items():
        held = [f"{count:,}" for _, count in entry["bytes"][::step]]
        lines.append([label, *held, f"{entry['kernels']:,}"])
    return plots.table(["bytes held", *lengths, "kernels' weights"], lines)


def table(record: dict) -> Markdown:
    """Nats a token after a prompt that was read densely and after one that was streamed."""
    nats = prefill_nats(record)
    lines: list[list[Any]] = [[FULL, nats[FULL, "dense"], None, None]]
    for label in ("Baseline", LESS.label):
        dense = nats[label, "dense"]
        streaming = nats[label, "streaming"]
        lines.append([label, dense, streaming, f"{streaming - dense:+.4f}"])
    columns = ["dense prefill", "streaming prefill", "difference"]
    return plots.table(["nats a token", *columns], lines)


def texts(record: dict) -> str:
    """The end of the prompt, and what each method writes after it."""
    entries = rows(record, "text", METHODS)
    full = entries[FULL]
    parts = ["... " + full["prompt"][-300:]]
    for label, entry in entries.items():
        same = ""
        if label != FULL:
            same = f" (as the full cache for {tokens_alike(entry, full)} tokens)"
        parts.append(f"\n=== {label}{same}\n{entry['text']}")
    return "\n".join(parts)


def tokens_alike(a: dict, b: dict) -> int | None:
    """How many tokens two continuations begin with alike; None where they never part."""
    for count, (token, other) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
        if token != other:
            return count
    return None


# ---------------------------------------------------------------------- figures
def figure(record: dict) -> Figure:
    """What each method's cache holds while a text is read token by token."""
    lines = {}
    for label, entry in rows(record, "bytes", METHODS).items():
        tokens, held = np.array(entry["bytes"]).T
        lines[label] = (tokens, held / 1024)
    title = "H2O at 5%: keys, values, scores and state"
    return plots.curves({title: lines}, "tokens seen", "KiB held by the cache", width=6.2)


# A token as it is drawn: row, column, characters, share of the heads that no longer hold it.
Placed = tuple[int, int, str, float]

FONT_SIZE = 6.5
# Of a monospaced character, over its size.
CHARACTER_WIDTH = 0.602


def evicted_figure(record: dict, width: int = 110) -> Figure:
    """The prompt under each policy, every token shaded by the share of heads that let it go.

    `width` in characters.
    """
    placed = {}
    for policy in POLICIES:
        entry = record["points"][f"evicted/{policy}"]
        placed[policy] = place_tokens(entry["tokens"], entry["gone"], width)
    # In rows of text; the last token lies in the last row.
    heights = [tokens[-1][0] + 1 for tokens in placed.values()]
    inches = (
        width * CHARACTER_WIDTH * FONT_SIZE / 72 + 0.2,
        sum(heights) * 0.15 + 0.35 * len(heights),
    )
    picture, panels = plt.subplots(
        len(placed),
        1,
        figsize=inches,
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
        dpi=100,
    )
    for panel, height, (policy, tokens) in zip(panels[:, 0], heights, placed.items(), strict=True):
        for token in tokens:
            _draw_token(panel, *token)
        panel.set(xlim=(0, width), ylim=(height, 0))
        panel.set_axis_off()
        title = f"{policy}: white is held by every head, dark red by none"
        panel.set_title(title, fontsize=8, loc="left")
    return picture


def place_tokens(tokens: list[str], gone: list[float], width: int) -> list[Placed]:
    """Tokens set in rows of `width` characters."""
    placed = []
    row = 0
    column = 0
    for token, share in zip(tokens, gone, strict=True):
        printable = "".join(c if c.isprintable() else "¶" for c in token)
        if column + len(printable) > width:
            row += 1
            column = 0
        placed.append((row, column, printable, share))
        column += len(printable)
    return placed


def _draw_token(panel: Any, row: int, column: int, characters: str, gone: float) -> None:
    shade = plt.get_cmap("Reds")(0.6 * gone)
    panel.add_patch(Rectangle((column, row), len(characters), 1, color=shade, lw=0))
    panel.text(
        column,
        row + 0.72,
        characters,
        family="monospace",
        fontsize=FONT_SIZE,
        parse_math=False,
    )
