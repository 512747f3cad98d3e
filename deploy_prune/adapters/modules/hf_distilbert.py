"""DistilBERT's self-attention with unlike query/key and value widths."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deploy_prune.adapters.modules.hf_attention import attend, heads_of


def forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    q, k = (heads_of(layer, hidden_states, self.qk_width) for layer in (self.q_lin, self.k_lin))
    v = heads_of(self.v_lin, hidden_states, self.vo_width)
    context, weights = attend(self, q, k, v, attention_mask, self.dropout.p, **kwargs)
    return self.out_lin(context), weights
