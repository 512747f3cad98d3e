"""The whole run: set up, search, cut, prove, time, bundle; every step a cached stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune import distributed
from deploy_prune.budget import MEASURED
from deploy_prune.errors import UsageError
from deploy_prune.files import read_json, write_json
from deploy_prune.pipeline import choosing, stages
from deploy_prune.pipeline.bundling import FACTS, MOMENTS, PATH, assemble, is_bundle, made_by
from deploy_prune.pipeline.decoders import DECODER, check_cache
from deploy_prune.pipeline.dynamics import dynamic_member, take_extras
from deploy_prune.pipeline.learning import delta_stage
from deploy_prune.pipeline.precisions import precision_stages
from deploy_prune.pipeline.recovering import WEIGHTS, Seed, recover_member
from deploy_prune.pipeline.setup import Setup, check_names, prepare
from deploy_prune.pipeline.uniform import check_uniform
from deploy_prune.pipeline.variant import variant_stage
from deploy_prune.pipeline.workspace import (
    Mode,
    Stage,
    Workspace,
    discard,
    fingerprint,
    open_workspace,
    refuse_foreign,
    work_directory,
)
from deploy_prune.plan import dense_plan
from deploy_prune.progress import SILENT, Progress
from deploy_prune.recipe import Recipe
from deploy_prune.saved_state import SavedState

if TYPE_CHECKING:
    import numpy as np

    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.refitting import Moments


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
    _check_path(recipe, path)
    # before a model is loaded, let alone trained
    distributed.from_main(lambda: refuse_foreign(out, work_directory(out), mode, is_bundle))
    setup = prepare(recipe, progress)
    _check_lengths(setup)
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
        dense = dense_stage(workspace, setup)
        chosen = choosing_stage(workspace, setup, searched, moments)
        members = member_stages(workspace, setup, searched, moments, dense, chosen)
        lowered = precision_stages(workspace, setup, {stages.DENSE: dense, **members}, _reference(dense))
        timed = bench_stage(workspace, setup, dense, members, lowered)
        models = {stages.DENSE: dense, **members}
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


def check_runtimes(recipe: Recipe) -> None:
    """Raise UnavailableError when a runtime to be timed is not here, UsageError when it does not run what it is to
    time: that must not show after hours of search."""
    from bench.runtimes import get_runtime
    from converters.precision.formats import check_steps

    check_names(recipe)
    if recipe.bench.enabled:
        for name in recipe.bench.runtimes:
            get_runtime(name)
        if recipe.bench.past:
            check_steps(recipe.bench.runtimes)
    if recipe.family.budget in MEASURED:
        get_runtime(recipe.family.latency.runtime)


def _check_path(recipe: Recipe, path: SolutionPath | None) -> None:
    """Raise UsageError where a path is missing or cannot be the recipe's."""
    from deploy_prune.plan_path import GIVEN

    if path is None and recipe.search.method == GIVEN:
        raise UsageError(
            "a plan is given, not searched, and none is here",
            where="recipe key search.method",
            got=GIVEN,
            remedy="`deploy-prune plan build PLAN.json -o BUNDLE` makes a bundle of a plan; or name a search.",
        )
    if path is not None and recipe.diff.enabled:
        raise UsageError(
            "a path of before cannot be of the model that is yet to be learned",
            where="recipe key diff",
            remedy="Name the delta in the model, `?delta=FILE`, and leave diff out.",
        )


def _check_lengths(setup: Setup) -> None:
    """Raise UsageError when the recipe asks for sequence lengths of a model that has no sequence, or for longer pasts
    than the model has positions for."""
    from converters.decoder_export import longest_of

    lengths, pasts = setup.recipe.bench.seq, setup.recipe.bench.past
    longest = longest_of(setup.model) if pasts else None
    if pasts and longest is not None and max(pasts) >= longest:
        raise UsageError(
            "more tokens than the model has positions for",
            where="recipe key bench.past",
            expected=f"at most {longest - 1} and one new token",
            got=str(max(pasts)),
            remedy="Name shorter pasts.",
        )
    if lengths and "sequence" not in setup.task.signature.dynamic:
        raise UsageError(
            "the model has no sequence to vary",
            where="recipe key bench.seq",
            expected="no bench.seq for " + setup.task.name,
            got=str(lengths),
            remedy="Leave bench.seq out.",
        )


