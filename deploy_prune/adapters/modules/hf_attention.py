"""Transformers' attention with unlike query/key and value widths, for every family that shares its outline.

The library's classes view query, key and value with one head width and take the scale from it; after a cut of `qk` or
`vo` units the widths differ and the scale must stay what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from deploy_prune.adapters.modules.past import taken_past


@cache
def uneven(cls: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """The subclass of the attention `cls` that computes by `forward`, with `qk_width` and `vo_width` features a head.

    Instances are made by assigning their class, never by a constructor.
    """
    return type(f"Uneven{cls.__name__}", (cls,), {"forward": forward, "__module__": __name__})


def heads_of(layer: nn.Module, x: Tensor, width: int) -> Tensor:
    """A projection's output by head: (batch, tokens, heads · width) -> (batch, heads, tokens, width)."""
    y: Tensor = layer(x)
    return y.view(*x.shape[:-1], -1, width).transpose(1, 2)


def cached(module: Any, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Key and value (batch, kv heads, tokens, width) after those of earlier tokens, where there is a cache among the
    attention's keyword arguments; it is taken out of them."""
    past = taken_past(arguments)
    if past is None:
        return key, value
    own = getattr(past, "self_attention_cache", past)  # of an encoder-decoder cache
    joined: tuple[Tensor, Tensor] = own.update(key, value, module.layer_idx)
    return joined


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """softmax(scaling · Q Kᵀ + mask) V by the attention function that the model's config names.

    `query` (batch, heads, tokens, qk width), `key` and `value` (batch, kv heads, tokens, width); the result is
    (batch, tokens, heads · vo width), with the attention weights where the function gives them.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = _eager_of(module)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    scaling = more.pop("scaling", None) or module.scaling
    output, weights = function(
        module, query, key, value, mask, dropout=dropout if module.training else 0.0, scaling=scaling, **more
    )
    return output.reshape(query.shape[0], query.shape[2], -1).contiguous(), weights


def turned(x: Tensor, cos: Tensor, sin: Tensor, pairs: Tensor | None) -> Tensor:
    """Rotary embedding on the pairs of dimensions that stayed.

    x (batch, heads, tokens, 2p) holds in every head p first halves, then p second halves; `pairs` (kv heads, p) says
    which of the d/2 original pairs they were (None: all), `cos` and `sin` (batch, tokens, d) are the model's.
    """
    if pairs is None:
        own_cos, own_sin = cos.unsqueeze(1), sin.unsqueeze(1)
    else:
        group = x.shape[1] // pairs.shape[0]
        index = torch.cat([pairs, pairs], dim=-1).repeat_interleave(group, dim=0)  # (heads, 2p); halves turn alike
        own_cos, own_sin = (t[:, :, index].transpose(1, 2).to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * own_cos + torch.cat([-second, first], dim=-1) * own_sin


def keep_pairs(module: Any, heads: list[int], kept: list[int], slots: int) -> None:
    """Remember which original rotary pairs each kept head still has: `rotary_pairs` (kv heads, pairs), int64.

    `kept` are unit indices head · slots + pair at the uncut module, whose own memory, if it was cut before, is
    followed.
    """
    pairs = torch.tensor(kept).view(len(heads), -1) % slots
    before = getattr(module, "rotary_pairs", None)
    if before is not None:
        pairs = before[torch.tensor(heads)].cpu().gather(1, pairs)
        del module.rotary_pairs
    device = next(module.parameters()).device
    module.register_buffer("rotary_pairs", pairs.to(device), persistent=False)


def _eager_of(module: Any) -> Any:
    """The `eager_attention_forward` of the family, which lies beside the library's own class."""
    import sys

    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise TypeError(f"{type(module).__name__} has no eager attention beside it")
