"""Text classification: one text or a pair of texts in, logits out, judged by the share of right answers, or by how
answers and labels go together where classes are uneven."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import UnsupportedModelError
from deploy_prune.signature import Signature, TensorSpec
from deploy_prune.tasks.classification import class_indices
from deploy_prune.tasks.labeled_texts import LabeledTexts
from deploy_prune.tasks.tokens import TokenRows, max_length_of, outputs_of, pad_id_of, text_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploy_prune.data import Examples
    from deploy_prune.tasks.labeled_texts import Split


class TextClassification(LabeledTexts):
    """Examples have `text`, for pairs also `text2`, and, but for agreement, `label`: an index or a name of it."""

    name = "text-classification"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_length: int,
        calibration: Examples,
        evaluation: Examples | None,
        metric: str | None,
    ) -> None:
        config: Any = model.config
        super().__init__(calibration, evaluation, metric, config.num_labels)
        self.max_length, self._pad = max_length, pad_id_of(tokenizer, model)
        names = ["input_ids", "attention_mask"]
        segments = "token_type_ids" in tokenizer.model_input_names and getattr(config, "type_vocab_size", 0) > 1
        if self.pairs and segments:
            names.append("token_type_ids")  # one text alone needs no segments: the model takes them as 0
        self.signature = Signature(
            inputs=text_inputs(model, names),
            output=TensorSpec("logits", "float32", ("batch", config.num_labels)),
            call=_logits,
        )
        label_names = {str(name): int(index) for name, index in (config.label2id or {}).items()}

        def split(examples: Examples) -> Split:
            texts = [examples.column(name) for name in (("text", "text2") if self.pairs else ("text",))]
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

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "max_length": self.max_length}


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = outputs_of(model, inputs).logits
    return logits
