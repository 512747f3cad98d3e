"""Surgery: a plan made real, as a physically smaller torch model of the same classes."""

from __future__ import annotations

import copy

from torch import nn

from deploy_prune.adapters import adapter_for
from deploy_prune.adapters.base import Adapter
from deploy_prune.architecture import weights_sha256
from deploy_prune.basis import require_basis
from deploy_prune.layers import bias_of, cut, layer_at, width
from deploy_prune.plan import PrunePlan
from deploy_prune.units import Site


def compact(model: nn.Module, plan: PrunePlan, *, inplace: bool = False, check_weights: bool = True) -> nn.Module:
    """The model without the units that `plan` removes; every remaining weight is copied bit for bit.

    A site that vanishes leaves the bias of its output projection. With `inplace` the given model is cut, else a copy.
    `check_weights=False` skips comparing the weights with the hash in the plan (for refitted weights, and for empty
    shells about to be loaded). Raises PlanError before any weight is touched.
    """
    adapter = adapter_for(model)
    sites = adapter.sites(model)
    plan.validate_for(sites, weights_sha256(model) if check_weights else None)
    if check_weights:
        require_basis(None, plan.basis)
    result = model if inplace else copy.deepcopy(model)
    for site in sites:
        if plan.vanishes(site):
            remove_site(result, adapter, site)
        elif any(len(plan.kept(site, kind)) < site.units(kind) for kind in site.counts):
            cut_site(result, adapter, site, plan)
    return result


def cut_site(model: nn.Module, adapter: Adapter, site: Site, plan: PrunePlan) -> None:
    """Cut the layers of one site down to the kept units, in place."""
    kept = {kind: plan.kept(site, kind) for kind in site.counts}
    for name, axis in site.axes():
        stays = site.kept_features(name, axis, width(layer_at(model, name), axis), kept)
        if not stays.all():
            cut(model, name, axis, stays)
    adapter.resize(model, site, kept)


def remove_site(model: nn.Module, adapter: Adapter, site: Site) -> None:
    """Replace a whole sublayer by the bias of its output projection, in place; its own norm leaves with it."""
    bias = bias_of(layer_at(model, site.out))
    for name in site.alone:  # first: some lie inside the sublayer
        model.set_submodule(name, nn.Identity())
    adapter.vanish(model, site, bias)
