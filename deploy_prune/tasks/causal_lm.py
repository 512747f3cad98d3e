"""Causal language modelling: windows of one long token stream, judged by perplexity.

Perplexity depends on the text, the window length and the stride; all three are reported with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import DataError, UsageError
from deploy_prune.signature import Signature, TensorSpec
from deploy_prune.tasks.base import AGREEMENT, Batch, Task, chunks, require_target, spread
from deploy_prune.tasks.classification import divergence
from deploy_prune.tasks.quality import bootstrap, perplexity, ratio_of_sums
from deploy_prune.tasks.tokens import max_length_of, pad_id_of, require_language_model, text_inputs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from deploy_prune.data import Examples

_SKIP = -100  # target of a position that is not judged
_JOIN = "\n\n"  # between the texts of data that comes in many rows


class CausalLM(Task):
    """Rows are windows of `length` tokens; each next one starts `stride` tokens later and judges only its new tokens.

    Stride = length gives windows without overlap, whose first token is context only. Calibration windows never overlap.
    """

    name = "causal-lm"
    metrics = ("perplexity", AGREEMENT)
    default_batch_size = 4
    loss_examples = 8  # windows

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        length: int,
        stride: int,
        calibration: Examples,
        evaluation: Examples | None,
        metric: str | None,
    ) -> None:
        super().__init__(calibration, evaluation, metric)
        self.length, self.stride = length, stride
        self._pad = pad_id_of(tokenizer, model)
        self._calibration = _windows(_token_stream(tokenizer, calibration), length, length)
        self._evaluation = [] if evaluation is None else _windows(_token_stream(tokenizer, evaluation), length, stride)
        config: Any = model.config
        self.signature = Signature(
            inputs=text_inputs(model, ("input_ids", "attention_mask")),
            output=TensorSpec("logits", "float32", ("batch", "sequence", config.vocab_size)),
            call=_logits,
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
        length: int = 512,
        stride: int | None = None,
        tokenizer: str | None = None,
    ) -> CausalLM:
        """`stride` is `length` unless given; `tokenizer` names another model's tokenizer than `model_ref`'s."""
        from deploy_prune.sources import load_tokenizer

        require_language_model(model, model_ref)
        loaded = load_tokenizer(tokenizer or model_ref)
        longest = max_length_of(model, loaded, None)
        stride = length if stride is None else stride
        if not 2 <= length <= longest:
            raise UsageError(
                "window length outside the model's range",
                got=str(length),
                expected=f"2 to {longest}",
                remedy="--task-option length=N, in recipes task.options.length.",
            )
        if not 1 <= stride <= length:
            raise UsageError("stride outside its range", got=str(stride), expected=f"1 to the length, {length}")
        return cls(model, loaded, length, stride, calibration, evaluation, metric)

    @property
    def higher_is_better(self) -> bool:
        return self.metric == AGREEMENT

    @property
    def calibration_size(self) -> int:
        return len(self._calibration)

    @property
    def evaluation_size(self) -> int:
        return len(self._evaluation)

    def calibration_batches(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        return self._stream(self._calibration, order)

    def evaluation(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        self._evaluation_examples()
        return self._stream(self._evaluation, chunks(spread(self.evaluation_size, limit), batch_size))

    def _stream(self, windows: Sequence[tuple[list[int], int]], batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        import torch

        for batch in batches:
            ids = torch.full((len(batch), self.length), self._pad)
            mask = torch.zeros_like(ids)
            target = torch.full_like(ids, _SKIP)
            for row, index in enumerate(batch):
                tokens, context = windows[index]
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
                target[row, context : len(tokens)] = ids[row, context : len(tokens)]
            yield Batch({"input_ids": ids, "attention_mask": mask}, target)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean cross entropy of the judged next tokens of each window."""
        total, count = _negative_log_likelihood(output, require_target(batch, self))
        return total / count.clamp(min=1)

    def distance(self, output: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        """KL(dense || output) in nats, mean over the positions that are not padding."""
        mask = batch.inputs["attention_mask"]
        return (divergence(output, reference) * mask).sum(-1) / mask.sum(-1).clamp(min=1)

    def _answers(self, output: Tensor, batch: Batch) -> Tensor:
        return output.argmax(-1).int()

    def _score(self, output: Tensor, batch: Batch) -> Tensor:
        import torch

        target = require_target(batch, self)
        # One window at a time: the logarithms of a batch's probabilities are as large as its logits.
        rows = [_negative_log_likelihood(o[None], t[None]) for o, t in zip(output, target, strict=True)]
        return torch.cat([torch.stack(row, dim=1) for row in rows]).double()

    def _agree(self, answers: np.ndarray, reference: np.ndarray, batch: Batch) -> np.ndarray:
        import numpy as np

        mask = batch.inputs["attention_mask"].cpu().numpy()
        return np.stack([((answers == reference) * mask).sum(1), mask.sum(1)], axis=1).astype(float)

    def _summarise(self, rows: np.ndarray) -> tuple[float, tuple[float, float], dict[str, Any]]:
        statistic = ratio_of_sums if self.metric == AGREEMENT else perplexity
        detail = {"length": self.length, "stride": self.stride, "tokens": int(rows[:, 1].sum())}
        return *bootstrap(rows, statistic), detail

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "length": self.length, "stride": self.stride}


def _negative_log_likelihood(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over each window of -log p(next token), and how many tokens were judged; both (window,)."""
    import torch
    from torch.nn.functional import cross_entropy, pad

    following = pad(target[:, 1:], (0, 1), value=_SKIP)  # position t predicts token t + 1
    each = cross_entropy(output.float().flatten(0, 1), following.flatten(), ignore_index=_SKIP, reduction="none")
    return each.view(following.shape).sum(-1), (following != _SKIP).sum(-1).to(torch.float32)


def _token_stream(tokenizer: Any, examples: Examples) -> list[int]:
    texts = list(examples.column("text"))
    if not all(isinstance(text, str) for text in texts):
        raise DataError("the column 'text' holds values that are no text", where=examples.reference)
    tokens: list[int] = tokenizer(_JOIN.join(texts), truncation=False, padding=False, verbose=False)["input_ids"]
    if len(tokens) < 2:
        raise DataError("too little text", where=examples.reference, got=f"{len(tokens)} tokens", expected="at least 2")
    return tokens


def _windows(tokens: list[int], length: int, stride: int) -> list[tuple[list[int], int]]:
    """(tokens, how many of them are context only) per window; together the windows judge every token but few.

    A token is judged where it has the most context; the first token of the text, and with stride = length of every
    window, cannot be.
    """
    windows: list[tuple[list[int], int]] = []
    judged = 0
    for start in range(0, len(tokens), stride):
        end = min(start + length, len(tokens))
        context = max(1, judged - start)
        if end - start > context:
            windows.append((tokens[start:end], context))
        judged = end
        if end == len(tokens):
            break
    return windows


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits
