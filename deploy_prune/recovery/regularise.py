"""What makes training harder so that it generalises: skipped sublayers, mixed images, softened labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from deploy_prune.recovery.options import RecoverOptions
from deploy_prune.tasks.base import Batch
from deploy_prune.units import Site

if TYPE_CHECKING:
    from numpy.random import Generator


@dataclass
class DropPath:
    """Stochastic depth (arXiv 1603.09382) on what the sites add to the residual stream.

    `chances` says how likely each site is skipped. A site's output may hold several parts of one row side by side, as
    Swin's windows do. What is skipped is drawn once for a step, so that activations computed again are the same.
    """

    chances: dict[str, float]
    kept: dict[str, Tensor] = field(default_factory=dict)

    def draw(self, rows: int) -> None:
        """Decide for each site and each of `rows` rows; kept ones will count 1/(1 − p) times."""
        self.kept = {name: (torch.rand(rows) >= p) / (1 - p) for name, p in self.chances.items()}

    def clear(self) -> None:
        """Skip nothing from now on."""
        self.kept = {}


@contextmanager
def dropping_paths(model: nn.Module, sites: Sequence[Site], layers: Sequence[str], rate: float) -> Iterator[DropPath]:
    """Within the block a site in layer l of L adds nothing for a row with chance rate · l/(L − 1), once drawn."""
    depth = {
        site.out: next((d for d, name in enumerate(layers) if f"{site.out}.".startswith(f"{name}.")), 0)
        for site in sites
    }
    chances = {name: rate * d / max(1, len(layers) - 1) for name, d in depth.items() if rate * d}
    paths = DropPath(chances)

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if name not in paths.kept:
                return output
            kept = paths.kept[name].to(output)
            kept = kept.repeat_interleave(len(output) // len(kept))
            return output * kept.view(-1, *[1] * (output.ndim - 1))

        return hook

    with ExitStack() as stack:
        for name in chances:
            stack.callback(model.get_submodule(name).register_forward_hook(hook_for(name)).remove)
        yield paths


def soften(batch: Batch, options: RecoverOptions, classes: int, random: Generator) -> Batch:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899), one of them at even odds when both are on, and smoothed
    labels. Every row is mixed with its mirror in the batch; targets become distributions over `classes`."""
    target = batch.target
    if target is not None:
        low = options.label_smoothing / classes
        target = one_hot(target, classes).float() * (1 - options.label_smoothing) + low
    inputs = dict(batch.inputs)
    if options.mixup or options.cutmix:
        (name, images), *_ = inputs.items()
        cut = bool(options.cutmix) and (not options.mixup or random.random() < 0.5)
        alpha = options.cutmix if cut else options.mixup
        λ = float(random.beta(alpha, alpha))
        if cut:
            top, bottom, left, right = _box(images.shape[-2], images.shape[-1], λ, random)
            mixed = images.clone()
            mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
            λ = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
        else:
            mixed = λ * images + (1 - λ) * images.flip(0)
        inputs[name] = mixed
        target = None if target is None else λ * target + (1 - λ) * target.flip(0)
    return Batch(inputs, target)


def _box(height: int, width: int, λ: float, random: Generator) -> tuple[int, int, int, int]:
    """A rectangle of 1 − λ of the area around a random centre, cut off at the border."""
    share = np.sqrt(1 - λ)
    tall, wide = int(height * share), int(width * share)
    y, x = int(random.integers(height)), int(random.integers(width))
    top, bottom = max(0, y - tall // 2), min(height, y + tall // 2)
    left, right = max(0, x - wide // 2), min(width, x + wide // 2)
    return top, bottom, left, right
