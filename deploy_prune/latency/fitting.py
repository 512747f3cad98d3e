"""From asked latencies to plans: chosen by the table, measured as whole models, corrected once.

How much dearer the last units to leave are than the first is the weak side of losses taken along a path. So the
choice is made with several steepnesses of the loss density, the path's own plan at that latency stands beside them, and
the one whose refitted model really loses least on calibration data is taken (ZipLM and SPDY search likewise).

The table's prediction of a plan is checked on the plan's own graph, timed interleaved with the dense model. Where it
was off, the limit is moved by as much as it was off and the choice made again; the new graph is measured too, and what
was predicted and measured is kept with the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.latency_table import LatencyTable
from deploy_prune.budget import Measured
from deploy_prune.errors import BudgetError, UsageError
from deploy_prune.files import scratch_directory
from deploy_prune.latency.choice import Options, choose, counts_of, fastest_ms, options_of
from deploy_prune.latency.losses import LossCurve
from deploy_prune.latency.measure import Export
from deploy_prune.latency.place import Place
from deploy_prune.plan import PrunePlan, Target
from deploy_prune.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import nn

    from bench.report import LatencyReport
    from deploy_prune.path import SolutionPath

MIN_ROUNDS = 40
STEEPNESSES = (1.0, 2.0, 4.0)
CLOSE = 0.02  # a prediction this near is not corrected: the measurement is no better
TAKEN = 0.03  # above the limit by more than this the target counts as missed


@dataclass(frozen=True)
class Fit:
    """One member at an asked latency, in milliseconds per call.

    `predicted` is what the table said of the plan, corrected by what the first check found, in terms of the dense
    model's latency while the plan was measured: `dense`, which may differ from the table's on another day.
    `uncorrected` is the table's own word. `measured` is the whole graph's median, and `ratio` that to dense with its
    interval.
    """

    budget: Measured
    value: float
    limit: float
    predicted: float
    uncorrected: float
    measured: float
    dense: float
    ratio: tuple[float, float, float]
    corrected: bool
    trusted: bool
    chosen_by: str = ""

    @property
    def met(self) -> bool:
        """Whether the measured latency is within the limit, up to `TAKEN`."""
        return self.measured <= self.limit * (1 + TAKEN)

    def to_json(self) -> dict[str, Any]:
        low, high = self.ratio[1:]
        return {
            "budget": self.budget,
            "value": self.value,
            "limit_ms": self.limit,
            "predicted_ms": self.predicted,
            "uncorrected_ms": self.uncorrected,
            "measured_ms": self.measured,
            "dense_ms": self.dense,
            "ratio": {"value": self.ratio[0], "low": low, "high": high},
            "corrected": self.corrected,
            "trusted": self.trusted,
            "met": self.met,
            "chosen_by": self.chosen_by,
        }


@dataclass(frozen=True)
class Search:
    """What a choice is made from."""

    path: SolutionPath
    table: LatencyTable
    curve: LossCurve
    place: Place
    kinds: tuple[str, ...]
    align: int
    loss_of: Callable[[PrunePlan], float] | None = None

    def options(self, steepness: float = 1.0) -> list[Options]:
        curve = self.curve.steeper(steepness)
        return options_of(self.path, self.table, curve, kinds=self.kinds, align=self.align)

    def candidates(self, asked: Target, limit_ms: float) -> dict[str, PrunePlan]:
        """Plans within a limit by the table, by how they were chosen. Raises BudgetError when there is none."""
        found = {
            f"steepness {power:g}": plan_within(self, self.options(power), asked, limit_ms) for power in STEEPNESSES
        }
        own = path_plan_within(self, asked, limit_ms)
        return found if own is None else {**found, "path": own}

    def best(self, asked: Target, limit_ms: float) -> tuple[PrunePlan, str]:
        """The candidate that loses least, measured where `loss_of` is given, and how it was chosen."""
        found = self.candidates(asked, limit_ms)
        if self.loss_of is None:
            name = next(iter(found))
            return found[name], name
        losses: dict[str, float] = {}
        for name, plan in found.items():
            same = next((other for other in losses if found[other].keep == plan.keep), None)
            losses[name] = losses[same] if same is not None else self.loss_of(plan)
        name = min(losses, key=lambda n: losses[n])
        return found[name], name


def limit_of(budget: Measured, value: float, dense_ms: float) -> float:
    """The most milliseconds that a target allows. Raises UsageError where the dense model would do."""
    limit = value if budget == "latency" else dense_ms / value
    if limit >= dense_ms:
        raise UsageError(
            f"the dense model meets {_said(budget, value)} already",
            expected=f"less than {dense_ms:.3f} ms" if budget == "latency" else "a speed-up above 1",
            got=f"{value:g}",
            remedy="Ask for less time; deploy-prune bench measures the dense model.",
        )
    return limit


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


def fit_plans(
    search: Search,
    targets: Mapping[str, tuple[Measured, float]],
    model: nn.Module,
    export: Export,
    *,
    progress: Progress = SILENT,
) -> tuple[dict[str, PrunePlan], dict[str, Fit]]:
    """The plan of every named target, and how far it can be trusted. All first choices are measured together, and so
    are the corrected ones. Raises BudgetError for the first target out of reach, UsageError for one that asks nothing.
    """
    table = search.table
    asked = {
        name: Target(budget=budget, value=value, kinds=search.kinds, align=search.align)
        for name, (budget, value) in targets.items()
    }
    limits = {name: limit_of(t.budget, t.value, table.dense_ms) for name, t in asked.items()}  # type: ignore[arg-type]
    best = {name: search.best(target, limits[name]) for name, target in asked.items()}
    plans = {name: plan for name, (plan, _) in best.items()}
    with scratch_directory() as scratch:
        check = _Check(model, search, export, scratch, progress)
        fits = check.fits(plans, asked, dict.fromkeys(plans, 1.0))
        off = {name: fit.measured / fit.predicted for name, fit in fits.items()}
        again = {name: factor for name, factor in off.items() if abs(factor - 1) > CLOSE}
        for name, factor in again.items():
            # against the dense model of the check, not of the table: the machine may be slower today
            limit = limit_of(targets[name][0], targets[name][1], fits[name].dense)
            wanted = limit / factor * table.dense_ms / fits[name].dense
            best[name] = search.best(asked[name], min(wanted, table.dense_ms))
            plans[name] = best[name][0]
        if again:
            fits |= {
                name: replace(fit, corrected=True)
                for name, fit in check.fits({name: plans[name] for name in again}, asked, again).items()
            }
    return plans, {name: replace(fit, chosen_by=best[name][1]) for name, fit in fits.items()}


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


@dataclass
class _Check:
    model: nn.Module
    search: Search
    export: Export
    directory: Path
    progress: Progress

    def fits(
        self, plans: Mapping[str, PrunePlan], asked: Mapping[str, Target], factors: Mapping[str, float]
    ) -> dict[str, Fit]:
        """Measure the plans against the dense model; predictions are multiplied by `factors`."""
        from converters.surgery import compact

        files = {"dense": self.directory / "dense.onnx"}
        if not files["dense"].exists():
            self.export(self.model, files["dense"])
        for name, plan in plans.items():
            files[f"{name} "] = self.directory / f"{name}.onnx"  # a member may be called dense
            self.export(compact(self.model, plan, check_weights=False), files[f"{name} "])
        report = self.search.place.time(files, min_rounds=MIN_ROUNDS, progress=self.progress)
        return {name: self._fit(report, name, plan, asked[name], factors[name]) for name, plan in plans.items()}

    def _fit(self, report: LatencyReport, name: str, plan: PrunePlan, asked: Target, factor: float) -> Fit:
        table, dense, own = self.search.table, report["dense"].p50_ms, report[f"{name} "]
        predicted = table.plan_ms(plan.counts(self.search.path.sites)) / table.dense_ms * dense
        budget: Measured = asked.budget  # type: ignore[assignment]
        return Fit(
            budget,
            asked.value,
            asked.value if budget == "latency" else dense / asked.value,
            predicted * factor,
            predicted,
            own.p50_ms,
            dense,
            (own.ratio.value, own.ratio.low, own.ratio.high),
            False,
            report.trusted,
        )


def _said(budget: Measured, value: float) -> str:
    return f"{value:g} ms" if budget == "latency" else f"a speed-up of {value:g}"
