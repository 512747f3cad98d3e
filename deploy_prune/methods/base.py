"""What every search method is given and gives back: a context, and one importance per unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from deploy_prune.errors import DataError
from deploy_prune.progress import SILENT, Progress, track
from deploy_prune.units import Site

if TYPE_CHECKING:
    from deploy_prune.budget import CostModel
    from deploy_prune.path import Allocation
    from deploy_prune.tasks.base import Batch, Task

Precision = Literal["bf16", "fp32"]
# One tensor (units,) per unit key, larger = leaves later.
Importance = Mapping[str, Tensor]


class Options(BaseModel):
    """Base of every method's options: unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NoOptions(Options):
    """For methods without options of their own."""


@dataclass(frozen=True)
class Context:
    """A model under search, its weights frozen, and the calibration stream that judges its units."""

    model: nn.Module
    sites: tuple[Site, ...]
    costs: CostModel
    task: Task
    examples: int
    batch_size: int
    precision: Precision
    seed: int
    progress: Progress = SILENT

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def batches(self, label: str, examples: int | None = None, *, epoch: int = 0) -> Iterator[Batch]:
        """One pass over the calibration subset, on the model's device, shown as `label`.

        Every `epoch` has its own order. Raises DataError when there is nothing.
        """
        limit = min(examples or self.examples, self.examples)
        stream = self.task.calibration(self.batch_size, limit=limit, seed=self.seed + epoch)
        count = 0
        for batch in track(stream, self.progress, label, -(-limit // self.batch_size)):
            count += 1
            yield batch.to(self.device)
        if not count:
            raise DataError("no calibration data", where=self.task.name, remedy="Give the task calibration data.")

    def output(self, batch: Batch) -> Tensor:
        """The task's output for a batch, in float32, under the asked precision."""
        with self.autocast():
            return self.task.signature.call(self.model, batch.inputs).float()

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()


@dataclass(frozen=True)
class Method:
    """One registry entry: `run(context, options)` returns an importance per unit.

    `allocation` is how the path orders units across sites unless the user asks otherwise.
    """

    name: str
    summary: str
    run: Callable[[Context, Any], Importance]
    options: type[Options] = NoOptions
    allocation: Allocation = "global"
