"""Figure 3: what top-k attention leaves out of a layer's outputs is of low rank, and adding it back
at a small rank nearly restores the model.

Top-k is an oracle here, and so is the best approximation of its residual: both look at the whole
sequence. They bound what a low-rank state could give.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lesslib.evaluation import Window, perplexity
from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Experiment, Point
from lesslib.experiments.loaded import model_of, windows_of
from lesslib.experiments.statistics import nats_apart
from lesslib.hf import replace_attention
from lesslib.models import model_shape
from lesslib.ops.blocks import BLOCK
from lesslib.policies import budget_of
from lesslib.reporting import plots

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

# Windows at the most: this sweep has many points.
WINDOWS = 24

# The share of keys behind the left half of Figure 3: the paper's 512 of 4,096.
SPECTRUM_FRACTION = 0.125

SPECTRUM = "singular values"
RANKS = (0, 1, 2, 4, 8)


# ---------------------------------------------------------------------- attention
def topk_outputs(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, count: int
) -> tuple[Tensor, Tensor]:
    """Dense causal attention, and attention over each query's own top `count` keys.

    q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]; both [B, Hq, S, Dv].
    """
    groups = q.shape[1] // k.shape[1]
    S = q.shape[2]
    k = k.repeat_interleave(groups, 1)
    v = v.repeat_interleave(groups, 1)
    full = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    sparse = torch.empty_like(full)
    # Queries in blocks, each with the keys up to its last: half of all logits are never needed.
    for start in range(0, S, BLOCK):
        stop = min(start + BLOCK, S)
        is_future = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device)
        is_future = is_future.triu(start + 1)
        logits = q[:, :, start:stop] @ k[:, :, :stop].mT * scaling  # [B, Hq, block, stop]
        logits.masked_fill_(is_future, -torch.inf)
        full[:, :, start:stop] = logits.softmax(-1) @ v[:, :, :stop]
        logits.masked_fill_(logits < smallest_of_largest(logits, count), -torch.inf)
        sparse[:, :, start:stop] = logits.softmax(-1) @ v[:, :, :stop]
    return full, sparse


def smallest_of_largest(x: Tensor, count: int) -> Tensor:
    """The smallest of the `count` largest numbers of each row [..., n], or of all: [..., 1]."""
    n = x.shape[-1]
    count = min(count, n)
    if x.device.type != "cpu":
        return x.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    # NumPy divides a row in a quarter of the time that topk takes on a CPU.
    place = n - count
    divided = np.partition(x.numpy(), place, axis=-1)
    return torch.from_numpy(divided[..., place : place + 1])


def best_of_rank(x: Tensor, rank: int) -> Tensor:
    """The closest matrices of `rank` to x [..., S, D], by its right singular vectors."""
    eigenvectors = torch.linalg.eigh(x.transpose(-1, -2) @ x).eigenvectors
    # Eigenvalues ascend, so the last vectors are those of the largest singular values.
    vectors = eigenvectors[..., x.shape[-1] - rank :]
    return x @ vectors @ vectors.transpose(-1, -2)


# ---------------------------------------------------------------------- points
class LowRankResiduals(Experiment):
    name = "low_rank_residuals"

    def points(self) -> list[Point]:
        fractions = (0.05,) if self.profile.quick else (0.02, 0.05, 0.125)
        points = [
            Point(SPECTRUM, {"what": SPECTRUM, "fraction": SPECTRUM_FRACTION}),
            Point("full", {"what": "perplexity", "fraction": 1.0}),
        ]
        for fraction in fractions:
            for rank in RANKS:
                parameters = {"what": "perplexity", "fraction": fraction, "rank": rank}
                points.append(Point(f"top {fraction:.1%}, rank {rank}", parameters))
        return points

    def corpora(self) -> tuple[str, ...]:
        return self.profile.evaluation[:1]

    def may_be_shared(self, point: Point) -> bool:
        return "rank" in point.parameters

    def compute(self, point: Point) -> dict[str, Any]:
        model, _ = model_of(self.profile.model)
        count = budget_of(point.parameters["fraction"], model_shape(model)["context"])
        if point.parameters["what"] == SPECTRUM:
            return {"layers": self._spectra(count)}
        return self._perplexity(count, point.parameters.get("rank", 0))

    def _windows(self) -> list[Window]:
        """At most WINDOWS of the corpus, evenly spread."""
        windows = windows_of(self.profile.name, self.profile.evaluation[0])
        step = -(-len(windows) // WINDOWS)
        return windows[::step]

    def _perplexity(self, count: int, rank: int) -> dict[str, Any]:
        """Perplexity under top-k attention with the residual added back at `rank`."""
        model, _ = model_of(self.profile.model)

        def attention(
            layer: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
        ) -> Tensor:
            full, sparse = topk_outputs(q.float(), k.float(), v.float(), scaling, count)
            if rank:
                sparse = sparse + best_of_rank(full - sparse, rank)
            return sparse.to(v.dtype)

        with replace_attention(model, attention):
            return perplexity(model, self._windows(), min(self.profile.batch, 4))

    def _spectra(self, count: int) -> dict[str, dict[str, list[float]]]:
        """Singular values of outputs and residuals by layer, of a batch of the longest windows.

        Means over heads, each head's values over the largest of its outputs.
        """
        model, _ = model_of(self.profile.model)
        spectra: dict[str, list[Tensor]] = defaultdict(list)

        def attention(
            layer: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scaling: float
        ) -> Tensor:
            full, sparse = topk_outputs(q.float(), k.float(), v.float(), scaling, count)
            values = torch.linalg.svdvals(torch.stack([full, full - sparse]))  # [2, B, Hq, D]
            largest_of_full = values[:1, ..., :1]
            spectra[str(layer)].append((values / largest_of_full).mean((1, 2)))
            return full.to(v.dtype)

        windows = self._windows()
        longest = max(len(window.ids) for window in windows)
        windows = [window for window in windows if len(window.ids) == longest]
        batch = min(self.profile.batch, 4)
        with replace_attention(model, attention):
            perplexity(model, windows[: self.profile.batch], batch)
        layers = {}
        for layer, values in spectra.items():
            full, residual = torch.stack(values).mean(0).double().numpy().round(6).tolist()
            layers[layer] = {"full": full, "residual": residual}
        return layers


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of Figure 3."""
    return LowRankResiduals(profile, seed).run()


