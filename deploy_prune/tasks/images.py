"""How an image becomes the model's input, and how to do it once only.

Preparation stops before normalisation, at bytes: a quarter of the memory, so that a whole calibration set stays
prepared for the repeated passes of a search.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

CACHE_BYTES = 2**29  # per data set; calibration and evaluation together hold at most 1 GiB


@dataclass(frozen=True)
class Preparation:
    """`Preparation((3, 224, 224), mean=(.5, .5, .5), std=(.5, .5, .5), interpolation="bicubic", crop_pct=0.9)`."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def transform(self) -> Callable[[Any], Any]:
        """Resize and crop a PIL image to a uint8 array (channel, height, width)."""
        from timm.data import create_transform

        made: Callable[[Any], Any] = create_transform(
            self.size,
            is_training=False,
            use_prefetcher=True,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=self.mean,
            std=self.std,
        )
        return made

    def normalise(self, stacked: Tensor) -> Tensor:
        """(value - mean) / std of values in [0, 1]; bytes are scaled first. (batch, channel, height, width) float32."""
        import torch

        values = stacked.float().div_(255) if stacked.dtype == torch.uint8 else stacked.clone()
        shape = (1, -1, 1, 1)
        return values.sub_(torch.tensor(self.mean).view(shape)).div_(torch.tensor(self.std).view(shape))


def preparation(
    model: nn.Module,
    *,
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    model_ref: str = "",
) -> Preparation:
    """The preparation a model was trained with, explicit options first: timm's `pretrained_cfg`, or for an `hf:`
    reference the folder's `preprocessor_config.json`.

    The size of the patch grid, fixed when the model was built, goes before the one its weights were made at. Raises
    UsageError when neither the model nor the options say how.
    """
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    own: Any = getattr(model, "config", None)
    own = getattr(own, "vision_config", own)
    if hasattr(own, "image_size"):
        edges = [own.image_size] * 2 if isinstance(own.image_size, int) else list(own.image_size)
        config["input_size"] = (own.num_channels, *edges)
        if model_ref.startswith("hf:") and (mean is None or std is None):
            from deploy_prune.sources import model_folder
            from deploy_prune.tasks.image_config import folder_images

            config.update(folder_images(model_folder(model_ref)))
    channels, *grid = config.get("input_size", (3,))
    embedding = getattr(model, "patch_embed", None)
    if getattr(embedding, "img_size", None) is not None:
        grid = list(embedding.img_size)  # type: ignore[union-attr]
    if hasattr(getattr(embedding, "proj", None), "in_channels"):
        channels = embedding.proj.in_channels  # type: ignore[union-attr]
    if image_size is not None:
        grid = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    mean = config.get("mean") if mean is None else mean
    std = config.get("std") if std is None else std
    absent = [name for name, value in (("image_size", grid), ("mean", mean), ("std", std)) if not value]
    if absent or mean is None or std is None:
        raise UsageError(
            "the model does not say how its images are prepared",
            where=type(model).__name__,
            remedy=f"Give the task options: {', '.join(absent)}.",
        )
    given = (("mean", mean), ("std", std))
    problems = [f"{name}: {len(v)} values for {channels} channels" for name, v in given if len(v) != channels]
    if len(grid) != 2:
        problems.append(f"image_size: {grid} is neither a number nor [height, width]")
    if problems:
        raise UsageError("image options do not fit the model", problems=problems)
    return Preparation(
        (channels, grid[0], grid[1]),
        tuple(map(float, mean)),
        tuple(map(float, std)),
        interpolation or config.get("interpolation") or "bicubic",
        float(crop_pct or config.get("crop_pct") or 1.0),
        config.get("crop_mode") or "center",
    )


class PreparedImages:
    """Images of one data set, prepared by a few threads and kept in memory up to `limit` bytes.

    Values may be PIL images, uint8 arrays (height, width[, channel]), or float arrays of the model's own size with
    values in [0, 1], which are only normalised.
    """

    def __init__(self, images: Sequence[Any], preparation: Preparation, where: str, limit: int = CACHE_BYTES) -> None:
        self._images, self._preparation, self._where, self._free = images, preparation, where, limit
        self._transform = preparation.transform()
        self._kept: dict[int, Tensor] = {}

    def stream(self, batches: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """One normalised tensor per batch of indices; the next batch is prepared while the caller uses this one."""
        import torch

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            ahead = self._submit(pool, batches[0]) if batches else []
            for position in range(len(batches)):
                current = [item.result() if isinstance(item, Future) else item for item in ahead]
                for index, tensor in zip(batches[position], current, strict=True):
                    self._keep(index, tensor)
                ahead = self._submit(pool, batches[position + 1]) if position + 1 < len(batches) else []
                yield self._preparation.normalise(torch.stack(current))

    def _submit(self, pool: ThreadPoolExecutor, batch: Sequence[int]) -> list[Tensor | Future[Tensor]]:
        return [self._kept[i] if i in self._kept else pool.submit(self._prepare, i) for i in batch]

    def _keep(self, index: int, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if index not in self._kept and size <= self._free:
            self._kept[index] = tensor
            self._free -= size

    def picture(self, index: int) -> Any:
        """The PIL image of one row, not resized. Raises DataError for float arrays, which are no pictures."""
        from PIL import Image

        image = self._picture_or_values(index)
        if not isinstance(image, Image.Image):
            raise DataError(
                "float arrays cannot be cropped, mirrored or otherwise changed",
                where=f"{self._where}, row {index}",
                expected="pictures, or uint8 arrays",
                remedy="Leave out recover.crop, flip, randaugment and erasing; mixup and cutmix work.",
            )
        return image

    def _prepare(self, index: int) -> Tensor:
        import numpy as np
        import torch
        from PIL import Image

        image = self._picture_or_values(index)
        if not isinstance(image, Image.Image):
            return self._values(image, index)
        return torch.from_numpy(np.ascontiguousarray(self._transform(image)))

    def _picture_or_values(self, index: int) -> Any:
        """A PIL image in the model's mode, or a float array."""
        import numpy as np
        from PIL import Image

        image = self._images[index]
        if isinstance(image, (np.ndarray, list)):
            array = np.asarray(image)
            if np.issubdtype(array.dtype, np.floating):
                return array
            if array.dtype != np.uint8 or array.ndim not in (2, 3):
                raise DataError(
                    "not an image array",
                    where=f"{self._where}, row {index}",
                    expected="uint8 (height, width[, channel]) or float in [0, 1]",
                    got=f"{array.dtype} {array.shape}",
                )
            image = Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array)
        if not isinstance(image, Image.Image):
            raise DataError(
                "not an image",
                where=f"{self._where}, row {index}",
                got=type(image).__name__,
                remedy="Map the column that holds image bytes with ?image=COLUMN.",
            )
        mode = "L" if self._preparation.size[0] == 1 else "RGB"
        return image.convert(mode)

    def _values(self, array: Any, index: int) -> Tensor:
        import numpy as np
        import torch

        layered = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
        if layered.shape != self._preparation.size:
            raise DataError(
                "a float image is not of the model's size",
                where=f"{self._where}, row {index}",
                expected=f"{self._preparation.size} (channel, height, width)",
                got=str(layered.shape),
                remedy="Only uint8 images are resized; convert yours, or build the model for this size.",
            )
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError(
                "float image values outside [0, 1]",
                where=f"{self._where}, row {index}",
                got=f"{array.min()} to {array.max()}",
            )
        return torch.from_numpy(np.ascontiguousarray(layered, dtype=np.float32))
