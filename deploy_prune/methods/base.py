"""What every search method is given and gives back: a context, and one importance per unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from deploy_prune import distributed
from deploy_prune.errors import DataError, UsageError
from deploy_prune.gates import gated
from deploy_prune.methods.compute import GIB, Compute, Kept, parts
from deploy_prune.progress import SILENT, Progress, track
from deploy_prune.saved_state import SavedState
from deploy_prune.units import Site

if TYPE_CHECKING:
    from deploy_prune.budget import CostModel
    from deploy_prune.path import Allocation
    from deploy_prune.tasks.base import Batch, Task

BasisName = Literal["own", "principal"]
_TARGET = "target of the batch"  # beside the inputs' names, where a kept batch has its target
# One tensor (units,) per unit key, larger = leaves later.
Importance = Mapping[str, Tensor]


class Options(BaseModel):
    """Base of every method's options: unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NoOptions(Options):
    """For methods without options of their own."""


# What a method adds up over examples: tensors by key, from one piece of a batch.
Step = Callable[["Batch"], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Context:
    """A model under search, its weights frozen, and the calibration stream that judges its units.

    A method that goes through the data with `accumulate` and `total` runs on any number of processes, in pieces of any
    size, and goes on after a kill; `saved` keeps what else it wants to find again. `facts`, JSON data that
    the method leaves there, are kept in the path's options as "found".
    """

    model: nn.Module
    sites: tuple[Site, ...]
    costs: CostModel
    task: Task
    examples: int
    batch_size: int
    precision: Literal["bf16", "fp32"]
    seed: int
    progress: Progress = SILENT
    compute: Compute = field(default_factory=Compute)
    saved: SavedState = field(default_factory=SavedState)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def order(self, examples: int | None = None, *, epoch: int = 0) -> list[list[int]]:
        """The global batches of one pass over the calibration subset; every `epoch` has its own order.

        Raises DataError when there is nothing.
        """
        limit = min(examples or self.examples, self.examples)
        items = self.task.calibration_items(limit)
        order = self.task.calibration_order(items, self.batch_size, self.seed + epoch)
        if not order:
            raise DataError("no calibration data", where=self.task.name, remedy="Give the task calibration data.")
        return order

    def batches(self, label: str, examples: int | None = None, *, epoch: int = 0) -> Iterator[Batch]:
        """One pass over the calibration subset, on the model's device, shown as `label`: of every batch this process's
        share. What is summed over it is whole only after `distributed.reduce`; `accumulate` does that and more."""
        order = self.order(examples, epoch=epoch)
        shares = [batch[distributed.index() :: distributed.count()] for batch in order]
        if self.compute.shard and not all(shares):
            raise UsageError("a batch is smaller than the number of processes", remedy="Use a larger batch.")
        yield from track(self._read([s for s in shares if s]), self.progress, label, len(order))

    def accumulate(
        self, label: str, step: Step, examples: int | None = None, *, epoch: int = 0
    ) -> tuple[dict[str, Tensor], int]:
        """Σ of step(batch) over one pass and all processes, and how many rows that were; shown and saved as `label`."""
        order = self.order(examples, epoch=epoch)
        state = self.saved.load(label)
        done = state.facts["done"] if state else 0
        rows = state.facts["rows"][distributed.index() :: distributed.count()] if state else []
        seen = sum(rows)
        sums = {key: t.to(self.device) for key, t in state.tensors.items()} if state else {}

        def save(done: int) -> None:
            self.saved.save(label, sums, {"done": done, "rows": distributed.all_gather(seen)}, per_process=True)

        plan = [list(parts(batch, self.compute)) for batch in order[done:]]
        stream = self._read([part.items for batch in plan for part in batch])
        self.progress.start(len(order), label)
        try:
            self.progress.advance(done)
            for number, batch in enumerate(plan, done + 1):
                for part in batch:
                    piece = next(stream)
                    found = step(piece)
                    if part.counts:
                        _add(sums, found)
                        seen += len(piece)
                self.progress.advance()
                if number < len(order) and self.saved.due():
                    save(number)
        finally:
            self.progress.finish()
        if done < len(order):
            save(len(order))
        return distributed.reduce(sums), sum(distributed.all_gather(seen))

    def total(self, batch: Sequence[int], step: Step, *, keep: bool = False) -> tuple[dict[str, Tensor], int]:
        """Σ of step(part) over one global batch and all processes, and its rows; `keep` its inputs for next time."""
        sums: dict[str, Tensor] = {}
        rows = 0
        for part in parts(batch, self.compute):
            piece = self._batch(part.items) if keep else next(self._read([part.items]))
            found = step(piece)
            if part.counts:
                _add(sums, found)
                rows += len(piece)
        return distributed.reduce(sums), sum(distributed.all_gather(rows))

    def dense_output(self, batch: Batch, *, fresh: bool = False) -> Tensor:
        """The dense model's output: kept from the last time if it fitted into memory, computed otherwise; `fresh`:
        computed in any case, so that hooks see it. To be called outside of `gated`.
        """

        def make() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"output": self.output(batch)}

        return self._kept.get(("dense", batch.items), make, fresh=fresh)["output"]

    def gradients(
        self,
        gates: Mapping[str, Tensor],
        batch: Batch,
        losses: Callable[[Tensor], Tensor],
        means: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """∂ Σ losses(output) / ∂ gates, by unit key, and the losses, for the model under these gates.

        The way back happens with the gates still in place, as activation checkpointing needs.
        """
        with gated(self.model, self.sites, gates, means):
            each = losses(self.output(batch))
            found = torch.autograd.grad(each.sum(), list(gates.values()))
        return dict(zip(gates, found, strict=True)), each.detach()

    def output(self, batch: Batch) -> Tensor:
        """The task's output for a batch, in float32, under the asked precision."""
        with self.autocast():
            return self.task.signature.call(self.model, batch.inputs).float()

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    @cached_property
    def _kept(self) -> Kept:
        return Kept(self.compute.memory_gb * GIB)

    def _read(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        for items, batch in zip(order, self.task.calibration_batches(order), strict=True):
            yield replace(batch.to(self.device), items=tuple(items))

    def _batch(self, items: tuple[int, ...]) -> Batch:
        from deploy_prune.tasks.base import Batch

        def make() -> dict[str, Tensor]:
            batch = next(self._read([items]))
            return {**batch.inputs, **({} if batch.target is None else {_TARGET: batch.target})}

        tensors = dict(self._kept.get(("batch", items), make))
        return Batch({k: t for k, t in tensors.items() if k != _TARGET}, tensors.get(_TARGET), items)


def _add(sums: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for key, tensor in found.items():
        sums[key] = sums[key] + tensor if key in sums else tensor


@dataclass(frozen=True)
class Method:
    """One registry entry: `run(context, options)` returns an importance per unit.

    `allocation` is how the path orders units across sites, `basis` which dimensions of a head its qk and vo units are
    (basis.py), `stages` at which sparsities the units still there are judged again (staged.py), `calibrated` whether a
    run puts the kinds of the path in order by measured losses (kind_losses.py), unless the user asks otherwise.
    """

    name: str
    summary: str
    run: Callable[[Context, Any], Importance]
    options: type[Options] = NoOptions
    allocation: Allocation = "global"
    basis: BasisName = "own"
    stages: tuple[float, ...] = ()
    calibrated: bool = False
