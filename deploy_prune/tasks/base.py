"""A task says what "good" means for a model: its data, its loss and its metric. It knows nothing of pruning.

Batches come from two separate sets: calibration, which searches and corrections may see, and evaluation, which only
the reported figure sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deploy_prune.errors import DataError, GateError, UsageError, did_you_mean
from deploy_prune.progress import Progress, track
from deploy_prune.tasks.quality import Quality

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from deploy_prune.data import Examples
    from deploy_prune.signature import Signature

    # Per-row losses (batch,) of an output and its batch, differentiable.
    Losses = Callable[[Tensor, "Batch"], Tensor]
    Predict = Callable[[dict[str, Tensor]], "Tensor | np.ndarray"]

AGREEMENT = "agreement"


@dataclass(frozen=True)
class Batch:
    """Named input tensors, first dimension = row, and what the task's loss compares the output to (or None).

    `items` names the calibration items these are, where the reader of the batch asked for that.
    """

    inputs: dict[str, Tensor]
    target: Tensor | None = None
    items: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def to(self, device: torch.device | str) -> Batch:
        target = None if self.target is None else self.target.to(device)
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, target, self.items)


class IdleBatch(Batch):
    """Run to keep step with other processes that share the model's weights; nothing of it counts."""


class Task(ABC):
    """What good means: `calibration()` and `evaluation()` batches, `loss`, `distance`, `evaluate`.

    `metrics` lists what the task can report, the default first; "agreement" with the dense model needs no labels.
    Sizes and limits count rows of batches.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    default_batch_size: ClassVar[int] = 64
    loss_examples: ClassVar[int] = 256

    signature: Signature

    def __init__(self, calibration: Examples, evaluation: Examples | None, metric: str | None) -> None:
        self.metric = metric or self.metrics[0]
        if self.metric not in self.metrics:
            raise UsageError(
                f"{self.name} has no such metric", got=self.metric, remedy=did_you_mean(self.metric, self.metrics)
            )
        self.calibration_data, self.evaluation_data = calibration, evaluation

    @classmethod
    @abstractmethod
    def create(
        cls, model: nn.Module, model_ref: str, calibration: Examples, evaluation: Examples | None, **options: Any
    ) -> Task:
        """The task for a loaded model; subclasses spell their options out as keyword-only parameters."""

    @property
    def higher_is_better(self) -> bool:
        return True

    @property
    def calibration_size(self) -> int:
        """Rows of one pass over the calibration data: its examples, unless a task says otherwise."""
        return len(self.calibration_data)

    @property
    def evaluation_size(self) -> int:
        """Rows of one pass over the evaluation data; 0 without evaluation data."""
        return len(self.evaluation_data) if self.evaluation_data else 0

    def calibration(self, batch_size: int, limit: int | None = None, seed: int = 0) -> Iterator[Batch]:
        """One shuffled pass. `limit` picks evenly spaced examples, always the same; `seed` sets their order only."""
        return self.calibration_batches(self.calibration_order(self.calibration_items(limit), batch_size, seed))

    def calibration_items(self, limit: int | None = None) -> list[int]:
        """Indices of the calibration examples that are never split, evenly spaced; as many as make `limit` rows."""
        return spread(self.calibration_size, limit)

    def calibration_order(self, items: Sequence[int], batch_size: int, seed: int = 0) -> list[list[int]]:
        """`items` in batches of about `batch_size` rows, in the order that `seed` sets."""
        return chunks(shuffled(items, seed), batch_size)

    @abstractmethod
    def calibration_batches(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """The batches that lists of calibration items name, one after another."""

    @abstractmethod
    def evaluation(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """One pass in a fixed order, the same at every batch size; `limit` picks evenly spaced examples."""

    def calibration_losses(self) -> Losses | None:
        """`loss` where the calibration data is labeled, None where it is not."""
        example = next(iter(self.calibration(1, limit=1)), None)
        return None if example is None or example.target is None else self.loss

    @abstractmethod
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The task's own loss, one value per row, differentiable. Raises DataError for unlabeled batches."""

    @abstractmethod
    def distance(self, output: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        """How far `output` is from the dense model's `reference`, one value >= 0 per row, differentiable."""

    def answers(self, output: Tensor, batch: Batch) -> np.ndarray:
        """What agreement compares, one row per row of the batch: the chosen class, tokens, or the embedding."""
        found: np.ndarray = self._answers(output, batch).cpu().numpy()
        return found

    def agreement(self, output: Tensor, reference: Tensor, batch: Batch) -> np.ndarray:
        """How far two outputs for a batch say the same: per row 1 or 0, a cosine, or (agreeing tokens, all tokens)."""
        return self._agree(self.answers(output.float(), batch), self.answers(reference.float(), batch), batch)

    @abstractmethod
    def _answers(self, output: Tensor, batch: Batch) -> Tensor:
        """What `answers` gives, on the device of output and batch."""

    @abstractmethod
    def _score(self, output: Tensor, batch: Batch) -> Tensor:
        """What the metric is made of, for the judged things of this batch, on the device of both."""

    @abstractmethod
    def _agree(self, answers: np.ndarray, reference: np.ndarray, batch: Batch) -> np.ndarray:
        """What agreement is made of, for the rows of this batch, wherever it is."""

    @abstractmethod
    def _summarise(self, rows: np.ndarray) -> tuple[float, tuple[float, float], dict[str, Any]]:
        """Value, 95 % interval and detail of the metric over all rows."""

    def describe(self) -> dict[str, Any]:
        """What a reader needs to repeat the figures, as plain JSON data."""
        return {
            "name": self.name,
            "metric": self.metric,
            "calibration": self.calibration_data.reference,
            "evaluation": self.evaluation_data.reference if self.evaluation_data else None,
        }

    def evaluate(
        self,
        predict: Predict,
        batch_size: int | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
        reference: Predict | np.ndarray | None = None,
        batches: Iterable[Batch] | None = None,
    ) -> Quality:
        """The metric of whatever computes `predict(inputs) -> output`: torch on any device, or another runtime.

        The metric "agreement" needs the dense model's `reference`: its predict function, or what `reference_answers`
        returned for the same limit. `batches` are judged in place of the evaluation data. Raises GateError when an
        output is not finite.
        """
        import numpy as np

        if self.metric == AGREEMENT and reference is None:
            raise UsageError("agreement needs the dense model to agree with", remedy="Pass reference=.")
        parts: list[np.ndarray] = []
        done = 0
        stream: Iterator[Batch] = (
            self._evaluation_with_progress(batch_size, limit, progress, f"evaluate {self.metric}")
            if batches is None
            else track(batches, progress, f"judge {self.metric}")
        )
        for batch in stream:
            output, here = self._output(predict, batch)
            if self.metric != AGREEMENT:
                parts.append(self._score(output, here).cpu().numpy())
                del output, here  # the next output needs their room
                continue
            if callable(reference):
                expected = self.answers(*self._output(reference, batch))
            else:
                assert reference is not None
                expected = reference[done : done + len(batch)]
                done += len(batch)
                if len(expected) != len(batch):
                    raise UsageError(
                        "the reference has too few rows",
                        got=str(len(reference)),
                        remedy="Make it with reference_answers at the same limit.",
                    )
            parts.append(self._agree(self.answers(output, here), expected, batch))
        rows = np.concatenate(parts).astype(np.float64)
        value, interval, detail = self._summarise(rows)
        return Quality(self.metric, value, len(rows), interval, self.higher_is_better, rows, detail)

    def reference_answers(
        self,
        predict: Predict,
        batch_size: int | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """The dense model's answers on the evaluation data, to be agreed with by many members."""
        import numpy as np

        stream = self._evaluation_with_progress(batch_size, limit, progress, "reference answers")
        return np.concatenate([self.answers(*self._output(predict, batch)) for batch in stream])

    def _evaluation_with_progress(
        self, batch_size: int | None, limit: int | None, progress: Progress | None, label: str
    ) -> Iterator[Batch]:
        size = batch_size or self.default_batch_size
        total = min(self.evaluation_size, limit or self.evaluation_size)
        return track(self.evaluation(size, limit), progress, label, -(-total // size))

    def _output(self, predict: Predict, batch: Batch) -> tuple[Tensor, Batch]:
        """The output where `predict` left it, and the batch there: the logits of a language model are large."""
        import torch

        with torch.no_grad():
            raw = predict(batch.inputs)
        output = torch.as_tensor(raw).detach().float()
        if not torch.isfinite(output).all():
            raise GateError(
                f"the model's output is not finite on the evaluation data of {self.name}",
                got=f"{int((~torch.isfinite(output)).sum())} of {output.numel()} values",
                remedy="It overflowed or was damaged: compare precision fp32, or another sparsity.",
            )
        return output, batch.to(output.device)

    def _evaluation_examples(self) -> Examples:
        if self.evaluation_data is None:
            raise DataError(
                "the task has no evaluation data",
                where=self.name,
                remedy="Give the task an evaluation data reference, other than its calibration data.",
            )
        return self.evaluation_data


def spread(size: int, limit: int | None) -> list[int]:
    """`limit` evenly spaced indices below `size`: data is often sorted by class or source."""
    count = size if limit is None else min(size, limit)
    return [index * size // count for index in range(count)] if count else []


def shuffled(indices: Sequence[int], seed: int) -> list[int]:
    import torch

    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    return [indices[i] for i in order.tolist()]


def chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    if size < 1:
        raise UsageError("batch size below 1", got=str(size))
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def require_target(batch: Batch, task: Task) -> Tensor:
    if batch.target is None:
        raise DataError(
            "the calibration data is unlabeled, so the task has no loss on it",
            where=task.name,
            got=task.calibration_data.reference,
            remedy="Give labeled calibration data, or ask for the objective that distils the dense model.",
        )
    return batch.target


def unknown_options(task: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises one UsageError listing every option that `task` does not have."""
    problems = [f"{name}: {did_you_mean(name, known)}" for name in options if name not in known]
    if problems:
        raise UsageError(f"unknown options of the task {task}", problems=problems)
