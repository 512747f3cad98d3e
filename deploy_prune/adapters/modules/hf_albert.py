"""ALBERT's attention, whose residual connection and norm lie inside: uneven, and vanished."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deploy_prune.adapters.modules.hf_attention import attend, heads_of
from deploy_prune.adapters.modules.vanished import Absent, Vanished


def forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    q, k = (heads_of(layer, hidden_states, self.qk_width) for layer in (self.query, self.key))
    v = heads_of(self.value, hidden_states, self.vo_width)
    context, weights = attend(self, q, k, v, attention_mask, self.attention_dropout.p, **kwargs)
    return self.LayerNorm(hidden_states + self.output_dropout(self.dense(context))), weights


class VanishedAlbertAttention(Absent):
    """What stays of an attention without heads: norm(x + bias of the output projection)."""

    def __init__(self, norm: nn.Module, bias: Tensor | None) -> None:
        super().__init__()
        self.dense, self.LayerNorm = Vanished(bias), norm

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.LayerNorm(hidden_states + self.dense(hidden_states)), None
