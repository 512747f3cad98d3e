"""The stage that chooses the members of a latency budget: table, losses along the path, plans and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.budget import MEASURED
from deploy_prune.files import read_json, write_json
from deploy_prune.pipeline import making
from deploy_prune.pipeline.losses import losses_of
from deploy_prune.pipeline.setup import Setup
from deploy_prune.plan import PrunePlan

if TYPE_CHECKING:
    from deploy_prune.latency.candidates import Search
    from deploy_prune.latency.graph import Graph
    from deploy_prune.latency.place import Place
    from deploy_prune.path import SolutionPath
    from deploy_prune.refitting import Moments

TABLE, LOSSES, FITS, PLANS = "table.json", "losses.json", "fits.json", "plans"


def is_measured(setup: Setup) -> bool:
    """Whether the family's members are chosen by measured latency."""
    return setup.recipe.family.budget in MEASURED


def place_of(setup: Setup) -> Place:
    from deploy_prune.latency.place import DEFAULT_SEQUENCE, Place
    from deploy_prune.tasks.tokens import longest_text

    how = setup.recipe.family.latency
    longest = longest_text(getattr(setup.model, "config", None)) or DEFAULT_SEQUENCE
    short = longest if longest < DEFAULT_SEQUENCE and not how.past else None
    return Place(how.runtime, how.batch, how.seq or short, how.threads, how.seconds, how.past)


def choose_members(
    setup: Setup, path: SolutionPath, moments: Moments | None, directory: Path, note: Callable[[str], None]
) -> None:
    """Write the plans of all members, how they fit, the table and the losses into `directory`."""
    from deploy_prune.latency.fitting import fit_plans

    family, place, graph = setup.recipe.family, place_of(setup), timed_graph(setup)
    setup.model.cpu()
    search = search_of(setup, path, moments, place, graph, family.alignment, family.kinds)
    search.table.save(directory / TABLE)
    write_json(directory / LOSSES, search.losses.to_json())
    targets = dict(zip(family.member_names(), ((family.budget, value) for value in family.values), strict=True))
    plans, fits = fit_plans(search, targets, setup.model, graph, progress=setup.progress)  # type: ignore[arg-type]
    (directory / PLANS).mkdir()
    for name, plan in plans.items():
        plan.save(directory / PLANS / f"{name}.json")
        fit = fits[name]
        note(
            f"{name}: {fit.measured:.3f} ms measured, {fit.predicted:.3f} predicted, {fit.limit:.3f} asked, "
            f"dense {fit.dense:.3f}" + ("" if fit.met else "; the target is MISSED")
        )
    where = {"runtime": place.runtime, "threads": place.threads, **table_sizes(search.table.facts)}
    where["precision"] = family.latency.precision
    write_json(directory / FITS, {name: {**where, **fit.to_json()} for name, fit in fits.items()})


def timed_graph(setup: Setup) -> Graph:
    """Writes a model as the graph whose latency the recipe's budget counts."""
    from deploy_prune.latency.graph import Graph

    recipe = setup.recipe
    export, timed, how = recipe.export, recipe.family.latency, recipe.precision
    cache = timed.past is not None
    return Graph(
        setup.task.signature,
        export.opset,
        export.variant,  # type: ignore[arg-type]  # settled before anything is exported
        cache,
        cache and export.last_logits,
        timed.precision,
        {
            "keep": how.keep_decoder if cache else how.keep,
            "calibrate": how.calibrate,
            "percentile": how.percentile,
            "reduce_range": how.reduce_range,
            "block": how.block,
        },
        making.calibration_of(setup) if timed.precision == "int8-static" else (),
    )


def search_of(
    setup: Setup,
    path: SolutionPath,
    moments: Moments | None,
    place: Place,
    graph: Graph,
    align: int,
    kinds: Sequence[str] | None = None,
) -> Search:
    """What members are chosen from: the table of the model's `graph` at `place`, from the user's cache where it was
    measured before, and what its plans along the path lose on calibration data."""
    from deploy_prune.cache import cache_root
    from deploy_prune.kind_losses import measured_losses
    from deploy_prune.latency.candidates import Search
    from deploy_prune.latency.measure import latency_table

    chosen = path.kinds(kinds)
    table = latency_table(
        setup.model,
        setup.sites,
        path.costs,
        place,
        graph,
        kinds=chosen,
        align=align,
        cache=cache_root() / "latency" / graph.form,
        progress=setup.progress,
    )
    loss_of = losses_of(setup, path, moments)
    losses = measured_losses(path, loss_of, kinds=kinds, progress=setup.progress)
    return Search(path, table, losses, place.of(table), tuple(kind.value for kind in chosen), align, loss_of)


def chosen_plans(directory: Path) -> dict[str, PrunePlan]:
    """Name -> plan of what `choose_members` left, largest first."""
    return {name: PrunePlan.load(directory / PLANS / f"{name}.json") for name in read_json(directory / FITS)}


def table_sizes(facts: Mapping[str, Any]) -> dict[str, int]:
    return {name: facts[name] for name in ("batch", "sequence", "past") if name in facts}
