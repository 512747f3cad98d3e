"""Plans within a latency, chosen in several ways: what they lose is measured, not guessed.

How much dearer the last units to leave are than the first is the weak side of losses taken along a path. So the choice
is made with several steepnesses of the loss density, and the path's own plan at that latency stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.latency_table import LatencyTable
from deploy_prune.errors import BudgetError
from deploy_prune.latency.choice import Options, choose, counts_of, fastest_ms, options_of
from deploy_prune.latency.losses import LossCurve
from deploy_prune.latency.place import Place
from deploy_prune.plan import PrunePlan, Target

if TYPE_CHECKING:
    from deploy_prune.path import SolutionPath

STEEPNESSES = (1.0, 2.0, 4.0)
PATH = "path"
WAYS = (*(f"steepness {power:g}" for power in STEEPNESSES), PATH)


@dataclass(frozen=True)
class Search:
    """What a choice is made from. `loss_of` measures what a plan loses; without it the first way is taken."""

    path: SolutionPath
    table: LatencyTable
    curve: LossCurve
    place: Place
    kinds: tuple[str, ...]
    align: int
    loss_of: Callable[[PrunePlan], float] | None = None
    _known: list[tuple[Any, float]] = field(default_factory=list, init=False, compare=False, repr=False)

    def options(self, steepness: float = 1.0) -> list[Options]:
        curve = self.curve.steeper(steepness)
        return options_of(self.path, self.table, curve, kinds=self.kinds, align=self.align)

    def within(self, way: str, asked: Target, limit_ms: float) -> PrunePlan | None:
        """The plan chosen in one of `WAYS` that the table says takes at most `limit_ms`; None when there is none."""
        if way == PATH:
            return path_plan_within(self, asked, limit_ms)
        try:
            return plan_within(self, self.options(STEEPNESSES[WAYS.index(way)]), asked, limit_ms)
        except BudgetError:
            return None

    def candidates(self, asked: Target, limit_ms: float) -> dict[str, PrunePlan]:
        """Plans within a limit by the table, by how they were chosen. Raises BudgetError when there is none."""
        first = plan_within(self, self.options(STEEPNESSES[0]), asked, limit_ms)
        plans = {way: self.within(way, asked, limit_ms) for way in WAYS[1:]}
        return {WAYS[0]: first, **{way: plan for way, plan in plans.items() if plan is not None}}

    def finalists(self, asked: Target, limit_ms: float) -> dict[str, PrunePlan]:
        """The path's own plan and the one that loses least of the others: the table may be off by more for the one
        than for the other, so that both are measured. Raises BudgetError when no plan is within the limit."""
        if self.loss_of is None:
            return {WAYS[0]: plan_within(self, self.options(STEEPNESSES[0]), asked, limit_ms)}
        found = self.candidates(asked, limit_ms)
        own = found.pop(PATH, None)
        way = self.least(found)
        return {way: found[way]} if own is None or own.keep == found[way].keep else {way: found[way], PATH: own}

    def least(self, plans: Mapping[str, PrunePlan]) -> str:
        """The way whose plan loses least by `loss_of`; of a single one it is not asked."""
        return min(plans, key=lambda way: self._lost(plans[way])) if len(plans) > 1 else next(iter(plans))

    def _lost(self, plan: PrunePlan) -> float:
        assert self.loss_of is not None
        for keep, loss in self._known:
            if keep == plan.keep:
                return loss
        self._known.append((plan.keep, self.loss_of(plan)))
        return self._known[-1][1]


def plan_within(search: Search, options: Sequence[Options], asked: Target, limit_ms: float) -> PrunePlan:
    """The plan that loses least within `limit_ms` by the table. Raises BudgetError with the best there is, and why."""
    table, place = search.table, search.place
    chosen = choose(options, limit_ms - table.rest_ms)
    if chosen is None:
        least = table.rest_ms + fastest_ms(options)
        at = ", ".join(f"{name} {size}" for name, size in place.sizes().items())
        raise BudgetError(
            f"no plan reaches {asked.budget} {asked.value:g} on {place.runtime}, {at}",
            expected=f"at most {limit_ms:.3f} ms",
            got=f"best reachable: {least:.3f} ms, {table.dense_ms / least:.2f} times as fast as dense",
            problems=[
                f"{table.rest_ms:.3f} of the dense model's {table.dense_ms:.3f} ms lie outside the sites",
                f"the sites take {fastest_ms(options):.3f} ms at their narrowest (kinds {', '.join(search.kinds)}, "
                f"align {search.align})",
            ],
            remedy="Ask for more time, allow more unit kinds, or start from a smaller model.",
        )
    return search.path.plan_keeping(counts_of(options, chosen), asked)


def path_plan_within(search: Search, asked: Target, limit_ms: float) -> PrunePlan | None:
    """The path's own aligned plan that is largest within `limit_ms` by the table; None when none is."""
    path, low, high = search.path, 0.0, 1.0
    found = None
    for _ in range(12):
        middle = (low + high) / 2
        try:
            plan = path.plan(middle, kinds=search.kinds, align=search.align)
        except BudgetError:
            high = middle
            continue
        if search.table.plan_ms(plan.counts(path.sites)) <= limit_ms:
            found, high = plan, middle
        else:
            low = middle
    return None if found is None else path.plan_keeping(found.counts(path.sites), asked)
