"""Train the kernels of one layer.

The loss is the squared error of the attention outputs past the budget, after the output projection
(paper, section 3.2). What is reported is that error over the sparse policy's own: 1 is eviction
alone, 0 the full cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lesslib.attention.whole_sequence import evict
from lesslib.ops.blocks import gather_tokens
from lesslib.ops.merge import Part
from lesslib.ops.scan import arrivals
from lesslib.policies import Policy
from lesslib.states import LayerKernels, State
from lesslib.training.capture import LayerData
from lesslib.training.recipe import Recipe
from lesslib.util.hardware import autocast

# Rows of R whose products are computed together: half of the zeros among them count.
COLUMNS = 128


def features(kernels: LayerKernels, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """phi(q) and psi(k) in float32.

    While training, their matmuls run under `autocast`, which halves the largest tensors of a step.
    """
    with autocast(q.device, kernels.training):
        phi = kernels.phi(q)
        psi = kernels.psi(k)
    return phi.float(), psi.float()


class LayerTrainer:
    """Everything that training one layer needs, computed once.

    Who leaves when, the sparse outputs and the targets do not depend on the kernels; only phi, psi
    and one scan are left to each step. What is kept covers the P positions past the budget, where
    each query finds one more evicted token in the state: sparse outputs, log-sum-exps, and the
    evicted keys and values in the order in which they leave, which take the place of k and v in
    `data`.

    `projection` is W_O [hidden, Hq * Dv]. The last `validation` sequences choose the best epoch;
    `batch` sequences are evaluated at once; Baseline+ holds `plus` more tokens. Raises ValueError
    where no sequence is left to train on, or none to validate.
    """

    def __init__(
        self,
        data: LayerData,
        policy: Policy,
        projection: Tensor,
        validation: int,
        batch: int = 8,
        plus: int = 4,
    ):
        sequences, _, tokens, _ = data.q.shape
        if not 0 < validation < sequences:
            raise ValueError(
                f"{validation} validation sequences of {sequences}: "
                "leave at least one for training and one for validation"
            )
        assert policy.budget is not None
        begun = time.perf_counter()
        self.data = data
        self.batch = batch
        self.device = projection.device
        self.positions = tokens - policy.budget - 1
        weights = projection.float()
        self.gram = weights.T @ weights  # W_O^T W_O, [Hq * Dv, Hq * Dv]
        # Differences are as long after R of W_O = Q R as after W_O, and half of R is zero.
        self.triangle = torch.linalg.qr(weights, mode="r").R
        self.outputs = projection.shape[0]
        self.train_rows = torch.arange(sequences - validation)
        self.validation_rows = torch.arange(sequences - validation, sequences)

        # Before `_evict`, which reorders k and v.
        self.plus_error = self._policy_error(policy.plus(plus))

        kept_out = data.out[:, :, self.past_budget]
        self.sparse = torch.empty_like(kept_out)  # [N, Hq, P, Dv]
        self.logsumexp = torch.empty(*kept_out.shape[:-1])  # [N, Hq, P]
        for rows in (*self.train_rows.split(batch), *self.validation_rows.split(batch)):
            self._evict(policy, rows)
        self.sparse_error = {
            "train": self._mean_error(self._sparse_output, self.train_rows),
            "validation": self._mean_error(self._sparse_output, self.validation_rows),
        }
        self.eviction_seconds = time.perf_counter() - begun

    @property
    def past_budget(self) -> slice:
        """The last P of all positions."""
        return slice(-self.positions, None)

    def _policy_error(self, policy: Policy) -> float:
        """Validation error of a policy alone, at the positions past this trainer's budget."""

        def output(rows: Tensor) -> Tensor:
            q, k, v = self._captured(rows)
            out = evict(policy, q, k, v, scaling=self.data.scaling).sparse
            return out[:, :, self.past_budget]

        return self._mean_error(output, self.validation_rows)

    def _captured(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of `rows` at all positions, in float32."""
        q = self.data.q[rows].to(self.device, torch.float32)
        k = self.data.k[rows].to(self.device, torch.float32)
        v = self.data.v[rows].to(self.device, torch.float32)
        return q, k, v

    def _evict(self, policy: Policy, rows: Tensor) -> None:
        """Keep what `policy` does to `rows`, and put their keys and values in order of leaving."""
        q, k, v = self._captured(rows)
        evicted = evict(policy, q, k, v, scaling=self.data.scaling)
        past = self.past_budget
        self.sparse[rows] = evicted.sparse[:, :, past].to("cpu", self.sparse.dtype)
        self.logsumexp[rows] = evicted.logsumexp[:, :, past].cpu()
        token = arrivals(evicted.times)[..., past]  # [b, Hkv, P]
        data = self.data
        data.k[rows, :, past] = gather_tokens(k, token).to("cpu", data.k.dtype)
        data.v[rows, :, past] = gather_tokens(v, token).to("cpu", data.v.dtype)

    def _load(self, x: Tensor, rows: Tensor) -> Tensor:
        """`rows` of x at the P positions past the budget, in float32; x may have no others."""
        past = x[:, :, self.past_budget]
        loaded = torch.empty_like(past[: len(rows)], dtype=torch.float32, device=self.device)
        # On CPU far faster than past[rows], and without a copy in half precision.
        for i, row in enumerate(rows.tolist()):
            loaded[i] = past[row]
        return loaded

    def target(self, rows: Tensor) -> Tensor:
        """Dense attention outputs [b, Hq, P, Dv] of sequences `rows`."""
        return self._load(self.data.out, rows)

    def output(self, state: State, rows: Tensor) -> Tensor:
        """Attention outputs under policy and state [b, Hq, P, Dv] for sequences `rows`."""
        q = self._load(self.data.q, rows)
        k = self._load(self.data.k, rows)
        v = self._load(self.data.v, rows)
        slots = Part(self._sparse_output(rows), self._load(self.logsumexp, rows))
        # Past the budget one token leaves before every query.
        has_arrived = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device)
        return state.join_over_arrivals(slots, q, k, v, has_arrived, self.data.scaling)

    def _sparse_output(self, rows: Tensor) -> Tensor:
        """Attention outputs of the policy alone [b, Hq, P, Dv] for sequences `rows`."""
        return self._load(self.sparse, rows)

    def error(self, out: Tensor, target: Tensor) -> Tensor:
        """Mean squared error after W_O; out, target [b, Hq, P, Dv]. For gradients; see
        `error_value`.
        """
        difference = _by_position(out - target)
        # d^T W_O^T W_O d. Both of its factors d have the same gradient, so one of them is detached
        # and the other's gradient doubled: a matmul less.
        pull = difference.detach() @ self.gram
        pull = pull.to(difference.dtype)
        error = difference.flatten().dot(pull.flatten()) / self._size(difference)
        return 2 * error - error.detach()

    def error_value(self, out: Tensor, target: Tensor) -> float:
        """`error` without gradients, by half of the multiplications."""
        difference = _by_position(out - target)
        total = 0.0
        for first in range(0, len(self.triangle), COLUMNS):
            # Rows of R are zero before their diagonal.
            rows = self.triangle[first : first + COLUMNS, first:]
            total += (difference[..., first:] @ rows.T).square().sum().item()
        return total / self._size(difference)

    def _size(self, difference: Tensor) -> int:
        """Numbers after W_O: of all positions of `difference` [b, P, Hq * Dv]."""
        return difference.shape[0] * difference.shape[1] * self.outputs

    @torch.no_grad()
    def _mean_error(self, out: Callable[[Tensor], Tensor], all_rows: Tensor) -> float:
        """Mean over `all_rows` of the error of `out(rows)`."""
        errors = []
        for rows in all_rows.split(self.batch):
            errors.append(self.error_value(out(rows), self.target(rows)) * len(rows))
        return sum(errors) / len(all_rows)

    def relative_error(self, kernels: LayerKernels) -> float:
        """Validation error of LESS over the sparse policy's."""
        kernels.eval()
        error = self._mean_error(lambda rows: self.output(kernels, rows), self.validation_rows)
        return error / self.sparse_error["validation"]

    def epoch(
        self, kernels: LayerKernels, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor]
    ) -> float:
        """One step of `optimizer` for each of the `batches` of rows.

        Returns the mean training error over the sparse policy's.
        """
        losses = []
        kernels.trains_in_half = True
        for rows in batches:
            out = self.output(kernels, rows)
            with autocast(self.device):
                error = self.error(out, self.target(rows))
            loss = error / self.sparse_error["train"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    def _shuffled_batches(self, size: int, order: torch.Generator) -> tuple[Tensor, ...]:
        """The training sequences in a new `order`, `size` at once."""
        permutation = torch.randperm(len(self.train_rows), generator=order)
        return self.train_rows[permutation].split(size)

    def fit(
        self,
        kernels: nn.Module,
        recipe: Recipe,
        label: str = "kernels",
        tick: Callable[[], None] = lambda: None,
    ) -> dict:
        """Train one layer's `kernels` in place and keep the weights of the best validation error.

        `tick` is called after each epoch. Returns the curves, and the seconds of the epochs, of the
        eviction passes before them and of the layer's share of the capture. Raises
        FloatingPointError, which says `label`, where the loss does not stay finite.
        """
        assert isinstance(kernels, LayerKernels)
        kernels.to(self.device).generator = torch.Generator(self.device).manual_seed(recipe.seed)
        optimizer = torch.optim.Adam(kernels.parameters(), lr=recipe.lr, fused=True)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.halve_every, gamma=0.5)
        order = torch.Generator().manual_seed(recipe.seed)
        begun = time.perf_counter()
        curve = [self.relative_error(kernels)]
        train_curve: list[float] = []
        best = float("inf")
        best_weights: dict[str, Tensor] = {}
        for epoch in range(1, recipe.epochs + 1):
            batches = self._shuffled_batches(recipe.batch, order)
            train_curve.append(self.epoch(kernels.train(), optimizer, batches))
            schedule.step()
            curve.append(self.relative_error(kernels))
            _check_finite(curve[-1], epoch, label, recipe)
            if curve[-1] < best:
                best = curve[-1]
                best_weights = _copy(kernels)
            tick()
        kernels.load_state_dict(best_weights)
        return {
            "train": train_curve,
            "validation": curve,
            "best": best,
            "baseline_plus": self.plus_error / self.sparse_error["validation"],
            # Of the epochs; kernels trained before lesslib timed the other two have this alone.
            "seconds": time.perf_counter() - begun,
            "seconds_eviction": self.eviction_seconds,
            "seconds_capture": self.data.seconds,
        }


def _by_position(x: Tensor) -> Tensor:
    """Attention outputs [b, Hq, P, Dv] as W_O takes them, [b, P, Hq * Dv]."""
    return x.transpose(1, 2).flatten(2)


def _check_finite(error: float, epoch: int, label: str, recipe: Recipe) -> None:
    """Raises FloatingPointError for an error that is infinite or NaN, which compares with none."""
    if not error < float("inf"):
        raise FloatingPointError(
            f"{label}: the loss is {error} after epoch {epoch}; lower --lr from {recipe.lr:g}"
        )


def _copy(kernels: nn.Module) -> dict[str, Tensor]:
    """The weights as they are now, apart from those that training goes on to change."""
    return {name: weights.detach().clone() for name, weights in kernels.state_dict().items()}
