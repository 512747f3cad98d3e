"""What tasks share whose examples are texts with a class: rows of tokens in an order that wastes little on padding, and
the metrics of classification, those of all answers together among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import DataError, UsageError
from deploy_prune.tasks.base import AGREEMENT, Batch, chunks, require_target, shuffled, spread
from deploy_prune.tasks.classification import Classification
from deploy_prune.tasks.quality import bootstrap, f1, matthews
from deploy_prune.tasks.tokens import TokenRows, grouped, padded

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from deploy_prune.data import Examples

    # Rows of tokens, and the class of each, where the data says it.
    Split = tuple[TokenRows, list[int] | None]

TOGETHER = {"matthews": matthews, "f1": f1}  # metrics that are no mean over examples


class LabeledTexts(Classification):
    """Evaluation runs from the shortest text to the longest, which wastes little on padding. The metrics `matthews` (as
    GLUE's CoLA) and `f1` (of class 1, as GLUE's MRPC) are of all answers together.

    Subclasses set `_calibration`, `_evaluation` and `_pad`, the id of padding.
    """

    metrics = ("accuracy", "matthews", "f1", AGREEMENT)
    _calibration: Split
    _evaluation: Split | None
    _pad: int

    def __init__(self, calibration: Examples, evaluation: Examples | None, metric: str | None, classes: int) -> None:
        super().__init__(calibration, evaluation, metric)
        if self.metric == "f1" and classes != 2:
            raise UsageError(
                "f1 is a metric of two classes",
                got=f"{classes} classes",
                remedy="Ask for metric=matthews or accuracy.",
            )
        self.pairs = "text2" in calibration.columns
        if evaluation is not None and ("text2" in evaluation.columns) != self.pairs:
            raise DataError(
                "only one of calibration and evaluation data has pairs",
                where=evaluation.reference,
                expected="the columns " + ", ".join(calibration.columns),
                got=", ".join(evaluation.columns),
                remedy="Map text2 with ?text2=COLUMN in both.",
            )

    def calibration_order(self, items: Sequence[int], batch_size: int, seed: int = 0) -> list[list[int]]:
        rows, _ = self._calibration
        order = shuffled(items, seed)
        return grouped(order, rows.lengths(order), batch_size, seed)

    def calibration_batches(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        return self._stream(self._calibration, order)

    def evaluation(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        self._evaluation_examples()
        assert self._evaluation is not None
        order = spread(self.evaluation_size, limit)
        length = dict(zip(order, self._evaluation[0].lengths(order), strict=True))
        return self._stream(self._evaluation, chunks(sorted(order, key=length.__getitem__), batch_size))

    def _stream(self, split: Split, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        import torch

        rows, labels = split
        for batch in batches:
            target = None if labels is None else torch.tensor([labels[i] for i in batch])
            yield Batch(padded(rows.rows(batch), self._pad), target)

    def _score(self, output: Tensor, batch: Batch) -> Tensor:
        import torch

        if self.metric not in TOGETHER:
            return super()._score(output, batch)
        return torch.stack([output.argmax(-1), require_target(batch, self)], dim=1)

    def _summarise(self, rows: np.ndarray) -> tuple[float, tuple[float, float], dict[str, Any]]:
        if self.metric not in TOGETHER:
            return super()._summarise(rows)
        return *bootstrap(rows, TOGETHER[self.metric]), {}
