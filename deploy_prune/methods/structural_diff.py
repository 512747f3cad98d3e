"""Structural diff pruning: hard-concrete gates on whole units, trained under a constraint on the model's size.

Diff pruning's L0 gates (arXiv 2012.07463) on heads, dimensions and neurons instead of single weights, with CoFi's
control of the size (arXiv 2204.00408). Weights are frozen, so that the result is an order of the units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from deploy_prune.hard_concrete import COFI
from deploy_prune.methods.base import Context, Importance, Options
from deploy_prune.methods.compute import repeated
from deploy_prune.methods.spp_quadratic import mean_inputs
from deploy_prune.methods.statistics import require_labels
from deploy_prune.recovery.state import restore_state, state_tensors
from deploy_prune.tasks.base import Batch
from deploy_prune.units import PER_HEAD, Site, UnitKind, groups, unit_key

if TYPE_CHECKING:
    from deploy_prune.budget import CostModel

_LOSS = "loss"  # beside the unit keys, in sums over rows
_LABEL = "structural diff"


class StructuralDiffOptions(Options):
    """Options of structural-diff."""

    steps: int = Field(200, ge=1, description="gradient steps")
    target: float = Field(0.6, gt=0, lt=1, description="sparsity that the constraint ends at")
    ramp: float = Field(0.8, gt=0, le=1, description="share of the steps in which it rises there, linearly from 0")
    rate: float = Field(0.1, gt=0, description="Adam's rate on the gates' logits")
    multiplier_rate: float = Field(0.1, gt=0, description="Adam's rate on λ1 and λ2")
    start: float = Field(2.5, description="log α of every gate at first")
    objective: Literal["distill", "task"] = Field("distill", description="distance to the dense outputs, or own loss")
    deviation: bool = Field(True, description="gates scale the deviation from the mean activation, not the activation")


class StructuralDiff:
    """Gates z_u ~ hard concrete(log α_u) on all units, and

        min over α, max over λ of   E_z L(W, z) + λ1 (ŝ − t) + λ2 (ŝ − t)²,

    ŝ the expected sparsity, t the target, which rises linearly to `target` within the first `ramp` of the steps; λ1 and
    λ2 start at 0 and ascend. One z a step for all examples, from seed and step alone, so that the work can be cut into
    pieces. The loss's gradient goes through the gates (Context.gradients), the constraint's straight to log α.
    """

    def __init__(self, context: Context, options: StructuralDiffOptions) -> None:
        self.context, self.options = context, options
        if options.objective == "task":
            require_labels(context, "structural-diff with objective task")
        self.means = mean_inputs(context) if options.deviation else None
        self.logits = {
            unit_key(s.name, k): nn.Parameter(torch.full((s.units(k),), options.start, device=context.device))
            for s, k in groups(context.sites)
        }
        self.multipliers = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.optimizer = torch.optim.Adam(self.logits.values(), lr=options.rate)
        self.ascent = torch.optim.Adam([self.multipliers], lr=options.multiplier_rate, maximize=True)
        self.steps = 0

    def run(self) -> None:
        """All steps that are left, from the saved state where there is one."""
        context, options = self.context, self.options
        self._load()
        batches = context.order()
        context.progress.start(options.steps, _LABEL)
        try:
            context.progress.advance(self.steps)
            for index in repeated(len(batches), options.steps, context.seed)[self.steps :]:
                loss, sparsity = self.step(batches[index])
                if context.saved.due():
                    self._save()
                context.progress.advance(note=f"loss {loss:.3g}, sparsity {sparsity:.2f} of {self.target:.2f}")
        finally:
            context.progress.finish()
        lagrange = self.multipliers.detach().tolist()
        context.facts.update(expected_sparsity=round(float(self.sparsity().detach()), 4), multipliers=lagrange)

    def step(self, batch: Sequence[int]) -> tuple[float, float]:
        """One step on a batch of examples; returns the loss and the expected sparsity before it."""
        z = self._gates()
        gates = {key: value.detach().requires_grad_(True) for key, value in z.items()}
        sums, rows = self.context.total(batch, lambda piece: self._gradients(gates, piece), keep=True)
        loss = float(sums.pop(_LOSS)) / rows
        with torch.enable_grad():
            sparsity = self.sparsity()
            gap = sparsity - self.target
            constraint = self.multipliers[0] * gap + self.multipliers[1] * gap**2
            carried = sum(((sums[key] / rows) * value).sum() for key, value in z.items())
            self.optimizer.zero_grad()
            self.ascent.zero_grad()
            (carried + constraint.to(carried)).backward()
        self.optimizer.step()
        self.ascent.step()
        self.steps += 1
        return loss, float(sparsity.detach())

    @property
    def target(self) -> float:
        """t at the present step."""
        return self.options.target * min(1.0, (self.steps + 1) / max(1.0, self.options.ramp * self.options.steps))

    def sparsity(self) -> Tensor:
        """ŝ, float64, differentiable in log α."""
        opened = {key: COFI.open_probability(value.double().cpu()) for key, value in self.logits.items()}
        return 1 - expected_params(self.context.sites, self.context.costs, opened) / expected_params(
            self.context.sites, self.context.costs, {key: torch.ones_like(p) for key, p in opened.items()}
        )

    def importance(self) -> Importance:
        """log α times a unit's parameters, shifted so that all are positive: per parameter, the order of log α."""
        least = min(float(value.detach().min()) for value in self.logits.values())
        return {
            unit_key(s.name, k): (self.logits[unit_key(s.name, k)].detach().double() - least + 1)
            * (self.context.costs.unit_params(s, k) / s.lanes(k))
            for s, k in groups(self.context.sites)
        }

    def _gates(self) -> dict[str, Tensor]:
        sequence = np.random.SeedSequence([self.context.seed, self.steps]).generate_state(1)
        generator = torch.Generator().manual_seed(int(sequence[0]))
        with torch.enable_grad():
            return {
                key: COFI.sampled(value, torch.rand(len(value), generator=generator).to(value.device))
                for key, value in self.logits.items()
            }

    def _gradients(self, gates: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Sums over the rows: ∂L/∂z by unit key, and L."""
        task, distill = self.context.task, self.options.objective == "distill"
        reference = self.context.dense_output(batch) if distill else None

        def losses(output: Tensor) -> Tensor:
            return task.loss(output, batch) if reference is None else task.distance(output, reference, batch)

        found, each = self.context.gradients(gates, batch, losses, self.means)
        return {**found, _LOSS: each.sum(dtype=torch.float64)}

    def _save(self) -> None:
        tensors = state_tensors(self.logits, self.optimizer, None, None)
        of_ascent = state_tensors({"multipliers": self.multipliers}, self.ascent, None, None)
        self.context.saved.save(
            _LABEL, tensors | {f"ascent/{k}": t for k, t in of_ascent.items()}, {"done": self.steps}
        )

    def _load(self) -> None:
        state = self.context.saved.load(_LABEL)
        if state is None:
            return
        ascent = {k.removeprefix("ascent/"): t for k, t in state.tensors.items() if k.startswith("ascent/")}
        own = {k: t for k, t in state.tensors.items() if not k.startswith("ascent/")}
        restore_state(own, self.logits, self.optimizer, None)
        restore_state(ascent, {"multipliers": self.multipliers}, self.ascent, None)
        self.steps = state.facts["done"]


def expected_params(sites: Sequence[Site], costs: CostModel, opened: Mapping[str, Tensor]) -> Tensor:
    """Parameters in units that stay, a scalar, when unit u stays with probability `opened`[u], independently.

    Those of a head's dimensions stay when both do:  Σ_h π_h (rest_h + Σ_{u ∈ h} π_u p_u),  p_u the parameters of one
    dimension, rest_h what of the head lies in none.
    """
    total = torch.zeros((), dtype=torch.float64)
    for site in sites:
        if UnitKind.HEAD not in site.counts:
            for kind in site.counts:
                total = total + opened[unit_key(site.name, kind)].sum() * costs.unit_params(site, kind)
            continue
        heads = opened[unit_key(site.name, UnitKind.HEAD)]
        inner = torch.full_like(heads, float(costs.unit_params(site, UnitKind.HEAD)))
        for kind in PER_HEAD:
            if kind in site.counts:
                own = costs.unit_params(site, kind) / site.lanes(kind)
                lanes = opened[unit_key(site.name, kind)].view(site.lanes(kind), -1)
                inner = inner - own * (1 - lanes).sum(1)
        total = total + (heads * inner).sum()
    return total


def structural_diff(context: Context, options: StructuralDiffOptions) -> Importance:
    """One training of the gates: units leave in the order of their log α, the lowest first."""
    search = StructuralDiff(context, options)
    search.run()
    return search.importance()
