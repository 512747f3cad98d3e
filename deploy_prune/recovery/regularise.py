"""What makes training harder so that it generalises: skipped sublayers, mixed images, softened labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    """Stochastic depth (arXiv 1603.09382) on what the sites add to the residual stream. `rows` is the batch's size;
    0 switches it off. A site's output may hold several parts of one row side by side, as Swin's windows do."""

    rows: int = 0


@contextmanager
def dropping_paths(model: nn.Module, sites: Sequence[Site], layers: Sequence[str], rate: float) -> Iterator[DropPath]:
    """Within the block a site in layer l of L adds nothing for a row with chance rate · l/(L − 1), else 1/(1 − p) of
    itself."""
    switch = DropPath()

    def hook_for(p: float) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if not switch.rows:
                return output
            kept = (torch.rand(switch.rows, device=output.device) >= p).to(output.dtype) / (1 - p)
            kept = kept.repeat_interleave(len(output) // switch.rows)
            return output * kept.view(-1, *[1] * (output.ndim - 1))

        return hook

    with ExitStack() as stack:
        for site in sites if rate else ():
            depth = next((i for i, name in enumerate(layers) if f"{site.name}.".startswith(f"{name}.")), 0)
            p = rate * depth / max(1, len(layers) - 1)
            if p:
                stack.callback(model.get_submodule(site.out).register_forward_hook(hook_for(p)).remove)
        yield switch


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
