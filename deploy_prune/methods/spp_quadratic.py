"""SPP's inclusion on the second-order model of the loss, where its path is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from deploy_prune.activations import watching
from deploy_prune.methods.base import Context, Importance
from deploy_prune.methods.statistics import gate_statistics, require_labels
from deploy_prune.tasks.base import Batch


def quadratic_inclusion(context: Context, *, deviation: bool = True) -> Importance:
    """Importance F_u of every unit, whose entry time in the inclusion is c_u/F_u up to what all units share.

    On L(M) = ½ Σ_u F_u (1 − M_u)² with coupling 1/ν_u = c_u/ν, c_u a unit's parameters, and while Γ_u = 0, the gate
    rests at M_u = F_u / (F_u + c_u/ν), and V with V̇_u = ρ M_u (ρ = α/ν a step, the same for all) reaches 1 at
        t_u = 1 / (ρ M_u) = (1 + c_u / (ν F_u)) / ρ,
    so that the order of entry is that of F_u/c_u: no step needs to be taken. F_u is the diagonal Fisher information of
    the gates, the mean over examples of (∂ℓ/∂m_u)²; with `deviation` a gate scales the deviation of the activation from
    its mean, as the refit will make up for the mean. Raises DataError for unlabeled calibration data.
    """
    require_labels(context, "spp")
    means = mean_inputs(context) if deviation else None
    statistics = gate_statistics(context, "spp: curvature", means=means)
    return {key: total / statistics.examples for key, total in statistics.curvature.items()}


@torch.no_grad()
def mean_inputs(context: Context) -> dict[str, Tensor]:
    """The mean input of every output projection over the calibration subset, (features,) float32 by site name."""

    def look(batch: Batch) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def see(site: str, x: Tensor) -> None:
            before = sums.get(f"{site}|sum")
            count = torch.tensor(float(len(x)), dtype=torch.float64)
            sums[f"{site}|sum"] = x.double().sum(0) if before is None else before + x.double().sum(0)
            sums[f"{site}|tokens"] = count + sums.get(f"{site}|tokens", torch.zeros_like(count))

        with watching(context.model, context.sites, see) as watch:
            watch.attend(context.task.signature, batch.inputs)
            context.output(batch)
        return sums

    sums, _ = context.accumulate("spp: mean activations", look)
    return {s.name: (sums[f"{s.name}|sum"] / sums[f"{s.name}|tokens"]).float() for s in context.sites}
