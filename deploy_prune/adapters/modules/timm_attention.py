"""timm's attention with unlike query/key and value widths."""

from __future__ import annotations

from timm.layers import Attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class UnevenAttention(Attention):
    """timm.layers.Attention whose heads have `qk_width` query/key and `vo_width` value features; `scale` stays the
    dense model's. Made from an Attention by assigning its class, never by a constructor."""

    qk_width: int
    vo_width: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (batch, tokens, width) -> the same."""
        rows, tokens, _ = x.shape
        qk, vo = self.num_heads * self.qk_width, self.num_heads * self.vo_width
        q, k, v = (
            part.view(rows, tokens, self.num_heads, -1).transpose(1, 2) for part in self.qkv(x).split([qk, qk, vo], -1)
        )
        y = scaled_dot_product_attention(
            self.q_norm(q),
            self.k_norm(k),
            v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(rows, tokens, vo)))
