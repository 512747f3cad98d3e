"""Every step of a run as a cached stage: what it is made from, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune import distributed
from deploy_prune.files import read_json, write_json
from deploy_prune.pipeline import choosing, making
from deploy_prune.pipeline.bundling import FACTS, MOMENTS, PATH
from deploy_prune.pipeline.checks import checked_plans
from deploy_prune.pipeline.decoders import DECODER
from deploy_prune.pipeline.dynamics import dynamic_member, take_extras
from deploy_prune.pipeline.losses import calibrated
from deploy_prune.pipeline.recovering import WEIGHTS, Seed, recover_member
from deploy_prune.pipeline.searching import find_path, moments_to, searched_by
from deploy_prune.pipeline.timing import time_family
from deploy_prune.pipeline.workspace import Stage, Workspace, fingerprint
from deploy_prune.saved_state import SavedState

if TYPE_CHECKING:
    import numpy as np

    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.setup import Setup
    from deploy_prune.plan import PrunePlan
    from deploy_prune.refitting import Moments


def search_stage(workspace: Workspace, setup: Setup, path: SolutionPath | None) -> Stage:
    """`path.safetensors`, searched or as given."""
    how = searched_by(setup)
    given = None if path is None else path.content_sha256()

    saved = workspace.saved("path")

    def work(directory: Path) -> None:
        (path or find_path(setup, saved)).save(directory / PATH)

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
        moments_to(setup, saved)
        if distributed.is_main():
            saved.rename(directory / MOMENTS)

    done = workspace.stage("moments", inputs, work, together=True)
    workspace.forget(saved.parent)
    return done


def calibrate_stage(workspace: Workspace, setup: Setup, searched: Stage, moments: Stage | None) -> Stage:
    """`path.safetensors` with its kinds made comparable, where the recipe asks for it."""
    from deploy_prune.path import SolutionPath
    from deploy_prune.refitting import load_moments

    def work(directory: Path) -> None:
        path = SolutionPath.load(searched.directory / PATH)
        loaded = None if moments is None else load_moments(moments.directory / MOMENTS)
        calibrated(setup, path, loaded).save(directory / PATH)

    inputs = {
        "path": searched.fingerprint,
        "moments": moments.fingerprint if moments else None,
        "examples": setup.recipe.search.loss_examples,
        **_parts(setup, "refit"),
    }
    return workspace.stage("calibrated", inputs, work)


def dense_stage(workspace: Workspace, setup: Setup) -> Stage:
    """The dense model's ONNX, proved and judged."""

    def work(directory: Path) -> None:
        write_json(directory / FACTS, making.export_dense(setup, directory))

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
        "examples": setup.recipe.search.loss_examples,
        **_parts(setup, "family", "refit", "export", "precision"),
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
    unread = making.unread_bytes(setup, dense_facts["export"])

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
        given: dict[str, Any] = {"basis": path.basis, "reference": reference_of(dense)}
        if setup.recipe.dynamic.enabled:

            def train(
                directory: Path, saved: SavedState, plan: PrunePlan = plan, given: dict[str, Any] = given
            ) -> None:
                dynamic_member(setup, plan, loaded(), directory, saved=saved, **given)

            recovered = training_stage(workspace, setup, name, inputs | _training(setup, "dynamic"), train)
            plan = distributed.from_main(partial(PrunePlan.load, recovered.directory / making.PLAN))
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
            facts = making.make_member(
                setup,
                name,
                plan,
                None if recovered else loaded(),
                directory,
                unread_bytes=unread,
                reference=reference_of(dense),
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
    made = {making.DENSE: dense, **members, **extra}
    files = {name: stage.directory / f"{name}.onnx" for name, stage in made.items()}
    decoders = {name: stage.directory / DECODER / GRAPH for name, stage in made.items()} if how.past else {}

    def work(directory: Path) -> None:
        for report in time_family(setup, files, precisions, decoders):
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


def reference_of(dense: Stage) -> np.ndarray | None:
    import numpy as np

    file = dense.directory / "answers.npy"
    return np.load(file, allow_pickle=False) if file.exists() else None
