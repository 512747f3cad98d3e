"""The stage before the search: the task learned as a sparse difference from the recipe's model, which then is cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deploy_prune import distributed
from deploy_prune.errors import UsageError
from deploy_prune.files import write_json
from deploy_prune.pipeline.setup import Setup
from deploy_prune.pipeline.workspace import Stage, Workspace, fingerprint
from deploy_prune.saved_state import SavedState

DELTA = "delta.safetensors"
LEARNED = "learned.json"


def delta_stage(workspace: Workspace, setup: Setup) -> tuple[Setup, Stage | None]:
    """The delta that the recipe asks for, and the setup of the model it makes; the setup as it is without one.

    Raises UsageError in a run of several processes: diff pruning trains in one.
    """
    from deploy_prune.architecture import weights_sha256
    from deploy_prune.delta import TaskDelta

    how = setup.recipe.diff
    if not how.enabled:
        return setup, None
    if distributed.launched() > 1:
        raise UsageError(
            "a task delta is learned in one process",
            where="recipe key diff",
            got=f"{distributed.launched()} processes",
            remedy="Learn it first: `deploy-prune diff`; then name it in the model: `?delta=FILE`.",
        )

    inputs = {**setup.identity, "diff": how.model_dump(mode="json")}
    place = workspace.saved("delta")
    saved = SavedState(place, fingerprint(inputs), setup.recipe.compute.checkpoint_minutes)
    done = workspace.stage("delta", inputs, lambda directory: _learn(setup, directory, saved))
    workspace.forget(place)
    delta = TaskDelta.load(done.directory / DELTA)
    model = delta.apply(setup.model)
    sha256 = weights_sha256(model)
    identity = {**setup.identity, "weights_sha256": sha256, "delta": done.fingerprint}
    return dataclasses.replace(setup, model=model, weights_sha256=sha256, identity=identity, delta=DELTA), done


def _learn(setup: Setup, directory: Path, saved: SavedState) -> None:
    from deploy_prune.delta import diff

    how = setup.recipe.diff
    model = setup.model.to(setup.device)
    found = diff(
        model,
        setup.task,
        head=None if how.head is None else tuple(how.head),
        seed=setup.recipe.seed,
        progress=setup.progress,
        saved=saved,
        **how.model_dump(exclude={"enabled", "head"}, exclude_unset=True),
    )
    model.cpu()
    portable = setup.recipe.portable()
    task = {"name": portable["task"]["name"], "data": portable["task"]["calibration"]}
    facts = {**found.delta.facts, "model": portable["model"], "task": {**task, "options": portable["task"]["options"]}}
    delta = dataclasses.replace(found.delta, facts=facts)
    delta.save(directory / DELTA)
    sizes = delta.sizes(setup.model)
    marks = found.to_json()
    marks.pop("marks")
    write_json(directory / LEARNED, {**marks, "fit": how.fit, "changed": delta.count, "sizes": sizes})
