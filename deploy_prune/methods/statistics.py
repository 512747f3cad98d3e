"""What the loss says of every gate: its slope and the diagonal Fisher information."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deploy_prune.errors import DataError
from deploy_prune.gates import open_gates
from deploy_prune.methods.base import Context
from deploy_prune.tasks.base import Batch


@dataclass(frozen=True)
class GateStatistics:
    """`curvature`: Σ over examples of (∂ℓ/∂m)² by unit key, `slope`: Σ ∂ℓ/∂m, each (units,) float64."""

    curvature: dict[str, Tensor]
    slope: dict[str, Tensor]
    examples: int


def require_labels(context: Context, method: str) -> None:
    """Raise DataError when the calibration data has none."""
    example = next(context.task.calibration_batches([context.order()[0][:1]]))
    if example.target is None:
        raise DataError(
            f"{method} needs labeled calibration data",
            where=context.task.name,
            remedy="Give labels; spp does without with the options objective=distill and curvature=0.",
        )


def gate_statistics(
    context: Context, label: str, examples: int | None = None, means: Mapping[str, Tensor] | None = None
) -> GateStatistics:
    """One pass of forward and backward over `examples` calibration examples (default: all of the context's).

    The sum of squared per-example gradients is the diagonal of the empirical Fisher information of the gates, which
    scale the deviation from `means` when given (gates.py). Raises DataError for unlabeled data.
    """

    def both(batch: Batch) -> dict[str, Tensor]:
        gates = open_gates(context.sites, batch=len(batch), device=context.device)
        for gate in gates.values():
            gate.requires_grad_(True)
        found, _ = context.gradients(gates, batch, lambda output: context.task.loss(output, batch), means)
        sums = {f"square|{key}": gradient.double().square().sum(0) for key, gradient in found.items()}
        return sums | {f"slope|{key}": gradient.double().sum(0) for key, gradient in found.items()}

    sums, rows = context.accumulate(label, both, examples)

    def of(part: str) -> dict[str, Tensor]:
        return {key.removeprefix(part): value for key, value in sums.items() if key.startswith(part)}

    return GateStatistics(of("square|"), of("slope|"), rows)
