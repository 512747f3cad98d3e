"""Sentence embedding: a text in, a unit vector out, judged by the rank correlation of cosines with human scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import DataError, UnsupportedModelError, UsageError, did_you_mean
from deploy_prune.files import read_json
from deploy_prune.signature import Signature, TensorSpec
from deploy_prune.tasks.base import AGREEMENT, Batch, Task, chunks, shuffled, spread
from deploy_prune.tasks.quality import bootstrap, spearman
from deploy_prune.tasks.tokens import TokenRows, grouped, max_length_of, outputs_of, pad_id_of, padded, text_inputs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from deploy_prune.data import Examples


class SentenceEmbedding(Task):
    """Examples are pairs (`text`, `text2`), with a human `score` for loss and Spearman, or single texts.

    Rows are sentences: a pair is two neighbouring rows and is never split, so sizes, limits and batch sizes are
    rounded up to even numbers. The target of both rows is the score divided by `score_max`, a cosine to aim at.
    """

    name = "sentence-embedding"
    metrics = ("spearman", AGREEMENT)

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        pooling: str,
        max_length: int,
        score_max: float,
        calibration: Examples,
        evaluation: Examples | None,
        metric: str | None,
    ) -> None:
        super().__init__(calibration, evaluation, metric)
        self.pooling, self.max_length, self.score_max = pooling, max_length, score_max
        config: Any = model.config
        names = ("input_ids", "attention_mask")
        self.signature = Signature(
            inputs=text_inputs(model, names),
            output=TensorSpec("embedding", "float32", ("batch", config.hidden_size)),
            call=POOLINGS[pooling],
        )
        self._pad = pad_id_of(tokenizer, model)

        def split(examples: Examples) -> _Sentences:
            return _Sentences(examples, tokenizer, names, max_length, score_max)

        self._calibration = split(calibration)
        self._evaluation = None if evaluation is None else split(evaluation)
        if self.metric == "spearman" and self._evaluation is not None and self._evaluation.scores is None:
            raise DataError(
                "Spearman's correlation needs scored pairs",
                where=self._evaluation.reference,
                expected="the columns text, text2 and score",
                remedy="Map them with ?text=..&text2=..&score=.., or ask for metric=agreement.",
            )

    @classmethod
    def create(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_ref: str,
        calibration: Examples,
        evaluation: Examples | None,
        *,
        metric: str | None = None,
        pooling: str | None = None,
        max_length: int | None = None,
        score_max: float = 5.0,
        tokenizer: str | None = None,
    ) -> SentenceEmbedding:
        """Pooling and length limit are those of the sentence-transformers folder, unless given."""
        from deploy_prune.sources import load_tokenizer, model_folder

        folder = model_folder(tokenizer or model_ref)
        pooling = pooling or _folder_pooling(folder)
        if pooling not in POOLINGS:
            raise UsageError("pooling is not supported", got=pooling, remedy=did_you_mean(pooling, list(POOLINGS)))
        if not score_max > 0:
            raise UsageError("score_max must be positive", got=str(score_max))
        if (
            not hasattr(getattr(model, "config", None), "hidden_size")
            or getattr(model, "base_model", None) is not model
        ):
            raise UnsupportedModelError(
                "the model is no text encoder",
                where=model_ref,
                got=type(model).__name__,
                expected="a transformers model without a head, such as BertModel",
            )
        loaded = load_tokenizer(tokenizer or model_ref)
        limit = max_length_of(model, loaded, max_length, _folder_length(folder))
        return cls(model, loaded, pooling, limit, score_max, calibration, evaluation, metric)

    @property
    def calibration_size(self) -> int:
        return self._calibration.size

    @property
    def evaluation_size(self) -> int:
        return self._evaluation.size if self._evaluation else 0

    def calibration_items(self, limit: int | None = None) -> list[int]:
        return self._calibration.items(limit)

    def calibration_order(self, items: Sequence[int], batch_size: int, seed: int = 0) -> list[list[int]]:
        split = self._calibration
        order = shuffled(items, seed)
        return grouped(order, split.lengths(order), split.per_batch(batch_size), seed)

    def calibration_batches(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        return (self._calibration.batch(items, self._pad) for items in order)

    def evaluation(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        self._evaluation_examples()
        split = self._evaluation
        assert split is not None
        items = split.items(limit)
        length = dict(zip(items, split.lengths(items), strict=True))
        batches = chunks(sorted(items, key=length.__getitem__), split.per_batch(batch_size))
        return (split.batch(items, self._pad) for items in batches)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """(cosine of the pair - score / score_max)^2, the same for both rows of a pair."""
        if batch.target is None:
            raise DataError(
                "the calibration data has no scores, so the task has no loss on it",
                where=self.calibration_data.reference,
                expected="the columns text, text2 and score",
                remedy="Map them in the reference, or ask for the objective that distils the dense model.",
            )
        return (_pair_cosine(output.float()).repeat_interleave(2) - batch.target).square()

    def distance(self, output: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        """1 - cosine to the dense embedding; 0 to 2."""
        from torch.nn.functional import cosine_similarity

        return 1 - cosine_similarity(output.float(), reference.float(), dim=-1)

    def _answers(self, output: Tensor, batch: Batch) -> Tensor:
        return output

    def _score(self, output: Tensor, batch: Batch) -> Tensor:
        import torch

        assert batch.target is not None
        return torch.stack([_pair_cosine(output).double(), batch.target[::2].double()], dim=1)

    def _agree(self, answers: np.ndarray, reference: np.ndarray, batch: Batch) -> np.ndarray:
        import numpy as np

        norms = np.linalg.norm(answers, axis=1) * np.linalg.norm(reference, axis=1)
        return np.asarray((answers * reference).sum(1) / np.maximum(norms, 1e-12))

    def _summarise(self, rows: np.ndarray) -> tuple[float, tuple[float, float], dict[str, Any]]:
        if self.metric == AGREEMENT:
            return *bootstrap(rows, lambda cosines: float(cosines.mean())), {}
        return *bootstrap(rows, spearman), {}

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "pooling": self.pooling,
            "max_length": self.max_length,
            "score_max": self.score_max,
        }


class _Sentences:
    """One data set as items: a pair of two sentences, or one sentence."""

    def __init__(self, examples: Examples, tokenizer: Any, names: Sequence[str], max_length: int, top: float) -> None:
        self.reference = examples.reference
        columns = [name for name in ("text", "text2") if name == "text" or name in examples.columns]
        self._parts = [
            TokenRows(tokenizer, names, max_length, examples.reference, examples.column(name)) for name in columns
        ]
        self._count = len(examples)
        self.width = len(columns)
        self.scores: list[float] | None = None
        if self.width == 2 and "score" in examples.columns:
            values = list(examples.column("score"))
            odd = [value for value in values if not isinstance(value, (int, float)) or not 0 <= value <= top]
            if odd:
                raise DataError(
                    "scores that are no numbers in range",
                    where=examples.reference,
                    expected=f"0 to {top}",
                    got=", ".join(repr(value) for value in odd[:5]),
                    remedy="Set the task option score_max to the top of your scale.",
                )
            self.scores = [value / top for value in values]

    @property
    def size(self) -> int:
        return self._count * self.width

    def items(self, limit: int | None) -> list[int]:
        return spread(self._count, None if limit is None else -(-limit // self.width))

    def per_batch(self, batch_size: int) -> int:
        return -(-batch_size // self.width)

    def lengths(self, items: Sequence[int]) -> list[int]:
        return [max(of) for of in zip(*(part.lengths(items) for part in self._parts), strict=True)]

    def batch(self, items: Sequence[int], pad_id: int) -> Batch:
        import torch

        rows = [row for of in zip(*(part.rows(items) for part in self._parts), strict=True) for row in of]
        target = None
        if self.scores is not None:
            target = torch.tensor([self.scores[item] for item in items]).repeat_interleave(2)
        return Batch(padded(rows, pad_id), target)


def _pair_cosine(output: Tensor) -> Tensor:
    """Cosine of rows 0 and 1, 2 and 3, ...; shape (rows / 2,)."""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(output[::2], output[1::2], dim=-1)


def _mean_pooled(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean of the last hidden states over the unmasked tokens, scaled to length 1."""
    from torch.nn.functional import normalize

    hidden = outputs_of(model, inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


def _first_token(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last hidden state of the first token, scaled to length 1."""
    from torch.nn.functional import normalize

    return normalize(outputs_of(model, inputs).last_hidden_state[:, 0], dim=-1)


def _last_token(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last hidden state of the last unmasked token (padding is on the right), scaled to length 1."""
    from torch.nn.functional import normalize

    hidden = outputs_of(model, inputs).last_hidden_state
    last = inputs["attention_mask"].sum(1, keepdim=True) - 1
    return normalize(hidden.gather(1, last.unsqueeze(-1).expand(-1, 1, hidden.shape[-1])).squeeze(1), dim=-1)


POOLINGS: dict[str, Callable[[nn.Module, Mapping[str, Tensor]], Tensor]] = {
    "mean": _mean_pooled,
    "cls": _first_token,
    "lasttoken": _last_token,
}


def _folder_pooling(folder: Path) -> str:
    """What modules.json and the pooling configuration ask for. Raises UsageError when it is more than a pooling."""
    if not (folder / "modules.json").is_file():
        raise UsageError(
            "the model folder does not say how token vectors are pooled",
            where=str(folder),
            expected="a sentence-transformers folder with modules.json",
            remedy=f"Give the task option pooling: {' or '.join(POOLINGS)}.",
        )
    listed = read_json(folder / "modules.json")
    modules = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in listed}
    foreign = modules.keys() - {"Transformer", "Pooling", "Normalize"}
    if foreign or "Pooling" not in modules:
        raise UsageError(
            "this sentence-transformers model has parts that are not supported",
            where=str(folder),
            expected="Transformer, Pooling and perhaps Normalize",
            got=", ".join(modules),
        )
    config = read_json(folder / modules["Pooling"] / "config.json")
    old_names = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_lasttoken": "lasttoken",
    }
    switches = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    asked = config.get("pooling_mode") or switches
    names = [asked] if isinstance(asked, str) else list(asked)
    return "+".join(old_names.get(name, name) for name in names)


def _folder_length(folder: Path) -> int | None:
    file = folder / "sentence_bert_config.json"
    value = read_json(file).get("max_seq_length") if file.is_file() else None
    return int(value) if value else None
