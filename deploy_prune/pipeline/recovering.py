"""The stage between surgery and export: a member is cut, proved, judged, and trained; what it leaves is its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune import distributed
from deploy_prune.files import atomic_file, write_json
from deploy_prune.pipeline import making
from deploy_prune.pipeline.searching import compute_of, moments_of
from deploy_prune.pipeline.setup import Setup
from deploy_prune.saved_state import SavedState

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from deploy_prune.basis import Basis
    from deploy_prune.plan import PrunePlan
    from deploy_prune.refitting import Moments

FACTS = "recovery.json"
WEIGHTS = "recovered.safetensors"


@dataclass(frozen=True)
class Seed:
    """The recovered member that the next, smaller one starts from, the file of its weights, and its stage's
    fingerprint."""

    name: str
    plan: PrunePlan
    weights: Path
    fingerprint: str


def recover_member(
    setup: Setup,
    plan: PrunePlan,
    moments: Moments | None,
    directory: Path,
    *,
    basis: Basis | None,
    seed: Seed | None,
    saved: SavedState,
    reference: np.ndarray | None,
) -> None:
    """Cut the member, prove the cut, judge it and train it; leaves `WEIGHTS` and `FACTS` in `directory`.

    With `seed` the member is cut from that larger recovered one instead of the dense model, refitted with moments of
    its own. The dense model teaches in either case. `reference` holds the dense model's answers when the metric is
    agreement. All processes of the run take part. Raises ParityError when the masked and the compact form differ.
    """
    from converters.parity import check_parity
    from converters.surgery import compact
    from deploy_prune.recovery import recover

    clock = making.Clock()
    if seed is not None:
        with clock.step("moments"):
            setup_of_seed = dataclasses.replace(setup, model=grown(setup, seed))
            own = plan.model_copy(update={"basis": None})  # the grown model's weights are in that basis already
            moments = None if moments is None else moments_of(setup_of_seed)
            source = making.planned_weights(setup_of_seed, own, moments, None)
        plan = own
    else:
        with clock.step("refit"):
            source = making.planned_weights(setup, plan, moments, basis)
    small = compact(source, plan, check_weights=False)
    with clock.step("parity"):
        forms: dict[str, Any] = {"masked": making.masked_form(setup, source, plan), "compact": small}
        parity = check_parity(forms, setup.task.signature, **making.parity_options(setup))
    with clock.step("quality"):
        before = judge(setup, small, reference)
    how = setup.recipe.recover.model_dump(exclude={"enabled", "progressive"}, exclude_unset=True)
    with clock.step("recover"):
        found = recover(
            small.to(setup.device),
            setup.task,
            teacher=setup.model,
            seed=setup.recipe.seed,
            progress=setup.progress,
            compute=compute_of(setup),
            saved=saved,
            **how,
        )
    save_weights(found.model.cpu(), directory / WEIGHTS)
    facts = {
        "recovery": {
            **{key: value for key, value in found.to_json().items() if key != "marks"},
            "quality_before": before,
            "seed": seed.name if seed else None,
        },
        "marks": found.to_json()["marks"],
        "parity": parity.to_json(),
        "seconds": clock.seconds,
    }
    write_json(directory / FACTS, facts)


def recovered_model(setup: Setup, plan: PrunePlan, weights: Path) -> nn.Module:
    """The compact model of `plan` with the weights that a recovery left. Raises ArtifactError when they do not fit."""
    from converters.checkpoint import load_tensors
    from converters.surgery import compact
    from deploy_prune.weights import read_safetensors

    small = compact(setup.model, plan, check_weights=False)
    load_tensors(small, read_safetensors(weights), str(weights))
    return small


def grown(setup: Setup, seed: Seed) -> nn.Module:
    """A recovered member in the dense model's shape, with zeros where units left."""
    from converters.expansion import expand

    return expand(recovered_model(setup, seed.plan, seed.weights), seed.plan, setup.model)


def judge(setup: Setup, model: nn.Module, reference: np.ndarray | None) -> dict[str, Any] | None:
    """The metric of a torch model on the evaluation data, by the main process; None without such data."""
    how, task = setup.recipe.quality, setup.task
    if task.evaluation_size == 0:
        return None

    def predict(inputs: Mapping[str, Tensor]) -> Tensor:
        return task.signature.call(model, inputs)

    return distributed.from_main(
        lambda: task.evaluate(predict, how.batch_size, how.limit, setup.progress, reference).to_json()
    )


def save_weights(model: nn.Module, file: Path) -> None:
    """Write a compact model's weights, atomically."""
    from safetensors.torch import save_file

    from converters.checkpoint import own_tensors

    with atomic_file(file) as temporary:
        save_file(own_tensors(model), temporary)
