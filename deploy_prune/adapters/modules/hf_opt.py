"""OPT's attention with unlike query/key and value widths; it scales the query before its heads are told apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deploy_prune.adapters.modules.hf_attention import attend, cached, heads_of


def forward(
    self: Any, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    q, k = (heads_of(layer, hidden_states, self.qk_width) for layer in (self.q_proj, self.k_proj))
    v = heads_of(self.v_proj, hidden_states, self.vo_width)
    k, v = cached(self, k, v, kwargs)
    context, weights = attend(self, q * self.scaling, k, v, attention_mask, self.dropout, **{**kwargs, "scaling": 1.0})
    return self.out_proj(context), weights
