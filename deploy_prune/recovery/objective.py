"""What recovery minimises: the task's own loss, and the distance to the dense model in outputs and hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from deploy_prune.errors import UsageError
from deploy_prune.recovery.hidden import hidden_error
from deploy_prune.recovery.options import RecoverOptions

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Batch, Task


W_TASK, W_LOGITS, W_HIDDEN = 0.5, 1.0, 1.0  # where the options leave them open (bench/notes.md)


class Objective:
    """L = w_task · ℓ + w_logits · T² · d(y/T, y*/T) + w_hidden · ε(h, h*), each a mean over the batch.

    ℓ and d are the task's loss and distance (for logits: cross entropy and KL; Hinton et al., arXiv 1503.02531), y* and
    h* the dense teacher's output and hidden states, ε the relative error of `hidden_error`.
    """

    def __init__(self, task: Task, options: RecoverOptions, *, labeled: bool, taught: bool) -> None:
        problems = []

        def weight(name: str, default: float, possible: bool, why_not: str) -> float:
            asked: float | None = getattr(options, name)
            if asked and not possible:
                problems.append(f"{name}: {why_not}")
            return (default if asked is None else asked) if possible else 0.0

        self.task = task
        self.w_task = weight("task_weight", W_TASK, labeled, "the calibration data has no labels")
        self.w_logits = weight("logits_weight", W_LOGITS, taught, "there is no teacher; pass the dense model")
        self.w_hidden = weight("hidden_weight", W_HIDDEN, taught, "there is no teacher; pass the dense model")
        self.temperature = options.temperature
        if options.softens_labels and not self.w_task:
            problems += [f"{n}: there is no task loss" for n in ("label_smoothing",) if getattr(options, n)]
        if not (self.w_task or self.w_logits or self.w_hidden):
            problems.append("nothing to minimise: no labels and no teacher, or their weights are 0")
        if problems:
            raise UsageError("recovery has no such loss here", problems=problems)

    @property
    def needs_teacher(self) -> bool:
        return bool(self.w_logits or self.w_hidden)

    def __call__(
        self,
        output: Tensor,
        batch: Batch,
        dense: Tensor | None,
        states: Sequence[Tensor] = (),
        dense_states: Sequence[Tensor] = (),
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch, a scalar."""
        loss = output.new_zeros(())
        if self.w_task:
            loss = loss + self.w_task * self.task.loss(output, batch).mean()
        if self.w_logits:
            assert dense is not None
            T = self.temperature
            loss = loss + self.w_logits * T**2 * self.task.distance(output / T, dense / T, batch).mean()
        if self.w_hidden:
            loss = loss + self.w_hidden * hidden_error(states, dense_states, mask)
        return loss
