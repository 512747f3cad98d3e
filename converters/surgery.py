"""Surgery: a plan made real, as a physically smaller torch model of the same classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from deploy_prune.adapters import adapter_for
from deploy_prune.architecture import weights_sha256
from deploy_prune.plan import PrunePlan
from deploy_prune.units import Site


def compact(model: nn.Module, plan: PrunePlan, *, inplace: bool = False, check_weights: bool = True) -> nn.Module:
    """The model without the units that `plan` removes; every remaining weight is copied bit for bit.

    With `inplace` the given model is cut, else a copy. `check_weights=False` skips comparing the weights with the
    hash in the plan (for refitted weights, and for empty shells about to be loaded).
    Raises PlanError before any weight is touched.
    """
    adapter = adapter_for(model)
    sites = adapter.sites(model)
    plan.validate_for(sites, weights_sha256(model) if check_weights else None)
    result = model if inplace else copy.deepcopy(model)
    for site in sites:
        kept = {kind: plan.kept(site, kind) for kind in site.counts}
        if all(len(kept[kind]) == count for kind, count in site.counts.items()):
            continue
        cut_site(result, site, kept)
        adapter.resize(result, site, {kind: len(units) for kind, units in kept.items()})
    return result


def cut_site(model: nn.Module, site: Site, kept: dict) -> None:
    """Cut the linear layers of one site down to the kept units, in place."""
    for kind, slices in site.slices.items():
        for s in slices:
            layer = model.get_submodule(s.module)
            assert isinstance(layer, nn.Linear)
            cut_linear(layer, s.features(kept[kind], site.counts[kind]), s.axis)


def cut_linear(layer: nn.Linear, features: Sequence[int], axis: Literal["out", "in"]) -> None:
    """Keep only the given output or input features of a linear layer, in place and in the given order."""
    weight = layer.weight
    index = torch.as_tensor(features, dtype=torch.long, device=weight.device)
    if axis == "out":
        layer.weight = _parameter(weight.index_select(0, index), weight)
        if layer.bias is not None:
            layer.bias = _parameter(layer.bias.index_select(0, index), layer.bias)
        layer.out_features = len(features)
    else:
        layer.weight = _parameter(weight.index_select(1, index), weight)
        layer.in_features = len(features)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().contiguous(), requires_grad=like.requires_grad)
