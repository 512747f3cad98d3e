"""The stage of a member whose structure changes while it trains: what it leaves is weights, a plan and a history."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.files import write_json
from deploy_prune.pipeline import making
from deploy_prune.pipeline.recovering import FACTS, WEIGHTS, judge, save_weights
from deploy_prune.pipeline.searching import compute_of
from deploy_prune.pipeline.setup import Setup
from deploy_prune.saved_state import SavedState

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from deploy_prune.basis import Basis
    from deploy_prune.plan import PrunePlan
    from deploy_prune.refitting import Moments

HISTORY = "history.json"
APART = "adapters"


def dynamic_member(
    setup: Setup,
    plan: PrunePlan,
    moments: Moments | None,
    directory: Path,
    *,
    basis: Basis | None,
    saved: SavedState,
    reference: np.ndarray | None,
) -> None:
    """Train the member from its plan; leaves its weights, its new plan, its history and `FACTS` in `directory`.

    With `dynamic.apart` base and adapters are left apart too. The dense model teaches; `reference` holds its answers
    when the metric is agreement. All processes of the run take part. Raises ParityError when the masked, the compact
    and the apart form differ.
    """
    from converters.parity import check_parity
    from converters.surgery import compact
    from deploy_prune.dynamic.trained import train_dynamic

    clock = making.Clock()
    with clock.step("refit"):
        source = making.planned_weights(setup, plan, moments, basis)
    with clock.step("quality"):
        before = judge(setup, compact(source, plan, check_weights=False), reference)
    how = setup.recipe.dynamic.model_dump(exclude={"enabled", "apart"}, exclude_unset=True)
    with clock.step("train"):
        found = train_dynamic(
            source.to(setup.device),
            setup.task,
            plan,
            teacher=setup.model,
            seed=setup.recipe.seed,
            progress=setup.progress,
            compute=compute_of(setup),
            saved=saved,
            **how,
        )
    source.cpu()
    trained = found.model.cpu()
    small = compact(trained, found.plan, check_weights=False)
    forms: dict[str, Any] = {"masked": making.masked_form(setup, trained, found.plan), "compact": small}
    if setup.recipe.dynamic.apart:
        assert found.adapted is not None  # the recipe asks for adapters
        forms["apart"] = _shipped_apart(setup, found.adapted.cpu(), found.plan, directory / APART)
    with clock.step("parity"):
        parity = check_parity(forms, setup.task.signature, **making.parity_options(setup))
    save_weights(small, directory / WEIGHTS)
    found.plan.save(directory / making.PLAN)
    found.history.save(directory / HISTORY)
    facts = found.to_json()
    marks = facts.pop("marks")
    write_json(
        directory / FACTS,
        {
            "recovery": {**facts, "quality_before": before, "seed": None},
            "marks": marks,
            "parity": parity.to_json(),
            "seconds": clock.seconds,
        },
    )


def take_extras(trained: Path, directory: Path) -> None:
    """Bring a member's history and adapters, where there are any, from the stage of its training to its own."""
    if (trained / HISTORY).exists():
        shutil.copyfile(trained / HISTORY, directory / HISTORY)
    if (trained / APART).is_dir():
        shutil.copytree(trained / APART, directory / APART, copy_function=os.link)


def _shipped_apart(setup: Setup, adapted: nn.Module, plan: PrunePlan, directory: Path) -> Any:
    """Write base and adapters, read them back, and return what they compute."""
    from converters.adapters_apart import load_apart, save_apart

    save_apart(adapted, plan, directory, tokenizer=making.tokenizer_of(setup))
    loaded = load_apart(directory, trust_code=True)  # it was written a moment ago, from the model of this run

    def form(inputs: Mapping[str, Tensor]) -> Tensor:
        return setup.task.signature.call(loaded, inputs)

    return form
