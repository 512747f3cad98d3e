"""timm's windowed attention with unlike query/key and value widths."""

from __future__ import annotations

import math
from typing import cast

import torch
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor
from torch.nn.functional import normalize


class UnevenWindowAttention(WindowAttention):
    """Swin's attention whose heads have `qk_width` query/key and `vo_width` value features; `scale` stays."""

    qk_width: int
    vo_width: int

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (windows · batch, tokens, width) -> the same; `mask` (windows, tokens, tokens) is added to the scores."""
        q, k, v = _by_head(self.qkv(x), self.num_heads, self.qk_width)
        scores = (q * self.scale) @ k.transpose(-2, -1) + self._get_rel_pos_bias()
        return cast(Tensor, self.proj_drop(self.proj(_attended(scores, v, mask, self.attn_drop))))


class UnevenWindowAttentionV2(WindowAttentionV2):
    """Swin v2's attention with heads and value features cut; the width of queries and keys stays."""

    qk_width: int
    vo_width: int

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As in `UnevenWindowAttention`; scores are cosines, scaled per head."""
        qkv = self.qkv(x)
        if self.q_bias is not None:
            qkv = qkv + torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = _by_head(qkv, self.num_heads, self.qk_width)
        scale = torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        scores = normalize(q, dim=-1) @ normalize(k, dim=-1).transpose(-2, -1) * scale
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        tokens = self.window_size[0] * self.window_size[1]
        bias = table[self.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        scores = scores + 16 * torch.sigmoid(bias).unsqueeze(0)
        return cast(Tensor, self.proj_drop(self.proj(_attended(scores, v, mask, self.attn_drop))))


def _by_head(qkv: Tensor, heads: int, qk_width: int) -> tuple[Tensor, ...]:
    """Fused projections (rows, tokens, features) by head: three of (rows, heads, tokens, width)."""
    qk = heads * qk_width
    rows, tokens, features = qkv.shape
    parts = qkv.split([qk, qk, features - 2 * qk], -1)
    return tuple(part.view(rows, tokens, heads, -1).transpose(1, 2) for part in parts)


def _attended(scores: Tensor, v: Tensor, mask: Tensor | None, dropout: torch.nn.Module) -> Tensor:
    """softmax(scores + mask of the window) V: (rows, tokens, heads · width)."""
    rows, heads, tokens, _ = v.shape
    if mask is not None:
        scores = scores.view(-1, mask.shape[0], heads, tokens, tokens) + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, heads, tokens, tokens)
    return (dropout(scores.softmax(-1)) @ v).transpose(1, 2).reshape(rows, tokens, -1)
