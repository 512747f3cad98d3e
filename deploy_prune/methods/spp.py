"""SPP: a solution path by differential inclusion on the gates (arXiv 2501.03289), weights frozen.

One run of split linearised Bregman iteration lets units enter the support of Γ one after another, most needed
first. The time of entry is the path: one search, every sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from deploy_prune.activations import watching
from deploy_prune.errors import DataError
from deploy_prune.gates import open_gates
from deploy_prune.methods.base import Context, Importance, Options
from deploy_prune.methods.statistics import gate_statistics
from deploy_prune.saved_state import State
from deploy_prune.tasks.base import Batch
from deploy_prune.units import groups, unit_key

Objective = Literal["distill", "task"]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's own defaults, for the adaptive step
_LOSS = "loss"  # beside the unit keys, in sums over rows
FLOOR = 1e-5  # of 1/ν; losses are in nats per example, where useful couplings lie between 1e-4 and 1e-2


class SppOptions(Options):
    """Options of SPP. The defaults were chosen on held-out calibration images of ViT-Tiny (bench/notes.md)."""

    steps: int = Field(60, ge=10, description="most gradient steps; the search ends when every unit has entered")
    travel: float = Field(
        0.4, gt=0, le=1, description="how far a gate that no gradient holds has closed when the first may enter"
    )
    pressure: float = Field(8.0, gt=0, description="1/ν in units of the mean absolute gradient per parameter")
    nu: float | None = Field(None, gt=0, description="fixed ν; unset: it follows the gradients, by pressure")
    entry_share: float = Field(
        0.5, gt=0, lt=1, description="a gate that stays at 1 enters after this share of the steps"
    )
    kappa: float = Field(10.0, gt=0, description="κ, the gain from V to Γ")
    curvature: float = Field(
        4.0, ge=0, description="weight of the Fisher quadratic in the loss; 0 is the paper's loss, and needs no labels"
    )
    curvature_examples: int = Field(256, ge=1, description="calibration examples for the Fisher quadratic")
    adaptive: bool = Field(True, description="divide the gate step by the gradient's running root mean square (Adam)")
    deviation: bool = Field(True, description="gates scale the deviation from the mean activation, not the activation")
    objective: Objective | None = Field(
        None,
        description="distance to the dense outputs, or the task's own loss; "
        "unset: distill, but task for causal-lm, whose outputs are too large to keep",
    )


@dataclass
class SplitLBI:
    """Split linearised Bregman iteration on any differentiable loss L, from M = 1, V = Γ = 0.

        L̄(M, Γ) = L(M) + (1/2ν) ‖M − Γ‖²
        M ← M − κα ∇_M L̄,    V ← V + (α/ν)(M − Γ),    Γ ← κ · sign(V) · max(|V| − 1, 0)

    `step_m` is κα and `step_v` is α/ν; 1/ν itself is given with every step, by key, so that units which cost more
    may be pulled harder. With `adaptive`, ∇_M L̄ is divided by its running root mean square, as in the paper's released
    code, so that `step_m` suits any scale of loss. `entry` holds, in steps, the time at which |V| passed 1,
    interpolated within its step; infinity where it has not.
    """

    M: dict[str, Tensor]
    step_m: float
    step_v: float
    kappa: float
    adaptive: bool = False
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        def zeros() -> dict[str, Tensor]:
            return {key: torch.zeros_like(m) for key, m in self.M.items()}

        self.V, self.Γ, self.first, self.second = zeros(), zeros(), zeros(), zeros()
        self.entry = {key: torch.full_like(m, math.inf) for key, m in self.M.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], coupling: Mapping[str, float]) -> None:
        """One step, with ∂L/∂M given; both are (units,) by key."""
        self.steps += 1
        for key, M in self.M.items():
            gap = M - self.Γ[key]
            direction = gradients[key] + coupling[key] * gap
            before = self.V[key].abs()
            self.V[key] += self.step_v * gap
            M -= self.step_m * (self._adapted(key, direction) if self.adaptive else direction)
            after = self.V[key].abs()
            self.Γ[key] = self.kappa * self.V[key].sign() * (after - 1).clamp(min=0)
            new = (after > 1) & self.entry[key].isinf()
            passed = (1 - before) / (after - before)
            self.entry[key] = torch.where(new, self.steps - 1 + passed, self.entry[key])

    def entry_time(self, key: str) -> Tensor:
        """Time of entry in steps, (units,) float64; of a unit still outside, when V's mean rate would bring it in."""
        rate = (self.V[key].abs().double() / self.steps).clamp(min=1e-12)
        return torch.where(self.entry[key].isfinite(), self.entry[key].double(), 1 / rate)

    def state_bytes(self) -> int:
        """Memory held between steps: a few numbers per unit, nothing per weight."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All of the state but the number of `steps`: "M|blocks.0.mlp/neuron" and so on."""
        parts = {
            "M": self.M, "V": self.V, "gamma": self.Γ, "first": self.first, "second": self.second, "entry": self.entry
        }  # fmt: skip
        return {f"{name}|{key}": tensor for name, part in parts.items() for key, tensor in part.items()}

    def _adapted(self, key: str, direction: Tensor) -> Tensor:
        first, second = self.first[key], self.second[key]
        first.mul_(BETA1).add_(direction, alpha=1 - BETA1)
        second.mul_(BETA2).addcmul_(direction, direction, value=1 - BETA2)
        return (first / (1 - BETA1**self.steps)) / ((second / (1 - BETA2**self.steps)).sqrt() + EPSILON)


