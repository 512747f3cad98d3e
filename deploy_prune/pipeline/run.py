"""The whole run: set up, search, cut, prove, time, bundle; every step a cached stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy_prune import distributed
from deploy_prune.errors import UsageError
from deploy_prune.methods import get_method
from deploy_prune.pipeline import making
from deploy_prune.pipeline.bundling import assemble, is_bundle, made_by
from deploy_prune.pipeline.checks import check_lengths, check_path, check_runtimes, checked_plans
from deploy_prune.pipeline.decoders import check_cache
from deploy_prune.pipeline.learning import delta_stage
from deploy_prune.pipeline.losses import calibrates, why_not
from deploy_prune.pipeline.precisions import precision_stages
from deploy_prune.pipeline.setup import Setup, prepare
from deploy_prune.pipeline.staged import (
    bench_stage,
    calibrate_stage,
    choosing_stage,
    dense_stage,
    member_stages,
    moments_stage,
    reference_of,
    search_stage,
)
from deploy_prune.pipeline.uniform import check_uniform
from deploy_prune.pipeline.variant import variant_stage
from deploy_prune.pipeline.workspace import Mode, discard, fingerprint, open_workspace, refuse_foreign, work_directory
from deploy_prune.progress import SILENT, Progress
from deploy_prune.recipe import Recipe

if TYPE_CHECKING:
    from deploy_prune.path import SolutionPath


@dataclass(frozen=True)
class Outcome:
    """A finished run. `already` when an earlier run had left this very bundle."""

    out: Path
    already: bool = False


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    mode: Mode = "new",
    path: SolutionPath | None = None,
    progress: Progress = SILENT,
    note: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run `recipe` and leave its bundle in `out`; with `path` given, nothing is searched.

    `mode` says what may happen to an earlier run (see workspace.py); `note` is told of every stage. Raises the errors
    of every step; none leaves an `out` behind. ParityError means that a member was not what it should be.
    """
    check_runtimes(recipe)
    check_cache(recipe)
    check_path(recipe, path)
    # before a model is loaded, let alone trained
    distributed.from_main(lambda: refuse_foreign(out, work_directory(out), mode, is_bundle))
    setup = prepare(recipe, progress)
    check_lengths(setup)
    check_uniform(setup)
    if path is not None:
        checked_plans(setup, path)  # a path of other weights, or a target out of reach, before anything is written
    wanted = run_fingerprint(setup, path)
    if mode == "resume" and distributed.from_main(lambda: _finished(out, wanted)):
        return Outcome(out, already=True)
    with open_workspace(out, mode, is_output=is_bundle, note=note) as workspace:
        setup, learned = delta_stage(workspace, setup)
        setup, formed = variant_stage(workspace, setup)
        searched = search_stage(workspace, setup, path)
        moments = moments_stage(workspace, setup)
        if path is None and calibrates(recipe):
            searched = calibrate_stage(workspace, setup, searched, moments)
        elif path is None and recipe.search.calibrate is None and get_method(recipe.search.method).calibrated:
            note(f"the path is not calibrated: {why_not(recipe)}")
        dense = dense_stage(workspace, setup)
        chosen = choosing_stage(workspace, setup, searched, moments)
        members = member_stages(workspace, setup, searched, moments, dense, chosen)
        lowered = precision_stages(workspace, setup, {making.DENSE: dense, **members}, reference_of(dense))
        timed = bench_stage(workspace, setup, dense, members, lowered)
        models = {making.DENSE: dense, **members}
        parts = (learned, formed, searched, chosen, *models.values(), *(s for s, _ in lowered.values()), timed)
        made = [stage for stage in parts if stage is not None]
        bundle = workspace.stage(
            "bundle",
            {"run": wanted, "parts": [stage.fingerprint for stage in made]},
            lambda directory: assemble(
                directory, setup, wanted, searched, models, timed, workspace.seconds, chosen, learned, formed, lowered
            ),
        )
        workspace.finish(bundle)
    return Outcome(out)


def _finished(out: Path, wanted: str) -> bool:
    """Whether an earlier run left the bundle that is `wanted`. Raises UsageError for the bundle of another run."""
    if not is_bundle(out):
        return False
    if not made_by(out, wanted):
        raise UsageError(
            "the output is the bundle of another run",
            where=str(out),
            got="a manifest of another recipe, data, weights or versions",
            remedy="--fresh replaces it when the new one is whole; or choose another output directory.",
        )
    discard(work_directory(out))
    return True


def run_fingerprint(setup: Setup, path: SolutionPath | None) -> str:
    """What tells this run from any other: the recipe, weights, data, versions, and a given path."""
    given = None if path is None else path.content_sha256()
    recipe = setup.recipe.model_dump(mode="json", exclude={"compute"})
    orders = {"calibrated": path is None and calibrates(setup.recipe)}  # which `compute` has a say in
    return fingerprint({"recipe": recipe, "identity": setup.identity, "path": given, **orders})
