"""The uniform layout: every layer keeps equally many units, so that a stock class of the library can hold the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from deploy_prune.errors import BudgetError, UnsupportedModelError
from deploy_prune.plan import PrunePlan, Target
from deploy_prune.units import UnitKind, groups, unit_key

if TYPE_CHECKING:
    from deploy_prune.budget import Budget
    from deploy_prune.path import SolutionPath


def uniform_plan(
    path: SolutionPath,
    sparsity: float | None = None,
    *,
    budget: Budget = "sparsity",
    value: float | None = None,
    kinds: Sequence[str] | None = None,
    align: int = 1,
) -> PrunePlan:
    """As `path.plan`, but all sites keep the same number n_k of units of each kind k: where the path has come to a
    share t of its way,

        n_k(t) = ⌈mean over sites of the units of kind k that leave after t⌉, rounded up to a multiple of `align`,

    at least 1 and at most all; every site keeps its own n_k last to leave. Plans are nested, and no site vanishes.
    Raises as `path.plan`, and UnsupportedModelError where sites of a kind have unlike sizes.
    """
    value = path.check_target(sparsity, budget, value, align)
    chosen = path.kinds(kinds)
    _require_alike(path, chosen)
    asked = Target(budget=budget, value=value, kinds=tuple(kind.value for kind in chosen), align=align)
    steps = np.unique(np.concatenate([path.scores[unit_key(s.name, k)] for s, k in groups(path.sites, chosen)]))

    def after(step: int) -> PrunePlan:
        return path.plan_keeping(_counts(path, chosen, float(steps[step]), align), asked)

    def met(plan: PrunePlan) -> bool:
        assert plan.achieved is not None
        if budget == "sparsity":
            return plan.achieved.sparsity >= value - 1e-12
        return bool(getattr(plan.achieved, budget) <= value)

    low, high = 0, len(steps) - 1
    last = after(high)
    if not met(last):
        assert last.achieved is not None
        raise BudgetError(
            f"no uniform plan of this path reaches {budget} {value:g}",
            expected=f"{budget} {value:g}",
            got=f"best reachable: {getattr(last.achieved, budget):g} (kinds {', '.join(asked.kinds)}, align {align})",
            remedy="Ask for less, or take the free layout.",
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if met(after(middle)) else (middle + 1, high)
    return after(low)


def _counts(
    path: SolutionPath, kinds: Sequence[UnitKind], step: float, align: int
) -> Mapping[str, Mapping[UnitKind, int]]:
    counts = {site.name: dict(site.counts) for site in path.sites}
    for kind in kinds:
        sites = [site for site in path.sites if kind in site.counts]
        kept = np.mean([(path.scores[unit_key(s.name, kind)] > step).sum() / s.lanes(kind) for s in sites])
        full, multiple = sites[0].counts[kind], align if kind is not UnitKind.HEAD else 1
        common = min(full, -(-max(1, int(np.ceil(kept - 1e-9))) // multiple) * multiple)
        for site in sites:
            counts[site.name][kind] = common
    return counts


def _require_alike(path: SolutionPath, kinds: Sequence[UnitKind]) -> None:
    problems = []
    for kind in kinds:
        sizes = {s.name: (s.counts[kind], s.kv_heads) for s in path.sites if kind in s.counts}
        if len(set(sizes.values())) > 1:
            first, other = (
                next(n for n, size in sizes.items() if size == z) for z in list(dict.fromkeys(sizes.values()))[:2]
            )
            problems.append(f"{kind.value}: {first} has {sizes[first][0]}, {other} has {sizes[other][0]}")
    if problems:
        raise UnsupportedModelError(
            "layers of unlike size have no uniform layout",
            where=path.model,
            problems=problems,
            remedy="Take the free layout (family.layout: free).",
        )
