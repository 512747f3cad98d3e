"""The part of the optimiser's state that belongs to units: given up when they leave, fresh when they come back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploy_prune.layers import is_transposed, layer_at
from deploy_prune.units import Axis, Site, UnitKind, groups, unit_key


@torch.no_grad()
def renew(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sites: Sequence[Site],
    left: Mapping[str, Sequence[int]],
    came: Mapping[str, Sequence[int]],
) -> None:
    """Adam's moments of units that left or came: 0, but for the second moment of those that came, which is the mean of
    its tensor.

    The step count is the whole tensor's. A second moment of 0 would therefore make a revived weight's first steps
    (1 − β₁)/√(1 − β₂) = 3.2 times as long as those of the weights around it; with their mean they are as long. Weights
    of inactive units have no gradient and, without moments, move by weight decay alone.
    """
    for units, fresh in ((left, False), (came, True)):
        for site, kind in groups(sites):
            chosen = units.get(unit_key(site.name, kind), ())
            if not len(chosen):
                continue
            for parameter, dim, index in _features(model, site, kind, chosen):
                state = optimizer.state.get(parameter)
                if not state:
                    continue
                state["exp_avg"].index_fill_(dim, index, 0.0)
                second: Tensor = state["exp_avg_sq"]
                if fresh:
                    second.index_fill_(dim, index, float(second.mean()))
                else:
                    second.index_fill_(dim, index, 0.0)


def _features(
    model: nn.Module, site: Site, kind: UnitKind, units: Sequence[int]
) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """(parameter, dimension, indices along it) of everything that the units own."""
    for s in site.slices[kind]:
        table = s.table(site.lanes(kind), site.counts[kind])
        if not table.shape[1]:
            continue
        index = torch.from_numpy(table[list(units)].reshape(-1))
        for parameter, dim in along(layer_at(model, s.layer), s.axis):
            yield parameter, dim, index.to(parameter.device)


def along(layer: nn.Module | nn.Parameter, axis: Axis) -> list[tuple[nn.Parameter, int]]:
    """The trainable parameters of a layer that have its features on `axis`, with the dimension they lie along.

    Beside a layer with adapters these are the adapters': A (rank, in) and B (out, rank).
    """
    found: list[tuple[Any, int]]
    if isinstance(layer, nn.Parameter):
        found = [(layer, 0 if axis == "out" else 1)]
    elif adapters := adapters_of(layer):
        found = [(a.weight, 1) if axis == "in" else (b.weight, 0) for a, b in adapters]
    else:
        found = [(layer.weight, 0 if (axis == "out") is not is_transposed(layer) else 1)]
        if axis == "out" and layer.bias is not None:
            found.append((layer.bias, 0))
    return [(parameter, dim) for parameter, dim in found if parameter.requires_grad]


def adapters_of(layer: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(A, B) of every low-rank adapter beside a layer; empty for a plain one."""
    import sys

    if "peft" not in sys.modules:
        return []
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        return []
    return [(layer.lora_A[name], layer.lora_B[name]) for name in layer.lora_A]
