"""The readable spec: LESS one token at a time, in plain loops. Slow on purpose; every fast form
is tested against it.

It takes a policy's fields but none of its code, so that a slip in `lesslib.policies` cannot hide
here too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy,
    phi: Tensor | None = None,
    psi: Tensor | None = None,
    real: Tensor | None = None,
    scaling: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, S, Dv] and eviction times [B, Hkv, S] of a policy, with LESS where `phi` and
    `psi` are given.

    q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]; phi [B, Hq, S, R] and psi [B, Hkv, S, R]
    are the kernels' features of q and k, in order of position; `real` [B, S] is False for
    padding.
    """
    B, Hq, S, D = q.shape
    Hkv, G = k.shape[1], Hq // k.shape[1]
    scaling = D**-0.5 if scaling is None else scaling
    out = torch.zeros(B, Hq, S, v.shape[-1], dtype=q.dtype)
    times = torch.full((B, Hkv, S), torch.iinfo(torch.int32).max, dtype=torch.int32)
    for b in range(B):
        kept: list[list[int]] = [[] for _ in range(Hkv)]
        score: list[dict[int, float]] = [{} for _ in range(Hkv)]
        R = 0 if psi is None else psi.shape[-1]
        H, z = (
            [torch.zeros(R, v.shape[-1], dtype=q.dtype)] * Hkv,
            [torch.zeros(R, dtype=q.dtype)] * Hkv,
        )
        tokens = [t for t in range(S) if real is None or real[b, t]]
        for t in set(range(S)) - set(tokens):
            out[b, :, t] = v[b, :, t].repeat_interleave(G, 0)  # a padded query attends itself
        for n, t in enumerate(tokens):
            rows = []  # this query's probabilities over what each key-value head holds
            for h in range(Hkv):
                kept[h].append(t)
                score[h][t] = 0.0
                for g in range(h * G, (h + 1) * G):
                    logits = q[b, g, t] @ k[b, h, kept[h]].T * scaling
                    weights = logits.exp()
                    numerator, denominator = weights @ v[b, h, kept[h]], weights.sum()
                    if phi is not None:
                        numerator = numerator + phi[b, g, t] @ H[h]
                        denominator = denominator + phi[b, g, t] @ z[h]
                    out[b, g, t] = numerator / denominator
                    if policy.name == "h2o" and policy.scores == "full":
                        everything = [j for j in tokens if j <= t]
                        rows.append(
                            weights / (q[b, g, t] @ k[b, h, everything].T * scaling).exp().sum()
                        )
                    else:
                        rows.append(weights / weights.sum())
            for h in range(Hkv):
                for i, j in enumerate(kept[h]):
                    if policy.name == "h2o":
                        score[h][j] += sum(float(rows[g][i]) for g in range(h * G, (h + 1) * G))
                    elif policy.name == "tova":
                        score[h][j] = sum(float(row[i]) for row in rows) / Hq
                if policy.budget is None or len(kept[h]) <= policy.budget:
                    continue
                if policy.name == "h2o":
                    may_leave = [
                        j for j in kept[h] if j not in tokens[max(0, n + 1 - policy.recent) : n + 1]
                    ]
                    leaver = min(may_leave, key=lambda j: score[h][j])
                elif policy.name == "tova":
                    leaver = min(kept[h], key=lambda j: score[h][j])
                else:
                    leaver = min(j for j in kept[h] if j not in tokens[: policy.sinks])
                kept[h].remove(leaver)
                times[b, h, leaver] = t + 1
                if psi is not None:
                    H[h] = H[h] + torch.outer(
                        psi[b, h, leaver], v[b, h, leaver]
                    )  # a new tensor: gradients need the old one
                    z[h] = z[h] + psi[b, h, leaver]
    return out, times
