"""SPP: a solution path by differential inclusion on the gates (arXiv 2501.03289), weights frozen.

Split linearised Bregman iteration lets units enter the support of Γ one after another, most needed first. The time of
entry is the path: one search, every sparsity. On the loss's second-order model, the default, the path is known in
closed form (spp_quadratic.py); here it is iterated through the model itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from deploy_prune.activations import watching
from deploy_prune.errors import UnresolvedError
from deploy_prune.gates import open_gates
from deploy_prune.methods.activation_scores import wanda
from deploy_prune.methods.base import Context, Importance, NoOptions, Options
from deploy_prune.methods.compute import repeated
from deploy_prune.methods.inclusion import BETA1, Inclusion, ReleasedInclusion, SplitLBI
from deploy_prune.methods.spp_quadratic import quadratic_inclusion
from deploy_prune.methods.statistics import gate_statistics, require_labels
from deploy_prune.saved_state import State
from deploy_prune.tasks.base import Batch
from deploy_prune.units import PER_HEAD, groups, unit_key

Objective = Literal["quadratic", "distill", "task"]
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
    weighted: bool = Field(
        False, description="the paper's variant for language models: times weight magnitude and input activations"
    )
    variant: Literal["equations", "released"] = Field(
        "equations", description="the paper's equations, or the iteration of its released code, which departs from them"
    )
    rate: float = Field(1e-3, gt=0, description="η of the released variant")
    same_in_heads: bool = Field(
        False, description="one group of the proximal map is the same dimension in every head, as in the released code"
    )
    until_resolved: bool = Field(
        False,
        description="go on after `steps` until `resolved` of the units have entered, at most `patience` times as long",
    )
    resolved: float = Field(0.98, gt=0, le=1, description="share of units that must have entered for a resolved path")
    patience: int = Field(10, ge=1, description="most steps of until_resolved, in units of `steps`")
    objective: Objective = Field(
        "quadratic",
        description="the loss of the inclusion: its second-order model, in closed form (only `deviation` matters "
        "then); or iterated through the model: the distance to the dense outputs, or the task's own loss",
    )


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
        self.objective = options.objective
        self.batches = context.order()
        means, self.dense_loss = self._look()
        self.fisher = self._fisher() if options.curvature else None
        self.means = means if options.deviation else None
        first_entry = options.entry_share * options.steps  # in steps, of a gate that stays at 1
        gates = {k: g.requires_grad_(True) for k, g in open_gates(context.sites, device=context.device).items()}
        lanes = {unit_key(s.name, k): s.lanes(k) for s, k in groups(context.sites, PER_HEAD) if options.same_in_heads}
        self.lbi: Inclusion = (
            ReleasedInclusion(gates, lanes=lanes, rate=options.rate)
            if options.variant == "released"
            else SplitLBI(
                gates,
                lanes=lanes,
                step_m=options.travel / first_entry,
                step_v=1 / first_entry,
                kappa=options.kappa,
                adaptive=options.adaptive,
            )
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
        """Steps until every unit has entered or all of them are done, then the importance of every unit.

        Raises UnresolvedError when `until_resolved` was asked and even its last step left too many units outside.
        """
        progress, saved, options = self.context.progress, self.context.saved, self.options
        if (state := saved.load("spp: search")) is not None:
            self._restore(state)
        most = options.steps * (options.patience if options.until_resolved else 1)
        progress.start(options.steps, "spp: search")
        try:
            progress.advance(min(self.lbi.steps, options.steps))
            for index in repeated(len(self.batches), most, self.context.seed)[self.lbi.steps :]:
                if self._settled():
                    break
                rise = self.step(self.batches[index])
                if saved.due():
                    saved.save("spp: search", self.lbi.tensors(), {"steps": self.lbi.steps, "price": self.price})
                progress.advance(note=f"rise {rise:.3f}, {self.lbi.entered():.0%} entered")
        finally:
            progress.finish()
        self._judge_resolution()
        return self.importance()

    def _settled(self) -> bool:
        """Whether further steps say nothing, as every time of entry is known, or enough are after all of the steps."""
        entered = self.lbi.entered()
        return entered == 1 or (self.lbi.steps >= self.options.steps and entered >= self.options.resolved)

    def _judge_resolution(self) -> None:
        """Say how far the path is resolved: a unit that has not entered is ordered by how fast it was coming."""
        entered, steps = self.lbi.entered(), self.lbi.steps
        self.context.facts.update(steps=steps, entered=round(entered, 4))
        if entered >= self.options.resolved:
            return
        found = f"{entered:.1%} of the units after {steps} steps"
        if self.options.until_resolved:
            raise UnresolvedError(
                "the search has not separated enough units",
                where="spp",
                expected=f"{self.options.resolved:.0%} of the units in the support",
                got=found,
                remedy="Raise patience, lower entry_share (equations) or raise rate (released variant).",
            )
        warnings.warn(
            f"spp: only {found} have entered; the others are ordered by how fast they were coming. "
            "The option until_resolved goes on until they have.",
            stacklevel=4,
        )

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
        require_labels(self.context, "spp with curvature")
        statistics = gate_statistics(self.context, "spp: curvature", self.options.curvature_examples)
        return {key: (c / statistics.examples).float() for key, c in statistics.curvature.items()}

    @torch.no_grad()
    def _look(self) -> tuple[dict[str, Tensor], float]:
        """The mean input of every output projection; the dense model's mean objective."""

        def look(batch: Batch) -> dict[str, Tensor]:
            sums: dict[str, Tensor] = {}

            def see(site: str, x: Tensor) -> None:
                found = {f"{site}|sum": x.double().sum(0), f"{site}|tokens": x.new_tensor(len(x), dtype=torch.float64)}
                for key, value in found.items():  # a block that serves several depths is seen at each
                    sums[key] = sums[key] + value if key in sums else value

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
    """One search: every unit's importance from its time of entry.

    With `weighted`, the paper's variant for language models, it is multiplied by Σ_i |W_ij| ‖X_j‖, the unit's weights
    times its input activations over the calibration text (Wanda-sp).
    """
    if options.objective == "quadratic":
        found = quadratic_inclusion(context, deviation=options.deviation)
    else:
        found = SppSearch(context, options).run()
    if not options.weighted:
        return found
    weights = wanda(context, NoOptions())
    return {key: value.double() * weights[key].to(value.device).double() for key, value in found.items()}
