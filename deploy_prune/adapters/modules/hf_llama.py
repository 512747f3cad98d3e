"""Attention of the Llama outline (Llama, Mistral, Qwen2, Qwen3, SmolLM3) with unlike query/key and value widths."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deploy_prune.adapters.modules.hf_attention import attend, cached, heads_of, turned


def forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    q, k = (heads_of(layer, hidden_states, self.qk_width) for layer in (self.q_proj, self.k_proj))
    v = heads_of(self.v_proj, hidden_states, self.vo_width)
    q, k = getattr(self, "q_norm", nn.Identity())(q), getattr(self, "k_norm", nn.Identity())(k)
    if is_rotary(self):
        pairs = getattr(self, "rotary_pairs", None)
        q, k = (turned(x, *position_embeddings, pairs) for x in (q, k))
    k, v = cached(self, k, v, kwargs)
    window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
    if window is not None:  # the mask has it already; for attention functions that make their own
        kwargs["sliding_window"] = window
    context, weights = attend(self, q, k, v, attention_mask, self.attention_dropout, **kwargs)
    return self.o_proj(context), weights


def is_rotary(attention: Any) -> bool:
    """Whether query and key are turned by position; some layers of SmolLM3 do without."""
    return bool(getattr(attention, "use_rope", True))
