"""Hard concrete gates: random numbers in [0, 1] that are exactly 0 or 1 most of the time, and differentiable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HardConcrete:
    """The distribution of Louizos et al. (arXiv 1712.01312): s is stretched to (`low`, `high`), l and r, and clamped.

    `edge` is how far uniform noise stays from 0 and 1, where its logit is infinite.
    """

    low: float
    high: float
    temperature: float = 1.0
    edge: float = 1e-6

    def sampled(self, alpha: Tensor, u: Tensor) -> Tensor:
        """z for logits α and uniform u, of one shape:

            s = σ((log u − log(1 − u) + α) / β),   z = min(1, max(0, s (r − l) + l))

        The temperature β divides α too, as in CoFi's released code.
        """
        return self._stretched(torch.sigmoid((torch.logit(u, self.edge) + alpha) / self.temperature))

    def without_noise(self, alpha: Tensor) -> Tensor:
        """z at u = ½."""
        return self._stretched(torch.sigmoid(alpha / self.temperature))

    def open_probability(self, alpha: Tensor) -> Tensor:
        """P(z > 0) = σ(α − β log(−l / r)), whose sum is E‖z‖₀."""
        return torch.sigmoid(alpha - self.temperature * math.log(-self.low / self.high))

    def _stretched(self, s: Tensor) -> Tensor:
        return (s * (self.high - self.low) + self.low).clamp(0, 1)


DIFF = HardConcrete(-1.5, 1.5, edge=1e-4)  # diff pruning (arXiv 2012.07463)
COFI = HardConcrete(-0.1, 1.1, temperature=2 / 3)  # arXiv 2204.00408
