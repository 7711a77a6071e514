"""The loss of pretraining: answers count more than other text, a teacher beside the text."""

import torch
import torch.nn.functional as F
from torch import Tensor

# what the text's own next token weighs beside a teacher's probabilities
TRUTH = 0.25


def answer_weights(ids: Tensor, colon: int, newline: int, weight: float) -> Tensor:
    """[B, S]: how much the token after each of ids [B, S] counts in the loss.

    What follows a `colon` in its line, as answers do, counts `weight` times.
    """
    last_colon = _last_position(ids, colon)
    last_newline = _last_position(ids, newline)
    weights = torch.where(last_colon > last_newline, weight, 1.0)
    # nothing follows; the row is kept, since logits without it would have to be copied
    weights[:, -1] = 0
    return weights


def _last_position(ids: Tensor, token: int) -> Tensor:
    """[B, S]: where `token` stood last, up to every position; -1 where it has not come yet."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    return torch.where(ids == token, positions, -1).cummax(1).values


def weighted_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, S, V] on the ids [B, S] that follow, by weights [B, S]."""
    following = ids.roll(-1, 1).flatten()
    return _weighted_mean(logits, following, weights)


def distilled_loss(logits: Tensor, ids: Tensor, weights: Tensor, teacher_logits: Tensor) -> Tensor:
    """The cross-entropy on a teacher's probabilities, and TRUTH times that on ids; as above."""
    following = ids.roll(-1, 1).flatten()
    probabilities = teacher_logits.float().softmax(-1).flatten(0, 1)  # [B S, V]
    truth = torch.full_like(probabilities[:, :1], TRUTH)
    target = probabilities.scatter_add_(1, following[:, None], truth)
    return _weighted_mean(logits, target, weights)


def _weighted_mean(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Of the cross-entropies on a target: ids [B S] or probabilities [B S, V]."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), target, reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()