class SppSearch:
    """The search as a loop a caller may drive: set up from a context, `step` over its batches, then `importance`.

    The loss is L(M) = objective(M) + (c/2) Σ_u F_u (1 − M_u)². The objective's gradient on a batch holds what units do
    together, but averages over examples in which a unit matters and others where it harms; F, the diagonal Fisher
    information of the gates, does not. c = `curvature`; what each part is worth is in bench/notes.md.

    Setting up costs one forward pass over the calibration subset, for the mean activations and the objective of the
    dense model, and a backward pass over some of it for F. Batches and dense outputs stay in memory as far as they fit
    (`Compute.memory_gb`); no state is held for any weight.

    ν changes on the way and α with it: V's step α/ν is constant, 1 / (entry_share · steps).
    """

    def __init__(self, context: Context, options: SppOptions) -> None:
        self.context, self.options = context, options
        self.objective: Objective = options.objective or ("task" if context.task.name == "causal-lm" else "distill")
        self.batches = context.order()
        means, self.dense_loss = self._look()
        self.fisher = self._fisher() if options.curvature else None
        self.means = means if options.deviation else None
        first_entry = options.entry_share * options.steps  # in steps, of a gate that stays at 1
        gates = open_gates(context.sites, device=context.device)
        self.lbi = SplitLBI(
            {key: gate.requires_grad_(True) for key, gate in gates.items()},
            step_m=options.travel / first_entry,
            step_v=1 / first_entry,
            kappa=options.kappa,
            adaptive=options.adaptive,
        )
        params = {unit_key(s.name, k): float(context.costs.unit_params(s, k)) for s, k in groups(context.sites)}
        self.cost = {key: p / min(params.values()) for key, p in params.items()}
        self.inverse_nu = 0.0 if options.nu is None else 1 / options.nu
        self.price = 0.0

    def step(self, batch: Sequence[int]) -> float:
        """One forward and backward pass over a batch of examples, of which every process takes its share, and one step
        of the inclusion; returns the objective's rise over dense."""
        sums, rows = self.context.total(batch, self._gradients, keep=True)
        rise = float(sums.pop(_LOSS)) / rows - self.dense_loss
        gradients = {key: sums[key] / rows for key in self.lbi.M}
        if self.options.nu is None:
            self._steer(gradients)
        if self.fisher is not None:
            for key, F in self.fisher.items():
                gradients[key] = gradients[key] - self.options.curvature * F * (1 - self.lbi.M[key].detach())
        self.lbi.step(gradients, {key: self.inverse_nu * cost for key, cost in self.cost.items()})
        return rise

    def run(self) -> Importance:
        """Steps until every unit has entered, or all of them, then the importance of every unit."""
        progress, saved = self.context.progress, self.context.saved
        if (state := saved.load("spp: search")) is not None:
            self._restore(state)
        progress.start(self.options.steps, "spp: search")
        try:
            progress.advance(self.lbi.steps)
            for index in self._order()[self.lbi.steps :]:
                rise = self.step(self.batches[index])
                if saved.due():
                    saved.save("spp: search", self.lbi.tensors(), {"steps": self.lbi.steps, "price": self.price})
                entered = self.entered()
                progress.advance(note=f"rise {rise:.3f}, {entered:.0%} entered")
                if entered == 1:  # every time of entry is known: further steps say nothing
                    break
        finally:
            progress.finish()
        return self.importance()

    def _order(self) -> list[int]:
        """Which batch every step takes: all of them in a new order, again and again."""
        generator = torch.Generator().manual_seed(self.context.seed)
        order: list[int] = []
        while len(order) < self.options.steps:
            order += reversed(torch.randperm(len(self.batches), generator=generator).tolist())
        return order[: self.options.steps]

    def _restore(self, state: State) -> None:
        for key, tensor in self.lbi.tensors().items():
            with torch.no_grad():
                tensor.copy_(state.tensors[key])
        self.lbi.steps, self.price = state.facts["steps"], state.facts["price"]

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the rows: ∂ objective/∂M by unit key, and the objective."""
        reference = self.context.dense_output(batch) if self.objective == "distill" else None
        gradients, losses = self.context.gradients(
            self.lbi.M, batch, lambda output: self._losses(output, reference, batch), self.means
        )
        return {**gradients, _LOSS: losses.sum(dtype=torch.float64)}

    def importance(self) -> Importance:
        """A unit's parameters over its time of entry, so that ordering by importance per parameter is by entry."""
        return {
            unit_key(s.name, k): self.context.costs.unit_params(s, k) / self.lbi.entry_time(unit_key(s.name, k))
            for s, k in groups(self.context.sites)
        }

    def entered(self) -> float:
        """Share of the units that are in the support of Γ."""
        inside = torch.stack([entry.isfinite().sum() for entry in self.lbi.entry.values()]).sum()
        return int(inside) / sum(len(entry) for entry in self.lbi.entry.values())

    def _steer(self, gradients: Mapping[str, Tensor]) -> None:
        """1/ν = pressure · the running mean of |∂L/∂m| per parameter: ν must follow the loss's own scale.

        At M = 1 a distilled loss has no gradient at all; FLOOR sets the gates going.
        """
        total = float(torch.stack([g.abs().sum() for g in gradients.values()]).sum())
        price = total / sum(self.cost[key] * len(g) for key, g in gradients.items())
        self.price = price if not self.price else BETA1 * self.price + (1 - BETA1) * price
        self.inverse_nu = max(self.options.pressure * self.price, FLOOR)

    def _fisher(self) -> dict[str, Tensor]:
        """F, the mean over examples of (∂ℓ/∂m)², by unit key. Raises DataError for unlabeled calibration data."""
        example = next(self.context.task.calibration_batches([self.batches[0][:1]]))
        if example.target is None:
            raise DataError(
                "spp's curvature needs labeled calibration data",
                where=self.context.task.name,
                remedy="Set the option curvature to 0 (search.options.curvature=0), or give labels.",
            )
        statistics = gate_statistics(self.context, "spp: curvature", self.options.curvature_examples)
        return {key: (c / statistics.examples).float() for key, c in statistics.curvature.items()}

    @torch.no_grad()
    def _look(self) -> tuple[dict[str, Tensor], float]:
        """The mean input of every output projection; the dense model's mean objective."""

        def look(batch: Batch) -> dict[str, Tensor]:
            sums: dict[str, Tensor] = {}

            def see(site: str, x: Tensor) -> None:
                sums[f"{site}|sum"] = x.double().sum(0)
                sums[f"{site}|tokens"] = torch.tensor(float(len(x)), dtype=torch.float64)

            with watching(self.context.model, self.context.sites, see) as watch:
                watch.attend(self.context.task.signature, batch.inputs)
                if self.objective == "distill":
                    self.context.dense_output(batch, fresh=True)
                else:
                    sums[_LOSS] = self.context.task.loss(self.context.output(batch), batch).sum(dtype=torch.float64)
            return sums

        sums, rows = self.context.accumulate("spp: dense outputs", look)
        loss = float(sums.pop(_LOSS)) / rows if _LOSS in sums else 0.0
        means = {s.name: (sums[f"{s.name}|sum"] / sums[f"{s.name}|tokens"]).float() for s in self.context.sites}
        return means, loss

    def _losses(self, output: Tensor, reference: Tensor | None, batch: Batch) -> Tensor:
        if reference is None:
            return self.context.task.loss(output, batch)
        return self.context.task.distance(output, reference, batch)


def spp(context: Context, options: SppOptions) -> Importance:
    """One search: every unit's importance from its time of entry."""
    return SppSearch(context, options).run()
