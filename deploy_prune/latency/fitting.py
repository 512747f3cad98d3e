"""From asked latencies to plans: chosen by the table, measured as whole models, corrected.

Of every target the path's own plan at that latency and the one by the table are exported and timed, interleaved with
the dense model. Where the table was off for one, its limit is moved by as much and it is chosen anew, in the same way:
the table is off by more for a plan that was chosen by it. The new ones are timed too, and once more corrected where
that was not enough. Of all that were measured within the limit the one is taken whose refitted model loses least on
calibration data (ZipLM and SPDY search likewise).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
CORRECTIONS = 2  # at most
CLOSE = 0.02  # a prediction this near is not corrected: the measurement is no better
TAKEN = 0.03  # above the limit by more than this the target counts as missed


@dataclass(frozen=True)
class Fit:
    """One member at an asked latency, in milliseconds per call.

    `predicted` is what the table said of the plan, corrected by what an earlier check found, in terms of the dense
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
    chosen_by: str

    @property
    def off(self) -> float:
        """Measured over what the table says."""
        return self.measured / self.uncorrected

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


class Tried(NamedTuple):
    """A plan and what was measured of it."""

    plan: PrunePlan
    fit: Fit


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
    are those of each correction. Raises BudgetError for the first target out of reach, UsageError for one that asks
    nothing.
    """
    table = search.table
    asked = {
        name: Target(budget=budget, value=value, kinds=search.kinds, align=search.align)
        for name, (budget, value) in targets.items()
    }
    limits = {name: limit_of(t.budget, t.value, table.dense_ms) for name, t in asked.items()}  # type: ignore[arg-type]
    plans = {
        Entry(name, way): plan
        for name, target in asked.items()
        for way, plan in search.finalists(target, limits[name]).items()
    }
    tried: dict[Entry, list[Tried]] = {entry: [] for entry in plans}
    with scratch_directory() as scratch:
        check = _Check(model, search, export, scratch, progress)
        for _ in range(1 + CORRECTIONS):
            if not plans:
                break
            factors = {entry: tried[entry][-1].fit.off for entry in plans if tried[entry]}
            for entry, fit in check.fits(plans, asked, factors).items():
                tried[entry].append(Tried(plans[entry], fit))
            moved = {entry: _moved(search, asked[entry.name], entry.way, *tried[entry][-1]) for entry in plans}
            plans = {entry: plan for entry, plan in moved.items() if plan is not None}
    taken = {
        name: _taken(search, asked[name], {e.way: t for e, t in tried.items() if e.name == name}) for name in asked
    }
    return {name: found.plan for name, found in taken.items()}, {name: found.fit for name, found in taken.items()}


def _moved(search: Search, asked: Target, way: Way, plan: PrunePlan, fit: Fit) -> PrunePlan | None:
    """The plan chosen in the same way within what the table must say of it to be measured within the limit. None where
    `plan` is near enough, or there is no other."""
    if abs(fit.measured / fit.limit - 1) <= CLOSE:
        return None
    moved = search.within(way, asked, _wanted(search, fit))
    return None if moved is None or moved.keep == plan.keep else moved


def _taken(search: Search, asked: Target, tried: Mapping[Way, Sequence[Tried]]) -> Tried:
    """Of the plans measured within the limit the one that loses least. Where none is, the nearest to it; BudgetError
    where nothing faster is known."""
    met = [found for each in tried.values() for found in reversed(each) if found.fit.met]  # of equals the last counts
    if met:
        return min(met, key=lambda found: search.loss_of(found.plan)) if len(met) > 1 else met[0]
    last = {way: each[-1].fit for way, each in tried.items()}
    if all(search.within(way, asked, _wanted(search, fit)) is None for way, fit in last.items()):
        raise _missed(search, asked, last)
    every = [found for each in tried.values() for found in each]
    return min(every, key=lambda found: found.fit.measured / found.fit.limit)


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
        """Measure the plans against the dense model. `factors`, of those that were tried before, correct the table."""
        from converters.surgery import compact

        files = {"dense": self.directory / "dense.onnx"}
        if not files["dense"].exists():
            self.export(self.model, files["dense"])
        for number, (entry, plan) in enumerate(plans.items()):
            files[str(entry)] = self.directory / f"{number}.onnx"
            self.export(compact(self.model, plan, check_weights=False), files[str(entry)])
        report = self.search.place.time(files, min_rounds=MIN_ROUNDS, progress=self.progress)
        return {
            entry: self._fit(report, entry, plan, asked[entry.name], factors.get(entry))
            for entry, plan in plans.items()
        }

    def _fit(self, report: LatencyReport, entry: Entry, plan: PrunePlan, asked: Target, factor: float | None) -> Fit:
        table, dense, own = self.search.table, report["dense"].p50_ms, report[str(entry)]
        predicted = table.plan_ms(plan.counts(self.search.path.sites)) / table.dense_ms * dense
        budget: Measured = asked.budget  # type: ignore[assignment]
        return Fit(
            budget,
            asked.value,
            asked.value if budget == "latency" else dense / asked.value,
            predicted * (factor or 1.0),
            predicted,
            own.p50_ms,
            dense,
            (own.ratio.value, own.ratio.low, own.ratio.high),
            factor is not None,
            report.trusted,
            str(entry.way),
        )


def _said(budget: Measured, value: float) -> str:
    return f"{value:g} ms" if budget == "latency" else f"a speed-up of {value:g}"
