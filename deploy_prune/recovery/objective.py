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


class Objective:
    """L = w_task · ℓ + w_logits · T² · d(y/T, y*/T) + w_hidden · ε(h, h*), each a mean over the batch.

    ℓ and d are the task's loss and distance (for logits: cross entropy and KL; Hinton et al., arXiv 1503.02531), y* and
    h* the dense teacher's output and hidden states, ε the relative error of `hidden_error`.
    """

    def __init__(self, task: Task, options: RecoverOptions, *, labeled: bool, taught: bool) -> None:
        asked = options.model_fields_set
        problems = []
        if not labeled and "task_weight" in asked and options.task_weight:
            problems.append("task_weight: the calibration data has no labels")
        for name in ("logits_weight", "hidden_weight"):
            if not taught and name in asked and getattr(options, name):
                problems.append(f"{name}: there is no teacher; pass the dense model")
        self.task = task
        self.w_task = options.task_weight if labeled else 0.0
        self.w_logits = options.logits_weight if taught else 0.0
        self.w_hidden = options.hidden_weight if taught else 0.0
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
