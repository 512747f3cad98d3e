"""Text classification: one text or a pair of texts in, logits out, judged by the share of right answers, or by how
answers and labels go together where classes are uneven."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import DataError, UnsupportedModelError, UsageError
from deploy_prune.signature import Signature, TensorSpec
from deploy_prune.tasks.base import AGREEMENT, Batch, chunks, require_target, shuffled, spread
from deploy_prune.tasks.classification import Classification, class_indices
from deploy_prune.tasks.quality import bootstrap, f1, matthews
from deploy_prune.tasks.tokens import TokenRows, grouped, max_length_of, outputs_of, pad_id_of, padded, text_inputs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from deploy_prune.data import Examples

TOGETHER = {"matthews": matthews, "f1": f1}  # metrics that are no mean over examples


class TextClassification(Classification):
    """Examples have `text`, for pairs also `text2`, and, but for agreement, `label`: an index or a name of the config.

    Evaluation runs from the shortest text to the longest, which wastes little on padding. The metrics `matthews` (as
    GLUE's CoLA) and `f1` (of class 1, as GLUE's MRPC) are of all answers together.
    """

    name = "text-classification"
    metrics = ("accuracy", "matthews", "f1", AGREEMENT)

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_length: int,
        calibration: Examples,
        evaluation: Examples | None,
        metric: str | None,
    ) -> None:
        super().__init__(calibration, evaluation, metric)
        config: Any = model.config
        self.max_length, self._pad = max_length, pad_id_of(tokenizer, model)
        if self.metric == "f1" and config.num_labels != 2:
            raise UsageError(
                "f1 is a metric of two classes",
                got=f"{config.num_labels} classes",
                remedy="Ask for metric=matthews or accuracy.",
            )
        names = ["input_ids", "attention_mask"]
        pairs = "text2" in calibration.columns
        if evaluation is not None and ("text2" in evaluation.columns) != pairs:
            raise DataError(
                "only one of calibration and evaluation data has pairs",
                where=evaluation.reference,
                expected="the columns " + ", ".join(calibration.columns),
                got=", ".join(evaluation.columns),
                remedy="Map text2 with ?text2=COLUMN in both.",
            )
        segments = "token_type_ids" in tokenizer.model_input_names and getattr(config, "type_vocab_size", 0) > 1
        if pairs and segments:
            names.append("token_type_ids")  # one text alone needs no segments: the model takes them as 0
        self.signature = Signature(
            inputs=text_inputs(model, names),
            output=TensorSpec("logits", "float32", ("batch", config.num_labels)),
            call=_logits,
        )
        label_names = {str(name): int(index) for name, index in (config.label2id or {}).items()}

        def split(examples: Examples) -> tuple[TokenRows, list[int] | None]:
            texts = [examples.column(name) for name in (("text", "text2") if pairs else ("text",))]
            rows = TokenRows(tokenizer, names, max_length, examples.reference, *texts)
            return rows, class_indices(examples, config.num_labels, label_names, self.metric)

        self._calibration = split(calibration)
        self._evaluation = None if evaluation is None else split(evaluation)

    @classmethod
    def create(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_ref: str,
        calibration: Examples,
        evaluation: Examples | None,
        *,
        metric: str | None = None,
        max_length: int | None = None,
        tokenizer: str | None = None,
    ) -> TextClassification:
        """`tokenizer` names the model whose tokenizer is used, where it is not `model_ref` itself."""
        from deploy_prune.sources import load_tokenizer

        labels = getattr(getattr(model, "config", None), "num_labels", 0)
        if labels < 2 or "SequenceClassification" not in type(model).__name__:
            raise UnsupportedModelError(
                "the model does not classify texts",
                where=model_ref,
                got=type(model).__name__,
                expected="a ...ForSequenceClassification with at least 2 labels",
            )
        if getattr(model.config, "pad_token_id", None) is None:
            raise UnsupportedModelError(
                "the model does not know its padding token, and so not where a text of a batch ends",
                where=model_ref,
                got="pad_token_id: null",
                remedy="Set it to the id it was trained with, in config.json or as in hf:DIR?pad_token_id=0.",
            )
        loaded = load_tokenizer(tokenizer or model_ref)
        return cls(model, loaded, max_length_of(model, loaded, max_length), calibration, evaluation, metric)

    @property
    def calibration_size(self) -> int:
        return len(self.calibration_data)

    @property
    def evaluation_size(self) -> int:
        return len(self.evaluation_data) if self.evaluation_data else 0

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

    def _stream(self, split: tuple[TokenRows, list[int] | None], batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        import torch

        rows, labels = split
        for batch in batches:
            target = None if labels is None else torch.tensor([labels[i] for i in batch])
            yield Batch(padded(rows.rows(batch), self._pad), target)

    def _score(self, output: Tensor, batch: Batch) -> np.ndarray:
        import numpy as np

        if self.metric not in TOGETHER:
            return super()._score(output, batch)
        return np.stack([output.argmax(-1).numpy(), require_target(batch, self).numpy()], axis=1)

    def _summarise(self, rows: np.ndarray) -> tuple[float, tuple[float, float], dict[str, Any]]:
        if self.metric not in TOGETHER:
            return super()._summarise(rows)
        return *bootstrap(rows, TOGETHER[self.metric]), {}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "max_length": self.max_length}


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = outputs_of(model, inputs).logits
    return logits
