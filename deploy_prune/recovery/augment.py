"""Images changed anew each time they are seen: crops, mirroring, RandAugment (arXiv 1909.13719), random erasing.

What happens to an image follows from seed, epoch and index alone, whoever prepares it: one process or eight.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from deploy_prune.recovery.options import RecoverOptions

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Batch, Task
    from deploy_prune.tasks.image_classification import ImageClassification
    from deploy_prune.tasks.images import Preparation


def augmented_batches(
    task: Task, order: Sequence[Sequence[int]], options: RecoverOptions, key: tuple[int, int]
) -> Iterator[Batch]:
    """The batches that `order` names, every image changed as `key` (seed, epoch) and its index say."""
    from deploy_prune.tasks.image_classification import ImageClassification

    assert isinstance(task, ImageClassification)
    workers = options.workers
    if workers is None:
        workers = min(8, torch.get_num_threads()) if torch.cuda.is_available() else 0
    changed = _Changed(task, changes(task.preparation, options), key)
    how: dict[str, Any] = {"num_workers": workers, "batch_size": None, "sampler": list(order)}
    how["generator"] = torch.Generator()  # else it would draw on the global one
    if workers:
        how |= {"multiprocessing_context": "fork", "prefetch_factor": 2}  # columns of lazy data cannot be pickled
    yield from DataLoader(changed, **how)


def changes(prepared: Preparation, options: RecoverOptions) -> Callable[[Any], torch.Tensor]:
    """A function of a PIL image that draws on the global generators and returns the model's normalised input."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision import transforms

    size = prepared.size[1:]
    if options.crop is None:
        steps = [step for step in prepared.transform().transforms if type(step).__name__ != "ToNumpy"]  # type: ignore[attr-defined]
    else:
        steps = [
            RandomResizedCropAndInterpolation(size, scale=(options.crop, 1.0), interpolation=prepared.interpolation)
        ]
    if options.flip:
        steps.append(transforms.RandomHorizontalFlip(options.flip))
    if options.randaugment:
        fill = tuple(round(255 * value) for value in prepared.mean)
        how = {"translate_const": int(min(size) * 0.45), "img_mean": fill if len(fill) > 1 else fill[0]}
        steps.append(rand_augment_transform(options.randaugment, how))
    steps += [transforms.ToTensor(), transforms.Normalize(prepared.mean, prepared.std)]
    if options.erasing:
        steps.append(RandomErasing(options.erasing, mode="pixel", device="cpu"))
    made: Callable[[Any], torch.Tensor] = transforms.Compose(steps)
    return made


class _Changed(Dataset):  # type: ignore[type-arg]
    """Item: a list of calibration items; value: their batch."""

    def __init__(self, task: ImageClassification, change: Callable[[Any], torch.Tensor], key: tuple[int, int]) -> None:
        self._task, self._change, self._key = task, change, key

    def __getitem__(self, items: Sequence[int]) -> Batch:
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                return self._task.changed_batch(items, self._seeded)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def _seeded(self, image: Any, item: int) -> torch.Tensor:
        words = np.random.SeedSequence([*self._key, item]).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))
        return self._change(image)
