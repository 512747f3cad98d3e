"""Image classification: pixel values in, logits out, judged by the share of right first answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import UnsupportedModelError
from deploy_prune.signature import Signature, TensorSpec
from deploy_prune.tasks.base import AGREEMENT, Batch, chunks, spread
from deploy_prune.tasks.classification import Classification, class_indices
from deploy_prune.tasks.images import Preparation, PreparedImages, preparation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploy_prune.data import Examples


class ImageClassification(Classification):
    """Examples have `image` and, but for agreement, `label`, an index below the model's number of classes."""

    name = "image-classification"
    metrics = ("top1", AGREEMENT)

    def __init__(
        self,
        prepared: Preparation,
        classes: int,
        calibration: Examples,
        evaluation: Examples | None,
        metric: str | None,
    ) -> None:
        super().__init__(calibration, evaluation, metric)
        self.preparation = prepared
        self.signature = Signature(
            inputs=(TensorSpec("pixel_values", "float32", ("batch", *prepared.size)),),
            output=TensorSpec("logits", "float32", ("batch", classes)),
            call=_logits,
        )
        self._calibration = _Split(calibration, prepared, classes, self.metric)
        self._evaluation = None if evaluation is None else _Split(evaluation, prepared, classes, self.metric)

    @classmethod
    def create(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_ref: str,
        calibration: Examples,
        evaluation: Examples | None,
        *,
        metric: str | None = None,
        image_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
    ) -> ImageClassification:
        """Images are prepared as the model's own configuration says, unless options say otherwise."""
        prepared = preparation(
            model,
            image_size=image_size,
            mean=mean,
            std=std,
            interpolation=interpolation,
            crop_pct=crop_pct,
            model_ref=model_ref,
        )
        classes = getattr(model, "num_classes", None) or getattr(getattr(model, "config", None), "num_labels", None)
        if not isinstance(classes, int) or classes < 1:
            raise UnsupportedModelError(
                "the model has no classifier",
                where=model_ref,
                expected="a timm model with num_classes, or one with config.num_labels",
            )
        return cls(prepared, classes, calibration, evaluation, metric)

    def calibration_batches(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        return self._calibration.stream(order)

    def changed_batch(self, items: Sequence[int], change: Callable[[Any, int], Tensor]) -> Batch:
        """The batch of calibration `items` whose pixels are what `change(PIL image, item)` makes of each."""
        return self._calibration.changed(items, change)

    def evaluation(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        self._evaluation_examples()
        assert self._evaluation is not None
        return self._evaluation.stream(chunks(spread(self.evaluation_size, limit), batch_size))

    def describe(self) -> dict[str, Any]:
        shown = self.preparation
        return {
            **super().describe(),
            "image": {
                "size": list(shown.size),
                "mean": list(shown.mean),
                "std": list(shown.std),
                "interpolation": shown.interpolation,
                "crop_pct": shown.crop_pct,
                "crop_mode": shown.crop_mode,
            },
        }


class _Split:
    """One data set: prepared images and their class indices."""

    def __init__(self, examples: Examples, prepared: Preparation, classes: int, metric: str) -> None:
        self._images = PreparedImages(examples.column("image"), prepared, examples.reference)
        self._labels = class_indices(examples, classes, None, metric)

    def stream(self, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        for batch, pixels in zip(batches, self._images.stream(batches), strict=True):
            yield Batch({"pixel_values": pixels}, self._target(batch))

    def changed(self, indices: Sequence[int], change: Callable[[Any, int], Tensor]) -> Batch:
        import torch

        pixels = torch.stack([change(self._images.picture(index), index) for index in indices])
        return Batch({"pixel_values": pixels}, self._target(indices))

    def _target(self, indices: Sequence[int]) -> Tensor | None:
        import torch

        return None if self._labels is None else torch.tensor([self._labels[i] for i in indices])


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    output = model(inputs["pixel_values"])
    logits: Tensor = getattr(output, "logits", output)
    return logits
