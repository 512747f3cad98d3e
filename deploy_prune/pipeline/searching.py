"""What a run makes once, for all its members: the solution path and the refit's moments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import DataError
from deploy_prune.pipeline.setup import Setup
from deploy_prune.pipeline.workspace import fingerprint

if TYPE_CHECKING:
    from deploy_prune.methods.compute import Compute
    from deploy_prune.path import SolutionPath
    from deploy_prune.refitting import Moments


def find_path(setup: Setup, saved: Path | None = None) -> SolutionPath:
    """Search the model once; all processes of the run take part. The path remembers the task, so that members can be
    cut from the file alone (and from the task delta beside it, where one made the model). The search goes on from what
    an earlier one left in the directory `saved`."""
    from deploy_prune.methods import search
    from deploy_prune.saved_state import SavedState

    recipe, how = setup.recipe, setup.recipe.search
    compute = compute_of(setup)
    model = setup.model if compute.shard else setup.model.to(setup.device)
    try:
        path = search(
            model,
            setup.task,
            how.method,
            allocation=how.allocation,
            basis=how.basis,
            stages=how.stages,
            examples=how.examples,
            batch_size=how.batch_size,
            precision=how.precision,
            seed=recipe.seed,
            model_name=recipe.portable()["model"],
            progress=setup.progress,
            compute=compute,
            saved=SavedState(saved, search_fingerprint(setup), recipe.compute.checkpoint_minutes),
            **how.options,
        )
    finally:
        model.cpu()
    learned = {} if setup.delta is None else {"delta": setup.delta}
    return dataclasses.replace(path, options={**path.options, "task": recipe.portable()["task"], **learned})


def kept_path(setup: Setup, saved: Path) -> SolutionPath:
    """As `find_path`; what it found stays in `saved` for as long as there is more to do to it."""
    from deploy_prune import distributed
    from deploy_prune.path import SolutionPath

    kept = saved / f"searched-{search_fingerprint(setup)[:16]}.safetensors"

    def keep() -> None:
        saved.mkdir(parents=True, exist_ok=True)
        path.save(kept)

    if distributed.from_main(kept.is_file):
        return SolutionPath.load(kept)
    path = find_path(setup, saved)
    distributed.from_main(keep)
    return path


def compute_of(setup: Setup) -> Compute:
    """How the work is cut up and shared out, by the recipe or by `accelerate launch --use_fsdp`."""
    from deploy_prune import distributed
    from deploy_prune.methods.compute import Compute

    how = setup.recipe.compute
    shard = how.shard or distributed.sharded_by_launcher()
    return Compute(how.micro_batch, how.activation_checkpointing, shard, how.memory_gb)


def search_fingerprint(setup: Setup) -> str:
    """What tells one search from any other: all that its path depends on, but for rounding."""
    return fingerprint({**setup.identity, "search": searched_by(setup)})


def searched_by(setup: Setup) -> dict[str, Any]:
    """The recipe's words on the search itself, without what is done to its path afterwards."""
    return setup.recipe.search.model_dump(mode="json", exclude={"calibrate", "loss_examples"})


def moments_of(setup: Setup) -> Moments:
    """First and second moments of what every output projection reads, over the refit's calibration examples."""
    from deploy_prune.refitting import collect_moments

    how = setup.recipe.refit
    limit = min(how.examples or setup.task.calibration_size, setup.task.calibration_size)
    model = setup.model.to(setup.device)
    setup.progress.start(limit, "moments")
    try:
        return collect_moments(
            model,
            setup.sites,
            setup.task.calibration(how.batch_size, limit, setup.recipe.seed),
            setup.task.signature,
            **emphasis_of(setup),
            progress=setup.progress,
        )
    finally:
        setup.progress.finish()
        model.cpu()


def moments_to(setup: Setup, directory: Path) -> None:
    """As `moments_of`, but written to `directory`, a few sites at a time if all do not fit into memory, and by all
    processes of the run. Sites that an earlier call left there whole are not done again."""
    from deploy_prune.methods import placed
    from deploy_prune.methods.compute import GIB
    from deploy_prune.moment_groups import collect_to

    how, task, compute = setup.recipe.refit, setup.task, compute_of(setup)
    limit = min(how.examples or task.calibration_size, task.calibration_size)
    order = task.calibration_order(task.calibration_items(limit), how.batch_size, setup.recipe.seed)
    model = setup.model if compute.shard else setup.model.to(setup.device)
    try:
        with placed(model, setup.sites, compute) as ready:
            collect_to(
                directory,
                ready,
                setup.sites,
                task,
                order,
                limit=setup.recipe.compute.memory_gb * GIB,
                **emphasis_of(setup),
                compute=compute,
                progress=setup.progress,
            )
    finally:
        model.cpu()


def emphasis_of(setup: Setup) -> dict[str, Any]:
    """The losses that weight the refit's tokens, and how far, by the recipe. Raises DataError when it asks for an
    emphasis on data without labels."""
    from deploy_prune.refitting import EMPHASIS

    asked = setup.recipe.refit.emphasis
    losses = setup.task.calibration_losses()
    if asked and losses is None:
        raise DataError(
            "refit.emphasis needs labeled calibration data",
            where=setup.task.name,
            remedy="Give labels, or leave refit.emphasis out.",
        )
    return {"losses": losses, "emphasis": EMPHASIS if asked is None else asked}
