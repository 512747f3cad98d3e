"""GPT-2's attention, query, key and value of one layer, with unlike query/key and value widths."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deploy_prune.adapters.modules.hf_attention import attend, cached


def forward(
    self: Any, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    rows, tokens, _ = hidden_states.shape
    qk, vo = self.num_heads * self.qk_width, self.num_heads * self.vo_width
    q, k, v = (
        part.view(rows, tokens, self.num_heads, -1).transpose(1, 2)
        for part in self.c_attn(hidden_states).split([qk, qk, vo], dim=2)
    )
    k, v = cached(self, k, v, kwargs)
    if self.reorder_and_upcast_attn and self.config._attn_implementation == "eager":
        context, weights = self._upcast_and_reordered_attn(q, k, v, attention_mask)
        context = context.reshape(rows, tokens, -1)
    else:
        context, weights = attend(self, q, k, v, attention_mask, self.attn_dropout.p, **kwargs)
    return self.resid_dropout(self.c_proj(context)), weights
