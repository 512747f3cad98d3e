"""What a search measures at its gates: the means of the activations and the curvature of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deploy_prune.activations import watching
from deploy_prune.gates import gated, open_gates
from deploy_prune.methods.base import Context


@dataclass(frozen=True)
class GateStatistics:
    """`means`: μ by site, (features of its output projection,); `curvature`: Σ over examples of (∂ℓ/∂m)² by unit key.

    The sum of squared per-example gradients is the diagonal of the empirical Fisher information of the gates.
    """

    means: dict[str, Tensor]
    curvature: dict[str, Tensor]
    examples: int


def gate_statistics(context: Context, label: str, examples: int | None = None) -> GateStatistics:
    """One pass of forward and backward over `examples` calibration examples (default: all of the context's)."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    squares: dict[str, Tensor] = {}
    seen = 0

    def see(site: str, x: Tensor) -> None:
        tokens[site] = tokens.get(site, 0) + len(x)
        sums[site] = sums.get(site, torch.zeros((), device=x.device)) + x.double().sum(0)

    with watching(context.model, context.sites, see) as watch:
        for batch in context.batches(label, examples):
            gates = open_gates(context.sites, batch=len(batch), device=context.device)
            for gate in gates.values():
                gate.requires_grad_(True)
            watch.attend(context.task.signature, batch.inputs)
            with gated(context.model, context.sites, gates):
                loss = context.task.loss(context.output(batch), batch).sum()
            gradients = torch.autograd.grad(loss, list(gates.values()))
            for key, gradient in zip(gates, gradients, strict=True):
                squared = gradient.double().square().sum(0)
                squares[key] = squares[key] + squared if key in squares else squared
            seen += len(batch)
    return GateStatistics({site: (total / tokens[site]).float() for site, total in sums.items()}, squares, seen)
