"""Scores of unlike unit kinds made comparable: what plans of each kind alone lose is measured, and orders the path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy_prune.errors import UsageError
from deploy_prune.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.refitting import Moments
    from deploy_prune.tasks import Task


def calibrate_path(
    model: nn.Module,
    task: Task,
    path: SolutionPath,
    *,
    moments: Moments | None = None,
    examples: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = SILENT,
) -> SolutionPath:
    """The path with its units ordered, over all kinds, by the loss per parameter that was measured of their kind.

    The loss is the mean distance to the outputs of `model` on calibration `examples` (None: the task's own
    number); give `moments` where the members will be refitted. Four plans of every kind are measured. Inside
    a kind the order stays.

    Raises GateError when a plan's outputs are not finite, BudgetError when no plan of any kind reaches a sparsity,
    PlanError for a path of other weights, UsageError without examples.
    """
    from deploy_prune.adapters import find_sites
    from deploy_prune.architecture import weights_sha256
    from deploy_prune.basis import in_basis
    from deploy_prune.distance import distance_of
    from deploy_prune.kind_losses import calibrated_path, measured_losses
    from deploy_prune.plan import dense_plan
    from deploy_prune.refitting import refit

    if examples is not None and examples < 1:
        raise UsageError("no examples to measure losses on", expected="at least 1", got=str(examples))
    given = dense_plan(path.model, path.weights_sha256, path.sites)
    given.validate_for(find_sites(model), weights_sha256(model), where="the path to calibrate")

    def weights_of(plan: PrunePlan) -> nn.Module:
        if moments is not None:
            return refit(model, plan, moments, basis=path.basis)
        return model if path.basis is None else in_basis(model, path.sites, path.basis)

    loss_of = distance_of(model, path.sites, task, weights_of, examples=examples, batch_size=batch_size, seed=seed)
    return calibrated_path(path, measured_losses(path, loss_of, progress=progress))
