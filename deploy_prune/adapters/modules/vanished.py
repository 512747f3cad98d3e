"""What stands where a sublayer was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deploy_prune.adapters.modules.past import taken_past


class Absent(nn.Module):
    """Base of what stands for a sublayer that is gone.

    In front of a key/value cache an attention that is gone still says how many tokens went by: models ask one layer's
    place in the cache for the length of the past. One number per token, never read, answers. `layer_idx` is that place,
    None for sublayers without.
    """

    layer_idx: int | None = None

    def count(self, hidden_states: Tensor, arguments: dict[str, Any]) -> None:
        past = taken_past(arguments)
        if past is not None and self.layer_idx is not None:
            nothing = torch.zeros_like(hidden_states[:, None, :, :1])
            past.update(nothing, nothing, self.layer_idx)


class Vanished(Absent):
    """A sublayer that lost all of its units: it adds the bias of its output projection, or nothing.

    Takes whatever the sublayer took, its first argument or `hidden_states` being (..., width). `extra` None values
    follow the output where callers expect a tuple (attention weights). `layer_idx` as in `Absent`.
    """

    def __init__(self, bias: Tensor | None, extra: int = 0, layer_idx: int | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.extra, self.layer_idx = extra, layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.count(hidden_states, kwargs)
        output = torch.zeros_like(hidden_states)
        if self.bias is not None:
            output = output + self.bias.to(hidden_states.dtype)
        return (output, *(None,) * self.extra) if self.extra else output


class Passing(Absent):
    """Hands its first argument on, where an inner module of a vanished sublayer was. Arguments as in `Vanished`."""

    def __init__(self, extra: int = 0, layer_idx: int | None = None) -> None:
        super().__init__()
        self.extra, self.layer_idx = extra, layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.count(hidden_states, kwargs)
        return (hidden_states, *(None,) * self.extra) if self.extra else hidden_states
