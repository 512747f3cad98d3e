"""The hard concrete distribution: a gate that is 0 or 1 most of the time and has a gradient (arXiv 1712.01312)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# As in CoFi (arXiv 2204.00408): temperature β, and the interval (l, r) to which s is stretched.
TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
_EDGE = 1e-6  # u is kept so far from 0 and 1, where its logit is infinite


def sampled(log_alpha: Tensor, u: Tensor) -> Tensor:
    """z for uniform u:  s = σ((log u − log(1 − u) + log α) / β),  z = min(1, max(0, s (r − l) + l)).

    Temperature and interval are CoFi's, β as in its released code, which divides log α by it too.
    """
    s = torch.sigmoid((torch.logit(u, _EDGE) + log_alpha) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z ≠ 0) = σ(log α − β log(−l/r))."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))
