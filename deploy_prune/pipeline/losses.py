"""What plans along a path lose, by the recipe: for the order of a calibrated path and for budgets of latency."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from deploy_prune.pipeline import making
from deploy_prune.pipeline.setup import Setup

if TYPE_CHECKING:
    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.recipe import Recipe
    from deploy_prune.refitting import Moments


def losses_of(setup: Setup, path: SolutionPath, moments: Moments | None) -> Callable[[PrunePlan], float]:
    """The distance of a plan's refitted model to the dense one on calibration data, nothing trained."""
    from deploy_prune.distance import distance_of

    recipe = setup.recipe
    examples = recipe.search.loss_examples or setup.task.loss_examples
    return distance_of(
        setup.model,
        setup.sites,
        setup.task,
        lambda plan: making.planned_weights(setup, plan, moments, path.basis),
        examples=min(examples, recipe.refit.examples or examples),
        batch_size=recipe.compute.micro_batch or min(recipe.refit.batch_size, setup.task.default_batch_size),
        seed=recipe.seed,
        device=setup.device,
    )


def calibrates(recipe: Recipe) -> bool:
    """Whether the path that the recipe's search finds is calibrated: as asked, else as the method does."""
    from deploy_prune.methods import METHODS

    search = recipe.search
    if search.calibrate is not None:
        return search.calibrate
    method = METHODS.get(search.method)
    return method is not None and method.calibrated and not why_not(recipe)


def why_not(recipe: Recipe) -> str:
    """Why a method that calibrates its paths does not do so here, unless it is asked for; else nothing."""
    from deploy_prune import distributed

    if recipe.search.allocation not in (None, "global"):
        return f"sites share the cut by allocation {recipe.search.allocation}"
    if recipe.compute.shard or distributed.sharded_by_launcher():
        return "the weights are spread over processes, and it takes one that holds the whole model"
    return ""


def calibrated(setup: Setup, path: SolutionPath, moments: Moments | None) -> SolutionPath:
    """The path with the units of all kinds in order of their measured loss per parameter."""
    from deploy_prune.kind_losses import calibrated_path, measured_losses

    setup.model.cpu()
    losses = measured_losses(path, losses_of(setup, path, moments), progress=setup.progress)
    return calibrated_path(path, losses)