def run_fingerprint(setup: Setup, path: SolutionPath | None) -> str:
    """What tells this run from any other: the recipe, weights, data, versions, and a given path."""
    given = None if path is None else path.content_sha256()
    recipe = setup.recipe.model_dump(mode="json", exclude={"compute"})
    return fingerprint({"recipe": recipe, "identity": setup.identity, "path": given})


def search_stage(workspace: Workspace, setup: Setup, path: SolutionPath | None) -> Stage:
    """`path.safetensors`, searched or as given."""
    how = setup.recipe.search.model_dump(mode="json")
    given = None if path is None else path.content_sha256()

    saved = workspace.saved("path")

    def work(directory: Path) -> None:
        (path or stages.find_path(setup, saved)).save(directory / PATH)

    done = workspace.stage("path", {**setup.identity, "search": how, "given": given}, work, together=True)
    workspace.forget(saved)
    return done


def moments_stage(workspace: Workspace, setup: Setup) -> Stage | None:
    """`moments.safetensors`, unless the recipe does without a refit."""
    how = setup.recipe.refit
    if not how.enabled:
        return None
    inputs = {**setup.identity, "examples": how.examples, "batch_size": how.batch_size, "emphasis": how.emphasis}
    saved = workspace.saved("moments") / fingerprint(inputs)

    def work(directory: Path) -> None:
        stages.moments_to(setup, saved)
        if distributed.is_main():
            saved.rename(directory / MOMENTS)

    done = workspace.stage("moments", inputs, work, together=True)
    workspace.forget(saved.parent)
    return done


def dense_stage(workspace: Workspace, setup: Setup) -> Stage:
    """The dense model's ONNX, proved and judged."""

    def work(directory: Path) -> None:
        write_json(directory / FACTS, stages.export_dense(setup, directory))

    return workspace.stage("dense", {**setup.identity, **_parts(setup, "export", "parity", "quality")}, work)


def choosing_stage(workspace: Workspace, setup: Setup, searched: Stage, moments: Stage | None) -> Stage | None:
    """The plans of a latency budget, with the table they were chosen by and what was measured of them; None for budgets
    that need no measurement."""
    if not choosing.is_measured(setup):
        return None
    from bench.environment import environment
    from deploy_prune.path import SolutionPath
    from deploy_prune.refitting import load_moments

    def work(directory: Path) -> None:
        path = SolutionPath.load(searched.directory / PATH)
        loaded = None if moments is None else load_moments(moments.directory / MOMENTS)
        choosing.choose_members(setup, path, loaded, directory, workspace.note)

    place = environment()
    inputs = {
        "path": searched.fingerprint,
        "moments": moments.fingerprint if moments else None,
        "machine": {"cpu": place["cpu"], "gpus": place["gpus"], "packages": place["packages"]},
        **_parts(setup, "family", "refit", "export"),
    }
    return workspace.stage("latency", inputs, work)


def member_stages(
    workspace: Workspace,
    setup: Setup,
    searched: Stage,
    moments: Stage | None,
    dense: Stage,
    chosen: Stage | None = None,
) -> dict[str, Stage]:
    """One stage per member. All plans are made first, so that a target out of reach is known before any work."""
    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.refitting import load_moments

    path = distributed.from_main(lambda: SolutionPath.load(searched.directory / PATH))
    plans = checked_plans(setup, path) if chosen is None else distributed.from_main(lambda: _chosen(chosen))
    dense_facts = distributed.from_main(lambda: read_json(dense.directory / FACTS))
    unread = stages.unread_bytes(setup, dense_facts["export"])

    @cache
    def loaded() -> Moments | None:
        return None if moments is None else load_moments(moments.directory / MOMENTS)

    done: dict[str, Stage] = {}
    larger: Seed | None = None
    for name, plan in plans.items():
        inputs = {
            "name": name,
            "plan": plan.to_json(),
            "moments": moments.fingerprint if moments else None,
            "dense": dense.fingerprint,
            **_parts(setup, "refit", "parity", "quality"),
        }
        recovered = None
        given: dict[str, Any] = {"basis": path.basis, "reference": _reference(dense)}
        if setup.recipe.dynamic.enabled:

            def train(
                directory: Path, saved: SavedState, plan: PrunePlan = plan, given: dict[str, Any] = given
            ) -> None:
                dynamic_member(setup, plan, loaded(), directory, saved=saved, **given)

            recovered = training_stage(workspace, setup, name, inputs | _training(setup, "dynamic"), train)
            plan = distributed.from_main(partial(PrunePlan.load, recovered.directory / stages.PLAN))
        elif setup.recipe.recover.enabled:
            given["seed"] = larger

            def train(
                directory: Path, saved: SavedState, plan: PrunePlan = plan, given: dict[str, Any] = given
            ) -> None:
                recover_member(setup, plan, loaded(), directory, saved=saved, **given)

            own = {**_training(setup, "recover"), "seed": larger.fingerprint if larger else None}
            recovered = training_stage(workspace, setup, name, inputs | own, train)
            if setup.recipe.recover.progressive:
                larger = Seed(name, plan, recovered.directory / WEIGHTS, recovered.fingerprint)
        inputs |= {"recovered": recovered.fingerprint if recovered else None, **_parts(setup, "export")}

        def work(
            directory: Path, name: str = name, plan: PrunePlan = plan, recovered: Stage | None = recovered
        ) -> None:
            facts = stages.make_member(
                setup,
                name,
                plan,
                None if recovered else loaded(),
                directory,
                unread_bytes=unread,
                reference=_reference(dense),
                dense_audit=dense_facts["audit"],
                basis=path.basis,
                recovered=recovered.directory if recovered else None,
            )
            if recovered is not None:
                take_extras(recovered.directory, directory)
            write_json(directory / FACTS, facts)

        done[name] = workspace.stage(name, inputs, work)
    return done


