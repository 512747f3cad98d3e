"""A search in stages: what is least needed leaves and the rest is refitted before the others are judged again.

What a unit is worth changes when others have gone. A second look is taken from the refitted model at each stage's
sparsity, and only at the units that are still there, so that all stages together are one path and its plans are nested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deploy_prune.layers import bias_of, layer_at, matrix, width
from deploy_prune.units import Site, groups, unit_key

if TYPE_CHECKING:
    from deploy_prune.budget import CostModel
    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan

# Importance of units that have left, relative to their place on the path: far below that of any that are there.
_GONE = 1e-30


@torch.no_grad()
def blank(model: nn.Module, sites: Sequence[Site], plan: PrunePlan) -> nn.Module:
    """Set the weights of every removed unit to zero, in place, so that gates on it have no say; returns the model."""
    for site in sites:
        kept = {kind: plan.kept(site, kind) for kind in site.counts}
        for name, axis in site.axes():
            layer = layer_at(model, name)
            gone = torch.from_numpy(~site.kept_features(name, axis, width(layer, axis), kept))
            weight, bias = matrix(layer), bias_of(layer)
            gone = gone.to(weight.device)
            if axis == "out":
                weight[gone] = 0
                if bias is not None:
                    bias[gone] = 0
            else:
                weight[:, gone] = 0
    return model


def joined(
    found: Mapping[str, Tensor], before: SolutionPath, plan: PrunePlan, sites: Sequence[Site], costs: CostModel
) -> dict[str, Tensor]:
    """Importance of all units: that `found` in this stage for those that `plan` keeps; the others leave as `before`.

    Both are float64 (units,) by key.
    """
    result = {}
    for site, kind in groups(sites):
        key = unit_key(site.name, kind)
        there = torch.zeros(site.units(kind), dtype=torch.bool)
        there[plan.kept(site, kind)] = True
        share = costs.unit_params(site, kind) / site.lanes(kind)
        earlier = _GONE * share * torch.from_numpy(before.scores[key])
        result[key] = torch.where(there, found[key].double() + 2 * _GONE * share, earlier)
    return result
