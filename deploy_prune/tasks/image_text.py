"""Image-text retrieval: pairs of an image and a caption in, their two embeddings out, judged by recall@1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deploy_prune.data_readers import ImageFiles
from deploy_prune.errors import DataError, UnsupportedModelError
from deploy_prune.signature import Signature, TensorSpec
from deploy_prune.tasks.base import AGREEMENT, Batch, Task, chunks, require_target, spread
from deploy_prune.tasks.images import Preparation, PreparedImages, preparation
from deploy_prune.tasks.quality import bootstrap, share
from deploy_prune.tasks.tokens import TokenRows, max_length_of, pad_id_of, padded, text_inputs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from deploy_prune.data import Examples
    from deploy_prune.tasks.quality import Quality

_NAMES = ("input_ids", "attention_mask")


class ImageText(Task):
    """Examples have `image` and `text`; several captions of one image are several examples.

    The output (batch, 2, width) holds the image's and the text's embedding of every pair, each of length 1: their
    product is the similarity, and either half serves retrieval by itself. Captions of one image are never each other's
    wrong answers. Recall@1: the share of captions whose own image is the nearest of all in the evaluation data; the
    same the other way round is in `detail`.
    """

    name = "image-text"
    metrics = ("recall@1", AGREEMENT)

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        prepared: Preparation,
        max_length: int,
        calibration: Examples,
        evaluation: Examples | None,
        metric: str | None,
    ) -> None:
        super().__init__(calibration, evaluation, metric)
        known: Any = model
        text = known.text_model
        self.preparation, self.max_length = prepared, max_length
        self.scale = math.exp(float(known.logit_scale.detach()))
        self.signature = Signature(
            inputs=(
                *text_inputs(text, _NAMES),
                TensorSpec("pixel_values", "float32", ("batch", *prepared.size)),
            ),
            output=TensorSpec("embeddings", "float32", ("batch", 2, known.config.projection_dim)),
            call=_embeddings,
        )
        pad = pad_id_of(tokenizer, text)

        def split(examples: Examples) -> _Pairs:
            return _Pairs(examples, tokenizer, prepared, max_length, pad)

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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
    ) -> ImageText:
        """Images and texts are prepared as the model's folder says, unless options say otherwise."""
        from deploy_prune.sources import load_tokenizer

        if type(model).__name__ != "CLIPModel":
            raise UnsupportedModelError(
                "the model does not embed images and texts together",
                where=model_ref,
                expected="a transformers CLIPModel",
                got=type(model).__name__,
            )
        prepared = preparation(
            model, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct, model_ref=model_ref
        )
        loaded = load_tokenizer(tokenizer or model_ref)
        text: Any = model.text_model
        limit = max_length_of(text, loaded, max_length)
        return cls(model, loaded, prepared, limit, calibration, evaluation, metric)

    def calibration_batches(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        return self._calibration.stream(order)

    def evaluation(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        self._evaluation_examples()
        assert self._evaluation is not None
        return self._evaluation.stream(chunks(spread(self.evaluation_size, limit), batch_size))

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The symmetric contrastive loss of CLIP (arXiv 2103.00020), one value per pair.

        With S = s·I Tᵀ the similarities of the batch:  ½ (-log softmax(S)_ii - log softmax(Sᵀ)_ii). Other captions of
        the same image are left out of the softmax. It depends on who shares the batch.
        """
        from torch.nn.functional import cross_entropy

        own = require_target(batch, self)
        scores = self.scale * output[:, 0].float() @ output[:, 1].float().T
        twins = own[:, None] == own[None, :]
        twins.fill_diagonal_(False)
        scores = scores.masked_fill(twins, float("-inf"))
        places = own.new_tensor(range(len(own)))
        there, back = (cross_entropy(s, places, reduction="none") for s in (scores, scores.T))
        return (there + back) / 2

    def distance(self, output: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        """1 - cosine to the dense embedding, the mean over image and text; 0 to 2."""
        from torch.nn.functional import cosine_similarity

        return (1 - cosine_similarity(output.float(), reference.float(), dim=-1)).mean(-1)

    def evaluate(self, *args: Any, **kwargs: Any) -> Quality:
        """As in `Task`; per example 1 where the caption found its image."""
        found = super().evaluate(*args, **kwargs)
        return found if self.metric == AGREEMENT else replace(found, per_example=_hits(found.per_example)[0])

    def _answers(self, output: Tensor, batch: Batch) -> Tensor:
        return output.flatten(1)

    def _score(self, output: Tensor, batch: Batch) -> Tensor:
        """(pairs, 1 + 2·width): which image it is, its embedding, the caption's."""
        import torch

        own = require_target(batch, self)
        return torch.cat([own[:, None].double(), output.flatten(1).double()], 1)

    def _agree(self, answers: np.ndarray, reference: np.ndarray, batch: Batch) -> np.ndarray:
        """The mean cosine of the two embeddings to the dense ones."""
        import numpy as np

        a, b = (x.reshape(len(x), 2, -1) for x in (answers, reference))
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return np.asarray(((a * b).sum(-1) / np.maximum(norms, 1e-12)).mean(-1))

    def _summarise(self, rows: np.ndarray) -> tuple[float, tuple[float, float], dict[str, Any]]:
        if self.metric == AGREEMENT:
            return *bootstrap(rows, lambda cosines: float(cosines.mean())), {}
        texts, images = _hits(rows)
        return *share(texts), {"image to text": float(images.mean()), "images": len(images)}

    def describe(self) -> dict[str, Any]:
        shown = self.preparation
        image = {"size": list(shown.size), "mean": list(shown.mean), "std": list(shown.std)}
        return {**super().describe(), "max_length": self.max_length, "image": image}


class _Pairs:
    """One data set: prepared images, token rows, and for each row the first one that shows the same image."""

    def __init__(self, examples: Examples, tokenizer: Any, prepared: Preparation, max_length: int, pad: int) -> None:
        images = examples.column("image")
        self._images = PreparedImages(images, prepared, examples.reference)
        self._rows = TokenRows(tokenizer, _NAMES, max_length, examples.reference, examples.column("text"))
        self._pad = pad
        names = images.keys if isinstance(images, ImageFiles) else range(len(images))
        place: dict[Any, int] = {}
        self._first = [place.setdefault(name, row) for row, name in enumerate(names)]
        if len(place) < 2:
            raise DataError("retrieval needs at least two images", where=examples.reference, got=str(len(place)))

    def stream(self, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        import torch

        shown = [[self._first[i] for i in batch] for batch in batches]
        for batch, own, pixels in zip(batches, shown, self._images.stream(shown), strict=True):
            inputs = {**padded(self._rows.rows(batch), self._pad), "pixel_values": pixels}
            yield Batch(inputs, torch.tensor(own))


def _hits(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each caption's nearest image is its own, and each image's nearest caption one of its own."""
    import numpy as np

    own = rows[:, 0].astype(int)
    image, text = np.split(rows[:, 1:], 2, axis=1)
    names, first = np.unique(own, return_index=True)  # every row of an image has the same embedding
    scores = text @ image[first].T
    return (names[scores.argmax(1)] == own).astype(float), (own[scores.argmax(0)] == names).astype(float)


def _embeddings(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    import torch

    found = model(**inputs)
    return torch.stack([found.image_embeds, found.text_embeds], 1)