def training_stage(
    workspace: Workspace,
    setup: Setup,
    name: str,
    inputs: Mapping[str, Any],
    train: Callable[[Path, SavedState], None],
) -> Stage:
    """What the training `train` of a member leaves, made from `inputs`; a killed one goes on inside the training."""
    saved = workspace.saved(f"{name}.trained")
    state = SavedState(saved, fingerprint(dict(inputs)), setup.recipe.compute.checkpoint_minutes)
    done = workspace.stage(f"{name}.trained", dict(inputs), lambda directory: train(directory, state), together=True)
    workspace.forget(saved)
    return done


def checked_plans(setup: Setup, path: SolutionPath) -> dict[str, PrunePlan]:
    """The plan of every member. Raises PlanError when the path is of other weights, BudgetError out of reach. Of a
    latency budget there are none yet; the path is checked all the same."""
    if choosing.is_measured(setup):
        dense_plan(path.model, path.weights_sha256, path.sites).validate_for(setup.sites, setup.weights_sha256)
        return {}
    plans = stages.plans_of(setup, path)
    for name, plan in plans.items():
        plan.validate_for(setup.sites, setup.weights_sha256, where=f"plan {name}")
    return plans


def _chosen(stage: Stage) -> dict[str, PrunePlan]:
    return choosing.chosen_plans(stage.directory)


def bench_stage(
    workspace: Workspace,
    setup: Setup,
    dense: Stage,
    members: dict[str, Stage],
    lowered: Mapping[str, tuple[Stage, str]] | None = None,
) -> Stage | None:
    """Raw samples and figures of every cell, unless the recipe does without."""
    from converters.decoder_export import GRAPH

    how = setup.recipe.bench
    if not how.enabled:
        return None
    extra = {name: stage for name, (stage, _) in (lowered or {}).items()}
    precisions = {name: name.removeprefix(f"{twin}.") for name, (_, twin) in (lowered or {}).items()}
    made = {stages.DENSE: dense, **members, **extra}
    files = {name: stage.directory / f"{name}.onnx" for name, stage in made.items()}
    decoders = {name: stage.directory / DECODER / GRAPH for name, stage in made.items()} if how.past else {}

    def work(directory: Path) -> None:
        for report in stages.time_family(setup, files, precisions, decoders):
            cell = report.to_json()
            name = "-".join([str(cell["runtime"]), *(f"{k}{v}" for k, v in report.samples.sizes.items())])
            report.save_raw(directory / f"{name}.samples.json")
            write_json(directory / f"{name}.cell.json", cell)

    inputs = {"models": [stage.fingerprint for stage in made.values()], **_parts(setup, "bench")}
    return workspace.stage("bench", inputs, work)


def _parts(setup: Setup, *names: str) -> dict[str, Any]:
    return {name: getattr(setup.recipe, name).model_dump(mode="json") for name in names}


def _training(setup: Setup, name: str) -> dict[str, Any]:
    """The recipe's part `name` as far as the weights depend on it."""
    return {name: getattr(setup.recipe, name).model_dump(mode="json", exclude={"enabled", "workers"})}


def _reference(dense: Stage) -> np.ndarray | None:
    import numpy as np

    file = dense.directory / "answers.npy"
    return np.load(file, allow_pickle=False) if file.exists() else None
