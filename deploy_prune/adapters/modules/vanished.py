"""What stands where a sublayer was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Vanished(nn.Module):
    """A sublayer that lost all of its units: it adds the bias of its output projection, or nothing.

    Takes whatever the sublayer took, its first argument or `hidden_states` being (..., width). `extra` None values
    follow the output where callers expect a tuple (attention weights).
    """

    def __init__(self, bias: Tensor | None, extra: int = 0) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.extra = extra

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = torch.zeros_like(hidden_states)
        if self.bias is not None:
            output = output + self.bias.to(hidden_states.dtype)
        return (output, *(None,) * self.extra) if self.extra else output


class Passing(nn.Module):
    """Hands its first argument on, where an inner module of a vanished sublayer was. `extra` as in `Vanished`."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *(None,) * self.extra) if self.extra else hidden_states
