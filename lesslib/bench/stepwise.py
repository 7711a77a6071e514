"""Kernel training as the authors' released code does it, to compare with: all is dense, S x S.

At every training step the mask is built again, one query after the other, and LESS's weights are
written out for every pair of tokens. It gives the same outputs and gradients as ours.
"""

import torch
from torch import Tensor

from lesslib.policies import H2O


@torch.no_grad()
def stepwise_mask(logits: Tensor, policy: H2O) -> Tensor:
    """H2O's kept set, bool [B, H, S, S], built one query after the other.

    A query keeps the `heavy` tokens of the best scores and the newest ones; `logits` [B, H, S, S]
    are causal.
    """
    B, H, S, _ = logits.shape
    budget = policy.budget
    # probabilities summed over the queries so far, [B, H, S]
    score = logits[:, :, :budget].softmax(-1).sum(2)
    rows = []
    for t in range(budget, S):
        first_recent = t - policy.recent
        heaviest = score[..., :first_recent].topk(policy.heavy, -1).indices
        keep = torch.zeros_like(score, dtype=torch.bool).scatter(-1, heaviest, True)
        keep[..., first_recent : t + 1] = True
        score = (score + logits[:, :, t].softmax(-1)) * keep
        rows.append(keep)
    # until the slots are full, every query keeps all that it sees
    first_rows = torch.ones(budget, S, dtype=torch.bool, device=logits.device).tril()
    return torch.cat([first_rows.expand(B, H, -1, -1), torch.stack(rows, 2)], 2)


def stepwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: H2O,
    features: tuple[Tensor, Tensor],
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """(LESS, dense attention), [B, H, S, Dv] each, through S x S weights.

    q, k [B, H, S, D], v [B, H, S, Dv]; `features` are phi(q) and psi(k), [B, H, S, R] each.
    """
    phi, psi = features
    S = q.shape[2]
    lowest = torch.finfo(q.dtype).min
    tiny = torch.finfo(q.dtype).tiny

    # dense attention, [B, H, S, S]
    causal = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
    logits = torch.where(causal, q @ k.transpose(-1, -2) * scaling, lowest)
    target = logits.softmax(-1) @ v

    # what the slots hold, and what the low-rank state has absorbed
    keep = stepwise_mask(logits, policy)
    sparse = torch.where(keep, logits, lowest)
    evicted = causal & ~keep
    low_rank = (phi @ psi.transpose(-1, -2)) * evicted

    # both under one softmax, in log space
    low_rank_total = low_rank.sum(-1, keepdim=True).clamp(min=tiny).log()
    total = torch.logaddexp(low_rank_total, sparse.logsumexp(-1, keepdim=True))
    weights = (torch.where(evicted, low_rank.clamp(min=tiny).log(), sparse) - total).exp()
    return weights @ v, target
