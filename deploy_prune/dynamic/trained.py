"""`train_dynamic`: a model and a plan in, trained weights and a better plan of the same budget out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deploy_prune.adapters import find_sites
from deploy_prune.budget import CostModel
from deploy_prune.dynamic.history import History
from deploy_prune.dynamic.options import DynamicOptions
from deploy_prune.dynamic.structure import Structure
from deploy_prune.dynamic.training import DynamicTraining
from deploy_prune.errors import UsageError
from deploy_prune.methods.compute import Compute
from deploy_prune.plan import PrunePlan
from deploy_prune.progress import SILENT, Progress
from deploy_prune.recipe_text import checked_options
from deploy_prune.recovery.options import check_fits
from deploy_prune.recovery.recovered import Recovered
from deploy_prune.saved_state import SavedState

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class DynamicResult(Recovered):
    """As `Recovered`, but `model` is dense-shaped: `compact(result.model, result.plan, check_weights=False)` is the
    compact one. `adapted` has the same weights with the adapters beside them (method lora), `history` what left and
    what came back on the way."""

    plan: PrunePlan
    history: History
    adapted: nn.Module | None


def train_dynamic(
    model: nn.Module,
    task: Task,
    plan: PrunePlan,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    compute: Compute | None = None,
    saved: SavedState | None = None,
    **options: Any,
) -> DynamicResult:
    """Train a copy of the dense-shaped `model` on the task's calibration data while its structure, at first `plan`,
    changes at a constant budget.

    RigL (arXiv 1911.11134) on whole units: every ΔT steps until T_end the share
        f(t) = (α/2)(1 + cos(π t / T_end))
    of the active parameters is up for exchange: the least important active units leave, and of all that are inactive
    those with the largest gradient of their gate come, until the budget is full. How dense every site is follows. Units
    leave and come with their weights as they are, which are the pretrained ones at first; their optimiser state is
    fresh. Everything else is `recover`: held-out judging, best weights (here with their structure), teacher, adapters.
    `model` has the weights that the plan cuts, say `refit(dense, plan, moments)`, in the basis of the plan's path.
    `options` are those of DynamicOptions.

    Raises UsageError (options, a plan that removes nothing, sharded weights), PlanError, and as `recover`.
    """
    parsed = checked_options(DynamicOptions, options, "a dynamic training")
    check_fits(parsed, type(task))
    compute = compute or Compute()
    if compute.shard:
        raise UsageError("a dynamic training needs whole weights", got="compute.shard", remedy="Leave shard out.")
    sites = find_sites(model)
    plan.validate_for(sites)
    example = next(iter(task.calibration(1, limit=1, seed=seed)))
    device = next(model.parameters()).device
    structure = Structure(plan, sites, CostModel.measure(model, sites, task.signature, example.to(device).inputs))
    if structure.sparsity <= 0:
        raise UsageError(
            "the plan removes nothing, so that nothing can be exchanged", remedy="Plan a sparsity above 0."
        )
    with torch.random.fork_rng(), torch.enable_grad():
        training = DynamicTraining(model, task, structure, teacher, parsed, compute, seed, progress or SILENT)
        place = saved or SavedState()
        own = json.dumps([place.identity, training.identity], sort_keys=True)
        training.run(SavedState(place.directory, own, place.minutes))
        best, adapted = training.best(), training.adapted()
    standing = training.standing
    return DynamicResult(
        best,
        task.metric,
        before=standing.marks[0].value,
        after=standing.marks[standing.best].value,
        steps=standing.step,
        best_step=standing.marks[standing.best].step,
        held_out=len(training.held_out),
        trained_on=len(training.feed.items),
        seconds=standing.seconds,
        marks=standing.marks,
        plan=training.best_plan,
        history=training.history,
        adapted=adapted,
    )
