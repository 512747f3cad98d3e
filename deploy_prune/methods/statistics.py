"""What the loss says of every gate: the diagonal Fisher information."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deploy_prune.gates import gated, open_gates
from deploy_prune.methods.base import Context


@dataclass(frozen=True)
class GateStatistics:
    """`curvature`: Σ over examples of (∂ℓ/∂m)² by unit key, each (units,) float64."""

    curvature: dict[str, Tensor]
    examples: int


def gate_statistics(context: Context, label: str, examples: int | None = None) -> GateStatistics:
    """One pass of forward and backward over `examples` calibration examples (default: all of the context's).

    The sum of squared per-example gradients is the diagonal of the empirical Fisher information of the gates. Raises
    DataError for unlabeled data.
    """
    squares: dict[str, Tensor] = {}
    seen = 0
    for batch in context.batches(label, examples):
        gates = open_gates(context.sites, batch=len(batch), device=context.device)
        for gate in gates.values():
            gate.requires_grad_(True)
        with gated(context.model, context.sites, gates):
            loss = context.task.loss(context.output(batch), batch).sum()
        gradients = torch.autograd.grad(loss, list(gates.values()))
        for key, gradient in zip(gates, gradients, strict=True):
            squared = gradient.double().square().sum(0)
            squares[key] = squares[key] + squared if key in squares else squared
        seen += len(batch)
    return GateStatistics(squares, seen)
