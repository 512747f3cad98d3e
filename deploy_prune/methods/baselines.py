"""The baselines every comparison includes: random, weight magnitude, Taylor and Fisher."""

from __future__ import annotations

import torch
from torch import Tensor

from deploy_prune.blocks import whole
from deploy_prune.layers import layer_at, matrix
from deploy_prune.methods.base import Context, Importance, NoOptions
from deploy_prune.methods.statistics import gate_statistics
from deploy_prune.units import groups, unit_key

LABEL = "gate gradients"  # one pass serves both methods that read it, where its state is kept


def random(context: Context, _: NoOptions) -> Importance:
    """Uniform noise per parameter, so that under the global allocation every order of leaving is equally likely."""
    generator = torch.Generator().manual_seed(context.seed)
    return {
        unit_key(s.name, k): torch.rand(s.units(k), generator=generator, dtype=torch.float64)
        * context.costs.unit_params(s, k)
        / s.lanes(k)
        for s, k in groups(context.sites)
    }


@torch.no_grad()
def magnitude(context: Context, _: NoOptions) -> Importance:
    """Σ w² over the unit's coupled rows and columns (biases left out); needs no data."""
    importance: dict[str, Tensor] = {}
    for site, kind in groups(context.sites):
        total = torch.zeros(site.units(kind), dtype=torch.float64)
        for s in site.slices[kind]:
            weight = whole(matrix(layer_at(context.model, s.layer))).double()
            squared = weight.square().sum(1 if s.axis == "out" else 0).cpu()
            total += squared[torch.from_numpy(s.table(site.lanes(kind), site.counts[kind]))].sum(1)
        importance[unit_key(site.name, kind)] = total
    return importance


def taylor(context: Context, _: NoOptions) -> Importance:
    """|Σ ∂ℓ/∂m| over the calibration set: the first-order change of the loss when the unit leaves."""
    return {key: slope.abs() for key, slope in gate_statistics(context, LABEL).slope.items()}


def fisher(context: Context, _: NoOptions) -> Importance:
    """Σ over examples of (∂ℓ/∂m)², the diagonal empirical Fisher information of the gates (Kwon et al., 2022)."""
    return gate_statistics(context, LABEL).curvature
