"""Figures 6 and 9 to 11: how near the attention of LESS lies to the original, and how it looks.

The cache never writes the weights of evicted tokens out: it holds their sum in H and z. Here they
are written out, row by row, to be looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lesslib.attention.fit import check_fit
from lesslib.experiments.claims import Verdict, claim
from lesslib.experiments.experiment import Experiment, Point
from lesslib.experiments.loaded import model_of, windows_of
from lesslib.experiments.method import Method
from lesslib.hf import capture
from lesslib.models import model_shape
from lesslib.policies import Policy, simulate
from lesslib.profiles import roles
from lesslib.reporting import plots
from lesslib.states import Kernels

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

# Of a map: the tokens at a text's end that it shows, and the pixels of its side.
MAP_TOKENS = 192
MAP_SIZE = 64
# Windows that distances are averaged over, at the most.
WINDOWS = 6
# The columns of the figures.
LABELS = ("original", "sparse", "LESS")
# (role of the model, policy, budget), the first of them alone in a quick profile
CASES = (("llama", "h2o", 0.05), ("llama", "lambda", 0.05), ("falcon", "h2o", 0.1))


# ---------------------------------------------------------------------- rows of attention


def dense_rows(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """Attention probabilities [B, Hq, S, S] over all tokens up to each query's.

    q [B, Hq, S, D], k [B, Hkv, S, D] after RoPE. O(S^2) memory, as in all of these: for pictures.
    """
    return _masked_logits(q, k, scaling, _seen(q)).softmax(-1)


def sparse_rows(q: Tensor, k: Tensor, scaling: float, evicted_at: Tensor) -> Tensor:
    """The same over the tokens that a policy keeps, by its eviction times [B, Hkv, S]."""
    return _masked_logits(q, k, scaling, _kept(q, k, evicted_at)).softmax(-1)


def less_rows(q: Tensor, k: Tensor, scaling: float, evicted_at: Tensor, kernels: Any) -> Tensor:
    """The same with the low-rank part: an evicted token j has the weight phi(q_t) psi(k_j) (eq. 3).

    `kernels`: those of the layer.
    """
    kept = _kept(q, k, evicted_at)
    logits = _masked_logits(q, k, scaling, kept)
    # [B, Hq, S, R] x [B, Hq, R, S] -> [B, Hq, S, S]
    weights = kernels.phi(q).float() @ _by_query_head(kernels.psi(k), q).float().mT
    evicted = weights.log().masked_fill(~_seen(q), -torch.inf)
    return torch.where(kept, logits, evicted).softmax(-1)


def _by_query_head(x: Tensor, q: Tensor) -> Tensor:
    """What KV heads hold, [B, Hkv, ...], repeated for the query heads that share them."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _seen(q: Tensor) -> Tensor:
    """[B, Hq, S, S]: whether key j is no later than query t."""
    B, Hq, S, _ = q.shape
    t = torch.arange(S, device=q.device)
    return (t <= t[:, None]).expand(B, Hq, S, S)


def _kept(q: Tensor, k: Tensor, evicted_at: Tensor) -> Tensor:
    """[B, Hq, S, S]: whether key j is seen by query t and has not been evicted before it."""
    t = torch.arange(q.shape[2], device=q.device)
    return _seen(q) & (t[:, None] < _by_query_head(evicted_at, q)[:, :, None])


def _masked_logits(q: Tensor, k: Tensor, scaling: float, mask: Tensor) -> Tensor:
    """Scaled logits [B, Hq, S, S], -inf where the mask is False."""
    logits = q.float() @ _by_query_head(k, q).float().mT * scaling
    return logits.masked_fill(~mask, -torch.inf)


def hellinger(p: Tensor, q: Tensor) -> Tensor:
    """Hellinger distance of distributions along the last dimension.

    0 for equal ones, 1 for disjoint ones.
    """
    return (1 - (p * q).sqrt().sum(-1)).clamp(min=0).sqrt()


class Comparison:
    """Compares every layer's attention to the original, as `lesslib.hf.capture` hands it on.

    `distances`: layer -> "sparse" or "LESS" -> by text, the mean over heads and positions past the
    budget. `maps`: label -> `small_map` of the first text in the middle layer.
    """

    def __init__(self, policy: Policy, kernels: Kernels, layers: int) -> None:
        self.policy = policy
        self.kernels = kernels
        self.middle = layers // 2
        self.distances: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.maps: dict[str, list[list[float]]] = {}

    def keep(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scaling: float
    ) -> None:
        """Take one layer of one text: q [1, Hq, S, D], k [1, Hkv, S, D] after RoPE."""
        is_real = torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device)
        evicted_at = simulate(self.policy, q, k, is_real, scaling)
        rows = {
            "original": dense_rows(q, k, scaling),
            "sparse": sparse_rows(q, k, scaling, evicted_at),
            "LESS": less_rows(q, k, scaling, evicted_at, self.kernels[layer]),
        }
        for label in ("sparse", "LESS"):
            # [B, Hq, S]
            distance = hellinger(rows["original"], rows[label])
            past_budget = distance[:, :, self.policy.budget :]
            self.distances[str(layer)][label].append(past_budget.mean().item())
        if layer == self.middle and not self.maps:
            self.maps = {label: small_map(row) for label, row in rows.items()}


