"""The whole run: set up, search, cut, prove, time, bundle; every step a cached stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.files import read_json, write_json
from deploy_prune.pipeline import stages
from deploy_prune.pipeline.bundling import assemble, is_bundle, made_by
from deploy_prune.pipeline.setup import Setup, prepare
from deploy_prune.pipeline.workspace import Mode, Stage, Workspace, discard, fingerprint, open_workspace, work_directory
from deploy_prune.progress import SILENT, Progress
from deploy_prune.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np

    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan

FACTS = "facts.json"
PATH = "path.safetensors"
MOMENTS = "moments.safetensors"


@dataclass(frozen=True)
class Outcome:
    """A finished run. `already` when an earlier run had left this very bundle."""

    out: Path
    already: bool = False


def run_recipe(recipe: Recipe, out: Path, *, mode: Mode = "new", path: SolutionPath | None = None,
               progress: Progress = SILENT) -> Outcome:
    """Run `recipe` and leave its bundle in `out`; with `path` given, nothing is searched.

    `mode` says what may happen to an earlier run (see workspace.py). Raises the errors of every step; none leaves an
    `out` behind. ParityError means that a member was not what it should be.
    """
    setup = prepare(recipe, progress)
    wanted = run_fingerprint(setup, path)
    if mode == "resume" and made_by(out, wanted):
        discard(work_directory(out))
        return Outcome(out, already=True)
    with open_workspace(out, mode, is_output=is_bundle) as workspace:
        searched = search_stage(workspace, setup, path)
        moments = moments_stage(workspace, setup)
        dense = dense_stage(workspace, setup)
        members = member_stages(workspace, setup, searched, moments, dense)
        timed = bench_stage(workspace, setup, dense, members)
        bundle = workspace.stage(
            "bundle",
            {"run": wanted, "parts": [s.fingerprint for s in (searched, dense, *members.values(), timed) if s]},
            lambda directory: assemble(directory, setup, wanted, workspace.stages),
        )
        workspace.finish(bundle)
    return Outcome(out)


def run_fingerprint(setup: Setup, path: SolutionPath | None) -> str:
    """What tells this run from any other: the recipe, weights, data, versions, and a given path."""
    given = None if path is None else {key: scores.tolist() for key, scores in path.scores.items()}
    return fingerprint({"recipe": setup.recipe.resolved(), "identity": setup.identity, "path": given})


def search_stage(workspace: Workspace, setup: Setup, path: SolutionPath | None) -> Stage:
    """`path.safetensors`, searched or as given."""
    how = setup.recipe.search.model_dump(mode="json")
    given = None if path is None else {key: scores.tolist() for key, scores in path.scores.items()}

    def work(directory: Path) -> None:
        (path or stages.find_path(setup)).save(directory / PATH)

    return workspace.stage("path", {**setup.identity, "search": how, "given": given}, work)


def moments_stage(workspace: Workspace, setup: Setup) -> Stage | None:
    """`moments.safetensors`, unless the recipe does without a refit."""
    from deploy_prune.refitting import save_moments

    how = setup.recipe.refit
    if not how.enabled:
        return None
    inputs = {**setup.identity, "examples": how.examples, "batch_size": how.batch_size}
    return workspace.stage("moments", inputs, lambda directory: save_moments(stages.moments_of(setup), directory / MOMENTS))


def dense_stage(workspace: Workspace, setup: Setup) -> Stage:
    """The dense model's ONNX, proved and judged."""

    def work(directory: Path) -> None:
        write_json(directory / FACTS, stages.export_dense(setup, directory))

    return workspace.stage("dense", {**setup.identity, **_parts(setup, "export", "parity", "quality")}, work)


def member_stages(workspace: Workspace, setup: Setup, searched: Stage, moments: Stage | None,
                  dense: Stage) -> dict[str, Stage]:
    """One stage per member. All plans are cut first, so that a target out of reach is known before any work."""
    from deploy_prune.path import SolutionPath
    from deploy_prune.refitting import load_moments

    plans = stages.plans_of(setup, SolutionPath.load(searched.directory / PATH))
    unread = stages.unread_bytes(setup, read_json(dense.directory / FACTS)["export"])
    loaded = None
    done = {}
    for name, plan in plans.items():
        inputs = {
            "name": name,
            "plan": plan.to_json(),
            "moments": moments.fingerprint if moments else None,
            "dense": dense.fingerprint,
            **_parts(setup, "refit", "export", "parity", "quality"),
        }

        def work(directory: Path, name: str = name, plan: PrunePlan = plan) -> None:
            nonlocal loaded
            if moments is not None and loaded is None:
                loaded = load_moments(moments.directory / MOMENTS)
            facts = stages.make_member(setup, name, plan, loaded, directory, unread_bytes=unread,
                                       reference=_reference(dense))
            write_json(directory / FACTS, facts)

        done[name] = workspace.stage(name, inputs, work)
    return done


def bench_stage(workspace: Workspace, setup: Setup, dense: Stage, members: dict[str, Stage]) -> Stage | None:
    """Raw samples and figures of every cell, unless the recipe does without."""
    how = setup.recipe.bench
    if not how.enabled:
        return None
    made = {stages.DENSE: dense, **members}
    files = {name: stage.directory / f"{name}.onnx" for name, stage in made.items()}

    def work(directory: Path) -> None:
        for report in stages.time_family(setup, files):
            cell = report.to_json()
            name = "-".join([str(cell["runtime"]), *(f"{k}{v}" for k, v in report.samples.sizes.items())])
            report.save_raw(directory / f"{name}.samples.json")
            write_json(directory / f"{name}.json", cell)

    inputs = {"models": [stage.fingerprint for stage in made.values()], **_parts(setup, "bench")}
    return workspace.stage("bench", inputs, work)


def _parts(setup: Setup, *names: str) -> dict[str, Any]:
    return {name: getattr(setup.recipe, name).model_dump(mode="json") for name in names}


def _reference(dense: Stage) -> np.ndarray | None:
    import numpy as np

    file = dense.directory / "answers.npy"
    return np.load(file, allow_pickle=False) if file.exists() else None
