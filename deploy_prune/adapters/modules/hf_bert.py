"""Self-attention of the BERT outline (BERT, RoBERTa, ELECTRA, ...) with unlike query/key and value widths."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deploy_prune.adapters.modules.hf_attention import attend, cached, heads_of


def forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    q, k = (heads_of(layer, hidden_states, self.qk_width) for layer in (self.query, self.key))
    v = heads_of(self.value, hidden_states, self.vo_width)
    k, v = cached(self, k, v, kwargs)
    return attend(self, q, k, v, attention_mask, self.dropout.p, **kwargs)
