"""Grow a Falcon out of a Llama that has learned something: it begins with nearly the same function, and its key and value heads become one.

A Falcon layer runs attention and MLP side by side, so every layer of the Llama becomes two: one attends, and one has the MLP, with an
attention of its own whose output begins at 0. Each query head begins with a key and value head of its own, turned so that all point one
way, which attention does not notice; `merge_heads` draws them together while the model trains (Ainslie et al., 2023, do it at one stroke).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM

from lesslib.hf import capture
from lesslib.util.hardware import autocast

FIT = 1200  # steps that fit a GELU MLP to a SwiGLU one, of 2,048 tokens each


def activations(llama: Any, windows: Iterable[Tensor]) -> dict[tuple[str, int], Tensor]:
    """By name and layer: what attention reads ("x") and what the MLP reads and gives ("in", "out"), [tokens, E], for windows [B, S]."""
    kept, hooks = defaultdict[tuple[str, int], list[Tensor]](list), []
    for i, layer in enumerate(llama.model.layers):
        for name, module, of_output in (
            ("x", layer.self_attn.k_proj, False),
            ("in", layer.mlp, False),
            ("out", layer.mlp, True),
        ):

            def keep(module, inputs, output, key=(name, i), of_output=of_output) -> None:
                kept[key].append((output if of_output else inputs[0]).flatten(0, 1))

            hooks.append(module.register_forward_hook(keep))
    with capture(llama, lambda *attention: None):
        for ids in windows:
            llama(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {key: torch.cat(parts) for key, parts in kept.items()}


def turned(
    Wq: Tensor, Wk: Tensor, Wv: Tensor, Wo: Tensor, x: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same attention with all heads' keys and values turned to the direction that carries most (`rank` 0), the next most (1), ...

    Wq, Wk, Wv [H, D, E], Wo [E, H, D] and inputs x [N, E], in float64. A key's two dimensions of one RoPE frequency are a complex number:
    to turn and scale it changes no product with a query that is turned alike and scaled oppositely. A value may go through any
    invertible map that the output's weights undo. Returns the weights and, [H], how much each head's keys carry in that direction, and its
    values in all. Needs H > `rank`, D (`rank` + 1) <= E and inputs that span E dimensions (else torch.linalg.LinAlgError).
    """
    k, q = (torch.complex(*W.chunk(2, 1)) for W in (Wk, Wq))  # [H, D / 2, E]
    seen, asked = (torch.einsum("ne,hfe->nhf", x.to(w.dtype), w) for w in (k, q))
    size = seen.abs().square().mean(0).sqrt()
    carries = size * asked.abs().square().mean(0).sqrt()
    weighted = seen / size * carries
    gram = torch.einsum("nhf,ngf->fhg", weighted.conj(), weighted) / len(x)
    common = torch.einsum(
        "nhf,fh->nf", weighted, torch.linalg.eigh(gram).eigenvectors[:, :, -1 - rank]
    )
    along = torch.einsum("nf,nhf->hf", common.conj(), seen / size)
    phase, cosine = (
        along.conj() / along.abs(),
        along.abs() / len(x) / common.abs().square().mean(0).sqrt(),
    )
    k, q = k / size[..., None] * phase[..., None], q * size[..., None] * phase[..., None]

    D, root = Wv.shape[1], torch.linalg.cholesky(x.T @ x / len(x))
    given = (
        torch.einsum("ohd,hde->hoe", Wo, Wv) @ root
    )  # what heads add to the output, of inputs made white
    basis = torch.linalg.svd(given.flatten(0, 1), full_matrices=False).Vh[D * rank : D * (rank + 1)]
    target, values, outputs = x @ torch.linalg.solve(root.T, basis.T), [], []
    for v, o in zip(Wv, Wo.unbind(1), strict=True):
        own = torch.linalg.cholesky(v @ x.T @ (x @ v.T) / len(x))
        white = torch.linalg.solve_triangular(own, v @ x.T, upper=False)
        U, _, Vh = torch.linalg.svd(target.T @ white.T / len(x))
        values.append(U @ Vh @ torch.linalg.solve_triangular(own, v, upper=False))
        outputs.append(o @ own @ (U @ Vh).T)
    Wq, Wk = (torch.cat([w.real, w.imag], 1) for w in (q, k))
    return (
        Wq,
        Wk,
        torch.stack(values),
        torch.stack(outputs, 1),
        (carries * cosine).mean(1),
        given.square().sum((1, 2)),
    )


