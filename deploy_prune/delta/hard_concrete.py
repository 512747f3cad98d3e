"""Hard concrete gates: random numbers in [0, 1] that are exactly 0 or 1 most of the time, and differentiable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOW, HIGH = -1.5, 1.5  # l and r of diff pruning (arXiv 2012.07463)
EDGE = 1e-4  # uniform noise stays this far from 0 and 1


def sampled(alpha: Tensor, generator: torch.Generator | None = None, low: float = LOW, high: float = HIGH) -> Tensor:
    """Gates drawn for logits α, of its shape (Louizos et al., arXiv 1712.01312; diff pruning, equation 4):

    u ~ U(0, 1),   s = σ(log u − log(1 − u) + α),   z = min(1, max(0, s (r − l) + l))
    """
    u = torch.empty_like(alpha).uniform_(EDGE, 1 - EDGE, generator=generator)
    return _stretched(torch.sigmoid(torch.logit(u) + alpha), low, high)


def expected(alpha: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """The gate without noise: z at u = ½."""
    return _stretched(torch.sigmoid(alpha), low, high)


def chance_open(alpha: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """P(z > 0) = σ(α − log(−l / r)), whose sum is E‖z‖₀."""
    return torch.sigmoid(alpha - math.log(-low / high))


def _stretched(s: Tensor, low: float, high: float) -> Tensor:
    return (s * (high - low) + low).clamp(0, 1)
