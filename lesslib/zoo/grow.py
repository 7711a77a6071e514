"""Grow a Falcon out of a Llama that has learned something.

It begins with nearly the same function, and its key and value heads become one. A Falcon layer runs
attention and MLP side by side, so every layer of the Llama becomes two: one attends, and one has
the MLP, with an attention of its own whose output begins at 0. Each query head begins with a key
and value head of its own, turned so that all point one way, which attention does not notice;
`merge_heads` draws them together while the model trains (Ainslie et al., 2023, do it at one
stroke).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

from lesslib.hf import capture
from lesslib.util.hardware import autocast

# steps that fit a GELU MLP to a SwiGLU one, of FIT_TOKENS each
FIT = 1200
FIT_TOKENS = 2048
FIT_LEARNING_RATE = 3e-3


# ---------------------------------------------------------------- the model
def check_growable(llama: Any) -> None:
    """Raises ValueError naming what of `llama` the Falcon could not have."""
    config = llama.config
    needed = {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    other = []
    for name, value in needed.items():
        actual = getattr(config, name, None)
        if actual != value:
            other.append(f"{name}={actual!r}, not {value!r}")
    if other:
        raise ValueError(
            f"no Falcon grows out of this model: it has {'; '.join(other)}; give another --teacher"
        )
    rope = config.rope_parameters.get("rope_type", "default")
    if rope != "default":
        raise ValueError(
            "no Falcon grows out of this model: its rotary positions are scaled "
            f"({rope}); give another --teacher"
        )


def falcon_config(llama_config: Any, layers: int, **others: Any) -> FalconConfig:
    """A Falcon 7B's parts (parallel block, rotary, no bias) in the sizes of a Llama's config."""
    return FalconConfig(
        vocab_size=llama_config.vocab_size,
        hidden_size=llama_config.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=llama_config.num_attention_heads,
        max_position_embeddings=llama_config.max_position_embeddings,
        parallel_attn=True,
        bias=False,
        alibi=False,
        bos_token_id=llama_config.bos_token_id,
        eos_token_id=llama_config.eos_token_id,
        pad_token_id=llama_config.pad_token_id,
        **others,
    )


def grown_falcon(llama: Any, windows: Iterable[Tensor], seed: int) -> Any:
    """A Falcon of twice the layers that begins as `llama`, made to fit on `windows` [B, S].

    It has a key and value head to each query head. Its attentions hold `shares` [2, H], of each
    head in the two (key, value) that `merge_heads` leads to. Raises as `check_growable` does.
    """
    check_growable(llama)
    config = llama.config
    torch.manual_seed(seed)
    falcon: Any = FalconForCausalLM(
        falcon_config(
            config,
            2 * config.num_hidden_layers,
            multi_query=False,
            rope_parameters=dict(config.rope_parameters),
            layer_norm_epsilon=config.rms_norm_eps,
            ffn_hidden_size=config.intermediate_size * 3 // 2,
        )
    ).to(llama.device)
    falcon.get_input_embeddings().weight.data.copy_(llama.get_input_embeddings().weight)
    falcon.transformer.ln_f.weight.data.copy_(llama.model.norm.weight)
    seen = activations(llama, windows)
    for i, layer in enumerate(llama.model.layers):
        attending = falcon.transformer.h[2 * i]
        beside_mlp = falcon.transformer.h[2 * i + 1]
        # of every fourth token, [tokens / 4, E]
        x = seen["x", i][::4].double()
        _attend_as(attending, layer, x)
        attending.mlp.dense_4h_to_h.weight.data.zero_()
        _attend_to_nothing(beside_mlp, layer, x)
        fit_mlp(beside_mlp.mlp, layer.mlp, seen["in", i], seen["out", i])
    return falcon


def _attend_as(falcon_layer: Any, llama_layer: Any, x: Tensor) -> None:
    """Give a layer the attention of a Llama's, its heads turned to their first direction."""
    norm = llama_layer.input_layernorm
    _set_attention(falcon_layer, turned(*_head_weights(llama_layer), x, rank=0))
    falcon_layer.input_layernorm.weight.data.copy_(norm.weight)


def _attend_to_nothing(falcon_layer: Any, llama_layer: Any, x: Tensor) -> None:
    """Give the layer that will have the MLP an attention whose output is 0.

    Its heads begin turned to their second direction.
    """
    norm = llama_layer.post_attention_layernorm
    _set_attention(falcon_layer, turned(*_head_weights(llama_layer), x, rank=1))
    attention = falcon_layer.self_attention
    attention.dense.weight.data.zero_()
    falcon_layer.input_layernorm.weight.data.copy_(norm.weight)
    # it reads through the MLP's norm
    of_norms = (llama_layer.input_layernorm.weight / norm.weight).detach().clamp(-5, 5)
    attention.query_key_value.weight.data.mul_(of_norms)


