"""A plan that came without a path, as the path it lies on: what it removes leaves, all else stays to the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy_prune.errors import PlanError
from deploy_prune.plan import Costs, PrunePlan
from deploy_prune.units import Site, groups, unit_key

if TYPE_CHECKING:
    from deploy_prune.budget import CostModel
    from deploy_prune.path import SolutionPath

GIVEN = "plan"  # the method of such a path, and `search.method` of the recipe of its run


def path_of_plan(plan: PrunePlan, sites: Sequence[Site], costs: CostModel, **options: Any) -> SolutionPath:
    """The path, which remembers the plan with its costs (`given_plan`). Raises PlanError for a plan in a path's basis,
    or one that removes nothing."""
    from deploy_prune.path import SolutionPath

    plan.validate_for(sites)
    if plan.basis is not None:
        raise PlanError(
            "the plan's qk and vo units are directions of its path's basis",
            remedy="Export from the path: deploy-prune export PATH.safetensors (a bundle has its own).",
        )
    achieved = costs_of(plan, sites, costs)
    if achieved.sparsity <= 0:
        raise PlanError("the plan removes nothing", where=plan.model)
    scores = {}
    for site, kind in groups(sites):
        scores[unit_key(site.name, kind)] = np.full(site.units(kind), achieved.sparsity)
        scores[unit_key(site.name, kind)][plan.kept(site, kind)] = 1.0
    told = plan.model_copy(update={"achieved": achieved}).to_json()
    return SolutionPath(plan.model, plan.weights_sha256, tuple(sites), costs, scores, GIVEN, {**options, "given": told})


def given_plan(path: SolutionPath) -> PrunePlan:
    """The plan that `path_of_plan` remembered."""
    return PrunePlan.from_json(path.options["given"])


def costs_of(plan: PrunePlan, sites: Sequence[Site], costs: CostModel) -> Costs:
    """What a plan costs, exactly."""
    from deploy_prune.budget import BYTES_PER_PARAMETER

    counts = plan.counts(sites)
    for site in sites:
        if plan.vanishes(site):
            counts[site.name] = dict.fromkeys(site.counts, 0)
    params = costs.params_of(sites, counts)
    units: dict[str, int] = {}
    for site, kind in groups(sites):
        units[kind.value] = units.get(kind.value, 0) + len(plan.kept(site, kind))
    return Costs(
        sparsity=(costs.params - params) / costs.prunable(sites),
        params=params,
        macs=costs.macs_of(sites, counts),
        bytes=BYTES_PER_PARAMETER * params,
        units=units,
    )
