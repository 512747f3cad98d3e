"""The stage that chooses the members of a latency budget: table, losses along the path, plans and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.budget import MEASURED
from deploy_prune.files import read_json, write_json
from deploy_prune.pipeline import making
from deploy_prune.pipeline.setup import Setup
from deploy_prune.plan import PrunePlan

if TYPE_CHECKING:
    from deploy_prune.latency.candidates import Search
    from deploy_prune.latency.measure import Export
    from deploy_prune.latency.place import Place
    from deploy_prune.path import SolutionPath
    from deploy_prune.refitting import Moments

TABLE, CURVE, FITS, PLANS = "table.json", "losses.json", "fits.json", "plans"


def is_measured(setup: Setup) -> bool:
    """Whether the family's members are chosen by measured latency."""
    return setup.recipe.family.budget in MEASURED


def place_of(setup: Setup) -> Place:
    from deploy_prune.latency.place import Place

    how = setup.recipe.family.latency
    return Place(how.runtime, how.batch, how.seq, how.threads, how.seconds)


def choose_members(
    setup: Setup, path: SolutionPath, moments: Moments | None, directory: Path, note: Callable[[str], None]
) -> None:
    """Write the plans of all members, how they fit, the table and the losses into `directory`."""
    from deploy_prune.latency.fitting import fit_plans

    family, place, export = setup.recipe.family, place_of(setup), exporter(setup)
    setup.model.cpu()
    search = search_of(setup, path, moments, place, family.alignment, family.kinds)
    search.table.save(directory / TABLE)
    write_json(directory / CURVE, search.curve.to_json())
    targets = dict(zip(family.member_names(), ((family.budget, value) for value in family.values), strict=True))
    plans, fits = fit_plans(search, targets, setup.model, export, progress=setup.progress)  # type: ignore[arg-type]
    (directory / PLANS).mkdir()
    for name, plan in plans.items():
        plan.save(directory / PLANS / f"{name}.json")
        fit = fits[name]
        note(
            f"{name}: {fit.measured:.3f} ms measured, {fit.predicted:.3f} predicted, {fit.limit:.3f} asked, "
            f"dense {fit.dense:.3f}" + ("" if fit.met else "; the target is MISSED")
        )
    where = {"runtime": place.runtime, "threads": place.threads, **table_sizes(search.table.facts)}
    write_json(directory / FITS, {name: {**where, **fit.to_json()} for name, fit in fits.items()})


def exporter(setup: Setup) -> Export:
    """Writes a model's ONNX file as the recipe says."""
    return lambda model, file: making.export(setup, model, file, file.stem)


def search_of(
    setup: Setup,
    path: SolutionPath,
    moments: Moments | None,
    place: Place,
    align: int,
    kinds: Sequence[str] | None = None,
) -> Search:
    """What members are chosen from: the model's table at `place`, from the user's cache where it was measured before,
    and what its plans along the path lose on calibration data."""
    from deploy_prune.cache import cache_root
    from deploy_prune.latency.candidates import Search
    from deploy_prune.latency.losses import loss_curve
    from deploy_prune.latency.measure import latency_table

    chosen, how = path.kinds(kinds), setup.recipe.export
    table = latency_table(
        setup.model,
        setup.sites,
        path.costs,
        place,
        exporter(setup),
        kinds=chosen,
        align=align,
        cache=cache_root() / "latency" / f"{how.variant}-{how.opset}",
        progress=setup.progress,
    )
    loss_of = losses_of(setup, path, moments)
    curve = loss_curve(path, loss_of, kinds=kinds, progress=setup.progress)
    return Search(path, table, curve, place, tuple(kind.value for kind in chosen), align, loss_of)


def chosen_plans(directory: Path) -> dict[str, PrunePlan]:
    """Name -> plan of what `choose_members` left, largest first."""
    return {name: PrunePlan.load(directory / PLANS / f"{name}.json") for name in read_json(directory / FITS)}


def table_sizes(facts: Mapping[str, Any]) -> dict[str, int]:
    return {name: facts[name] for name in ("batch", "sequence") if name in facts}


def losses_of(setup: Setup, path: SolutionPath, moments: Moments | None) -> Callable[[PrunePlan], float]:
    """The distance of a plan's refitted model to the dense one on calibration data, nothing trained."""
    from deploy_prune.latency.distance import distance_of

    return distance_of(
        setup.model,
        setup.sites,
        setup.task,
        lambda plan: making.planned_weights(setup, plan, moments, path.basis),
        batch_size=setup.recipe.refit.batch_size,
        seed=setup.recipe.seed,
        device=setup.device,
    )
