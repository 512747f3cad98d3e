"""Plans within a latency: the path's own, and the one that a table of times and losses says is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from bench.latency_table import LatencyTable
from deploy_prune.errors import BudgetError
from deploy_prune.kind_losses import Losses
from deploy_prune.latency.choice import Options, choose, counts_of, fastest_ms, options_of
from deploy_prune.latency.place import Place
from deploy_prune.plan import PrunePlan, Target

if TYPE_CHECKING:
    from deploy_prune.path import SolutionPath


class Way(StrEnum):
    """How a plan is chosen: from the table, or in the path's own order."""

    TABLE = "table"
    PATH = "path"


@dataclass(frozen=True)
class Search:
    """What a choice is made from. `loss_of` measures what a plan loses."""

    path: SolutionPath
    table: LatencyTable
    losses: Losses
    place: Place
    kinds: tuple[str, ...]
    align: int
    loss_of: Callable[[PrunePlan], float]

    def options(self) -> list[Options]:
        return options_of(self.path, self.table, self.losses, kinds=self.kinds, align=self.align)

    def within(self, way: Way, asked: Target, limit_ms: float) -> PrunePlan | None:
        """The plan chosen in one way that the table says takes at most `limit_ms`; None when there is none."""
        if way is Way.PATH:
            return path_plan_within(self, asked, limit_ms)
        try:
            return plan_within(self, self.options(), asked, limit_ms)
        except BudgetError:
            return None

    def finalists(self, asked: Target, limit_ms: float) -> dict[Way, PrunePlan]:
        """The plan by the table and the path's own: the table may be off by more for the one than for the other, so
        that both are measured. Raises BudgetError when no plan is within the limit."""
        plan = plan_within(self, self.options(), asked, limit_ms)
        own = self.within(Way.PATH, asked, limit_ms)
        return {Way.TABLE: plan} if own is None or own.keep == plan.keep else {Way.TABLE: plan, Way.PATH: own}


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