def _head_weights(llama_layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wq, Wk, Wv [H, D, E] and Wo [E, H, D] of a Llama's layer, in float64."""
    attention = llama_layer.self_attn
    heads = attention.config.num_attention_heads
    Wq = attention.q_proj.weight.detach().double().unflatten(0, (heads, -1))
    Wk = attention.k_proj.weight.detach().double().unflatten(0, (heads, -1))
    Wv = attention.v_proj.weight.detach().double().unflatten(0, (heads, -1))
    Wo = attention.o_proj.weight.detach().double().unflatten(1, (heads, -1))
    return Wq, Wk, Wv, Wo


def _set_attention(falcon_layer: Any, heads: TurnedHeads) -> None:
    """Put heads, each with its query, key and value, into a layer's attention."""
    attention = falcon_layer.self_attention
    qkv = torch.stack([heads.Wq, heads.Wk, heads.Wv], 1)  # [H, 3, D, E]
    attention.query_key_value.weight.data.copy_(qkv.flatten(0, 2))
    attention.dense.weight.data.copy_(heads.Wo.flatten(1))
    key_shares = heads.key_shares / heads.key_shares.sum()
    value_shares = heads.value_shares / heads.value_shares.sum()
    attention.register_buffer("shares", torch.stack([key_shares, value_shares]).float())


# ---------------------------------------------------------------- what the Llama's layers read
def activations(llama: Any, windows: Iterable[Tensor]) -> dict[tuple[str, int], Tensor]:
    """By name and layer, for windows [B, S], what parts of a Llama read and give, [tokens, E].

    "x" is what attention reads, "in" and "out" what the MLP reads and gives.
    """
    kept: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    hooks = []
    for i, layer in enumerate(llama.model.layers):
        attention_hook = _keep_input(kept["x", i])
        hooks.append(layer.self_attn.k_proj.register_forward_hook(attention_hook))
        hooks.append(layer.mlp.register_forward_hook(_keep_input(kept["in", i])))
        hooks.append(layer.mlp.register_forward_hook(_keep_output(kept["out", i])))
    with capture(llama, _ignore):
        for ids in windows:
            llama(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {key: torch.cat(parts) for key, parts in kept.items()}


def _keep_input(parts: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that appends what a module reads, [B S, E]."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        parts.append(inputs[0].flatten(0, 1))

    return hook


def _keep_output(parts: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that appends what a module gives, [B S, E]."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        parts.append(output.flatten(0, 1))

    return hook


def _ignore(*attention: Any) -> None:
    """Keeps nothing of an attention."""


# ---------------------------------------------------------------- turning heads
class TurnedHeads(NamedTuple):
    """Weights of turned heads, and how much each carries in the common direction.

    Wq, Wk, Wv [H, D, E], Wo [E, H, D]; `key_shares` [H] of the keys in that direction,
    `value_shares` [H] of the values in all.
    """

    Wq: Tensor
    Wk: Tensor
    Wv: Tensor
    Wo: Tensor
    key_shares: Tensor
    value_shares: Tensor


def turned(Wq: Tensor, Wk: Tensor, Wv: Tensor, Wo: Tensor, x: Tensor, rank: int) -> TurnedHeads:
    """The same attention with all heads' keys and values turned to one direction.

    It is the direction that carries most (`rank` 0), the next most (1), ... Wq, Wk, Wv [H, D, E],
    Wo [E, H, D] and inputs x [N, E], in float64. Needs H > `rank`, D (`rank` + 1) <= E and inputs
    that span E dimensions (else torch.linalg.LinAlgError).
    """
    Wq, Wk, key_shares = _turned_keys(Wq, Wk, x, rank)
    Wv, Wo, value_shares = _turned_values(Wv, Wo, x, rank)
    return TurnedHeads(Wq, Wk, Wv, Wo, key_shares, value_shares)


def _turned_keys(Wq: Tensor, Wk: Tensor, x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned, and [H] how much each head's keys carry.

    A key's two dimensions of one RoPE frequency are a complex number: to turn and scale it changes
    no product with a query that is turned alike and scaled oppositely.
    """
    k = torch.complex(*Wk.chunk(2, 1))  # [H, D / 2, E]
    q = torch.complex(*Wq.chunk(2, 1))
    keys = torch.einsum("ne,hfe->nhf", x.to(k.dtype), k)
    queries = torch.einsum("ne,hfe->nhf", x.to(q.dtype), q)
    size = keys.abs().square().mean(0).sqrt()  # [H, D / 2]
    carries = size * queries.abs().square().mean(0).sqrt()
    # the common direction of every frequency f, of keys by what they carry
    weighted = keys / size * carries
    gram = torch.einsum("nhf,ngf->fhg", weighted.conj(), weighted) / len(x)
    eigenvectors = torch.linalg.eigh(gram).eigenvectors
    common = torch.einsum("nhf,fh->nf", weighted, eigenvectors[:, :, -1 - rank])
    along = torch.einsum("nf,nhf->hf", common.conj(), keys / size)
    phase = along.conj() / along.abs()
    cosine = along.abs() / len(x) / common.abs().square().mean(0).sqrt()
    k = k / size[..., None] * phase[..., None]
    q = q * size[..., None] * phase[..., None]
    return _as_real(q), _as_real(k), (carries * cosine).mean(1)


def _as_real(weight: Tensor) -> Tensor:
    """[H, D, E] of a complex weight [H, D / 2, E]."""
    return torch.cat([weight.real, weight.imag], 1)


def _turned_values(Wv: Tensor, Wo: Tensor, x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and outputs turned, and [H] how much each head's values carry.

    A value may go through any invertible map that the output's weights undo.
    """
    D = Wv.shape[1]
    root = torch.linalg.cholesky(x.T @ x / len(x))
    # what heads add to the output, of inputs made white
    added = torch.einsum("ohd,hde->hoe", Wo, Wv) @ root
    directions = torch.linalg.svd(added.flatten(0, 1), full_matrices=False).Vh
    basis = directions[D * rank : D * (rank + 1)]
    target = x @ torch.linalg.solve(root.T, basis.T)  # [N, D]
    values = []
    outputs = []
    for v, o in zip(Wv, Wo.unbind(1), strict=True):
        # to white values, then by the rotation that comes nearest to the target
        covariance_root = torch.linalg.cholesky(v @ x.T @ (x @ v.T) / len(x))
        white = torch.linalg.solve_triangular(covariance_root, v @ x.T, upper=False)
        U, _, Vh = torch.linalg.svd(target.T @ white.T / len(x))
        rotation = U @ Vh
        values.append(rotation @ torch.linalg.solve_triangular(covariance_root, v, upper=False))
        outputs.append(o @ covariance_root @ rotation.T)
    return torch.stack(values), torch.stack(outputs, 1), added.square().sum((1, 2))


# ---------------------------------------------------------------- the MLP
def fit_mlp(falcon_mlp: Any, llama_mlp: Any, x: Tensor, y: Tensor) -> None:
    """Train a Falcon's GELU MLP to give y [N, E] for x [N, E].

    It begins from the first layer of the Llama's SwiGLU MLP.
    """
    gate = llama_mlp.gate_proj.weight
    more_units = len(falcon_mlp.dense_h_to_4h.weight) - len(gate)
    first_layer = torch.cat([gate, llama_mlp.up_proj.weight[:more_units]])
    falcon_mlp.dense_h_to_4h.weight.data.copy_(first_layer)
    falcon_mlp.dense_4h_to_h.weight.data.zero_()
    optimizer = torch.optim.AdamW(
        falcon_mlp.parameters(), lr=FIT_LEARNING_RATE, weight_decay=0, fused=True
    )
    for step in range(FIT):
        rise = min(1, (step + 1) / 50)
        fall = 1 - step / FIT
        optimizer.param_groups[0]["lr"] = FIT_LEARNING_RATE * rise * fall + 1e-5
        tokens = torch.randint(len(x), (FIT_TOKENS,))
        with autocast(x.device):
            out = falcon_mlp(x[tokens])
        F.mse_loss(out.float(), y[tokens]).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- heads that become one
@torch.no_grad()
def merge_heads(falcon: Any, part: float) -> None:
    """Move every key and value head by `part` of its way to the shared one.

    The shared one is the mean of all by `shares`.
    """
    for layer in falcon.transformer.h:
        attention = layer.self_attention
        sizes = (attention.num_heads, 3, attention.head_dim)
        qkv = attention.query_key_value.weight.data.unflatten(0, sizes)  # [H, 3, D, E]
        keys = qkv[:, 1]
        values = qkv[:, 2]
        key_shares, value_shares = attention.shares
        keys.lerp_(torch.einsum("h,hde->de", key_shares, keys), part)
        values.lerp_(torch.einsum("h,hde->de", value_shares, values), part)


def multi_query(falcon: Any) -> FalconForCausalLM:
    """The multi-query model that `falcon` has become.

    Raises ValueError where its heads are not one yet.
    """
    config = FalconConfig(**falcon.config.to_dict() | {"multi_query": True})
    one: Any = FalconForCausalLM(config).to(falcon.device)
    state = {}
    for name, weight in falcon.state_dict().items():
        if name.endswith("query_key_value.weight"):
            state[name] = _one_head(name, weight, falcon.config.num_attention_heads)
        elif not name.endswith("shares"):
            state[name] = weight
    one.load_state_dict(state)
    return one


def _one_head(name: str, weight: Tensor, heads: int) -> Tensor:
    """Weights [3 H D, E] of queries, keys and values with the first key and value head alone."""
    q, k, v = weight.unflatten(0, (heads, 3, -1)).unbind(1)  # [H, D, E]
    apart = torch.stack([(k - k[0]).abs().max(), (v - v[0]).abs().max()]).max().item()
    if not apart <= 1e-5:  # NaN is not
        raise ValueError(
            f"key and value heads of {name} are still {apart:.1e} apart: merge them all the way "
            "first"
        )
    return torch.cat([q.flatten(0, 1), k[0], v[0]])