def fit_mlp(mine: Any, its: Any, x: Tensor, y: Tensor) -> None:
    """Train Falcon's GELU MLP `mine` to give y [N, E] for x [N, E], from the first layer of `its`, Llama's."""
    wide = len(mine.dense_h_to_4h.weight) - len(its.gate_proj.weight)
    mine.dense_h_to_4h.weight.data.copy_(
        torch.cat([its.gate_proj.weight, its.up_proj.weight[:wide]])
    )
    mine.dense_4h_to_h.weight.data.zero_()
    optimizer = torch.optim.AdamW(mine.parameters(), lr=3e-3, weight_decay=0, fused=True)
    for step in range(FIT):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / FIT) + 1e-5
        some = torch.randint(len(x), (2048,))
        with autocast(x.device):
            out = mine(x[some])
        F.mse_loss(out.float(), y[some]).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_growable(llama: Any) -> None:
    """Raises ValueError naming what of `llama` the Falcon could not have."""
    c = llama.config
    wanted = {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "num_key_value_heads": c.num_attention_heads,
        "head_dim": c.hidden_size // c.num_attention_heads,
    }
    if other := [
        f"{n}={getattr(c, n, None)!r}, not {value!r}"
        for n, value in wanted.items()
        if getattr(c, n, None) != value
    ]:
        raise ValueError(
            f"no Falcon grows out of this model: it has {'; '.join(other)}; give another --teacher"
        )
    if (kind := c.rope_parameters.get("rope_type", "default")) != "default":
        raise ValueError(
            f"no Falcon grows out of this model: its rotary positions are scaled ({kind}); give another --teacher"
        )


def grown_falcon(llama: Any, windows: Iterable[Tensor], seed: int) -> Any:
    """A Falcon of twice the layers that begins as `llama`, with a key and value head to each query head; made to fit on `windows` [B, S].

    Its attentions hold `shares` [2, H], of each head in the two that `merge_heads` leads to. Raises as `check_growable` does.
    """
    check_growable(llama)
    c = llama.config
    H, D, mlp = c.num_attention_heads, c.head_dim, c.intermediate_size * 3 // 2
    torch.manual_seed(seed)
    falcon: Any = FalconForCausalLM(
        FalconConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_hidden_layers=2 * c.num_hidden_layers,
            num_attention_heads=H,
            max_position_embeddings=c.max_position_embeddings,
            multi_query=False,
            parallel_attn=True,
            bias=False,
            alibi=False,
            rope_parameters=dict(c.rope_parameters),
            layer_norm_epsilon=c.rms_norm_eps,
            ffn_hidden_size=mlp,
            bos_token_id=c.bos_token_id,
            eos_token_id=c.eos_token_id,
            pad_token_id=c.pad_token_id,
        )
    ).to(llama.device)
    falcon.get_input_embeddings().weight.data.copy_(llama.get_input_embeddings().weight)
    falcon.transformer.ln_f.weight.data.copy_(llama.model.norm.weight)
    acts = activations(llama, windows)
    for i, layer in enumerate(llama.model.layers):
        a, x = layer.self_attn, acts["x", i][::4].double()
        Wq, Wk, Wv = (
            p.weight.detach().double().unflatten(0, (H, D)) for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        Wo = a.o_proj.weight.detach().double().unflatten(1, (H, D))
        for part, norm in enumerate((layer.input_layernorm, layer.post_attention_layernorm)):
            mine = falcon.transformer.h[2 * i + part]
            *qkv, out, key_shares, value_shares = turned(Wq, Wk, Wv, Wo, x, part)
            attention = mine.self_attention
            attention.query_key_value.weight.data.copy_(torch.stack(qkv, 1).flatten(0, 2))
            attention.dense.weight.data.copy_(out.flatten(1) * (part == 0))
            mine.input_layernorm.weight.data.copy_(norm.weight)
            if part:  # it reads through the MLP's norm
                attention.query_key_value.weight.data.mul_(
                    (layer.input_layernorm.weight / norm.weight).detach().clamp(-5, 5)
                )
            shares = torch.stack([key_shares / key_shares.sum(), value_shares / value_shares.sum()])
            attention.register_buffer("shares", shares.float())
        falcon.transformer.h[2 * i].mlp.dense_4h_to_h.weight.data.zero_()
        fit_mlp(mine.mlp, layer.mlp, acts["in", i], acts["out", i])
    return falcon


@torch.no_grad()
def merge_heads(falcon: Any, part: float) -> None:
    """Move every key and value head by `part` of its way to the shared one, the mean of all by `shares`."""
    for layer in falcon.transformer.h:
        a = layer.self_attention
        W = a.query_key_value.weight.data.unflatten(0, (a.num_heads, 3, a.head_dim))
        for which in (0, 1):
            W[:, 1 + which].lerp_(torch.einsum("h,hde->de", a.shares[which], W[:, 1 + which]), part)


def multi_query(falcon: Any) -> FalconForCausalLM:
    """The multi-query model that `falcon` has become. Raises ValueError where its heads are not one yet."""
    one: Any = FalconForCausalLM(
        FalconConfig(**falcon.config.to_dict() | {"multi_query": True})
    ).to(falcon.device)
    state = {n: t for n, t in falcon.state_dict().items() if not n.endswith("shares")}
    for name in [n for n in state if n.endswith("query_key_value.weight")]:
        q, k, v = state[name].unflatten(0, (falcon.config.num_attention_heads, 3, -1)).unbind(1)
        apart = torch.stack([(w - w[0]).abs().max() for w in (k, v)]).max().item()
        if not apart <= 1e-5:  # NaN is not
            raise ValueError(
                f"key and value heads of {name} are still {apart:.1e} apart: merge them all the way first"
            )
        state[name] = torch.cat([q.flatten(0, 1), k[0], v[0]])
    one.load_state_dict(state)
    return one
