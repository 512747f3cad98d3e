"""Swin v2's attention of transformers with fewer value features than query and key features in a head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, softmax

from deploy_prune.adapters.modules.hf_attention import heads_of


def forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
) -> tuple[Tensor, ...]:
    """hidden_states (batch · windows, tokens, width); attention_mask (windows, tokens, tokens)."""
    rows, tokens, _ = hidden_states.shape
    q, k = (normalize(heads_of(layer, hidden_states, self.qk_width), dim=-1) for layer in (self.query, self.key))
    v = heads_of(self.value, hidden_states, self.vo_width)
    heads = v.shape[1]
    scores = q @ k.transpose(-2, -1) * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
    table = self.continuous_position_bias_mlp(self.relative_coords_table).view(-1, heads)
    bias = table[self.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
    scores = scores + 16 * torch.sigmoid(bias).unsqueeze(0)
    if attention_mask is not None:
        windows = attention_mask.shape[0]
        mask = attention_mask.unsqueeze(1).unsqueeze(0)
        # the library adds its mask twice
        scores = scores.view(rows // windows, windows, heads, tokens, tokens) + mask + mask
        scores = scores.view(-1, heads, tokens, tokens)
    weights = self.dropout(softmax(scores, dim=-1))
    context = (weights @ v).transpose(1, 2).reshape(rows, tokens, -1)
    return (context, weights) if output_attentions else (context,)
