"""BERT's self-attention with unlike query/key and value widths."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.bert.modeling_bert import BertSelfAttention

from deploy_prune.adapters.modules.hf_attention import attend, heads_of


class UnevenBertSelfAttention(BertSelfAttention):
    qk_width: int
    vo_width: int

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        q, k = (heads_of(layer, hidden_states, self.qk_width) for layer in (self.query, self.key))
        v = heads_of(self.value, hidden_states, self.vo_width)
        return attend(self, q, k, v, attention_mask, self.dropout.p, **kwargs)
