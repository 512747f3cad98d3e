"""Llama's attention with unlike query/key and value widths and the rotary pairs that stayed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from deploy_prune.adapters.modules.hf_attention import attend, heads_of, turned


class UnevenLlamaAttention(LlamaAttention):
    qk_width: int
    vo_width: int

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k = (heads_of(layer, hidden_states, self.qk_width) for layer in (self.q_proj, self.k_proj))
        v = heads_of(self.v_proj, hidden_states, self.vo_width)
        cos, sin = position_embeddings
        pairs = getattr(self, "rotary_pairs", None)
        if pairs is None:  # only values were cut
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        else:
            q, k = (turned(x, cos, sin, pairs) for x in (q, k))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        context, weights = attend(self, q, k, v, attention_mask, self.attention_dropout, **kwargs)
        return self.o_proj(context), weights
