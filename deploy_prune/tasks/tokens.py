"""Texts become padded rows of token ids: tokenised once, grouped by length, padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import DataError, UnsupportedModelError, UsageError
from deploy_prune.signature import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

# Their positions begin after the padding id: so many fewer tokens fit.
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")
_POOL = 16  # batches that are sorted by length together; more saves no padding worth having
Row = dict[str, list[int]]


class TokenRows:
    """Token rows of one data set, made when first asked for: `rows([0, 5])` -> [{"input_ids": [...]}, ...]."""

    def __init__(
        self, tokenizer: Any, names: Sequence[str], max_length: int, where: str, *texts: Sequence[Any]
    ) -> None:
        self._tokenizer, self._names, self._max_length, self._where = tokenizer, names, max_length, where
        self._texts = texts
        self._made: dict[int, Row] = {}

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """Raises DataError for an example that is not text."""
        todo = sorted({index for index in indices if index not in self._made})
        if todo:
            columns = [[self._text(texts[index], index) for index in todo] for texts in self._texts]
            encoded = self._tokenizer(*columns, truncation=True, max_length=self._max_length, padding=False)
            for position, index in enumerate(todo):
                self._made[index] = {name: encoded[name][position] for name in self._names}
        return [self._made[index] for index in indices]

    def lengths(self, indices: Sequence[int]) -> list[int]:
        return [len(row["input_ids"]) for row in self.rows(indices)]

    def _text(self, value: Any, index: int) -> str:
        if not isinstance(value, str):
            raise DataError("not a text", where=f"{self._where}, row {index}", got=repr(value)[:60])
        return value


def padded(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Stack rows to int64 (row, longest), padded on the right; the mask and segments of padding are 0."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def stacked(name: str) -> Tensor:
        filler = pad_id if name == "input_ids" else 0
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

    return {name: stacked(name) for name in rows[0]}


def grouped(order: Sequence[int], lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Batches of `order`d indices with little padding: a few batches at a time are sorted by length and reshuffled."""
    from deploy_prune.tasks.base import chunks, shuffled

    length = dict(zip(order, lengths, strict=True))
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * _POOL):
        pool = sorted(order[start : start + batch_size * _POOL], key=length.__getitem__)
        batches += chunks(pool, batch_size)
    return [batches[i] for i in shuffled(range(len(batches)), seed)]


def max_length_of(model: nn.Module, tokenizer: Any, asked: int | None, folder_limit: int | None = None) -> int:
    """The longest row: the least of what model, tokenizer, model folder and user allow."""
    if asked is not None and asked < 2:
        raise UsageError("max_length is too small", got=str(asked), expected="at least 2 tokens")
    limits = [asked, folder_limit, tokenizer.model_max_length, longest_text(model.config)]
    return min(int(limit) for limit in limits if limit)


def longest_text(config: Any) -> int | None:
    """How many tokens a model with this config has positions for (its text tower, where it has several), None where it
    does not say."""
    config = getattr(config, "text_config", config)
    positions = getattr(config, "max_position_embeddings", None) or 0
    if positions > 0 and getattr(config, "model_type", None) in _POSITIONS_AFTER_PADDING:
        positions -= config.pad_token_id + 1
    return int(positions) if positions > 0 else None


def text_inputs(model: nn.Module, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    """The specifications of `input_ids`, `attention_mask` and, where named, `token_type_ids`."""
    config: Any = model.config
    shape = ("batch", "sequence")
    known = {
        "input_ids": TensorSpec("input_ids", "int64", shape, "ids", config.vocab_size),
        "attention_mask": TensorSpec("attention_mask", "int64", shape, "mask"),
        "token_type_ids": TensorSpec("token_type_ids", "int64", shape, "ids", getattr(config, "type_vocab_size", 0)),
    }
    return tuple(known[name] for name in names)


def pad_id_of(tokenizer: Any, model: nn.Module) -> int:
    """The id of padding. The model's own, where it has one: some count positions by it, decoders find the last token of
    a text by it. Under a mask alone any id will do: the tokenizer's, or 0."""
    config: Any = model.config
    own = getattr(config, "pad_token_id", None)
    return int(own if own is not None else tokenizer.pad_token_id or 0)


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """What the model gives for `inputs`, without a key/value cache where it would make one."""
    import inspect

    cacheless = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(**inputs, **cacheless)


def require_language_model(model: nn.Module, where: str, remedy: str | None = None) -> None:
    """Raise UnsupportedModelError unless `model` says which token comes next."""
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedModelError(
            "the model is no causal language model",
            where=where,
            got=type(model).__name__,
            expected="a ...ForCausalLM",
            remedy=remedy,
        )