# ---------------------------------------------------------------------- claims
def directions(record: dict, share: float) -> dict[str, tuple[int, int]]:
    """Per layer, singular directions that hold `share` of the energy, the squared singular values:
    of the attention outputs, and of their top-k residual.
    """
    counts = {}
    for layer, values in record["points"][SPECTRUM]["layers"].items():
        full = _directions(values["full"], share)
        residual = _directions(values["residual"], share)
        counts[layer] = (full, residual)
    return counts


def _directions(singular_values: list[float], share: float) -> int:
    """How many of the largest values hold `share` of the energy of all."""
    energy = np.cumsum(np.square(singular_values))
    return 1 + int((energy < share * energy[-1]).sum())


@claim(
    "Figure 3",
    "What sparse attention leaves out is of low rank; rank 4 nearly restores it",
    paper="by eye",
    needs=("low_rank_residuals",),
)
def verdicts(record: dict) -> list[Verdict]:
    """Both halves of the figure."""
    verdicts = [_fewer_directions(record), _little_beyond_rank_4(record)]
    for fraction in perplexity_by_rank(record):
        verdicts.append(_rank_4_restores(record, fraction))
    return verdicts


def verdicts_of_every_profile(record: dict) -> list[Verdict]:
    """Those that quick profiles measure too: of the right half, at 5% alone."""
    return [
        _fewer_directions(record),
        _little_beyond_rank_4(record),
        _rank_4_restores(record, 0.05),
    ]


def _fewer_directions(record: dict) -> Verdict:
    counts = directions(record, 0.9)
    numbers = [f"layer {i}: {residual} against {full}" for i, (full, residual) in counts.items()]
    return Verdict(
        "in every layer the top-12.5% residual needs fewer directions for 90% of its energy"
        " than the outputs do",
        all(residual < full for full, residual in counts.values()),
        ", ".join(numbers),
    )


