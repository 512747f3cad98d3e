"""How far a plan's refitted model is from the dense one: the loss that is measured along a path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from deploy_prune.errors import GateError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from deploy_prune.plan import PrunePlan
    from deploy_prune.tasks import Task
    from deploy_prune.units import Site


def distance_of(
    model: nn.Module,
    sites: Sequence[Site],
    task: Task,
    weights_of: Callable[[PrunePlan], nn.Module],
    *,
    examples: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | None = None,
) -> Callable[[PrunePlan], float]:
    """The mean of `task.distance` between `model` and the masked model of a plan, over calibration examples, by default
    `task.loss_examples` (distances to the dense model have no noise of labels in them, so that few are enough).

    `weights_of` gives a plan's dense-shaped weights, refitted or not. All is computed on `device`, by default that of
    `model`, where the model stays. Raises GateError when a plan's outputs are not finite.
    """
    import torch

    from deploy_prune.gates import masked

    home = next(model.parameters()).device
    device = device or home
    limit = min(task.loss_examples if examples is None else examples, task.calibration_size)
    batches = [batch.to(device) for batch in task.calibration(batch_size, limit, seed)]

    def outputs(source: nn.Module) -> Iterator[Tensor]:
        for batch in batches:
            with torch.no_grad():
                found = task.signature.call(source, batch.inputs).float()
            yield found

    dense = list(outputs(model.eval().to(device)))
    model.to(home)

    def distance(plan: PrunePlan) -> float:
        source = weights_of(plan).to(device).eval()
        with masked(source, sites, plan):
            own = outputs(source)  # one batch at a time
            each = [task.distance(o, d, b).flatten() for o, d, b in zip(own, dense, batches, strict=True)]
        source.to(home)
        mean = float(torch.cat(each).mean())
        if not mean < float("inf"):
            raise GateError(
                "a plan along the path gives outputs that are not finite",
                where="the losses along a path",
                remedy="Use more calibration examples or a larger ridge (refit.ridge); or do without such losses, "
                "search.calibrate=false.",
            )
        return mean

    return distance
