"""The differential inclusion itself: iterations on gates that know nothing of models.

Units enter the support of Γ one after another, most needed first; the time of entry is the solution path.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BETA1, BETA2 = 0.9, 0.999  # Adam's own defaults, for the adaptive step


@dataclass
class Inclusion(ABC):
    """State that every variant has: gates M, their dual V, sparse companion Γ, Adam's two moments, times of entry.

    `lanes` says by key into how many equal rows a tensor is split: the units of a column form one group of the proximal
    map and enter together (the same dimension of every head). `entry` holds, in steps, the time at which a unit passed
    the threshold, interpolated within its step; infinity where it has not.
    """

    M: dict[str, Tensor]
    lanes: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        def zeros() -> dict[str, Tensor]:
            return {key: torch.zeros_like(m) for key, m in self.M.items()}

        self.V, self.Γ, self.first, self.second = zeros(), zeros(), zeros(), zeros()
        self.entry = {key: torch.full_like(m, math.inf) for key, m in self.M.items()}

    @abstractmethod
    def step(self, gradients: Mapping[str, Tensor], coupling: Mapping[str, float]) -> None:
        """One step, with ∂L/∂M given, (units,) by key, and 1/ν by key."""

    def entry_time(self, key: str) -> Tensor:
        """Time of entry in steps, (units,) float64; of a unit still outside, when V's mean rate would bring it in."""
        rate = (self.size(key, self.V[key]).double() / self.threshold / self.steps).clamp(min=1e-12)
        return torch.where(self.entry[key].isfinite(), self.entry[key].double(), 1 / rate)

    def entered(self) -> float:
        """Share of the units that are in the support of Γ."""
        inside = torch.stack([entry.isfinite().sum() for entry in self.entry.values()]).sum()
        return int(inside) / sum(len(entry) for entry in self.entry.values())

    @property
    def threshold(self) -> float:
        """|V| above which a unit is in the support."""
        return 1.0

    def size(self, key: str, value: Tensor) -> Tensor:
        """‖V_g‖ of every unit's group, over the square root of the group's size so that the threshold is the same;
        |V| for units that are alone."""
        lanes = self.lanes.get(key, 1)
        if lanes == 1:
            return value.abs()
        return value.view(lanes, -1).square().mean(0).sqrt().repeat(lanes)

    def state_bytes(self) -> int:
        """Memory held between steps: a few numbers per unit, nothing per weight."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All of the state but the number of `steps`: "M|blocks.0.mlp/neuron" and so on."""
        parts = {
            "M": self.M, "V": self.V, "gamma": self.Γ, "first": self.first, "second": self.second, "entry": self.entry
        }  # fmt: skip
        return {f"{name}|{key}": tensor for name, part in parts.items() for key, tensor in part.items()}

    def adapted(self, key: str, direction: Tensor, epsilon: float) -> Tensor:
        """Adam's direction: the running mean over the running root mean square, bias corrected."""
        first, second = self.first[key], self.second[key]
        first.mul_(BETA1).add_(direction, alpha=1 - BETA1)
        second.mul_(BETA2).addcmul_(direction, direction, value=1 - BETA2)
        return (first / (1 - BETA1**self.steps)) / ((second / (1 - BETA2**self.steps)).sqrt() + epsilon)

    def note_entries(self, key: str, before: Tensor) -> Tensor:
        """Write down who passed the threshold in this step; returns the sizes now. `before` are those of the last."""
        after = self.size(key, self.V[key])
        new = (after > self.threshold) & self.entry[key].isinf()
        passed = (self.threshold - before) / (after - before)
        self.entry[key] = torch.where(new, self.steps - 1 + passed, self.entry[key])
        return after


@dataclass
class SplitLBI(Inclusion):
    """Split linearised Bregman iteration on any differentiable loss L, from M = 1, V = Γ = 0 (arXiv 2501.03289).

        L̄(M, Γ) = L(M) + (1/2ν) ‖M − Γ‖²
        M ← M − κα ∇_M L̄,    V ← V + (α/ν)(M − Γ),    Γ_g ← κ · max(0, 1 − 1/‖V_g‖) V_g

    which for a unit alone is the soft threshold κ · sign(V) · max(|V| − 1, 0). `step_m` is κα and `step_v` is α/ν; 1/ν
    itself is given with every step, by key, so that units which cost more may be pulled harder. With `adaptive`, ∇_M L̄
    is divided by its running root mean square, as in the paper's released code, so that `step_m` suits any scale of
    loss.
    """

    step_m: float
    step_v: float
    kappa: float
    adaptive: bool = False

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], coupling: Mapping[str, float]) -> None:
        self.steps += 1
        for key, M in self.M.items():
            gap = M - self.Γ[key]
            direction = gradients[key] + coupling[key] * gap
            before = self.size(key, self.V[key])
            self.V[key] += self.step_v * gap
            M -= self.step_m * (self.adapted(key, direction, 1e-8) if self.adaptive else direction)
            size = self.note_entries(key, before)
            self.Γ[key] = self.kappa * (1 - 1 / size.clamp(min=1)) * self.V[key]


@dataclass
class ReleasedInclusion(Inclusion):
    """The iteration of the paper's released code, which is not that of its equations: no coupling and no ν.

        M ← Adam(M, ∇_M L; η, ε = 1e-4),    V ← V + η/(1 − β₁ᵗ) · (M − Γ),    Γ ← max(0, sign(V) · max(|V| − λ, 0))

    With the released η = 1e-3 and λ = 3 a gate that stays at 1 enters after some 3,000 steps; `rate` is η.
    """

    rate: float = 1e-3
    shrink: float = 3.0

    @property
    def threshold(self) -> float:
        return self.shrink

    def size(self, key: str, value: Tensor) -> Tensor:
        return super().size(key, value.clamp(min=0))

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], coupling: Mapping[str, float]) -> None:
        self.steps += 1
        for key, M in self.M.items():
            before = self.size(key, self.V[key])
            M -= self.rate * self.adapted(key, gradients[key], 1e-4)
            self.V[key] += self.rate / (1 - BETA1**self.steps) * (M - self.Γ[key])
            size = self.note_entries(key, before)
            self.Γ[key] = ((1 - self.shrink / size.clamp(min=self.shrink)) * self.V[key]).clamp(min=0)