def _little_beyond_rank_4(record: dict) -> Verdict:
    beyond = {}
    for layer, values in record["points"][SPECTRUM]["layers"].items():
        residual_energy = sum(x * x for x in values["residual"][4:])
        beyond[layer] = residual_energy / sum(x * x for x in values["full"])
    return Verdict(
        "in every layer the residual beyond rank 4 holds less than 5% of the outputs' energy",
        max(beyond.values()) < 0.05,
        ", ".join(f"layer {layer}: {share:.1%}" for layer, share in beyond.items()),
    )


def _rank_4_restores(record: dict, fraction: float) -> Verdict:
    full = record["points"]["full"]["token_ppl"]
    by_rank = perplexity_by_rank(record)[fraction]
    closed = (by_rank[0] - by_rank[4]) / (by_rank[0] - full)
    return Verdict(
        f"rank 4 takes back at least half of the perplexity that top-{fraction:.1%} caching loses",
        closed >= 0.5,
        f"{by_rank[0]:.2f} -> {by_rank[4]:.2f}, full {full:.2f}: {closed:.0%}",
    )


def perplexity_by_rank(record: dict) -> dict[float, dict[int, float]]:
    """Token perplexity by the share of keys and the rank that is added back, both ascending."""
    scored = []
    for entry in record["points"].values():
        parameters = entry["parameters"]
        if "rank" in parameters:
            scored.append((parameters["fraction"], parameters["rank"], entry["token_ppl"]))
    by_fraction: dict[float, dict[int, float]] = {}
    for fraction, rank, ppl in sorted(scored):
        by_fraction.setdefault(fraction, {})[rank] = ppl
    return by_fraction


# ---------------------------------------------------------------------- tables and a figure
def directions_table(record: dict) -> Markdown:
    """How fast singular values decay, by layer."""
    layers = record["points"][SPECTRUM]["layers"]
    lines = []
    for layer, (full, residual) in directions(record, share=0.9).items():
        # The values are relative to the largest of the outputs, so the eighth says the ratio.
        eighth = [1 / layers[layer][part][7] for part in ("full", "residual")]
        lines.append([layer, full, residual, *eighth])
    columns = ["directions for 90% of full outputs", "... of the residual"]
    return plots.table(["layer", *columns, "largest / 8th singular value, full", "residual"], lines)


def table(record: dict) -> Markdown:
    """Perplexity of every cache, and what it loses to the full one."""
    full = record["points"]["full"]
    lines = []
    for key, entry in record["points"].items():
        if "token_ppl" in entry:
            loss, low, high = nats_apart(entry, full)
            ppl = [entry["token_ppl"], entry["word_ppl"]]
            lines.append([key, *ppl, loss, f"{low:.3f} to {high:.3f}"])
    columns = ["token perplexity", "word perplexity", "nats a token above full"]
    return plots.table(["cache", *columns, "95% over documents"], lines)


def figure(record: dict) -> Figure:
    """Left, singular values by layer; right, perplexity against the rank that is added back."""
    picture, (left, right) = plots.axes(2)
    layers = record["points"][SPECTRUM]["layers"]
    for layer, values in layers.items():
        shade = 0.35 + 0.65 * (int(layer) + 1) / len(layers)
        for part, tint in (("full", plots.COLOURS["Full"]), ("residual", "#3182bd")):
            index = range(1, len(values[part]) + 1)
            label = part if layer == "0" else None
            left.semilogy(index, values[part], color=tint, alpha=shade, label=label)
    left.set(
        xlabel="index",
        ylabel="singular value / largest of full",
        title="outputs and top-12.5% residuals, by layer",
    )
    left.legend()
    for (fraction, by_rank), tint in zip(
        perplexity_by_rank(record).items(), plots.BLUES, strict=False
    ):
        ranks = list(by_rank)
        ppl = list(by_rank.values())
        right.plot(ranks, ppl, "o-", color=tint, label=f"top {fraction:.1%}")
    full = record["points"]["full"]["token_ppl"]
    right.axhline(full, color=plots.COLOURS["Full"], ls="--", label="full")
    right.set(
        xlabel="rank of the residual that is added back",
        ylabel="token perplexity",
        title="top-k caching, recovered",
    )
    right.legend()
    return picture
