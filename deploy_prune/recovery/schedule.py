"""How fast the weights move at each step, and which of them decay."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def rate_at(step: int, steps: int, warmup: float) -> float:
    """The share of the peak rate at `step` of `steps`: linear to 1 within `warmup`, then half a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; norms, biases and what timm's model exempts do not."""
    exempting: Any = getattr(model, "no_weight_decay", tuple)  # timm: class token, positions
    exempt = exempting()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or name in exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
