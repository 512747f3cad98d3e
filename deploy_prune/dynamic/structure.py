"""The structure of a model in training: which units are active, and how an exchange chooses the next ones.

An exchange is two cuts of a solution path. Along the first the least important active units leave; along the second
the others come back, those with the largest gate gradient first, until the budget is full. So every structure is a
legal plan of the budget, and how dense each site is follows from the units alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from deploy_prune.path import SolutionPath
from deploy_prune.plan import PrunePlan, Target
from deploy_prune.slots import rank_in_lane
from deploy_prune.units import PER_HEAD, Site, UnitKind, groups, unit_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploy_prune.budget import CostModel

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

_BELOW = 0.999  # the largest value within a tier: the next tier begins at 1


class Structure:
    """Active units at a constant budget, beginning with `plan`.

    `open` says by unit key which gates are 1, (units,) bool. A removed head's own dimensions stay open, as many as
    those of the heads that stay: its gate is closed, and its gradient says what the head as it would come back is
    worth.
    """

    def __init__(self, plan: PrunePlan, sites: Sequence[Site], costs: CostModel) -> None:
        self.plan, self.sites, self.costs = plan, tuple(sites), costs
        if plan.asked is None:
            self.asked = Target(budget="sparsity", value=0.0, kinds=tuple({k.value for _, k in groups(sites)}), align=1)
        else:
            self.asked = plan.asked
        kinds = [UnitKind(k) for k in self.asked.kinds]
        gone = costs.params - costs.params_of(sites, plan.counts(sites))
        self.sparsity = gone / costs.prunable(sites, kinds)
        self.open = {unit_key(s.name, k): self._opened(s, k, plan.kept(s, k)) for s, k in groups(sites)}

    def exchange(self, fraction: float, importance: Mapping[str, Floats], growth: Mapping[str, Floats]) -> PrunePlan:
        """Drop the `fraction` of the active parameters that is least important, grow as much where `growth` is largest;
        both (units,) >= 0 by unit key and per unit. What has just left may come back at once. Returns the plan before.
        """
        before = self.plan
        least = self._path(self.open, importance)
        dropped = min(1 - (1 - self.sparsity) * (1 - fraction), _BELOW)
        survivors = least.plan(dropped, kinds=self.asked.kinds, align=self.asked.align)
        stays = {unit_key(s.name, k): self._after(least, s, k, survivors) for s, k in groups(self.sites)}
        grown = self._path(stays, growth)
        plan = grown.plan(self.sparsity, kinds=self.asked.kinds, align=self.asked.align)
        self.plan = plan.model_copy(update={"asked": before.asked, "basis": before.basis})
        self.open = {unit_key(s.name, k): self._after(grown, s, k, plan) for s, k in groups(self.sites)}
        return before

    def restore(self, plan: PrunePlan, opened: Mapping[str, Flags]) -> None:
        """Take up the structure of an interrupted training."""
        self.plan, self.open = plan, dict(opened)

    def gone(self) -> dict[str, float]:
        """The share of its prunable parameters that every site lacks."""
        counts = self.plan.counts(self.sites)
        return {
            s.name: (self.costs.params_of([s], {s.name: s.counts}) - self.costs.params_of([s], counts))
            / self.costs.prunable([s])
            for s in self.sites
        }

    def _path(self, upper: Mapping[str, Flags], values: Mapping[str, Floats]) -> SolutionPath:
        """The path on which units outside of `upper` leave first, and within each tier those of least value per
        parameter."""
        scaled, most = {}, 0.0
        for site, kind in groups(self.sites):
            key = unit_key(site.name, kind)
            per_unit = self.costs.unit_params(site, kind) / site.lanes(kind)
            scaled[key] = np.asarray(values[key], dtype=np.float64) / per_unit
            most = max(most, float(scaled[key].max(initial=0.0)))
        importance = {}
        for site, kind in groups(self.sites):
            key = unit_key(site.name, kind)
            tiered = upper[key] + _BELOW * scaled[key] / (most or 1.0)
            if kind in PER_HEAD:
                tiered = self._for_all_heads(site, kind, tiered)
            importance[key] = tiered * (self.costs.unit_params(site, kind) / site.lanes(kind))
        return SolutionPath.from_importance(
            importance,
            model=self.plan.model,
            weights_sha256=self.plan.weights_sha256,
            sites=self.sites,
            costs=self.costs,
            method="dynamic",
        )

    def _for_all_heads(self, site: Site, kind: UnitKind, values: Floats) -> Floats:
        """Values of a head's dimensions where removed heads have, rank by rank, the mean of those that are there: they
        say nothing themselves, and the path counts a slot over all heads."""
        there = self.open[unit_key(site.name, UnitKind.HEAD)]
        lanes = values.reshape(site.lanes(kind), -1).copy()
        if there.any() and not there.all():
            mean = np.sort(lanes[there], axis=1).mean(0)
            for lane in np.flatnonzero(~there):
                lanes[lane, np.argsort(lanes[lane], kind="stable")] = mean
        return lanes.reshape(-1)

    def _after(self, path: SolutionPath, site: Site, kind: UnitKind, plan: PrunePlan) -> Flags:
        """Open gates once `path` was cut to `plan`: of removed heads too, the dimensions that leave last."""
        if kind not in PER_HEAD:
            return self._opened(site, kind, plan.kept(site, kind))
        slots = site.counts[kind]
        count = plan.counts([site])[site.name][kind]
        if not count:  # the site vanished; it would come back as it was
            return self.open[unit_key(site.name, kind)].copy()
        ranks = rank_in_lane(np.asarray(path.scores[unit_key(site.name, kind)]), site.lanes(kind))
        return np.asarray(ranks >= slots - count)

    def _opened(self, site: Site, kind: UnitKind, kept: Sequence[int]) -> Flags:
        """Flags of the kept units; of a head that keeps no dimensions, the first ones, as many as the others have."""
        flags = np.zeros(site.units(kind), dtype=bool)
        flags[list(kept)] = True
        if kind in PER_HEAD:
            lanes = flags.reshape(site.lanes(kind), -1)
            count = int(lanes.sum(1).max()) or site.counts[kind]
            lanes[lanes.sum(1) == 0, :count] = True
        return flags


def exchanged_units(
    sites: Sequence[Site], before: PrunePlan, after: PrunePlan
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(left, came): unit indices by unit key that only `before`, and only `after` keeps."""

    def only(of: PrunePlan, other: PrunePlan) -> dict[str, list[int]]:
        found = {unit_key(s.name, k): sorted(set(of.kept(s, k)) - set(other.kept(s, k))) for s, k in groups(sites)}
        return {key: units for key, units in found.items() if units}

    return only(before, after), only(after, before)
