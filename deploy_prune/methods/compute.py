"""How a search is computed, as far as that changes its result by rounding only: its memory, its pieces, its processes.

Here are the options (`Compute`) and what a search keeps in memory because it will want it again (`Kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploy_prune import distributed
from deploy_prune.progress import SILENT, Progress
from deploy_prune.tasks.base import Batch, IdleBatch

if TYPE_CHECKING:
    from torch import Tensor

    from deploy_prune.tasks.base import Task

GIB = 2**30


@dataclass(frozen=True)
class Compute:
    """`micro_batch` items go through the model at once (None: a process's whole share of a batch).

    `activation_checkpointing` keeps the inputs of each block only and computes the rest again on the way back. `shard`
    spreads the weights over the processes (FSDP). `memory_gb` bounds what is kept of calibration batches and dense
    outputs, in GiB per process; what does not fit is made again when it is wanted.
    """

    micro_batch: int | None = None
    activation_checkpointing: bool = False
    shard: bool = False
    memory_gb: float = 2.0


@dataclass(frozen=True)
class Part:
    """Calibration items that go through the model together. `counts` is false for work that only keeps step."""

    items: tuple[int, ...]
    counts: bool


def parts(batch: Sequence[int], compute: Compute) -> Iterator[Part]:
    """This process's share of a global batch, every so-manieth example, in pieces of at most `micro_batch`.

    With sharded weights every forward pass is a meeting of all processes, so that all make equally many.
    """
    share = batch[distributed.index() :: distributed.count()]
    largest = -(-len(batch) // distributed.count())
    size = compute.micro_batch or largest
    for start in range(0, largest, size):
        items = tuple(share[start : start + size])
        if items:
            yield Part(items, True)
        elif compute.shard:
            yield Part(tuple(batch[:1]), False)


def share(task: Task, order: Sequence[Sequence[int]], compute: Compute, progress: Progress = SILENT) -> Iterator[Batch]:
    """This process's pieces of the global batches `order`; `progress` is told of whole batches."""
    pieces = [(number, part) for number, batch in enumerate(order) for part in parts(batch, compute)]
    read = task.calibration_batches([part.items for _, part in pieces])
    done = 0
    for (number, part), batch in zip(pieces, read, strict=True):
        progress.advance(number - done)
        done = number
        yield batch if part.counts else IdleBatch(batch.inputs)
    progress.advance(len(order) - done)


def repeated(batches: int, steps: int, seed: int) -> list[int]:
    """Which of so many batches every step takes: all of them in a new order, again and again."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += reversed(torch.randperm(batches, generator=generator).tolist())
    return order[:steps]


class Kept:
    """Tensors kept by key while they fit into `limit` bytes; the others are made anew at every call."""

    def __init__(self, limit: float) -> None:
        self._free = limit
        self._values: dict[object, dict[str, Tensor]] = {}

    def get(self, key: object, make: Callable[[], dict[str, Tensor]], *, fresh: bool = False) -> dict[str, Tensor]:
        if key in self._values and not fresh:
            return self._values[key]
        value = make()
        if key in self._values:
            return value
        size = sum(t.numel() * t.element_size() for t in value.values())
        if size <= self._free:
            self._values[key] = value
            self._free -= size
        return value
