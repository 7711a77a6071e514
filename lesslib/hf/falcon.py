"""Falcon, which does not use the attention interface: a subclass in its registry does."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.falcon import modeling_falcon as falcon

from lesslib.hf.interface import (
    DECODING,
    WHOLE_SEQUENCE,
    decoding_attention,
    whole_sequence_attention,
)


class FalconLessAttention(falcon.FalconAttention):
    """Falcon's attention through our functions; heads are split by group."""

    def forward(
        self,
        hidden_states,
        alibi,
        attention_mask,
        layer_past=None,
        position_embeddings=None,
        **kwargs,
    ):
        if alibi is not None:
            raise NotImplementedError(
                "Falcon with alibi is not implemented: use one with rotary positions (alibi=False),"
                " as 7B and 40B"
            )
        fused = self.query_key_value(hidden_states)
        fused = fused.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))  # [B, S, Hkv, G + 2, D]
        q = fused[..., :-2, :].flatten(2, 3).transpose(1, 2)
        k = fused[..., -2, :].transpose(1, 2)
        v = fused[..., -1, :].transpose(1, 2)
        q, k = falcon.apply_rotary_pos_emb(q, k, *position_embeddings)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        attention = whole_sequence_attention
        if self.config._attn_implementation == DECODING:
            attention = decoding_attention
        scaling = self.head_dim**-0.5
        out, weights = attention(self, q, k, v, attention_mask, scaling=scaling, **kwargs)
        return self.dense(out.flatten(2)), weights


def is_falcon(model: PreTrainedModel) -> bool:
    return isinstance(model, falcon.FalconPreTrainedModel)


FALCON_CLASSES: dict = falcon.FALCON_ATTENTION_CLASSES
FALCON_CLASSES[WHOLE_SEQUENCE] = FalconLessAttention
FALCON_CLASSES[DECODING] = FalconLessAttention