def small_map(rows: Tensor) -> list[list[float]]:
    """The last tokens of the first text's head 0, averaged to MAP_SIZE x MAP_SIZE."""
    corner = rows[:1, :1, -MAP_TOKENS:, -MAP_TOKENS:]
    pooled = F.avg_pool2d(corner, MAP_TOKENS // MAP_SIZE)[0, 0]
    return pooled.double().numpy(force=True).round(4).tolist()


# ---------------------------------------------------------------------- points
class AttentionMaps(Experiment):
    """Every layer reads what the dense model gives it.

    So its distance is its own, and not the sum of what the layers below it add.
    """

    name = "attention_maps"

    def cases(self) -> tuple[tuple[str, str, float], ...]:
        return CASES[:1] if self.profile.quick else CASES

    def points(self) -> list[Point]:
        points = []
        for role, policy, fraction in self.cases():
            method = Method.less(fraction, policy=policy)
            model_name = roles(self.profile.name)[role]
            parameters = {"name": model_name, "policy": policy, "fraction": fraction}
            points.append(Point(f"{role}/{policy} {method.budget}", parameters, method))
        return points

    def corpora(self) -> tuple[str, ...]:
        return (self.profile.evaluation[0],)

    def models(self) -> list[str]:
        return [roles(self.profile.name)[role] for role, _, _ in self.cases()]

    def compute(self, point: Point) -> dict[str, Any]:
        """Distances by layer, and the maps of one head."""
        model_name = point.parameters["name"]
        model, _ = model_of(model_name)
        policy, kernels = self.setting(point)
        check_fit(model, policy, kernels)
        layers = model_shape(model)["layers"]
        comparison = Comparison(policy, cast(Kernels, kernels), layers)

        windows = windows_of(self.profile.name, self.corpora()[0], model_name)
        # At most WINDOWS of them, evenly spread: every n-th, n rounded up.
        every = -(-len(windows) // WINDOWS)
        with capture(model, comparison.keep):
            for window in windows[::every]:
                ids = torch.tensor([window.ids], device=model.device)
                model(input_ids=ids, use_cache=False)
        return {"distances": comparison.distances, "maps": comparison.maps}


def run(profile: str, seed: int = 0) -> dict[str, Any]:
    """The record of Figures 6 and 9 to 11."""
    return AttentionMaps(profile, seed).run()


# ---------------------------------------------------------------------- claims
@claim(
    "Figure 6",
    "In every layer attention lies nearer to the original under LESS",
    paper="by eye",
    needs=("attention_maps",),
)
def verdicts(record: dict) -> Iterator[Verdict]:
    """The mean Hellinger distance of LESS against that of the sparse policy, layer by layer."""
    for case, entry in record["points"].items():
        is_nearer = []
        numbers = []
        for layer, distances in entry["distances"].items():
            less = np.mean(distances["LESS"])
            sparse = np.mean(distances["sparse"])
            is_nearer.append(less < sparse)
            numbers.append(f"layer {layer}: {less:.3f} against {sparse:.3f}")
        claim = f"{case}: LESS attends nearer to the original in every layer"
        yield Verdict(claim, all(is_nearer), ", ".join(numbers))


# ---------------------------------------------------------------------- tables and figures
def table(record: dict) -> Markdown:
    """Distances to the original by case and layer."""
    lines = []
    for case, entry in record["points"].items():
        for layer, distances in entry["distances"].items():
            sparse = distances["sparse"]
            less = distances["LESS"]
            nearer = f"{1 - np.mean(less) / np.mean(sparse):.0%}"
            lines.append([case, layer, mean_and_spread(sparse), mean_and_spread(less), nearer])
    columns = ["model/policy budget", "layer", "sparse (± over texts)", "LESS", "nearer by"]
    return plots.table(columns, lines)


def mean_and_spread(distances: list[float]) -> str:
    """The mean over texts, and the standard deviation between them."""
    return f"{np.mean(distances):.3f} ± {np.std(distances, ddof=1):.3f}"


def distances_figure(record: dict) -> Figure:
    """Figure 6: the distance to the original by layer, of the policy alone and of LESS."""
    panels = {}
    for case, entry in record["points"].items():
        layers = [int(layer) for layer in entry["distances"]]
        lines = {}
        for method, label in (("Baseline", "sparse"), ("LESS", "LESS")):
            by_layer = entry["distances"].values()
            lines[method] = (layers, [float(np.mean(layer[label])) for layer in by_layer])
        panels[case] = lines
    return plots.curves(panels, "layer", "Hellinger distance to the original")


def maps_figure(record: dict) -> Figure:
    """Figures 9 to 11: one head's attention by case, original, sparse and LESS.

    Brighter is heavier, on one logarithmic scale.
    """
    points = record["points"]
    figure, panels = plt.subplots(
        len(points),
        len(LABELS),
        figsize=(8, 2.8 * len(points)),
        squeeze=False,
        layout="constrained",
    )
    for row, (case, entry) in zip(panels, points.items(), strict=True):
        for panel, label in zip(row, LABELS, strict=True):
            # A zero weight is drawn as 0.0001, the darkest colour.
            weights = np.log10(np.array(entry["maps"][label]) + 1e-4)
            image = panel.imshow(weights, cmap="magma", vmin=-4, vmax=-0.5)
            panel.set(title=f"{case}: {label}", xticks=[], yticks=[], xlabel="key", ylabel="query")
        figure.colorbar(image, ax=row, label="log10 of the weight")
    return figure
