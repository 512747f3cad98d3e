"""`recover`: a compact model in, its best trained version out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deploy_prune.errors import UsageError
from deploy_prune.progress import SILENT, Progress
from deploy_prune.recovery.options import RecoverOptions, check_fits
from deploy_prune.recovery.state import Mark
from deploy_prune.recovery.training import Training

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Task


@dataclass(frozen=True)
class Recovered:
    """The trained model and how it went. `before` and `after` are the metric on the held-out calibration part, which no
    step saw; `best_step` 0 means that no step made it better, and `model` has the weights it started from."""

    model: nn.Module
    metric: str
    before: float
    after: float
    steps: int
    best_step: int
    held_out: int
    trained_on: int
    seconds: float
    marks: list[Mark]

    def to_json(self) -> dict[str, Any]:
        """Everything but the model, as plain JSON data."""
        names = ("metric", "before", "after", "steps", "best_step", "held_out", "trained_on", "seconds")
        return {**{name: getattr(self, name) for name in names}, "marks": [asdict(mark) for mark in self.marks]}


def recover(
    model: nn.Module,
    task: Task,
    *,
    teacher: nn.Module | None = None,
    state: Path | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Recovered:
    """Train a copy of the compact `model` on the task's calibration data; `teacher` is the dense model it came from.

    A part of the calibration data is held out; the best weights on it are kept, the given ones being the first
    candidate. `options` are those of RecoverOptions. With `state`, a file, the run saves where it stands every
    `checkpoint_minutes`, and a later call with the same arguments goes on from there to the same weights, bit for bit.
    Training runs where `model` is, or on all processes of `accelerate launch`.

    Raises UsageError (options), DataError (data), RecoveryError (the loss is not finite), UnavailableError (no peft).
    """
    parsed = options_from(options)
    check_fits(parsed, type(task))
    with torch.random.fork_rng(), torch.enable_grad():
        training = Training(model, task, teacher, parsed, seed, Path(state) if state else None, progress or SILENT)
        training.run()
    standing = training.standing
    best = standing.marks[standing.best]
    return Recovered(
        training.best(),
        task.metric,
        before=standing.marks[0].value,
        after=best.value,
        steps=standing.step,
        best_step=best.step,
        held_out=len(training.held_out),
        trained_on=len(training.feed.items),
        seconds=standing.seconds,
        marks=standing.marks,
    )


def options_from(options: dict[str, Any]) -> RecoverOptions:
    """Options as their type. Raises UsageError that lists every unknown or impossible one."""
    from pydantic import ValidationError

    from deploy_prune.recipe_text import explain

    try:
        return RecoverOptions.model_validate(options)
    except ValidationError as error:
        problems = explain(error, RecoverOptions)
        raise UsageError(f"{len(problems)} bad option(s) of recovery", problems=problems) from error
