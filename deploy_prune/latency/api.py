"""The latency budget from Python: one call from a path to plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from deploy_prune.budget import Measured
from deploy_prune.precision_options import Precision
from deploy_prune.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.latency.fitting import Fit
    from deploy_prune.latency.place import Place
    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.refitting import Moments
    from deploy_prune.tasks import Task


def latency_plans(
    model: nn.Module,
    task: Task,
    path: SolutionPath,
    values: Sequence[float],
    *,
    budget: Measured = "speedup",
    place: Place | None = None,
    moments: Moments | None = None,
    kinds: Sequence[str] | None = None,
    align: int = 8,
    precision: Literal["fp32", Precision] = "fp32",
    progress: Progress = SILENT,
) -> list[tuple[PrunePlan, Fit]]:
    """A plan for every value, times as fast as dense or (`budget="latency"`) milliseconds, and what was measured of it.

    `place` says where: `Place("ort-cpu", batch=8)`; with a `past`, `Place(past=1024)`, decoders with a cache are timed,
    in `precision` graphs of that format (int8-static with its ranges from calibration examples). Give `moments` where
    the members will be refitted: losses are then those of refitted models. The table of a model and machine is
    kept in the user's cache. Raises BudgetError for a value out of reach, with the best there is.
    """
    from converters.precision.formats import check_timed
    from deploy_prune.basis import in_basis
    from deploy_prune.cache import cache_root
    from deploy_prune.distance import distance_of
    from deploy_prune.kind_losses import measured_losses
    from deploy_prune.latency.candidates import Search
    from deploy_prune.latency.fitting import fit_plans
    from deploy_prune.latency.graph import Graph
    from deploy_prune.latency.measure import latency_table
    from deploy_prune.latency.place import Place
    from deploy_prune.refitting import refit

    place = place or Place()
    check_timed(place.runtime, precision, place.past is not None)
    chosen = path.kinds(kinds)

    def weights_of(plan: PrunePlan) -> nn.Module:
        if moments is not None:
            return refit(model, plan, moments, basis=path.basis)
        return model if path.basis is None else in_basis(model, path.sites, path.basis)

    ranges = task.calibration(16, 128) if precision == "int8-static" else ()
    batches = [{name: value.numpy() for name, value in batch.inputs.items()} for batch in ranges]
    export = Graph(task.signature, cache=place.past is not None, precision=precision, batches=batches)
    table = latency_table(
        model,
        path.sites,
        path.costs,
        place,
        export,
        kinds=chosen,
        align=align,
        cache=cache_root() / "latency" / export.form,
        progress=progress,
    )
    loss_of = distance_of(model, path.sites, task, weights_of)
    losses = measured_losses(path, loss_of, kinds=kinds, progress=progress)
    search = Search(path, table, losses, place.of(table), tuple(kind.value for kind in chosen), align, loss_of)
    asked = {repr(value): (budget, value) for value in values}
    plans, fits = fit_plans(search, asked, model, export, progress=progress)
    return [(plans[repr(value)], fits[repr(value)]) for value in values]
