"""Plans within a latency: the path's own, and the one that a table of times and losses says is best.

How dear units of one kind are beside those of another is the weak side of losses that were measured for each alone. So
the kinds are weighed against each other by what whole plans lose, measured, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.latency_table import LatencyTable
from deploy_prune.errors import BudgetError
from deploy_prune.kind_losses import Losses
from deploy_prune.latency.choice import Options, choose, counts_of, fastest_ms, options_of
from deploy_prune.latency.place import Place
from deploy_prune.latency.weighing import weigh
from deploy_prune.plan import PrunePlan, Target

if TYPE_CHECKING:
    from deploy_prune.path import SolutionPath

TRIALS = 0  # weighing did harm on ViT-Tiny and little good on MiniLM (bench/notes.md)


@dataclass(frozen=True)
class Way:
    """How a plan is chosen: in the path's own order, or from the table with the losses of unit kinds counting `weights`
    times."""

    own: bool = False
    weights: tuple[tuple[str, float], ...] = ()

    def weighed(self, weights: Mapping[str, float]) -> Way:
        return replace(self, weights=tuple((kind, weight) for kind, weight in weights.items() if weight != 1.0))

    def __str__(self) -> str:
        if self.own:
            return "path"
        return ", ".join(["table", *(f"{kind} x{weight:.3g}" for kind, weight in self.weights)])


PATH, BY_TABLE = Way(own=True), Way()


@dataclass(frozen=True)
class Search:
    """What a choice is made from. `loss_of` measures what a plan loses; without it kinds are not weighed, and the
    path's own plan is no finalist. `trials` are the plans that are measured at most to weigh kinds, for each target."""

    path: SolutionPath
    table: LatencyTable
    losses: Losses
    place: Place
    kinds: tuple[str, ...]
    align: int
    loss_of: Callable[[PrunePlan], float] | None = None
    trials: int = TRIALS
    _known: list[tuple[Any, float]] = field(default_factory=list, init=False, compare=False, repr=False)

    def options(self, way: Way = BY_TABLE) -> list[Options]:
        losses = self.losses.weighed(dict(way.weights))
        return options_of(self.path, self.table, losses, kinds=self.kinds, align=self.align)

    def within(self, way: Way, asked: Target, limit_ms: float) -> PrunePlan | None:
        """The plan chosen in one way that the table says takes at most `limit_ms`; None when there is none."""
        if way.own:
            return path_plan_within(self, asked, limit_ms)
        try:
            return plan_within(self, self.options(way), asked, limit_ms)
        except BudgetError:
            return None

    def finalists(self, asked: Target, limit_ms: float) -> dict[Way, PrunePlan]:
        """The plan by the table, unit kinds weighed, and the path's own: the table may be off by more for the one than
        for the other, so that both are measured. Raises BudgetError when no plan is within the limit."""
        plan = plan_within(self, self.options(), asked, limit_ms)
        if self.loss_of is None:
            return {BY_TABLE: plan}
        way, own = self._weighed(asked, limit_ms), self.within(PATH, asked, limit_ms)
        plan = self.within(way, asked, limit_ms) or plan
        return {way: plan} if own is None or own.keep == plan.keep else {way: plan, PATH: own}

    def least(self, plans: Mapping[Way, PrunePlan]) -> Way:
        """The way whose plan loses least by `loss_of`; of a single one it is not asked."""
        return min(plans, key=lambda way: self._lost(plans[way])) if len(plans) > 1 else next(iter(plans))

    def _weighed(self, asked: Target, limit_ms: float) -> Way:
        """The choice by the table whose plan loses least of those tried."""
        enough = len(self._known) + 1 + self.trials  # the first of them is that of even weights

        def lost(weights: Mapping[str, float]) -> float:
            plan = self.within(BY_TABLE.weighed(weights), asked, limit_ms)
            return float("inf") if plan is None else self._lost(plan)

        return BY_TABLE.weighed(weigh(self.kinds, lost, lambda: len(self._known) < enough))

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
