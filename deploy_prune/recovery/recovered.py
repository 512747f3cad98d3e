"""`recover`: a compact model in, its best trained version out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deploy_prune.methods.compute import Compute
from deploy_prune.progress import SILENT, Progress
from deploy_prune.recipe_text import checked_options
from deploy_prune.recovery.options import RecoverOptions, check_fits
from deploy_prune.recovery.sparse import SparseTraining
from deploy_prune.recovery.state import Mark
from deploy_prune.recovery.training import Training
from deploy_prune.saved_state import SavedState

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Task


@dataclass(frozen=True)
class Recovered:
    """The trained model and how it went. `before` and `after` are the metric on the held-out calibration part, which no
    step saw; `best_step` 0 means that no step made it better, and `model` has the weights it started from. `changed`
    counts the weights that a sparse delta changes."""

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
    changed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but the model, as plain JSON data."""
        names = ("metric", "before", "after", "steps", "best_step", "held_out", "trained_on", "seconds", "changed")
        return {**{name: getattr(self, name) for name in names}, "marks": [asdict(mark) for mark in self.marks]}


def recover(
    model: nn.Module,
    task: Task,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    compute: Compute | None = None,
    saved: SavedState | None = None,
    **options: Any,
) -> Recovered:
    """Train a copy of the compact `model` on the task's calibration data; `teacher` is the dense model it came from.

    A part of the calibration data is held out; the best weights on it are kept, the given ones being the first
    candidate. `options` are those of RecoverOptions; a site that vanished is no matter, its layer's hidden state is
    matched all the same. Same seed, data, versions and processes: same weights. `compute` says in which pieces the work
    is done, `saved` where an interrupted recovery goes on, to the same weights bit for bit. In a run of several
    processes every one calls this, and all get the same model.

    Raises UsageError (options), DataError (data), RecoveryError (the loss is not finite), UnavailableError (no peft).
    """
    parsed = checked_options(RecoverOptions, options, "recovery")
    check_fits(parsed, type(task))
    with torch.random.fork_rng(), torch.enable_grad():
        kind = SparseTraining if parsed.method == "diff" else Training
        training = kind(model, task, teacher, parsed, compute or Compute(), seed, progress or SILENT)
        place = saved or SavedState()
        own = json.dumps([place.identity, training.identity], sort_keys=True)
        training.run(SavedState(place.directory, own, place.minutes))
    standing = training.standing
    best = standing.marks[standing.best]
    found = training.best()
    return Recovered(
        found,
        task.metric,
        before=standing.marks[0].value,
        after=best.value,
        steps=standing.step,
        best_step=best.step,
        held_out=len(training.held_out),
        trained_on=len(training.feed.items),
        seconds=standing.seconds,
        marks=standing.marks,
        changed=_changed(model, found) if parsed.method == "diff" else None,
    )


def _changed(given: nn.Module, found: nn.Module) -> int:
    """How many weights differ."""
    pairs = zip(given.parameters(), found.parameters(), strict=True)
    return sum(int((a.detach() != b.detach().to(a.device)).sum()) for a, b in pairs)
