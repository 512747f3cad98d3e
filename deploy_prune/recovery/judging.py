"""How good the weights are on calibration examples that no step sees: the task's metric, and a loss for ties."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deploy_prune.recovery.state import Mark

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Batch, Task

Forward = Callable[[Mapping[str, Tensor]], Tensor]


class Judge:
    """Marks for weights, all on the same held-out `items`. `dense` computes the teacher's output, None without one."""

    def __init__(self, task: Task, items: Sequence[int], dense: Forward | None) -> None:
        self.task, self.dense = task, dense
        self.order = task.calibration_order(items, task.default_batch_size)

    def mark(self, step: int, forward: Forward) -> Mark:
        """The mark of what `forward` computes. The loss is the task's own with labels, else the distance to dense."""
        losses: list[Tensor] = []
        current: list[Batch] = []

        def stream() -> Iterator[Batch]:
            for batch in self.task.calibration_batches(self.order):
                current[:] = [batch]
                yield batch

        def predict(inputs: dict[str, Tensor]) -> Tensor:
            output, (batch,) = forward(inputs), current
            here = batch.to(output.device)
            if batch.target is not None:
                losses.append(self.task.loss(output, here))
            elif self.dense is not None:
                losses.append(self.task.distance(output, self.dense(inputs), here))
            return output

        quality = self.task.evaluate(predict, batches=stream(), reference=self.dense)
        return Mark(step, quality.value, float(torch.cat(losses).mean()))
