"""Classification by a language model: a text is put into a prompt, and the class is the answer whose first token the
model finds likeliest to follow. No head, no training; the shipped model gives one logit for every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import DataError, UsageError
from deploy_prune.signature import Signature, TensorSpec
from deploy_prune.tasks.classification import class_indices
from deploy_prune.tasks.labeled_texts import LabeledTexts
from deploy_prune.tasks.tokens import (
    Row,
    TokenRows,
    max_length_of,
    outputs_of,
    pad_id_of,
    require_language_model,
    text_inputs,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploy_prune.data import Examples
    from deploy_prune.tasks.labeled_texts import Split

_INPUTS = ("input_ids", "attention_mask")


class PromptedClassification(LabeledTexts):
    """Examples have `text`, perhaps `text2`, and, but for agreement, `label`: an index into `answers`, or an answer.

    `template="Review: {text}\\nSentiment:"` with `answers=[" negative", " positive"]` asks for SST-2's classes 0 and 1.
    """

    name = "prompted-classification"
    default_batch_size = 16
    loss_examples = 64

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_length: int,
        template: str,
        answers: Sequence[str],
        calibration: Examples,
        evaluation: Examples | None,
        metric: str | None,
    ) -> None:
        super().__init__(calibration, evaluation, metric, len(answers))
        self.max_length, self.template, self.answers_are = max_length, template, tuple(answers)
        self._pad = pad_id_of(tokenizer, model)
        names = {answer.strip(): index for index, answer in enumerate(answers)}
        fields = _fields(template)

        def split(examples: Examples) -> Split:
            columns = [examples.column(name) for name in fields]
            prompts = [
                template.format(**dict(zip(fields, map(str, row), strict=True))) for row in zip(*columns, strict=True)
            ]
            rows = _Prompts(tokenizer, _INPUTS, max_length, examples.reference, prompts)
            return rows, class_indices(examples, len(answers), names, self.metric)

        self._calibration = split(calibration)
        self._evaluation = None if evaluation is None else split(evaluation)
        example = template.format(**{name: str(calibration.column(name)[0]) for name in fields})
        chosen = answer_ids(tokenizer, example, answers)
        self.signature = Signature(
            inputs=text_inputs(model, _INPUTS),
            output=TensorSpec("logits", "float32", ("batch", len(answers))),
            call=lambda model, inputs: _logits(model, inputs, chosen),
        )

    @classmethod
    def create(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_ref: str,
        calibration: Examples,
        evaluation: Examples | None,
        *,
        template: str | None = None,
        answers: Sequence[str] | None = None,
        metric: str | None = None,
        max_length: int | None = None,
        tokenizer: str | None = None,
    ) -> PromptedClassification:
        """`tokenizer` names the model whose tokenizer is used, where it is not `model_ref` itself."""
        from deploy_prune.sources import load_tokenizer

        require_language_model(model, model_ref, "A model with a classifier on top takes the task text-classification.")
        if not template or isinstance(answers, str) or not answers or len(answers) < 2:
            raise UsageError(
                "the task needs a prompt and its answers",
                where=cls.name,
                expected='template: "Review: {text}\\nSentiment:" and answers: [" negative", " positive"]',
                got=f"template: {template!r}, answers: {answers!r}",
                remedy="Set both among the task's options; answers in the order of the labels, with a leading space.",
            )
        loaded = load_tokenizer(tokenizer or model_ref)
        longest = max_length_of(model, loaded, max_length)
        return cls(model, loaded, longest, template, answers, calibration, evaluation, metric)

    def describe(self) -> dict[str, Any]:
        asked = {"max_length": self.max_length, "template": self.template, "answers": list(self.answers_are)}
        return {**super().describe(), **asked}


class _Prompts(TokenRows):
    """Rows that are never cut short: what would go is the question at the end."""

    def rows(self, indices: Sequence[int]) -> list[Row]:
        made = super().rows(indices)
        for index, row in zip(indices, made, strict=True):
            if len(row["input_ids"]) >= self._max_length:
                raise DataError(
                    "the prompt is too long for the model",
                    where=f"{self._where}, row {index}",
                    expected=f"fewer than {self._max_length} tokens",
                    remedy="Shorten the text or the template, or drop the row.",
                )
        return made


def answer_ids(tokenizer: Any, prompt: str, answers: Sequence[str]) -> list[int]:
    """The token that begins each answer after `prompt`.

    Raises UsageError where an answer begins within a token of the prompt, or two begin with the same one.
    """
    before = tokenizer(prompt)["input_ids"]
    problems, found = [], []
    for answer in answers:
        ids = tokenizer(prompt + answer)["input_ids"]
        if ids[: len(before)] != before or len(ids) == len(before):
            problems.append(f"{answer!r} does not begin a token of its own after {prompt[-20:]!r}")
        else:
            found.append(int(ids[len(before)]))
            if found.index(found[-1]) != len(found) - 1:
                problems.append(f"{answer!r} begins with the same token as another answer")
    if problems:
        raise UsageError(
            "the answers cannot be told apart by their first token",
            where=f"the tokenizer {type(tokenizer).__name__}",
            problems=problems,
            remedy="Begin every answer with a space and end the template without one; choose answers that begin apart.",
        )
    return found


def _fields(template: str) -> list[str]:
    """The columns a template reads. Raises UsageError for a template that reads none or cannot be read."""
    try:
        fields = list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name is not None))
        template.format(**dict.fromkeys(fields, ""))
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise UsageError(
            "the template cannot be read", got=f"{template!r}: {error}", expected="{text}, {text2}"
        ) from None
    if not fields or set(fields) - {"text", "text2"}:
        raise UsageError(
            "the template must read text, or text and text2",
            where=repr(template),
            expected="{text}, {text2}; other braces doubled",
            got=", ".join(map(repr, fields)) or "no field",
        )
    return fields


def _logits(model: nn.Module, inputs: Mapping[str, Tensor], answers: Sequence[int]) -> Tensor:
    """The logits (batch, answers) at the last token of every row; the vocabulary is computed there alone."""
    import torch

    last = inputs["attention_mask"].sum(-1) - 1
    rows = torch.arange(last.shape[0], device=last.device)

    def only_last(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows, last][:, None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(only_last)  # type: ignore[operator]
    try:
        logits: Tensor = outputs_of(model, inputs).logits
    finally:
        handle.remove()
    return logits[:, 0][:, torch.tensor(answers, device=logits.device)]
