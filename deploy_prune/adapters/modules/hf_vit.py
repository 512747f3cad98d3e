"""Attention of the ViT outline (ViT, DeiT, DINOv2, CLIP, Swin) with unlike query/key and value widths."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deploy_prune.adapters.modules.hf_attention import attend, heads_of


def forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    context, weights = _context(self, hidden_states, attention_mask, self.attention_dropout, self.scaling, kwargs)
    return self.o_proj(context), weights


def clip_forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    context, weights = _context(self, hidden_states, attention_mask, self.dropout, self.scale, kwargs)
    return self.out_proj(context), weights


def windowed_forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """hidden_states (batch · windows, tokens, width); attention_mask (windows, tokens, tokens) is added to scores."""
    bias = self.relative_position_bias()  # (1, heads, tokens, tokens)
    if attention_mask is not None:
        windows, tokens, _ = attention_mask.shape
        mask = attention_mask[None, :, None].expand(hidden_states.shape[0] // windows, -1, -1, -1, -1)
        bias = bias + mask.reshape(-1, 1, tokens, tokens)
    context, weights = _context(self, hidden_states, bias, self.attention_dropout, self.scaling, kwargs)
    return self.o_proj(context), weights


def _context(
    self: Any, x: Tensor, mask: Tensor | None, dropout: float, scaling: float, more: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    q, k = (heads_of(layer, x, self.qk_width) for layer in (self.q_proj, self.k_proj))
    v = heads_of(self.v_proj, x, self.vo_width)
    return attend(self, q, k, v, mask, dropout, **{**more, "scaling": scaling})
