"""Which examples each step sees: a function of seed, step and process alone, so that a run can stop and go on anywhere.

The calibration data is split once: a part held out for judging, evenly spaced, and the part that is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from deploy_prune import distributed
from deploy_prune.errors import DataError
from deploy_prune.recovery.augment import augmented_batches
from deploy_prune.recovery.options import EPOCHS, RecoverOptions
from deploy_prune.tasks.base import chunks, spread

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Batch, Task

MOST_HELD_OUT = 512  # examples that a share may hold out: judging costs time, and more tell little more


def split(task: Task, options: RecoverOptions) -> tuple[list[int], list[int]]:
    """Calibration items to train on, and held out. Raises DataError when either would be empty."""
    items = task.calibration_items(options.examples)
    share = options.holdout < 1
    number = max(1, round(min(options.holdout * len(items), MOST_HELD_OUT) if share else options.holdout))
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
    """The training part. Every process takes its share of each batch, in pieces of at most `micro_batch` examples."""

    task: Task
    items: Sequence[int]
    options: RecoverOptions
    seed: int
    micro_batch: int | None = None

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of one pass, all of one size: a smaller last one is left out where there are others.

        Raises DataError when a batch has fewer examples than there are processes.
        """
        order = self.task.calibration_order(self.items, self.options.batch_size, self.seed + number)
        full = max(map(len, order))
        share = full // distributed.count()
        if not share:
            raise DataError(
                "fewer examples in a batch than processes",
                where=self.task.name,
                expected=f"at least {distributed.count()}",
                got=str(full),
                remedy="Raise recover.batch_size, give more data, or start fewer processes.",
            )
        return [batch[: share * distributed.count()] for batch in order if len(batch) == full]

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        if self.options.steps is not None:
            return self.options.steps
        return max(1, round((self.options.epochs or EPOCHS) * len(self.epoch(0))))

    def batches(self, first: int) -> Iterator[list[Batch]]:
        """For each step from `first` on, the pieces of its batch that this process computes, one after another."""
        epoch, skipped = divmod(first, len(self.epoch(0)))
        for number in count(epoch):
            shares = [batch[distributed.index() :: distributed.count()] for batch in self.epoch(number)[skipped:]]
            skipped = 0
            pieces = [chunks(share, self.micro_batch or len(share)) for share in shares]
            stream = self._read([piece for of_step in pieces for piece in of_step], number)
            for of_step in pieces:
                yield [next(stream) for _ in of_step]

    def _read(self, order: Sequence[Sequence[int]], epoch: int) -> Iterator[Batch]:
        if self.options.augments:
            return augmented_batches(self.task, order, self.options, (self.seed, epoch))
        return self.task.calibration_batches(order)
