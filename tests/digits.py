"""The digits as a task, and as a run of seconds, for the tests: 8 x 8 images, found offline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy_prune.tasks import Task, load_task

if TYPE_CHECKING:
    from torch import nn

# Of the recipe `digits`: the demo's model without training, searched by the cheapest method: a run of seconds.
SETTINGS = {
    "model": "python:deploy_prune.demo:digits_vit_untrained",
    "search.method": "magnitude",
    "search.options": "{}",
    "refit.examples": "64",
    "quality.limit": "64",
    "family.sparsities": "[0.5]",
}


def digits_task(model: nn.Module) -> Task:
    """Classification of digits by `model`, calibrated on the train part and judged on the test part."""
    return load_task(
        "image-classification",
        model=model,
        model_ref="python:deploy_prune.demo:digits_vit",
        calibration="digits:train",
        evaluation="digits:test",
    )
