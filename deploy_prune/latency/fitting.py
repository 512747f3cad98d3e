"""From asked latencies to plans: chosen by the table, measured as whole models, corrected once.

Of every target the path's own plan at that latency and the one by the table are exported and timed, interleaved with
the dense model. Where the table was off for one, its limit is moved by as much and it is chosen anew, in the same way:
the table is off by more for a plan that was chosen by it. Of the two, now at one measured latency, the one is taken
whose refitted model loses least on calibration data (ZipLM and SPDY search likewise), and it is measured too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deploy_prune.budget import Measured
from deploy_prune.errors import BudgetError, UsageError
from deploy_prune.files import scratch_directory
from deploy_prune.latency.candidates import Search, Way, plan_within
from deploy_prune.latency.measure import Export
from deploy_prune.plan import PrunePlan, Target
from deploy_prune.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import nn

    from bench.report import LatencyReport

MIN_ROUNDS = 40
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
    def off(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted

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


class Entry(NamedTuple):
    """One way to meet the target of a member."""

    name: str
    way: Way

    def __str__(self) -> str:
        return f"{self.name}: {self.way}"


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
    finalists = {name: search.finalists(target, limits[name]) for name, target in asked.items()}
    with scratch_directory() as scratch:
        check = _Check(model, search, export, scratch, progress)
        entries = {Entry(name, way): plan for name, plans in finalists.items() for way, plan in plans.items()}
        fits = check.fits(entries, asked, dict.fromkeys(entries, 1.0))
        plans: dict[Entry, PrunePlan] = {}
        for name, target in asked.items():
            moved = {
                way: _moved(search, target, way, plan, fits[Entry(name, way)]) for way, plan in finalists[name].items()
            }
            reached = {way: plan for way, plan in moved.items() if plan is not None}
            if not reached:
                raise _missed(search, target, {way: fits[Entry(name, way)] for way in moved})
            way = search.least(reached)
            plans[Entry(name, way)] = reached[way]
        again = {entry: fits[entry].off for entry, plan in plans.items() if plan.keep != entries[entry].keep}
        if again:
            later = check.fits({entry: plans[entry] for entry in again}, asked, again)
            fits |= {entry: replace(fit, corrected=True) for entry, fit in later.items()}
    return (
        {entry.name: plan for entry, plan in plans.items()},
        {entry.name: replace(fits[entry], chosen_by=str(entry.way)) for entry in plans},
    )


def _moved(search: Search, asked: Target, way: Way, plan: PrunePlan, fit: Fit) -> PrunePlan | None:
    """The plan chosen in the same way within what the table must say of it to be measured within the limit. None when
    there is none and `plan` missed its limit."""
    wanted = _wanted(search, fit)
    if abs(wanted / limit_of(fit.budget, fit.value, search.table.dense_ms) - 1) <= CLOSE:
        return plan
    return search.within(way, asked, wanted) or (plan if fit.met else None)


def _wanted(search: Search, fit: Fit) -> float:
    """The limit for the table: moved by as much as it was off for the plan, and by as much as the machine has become
    slower since the table was made, which a limit in milliseconds feels."""
    dense = search.table.dense_ms
    return min(fit.limit / fit.off * dense / fit.dense, dense)


def _missed(search: Search, asked: Target, fits: Mapping[Way, Fit]) -> BudgetError:
    """What `plan_within` says of a target out of reach, with what was measured."""
    fit = next(iter(fits.values()))
    try:
        plan_within(search, search.options(), asked, _wanted(search, fit))
    except BudgetError as error:
        measured = [f"{way}: {f.measured:.3f} ms measured, {f.predicted:.3f} predicted" for way, f in fits.items()]
        return BudgetError(
            error.what,
            expected=f"at most {fit.limit:.3f} ms as measured",
            got=error.got,
            problems=[*error.problems, *measured],
            remedy=error.remedy,
        )
    raise AssertionError("a plan within the limit was not found by its own way")


@dataclass
class _Check:
    model: nn.Module
    search: Search
    export: Export
    directory: Path
    progress: Progress

    def fits(
        self, plans: Mapping[Entry, PrunePlan], asked: Mapping[str, Target], factors: Mapping[Entry, float]
    ) -> dict[Entry, Fit]:
        """Measure the plans against the dense model; predictions are multiplied by `factors`."""
        from converters.surgery import compact

        files = {"dense": self.directory / "dense.onnx"}
        if not files["dense"].exists():
            self.export(self.model, files["dense"])
        for number, (entry, plan) in enumerate(plans.items()):
            files[str(entry)] = self.directory / f"{number}.onnx"
            self.export(compact(self.model, plan, check_weights=False), files[str(entry)])
        report = self.search.place.time(files, min_rounds=MIN_ROUNDS, progress=self.progress)
        return {
            entry: self._fit(report, entry, plan, asked[entry.name], factors[entry]) for entry, plan in plans.items()
        }

    def _fit(self, report: LatencyReport, entry: Entry, plan: PrunePlan, asked: Target, factor: float) -> Fit:
        table, dense, own = self.search.table, report["dense"].p50_ms, report[str(entry)]
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
