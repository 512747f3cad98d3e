"""Which examples each step sees: a function of seed, step and process alone, so that a run can stop and go on anywhere.

The calibration data is split once: a part held out for judging, evenly spaced, and the part that is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from deploy_prune.errors import DataError, UsageError
from deploy_prune.recovery.augment import augmented_batches
from deploy_prune.recovery.options import RecoverOptions
from deploy_prune.tasks.base import spread

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Batch, Task

EPOCHS = 10.0  # where neither epochs nor steps are given
MOST_HELD_OUT = 512  # examples that a share may hold out: judging costs time, and more tell little more


def split(task: Task, options: RecoverOptions) -> tuple[list[int], list[int]]:
    """Calibration items to train on, and held out. Raises DataError when either would be empty."""
    items = task.calibration_items(options.examples)
    wanted = options.holdout * len(items) if options.holdout < 1 else options.holdout
    number = max(1, round(min(wanted, MOST_HELD_OUT) if options.holdout < 1 else wanted))
    if number >= len(items):
        raise DataError(
            "too little calibration data to hold a part out",
            where=task.name,
            expected=f"more than {number} examples",
            got=str(len(items)),
            remedy="Give more calibration data, or a smaller recover.holdout.",
        )
    held_out = {items[index] for index in spread(len(items), number)}
    return [item for item in items if item not in held_out], sorted(held_out)


@dataclass(frozen=True)
class Feed:
    """The training part, as process `rank` of `world` sees it."""

    task: Task
    items: Sequence[int]
    options: RecoverOptions
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        parts = self.options.accumulate * self.world
        if self.options.batch_size % parts:
            raise UsageError(
                "the batch cannot be split evenly",
                where="recover.batch_size",
                expected=f"a multiple of {parts} (accumulate {self.options.accumulate} · {self.world} processes)",
                got=str(self.options.batch_size),
            )

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of one pass, all of one size: a smaller last one is left out where there are others."""
        order = self.task.calibration_order(self.items, self.options.batch_size, self.seed + number)
        full = max(map(len, order))
        parts = self.options.accumulate * self.world
        if full < parts:
            raise DataError(
                "fewer examples than parts of a batch",
                where=self.task.name,
                expected=f"at least {parts}",
                got=str(full),
                remedy="Lower recover.accumulate or the number of processes.",
            )
        return [batch for batch in order if len(batch) == full]

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        if self.options.steps is not None:
            return self.options.steps
        return max(1, round((self.options.epochs or EPOCHS) * len(self.epoch(0))))

    def batches(self, first: int) -> Iterator[list[Batch]]:
        """For each step from `first` on, the parts of its batch that this process computes, one after another."""
        stream = self._stream(first)
        while True:
            yield [next(stream) for _ in range(self.options.accumulate)]

    def _stream(self, first: int) -> Iterator[Batch]:
        number, skipped = divmod(first, len(self.epoch(0)))
        for epoch in count(number):
            order = [part for batch in self.epoch(epoch)[skipped:] for part in self._own_parts(batch)]
            skipped = 0
            if self.options.augments:
                yield from augmented_batches(self.task, order, self.options, (self.seed, epoch))
            else:
                yield from self.task.calibration_batches(order)

    def _own_parts(self, batch: Sequence[int]) -> list[list[int]]:
        size = len(batch) // (self.options.accumulate * self.world)
        starts = [(part * self.world + self.rank) * size for part in range(self.options.accumulate)]
        return [list(batch[start : start + size]) for start in starts]
