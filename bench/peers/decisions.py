"""Which units a smaller model kept, read off its weights: a peer's decisions as a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploy_prune.layers import layer_at, matrix
from deploy_prune.plan import PrunePlan, plan_from_units
from deploy_prune.units import PER_HEAD, Site, UnitKind, groups


def plan_of(dense: nn.Module, small: nn.Module, sites: Sequence[Site], model: str, weights_sha256: str) -> PrunePlan:
    """The plan whose cut of `dense` is `small`. Rows of the layers that make a site's features are found again bit for
    bit, in their order. Raises ValueError when they are not, or when a unit is kept in part."""
    kept: dict[tuple[str, UnitKind], list[int]] = {}
    for site, kind in groups(sites):
        s = next(s for s in site.slices[kind] if s.axis == "out")
        if kind is UnitKind.VO:
            s = next(s for s in site.slices[kind] if s.axis == "out" and s.layer != site.out)
        rows = kept_rows(matrix(layer_at(dense, s.layer)), matrix(layer_at(small, s.layer)), s.layer)
        stays = rows[torch.from_numpy(s.table(site.lanes(kind), site.counts[kind]))]
        whole = stays.any(1) if kind is UnitKind.HEAD else stays.all(1)
        if kind is not UnitKind.HEAD and bool((stays.any(1) != whole).any()):
            raise ValueError(f"{site.name}: {kind.value} units are kept in part")
        kept[site.name, kind] = whole.nonzero()[:, 0].tolist()
    for site in sites:
        heads = set(kept.get((site.name, UnitKind.HEAD), []))
        for kind in PER_HEAD:
            if kind in site.counts:
                kept[site.name, kind] = [u for u in kept[site.name, kind] if u // site.counts[kind] in heads]
    plan = plan_from_units(model, weights_sha256, sites, kept)
    plan.validate_for(sites)
    return plan


def kept_rows(dense: Tensor, small: Tensor, name: str) -> Tensor:
    """Which rows of `dense` are those of `small`, (rows,) boolean: the first match of each, in order."""
    stays = torch.zeros(len(dense), dtype=torch.bool)
    start = 0
    for row in small:
        same = (dense[start:] == row).all(1).nonzero()
        if not len(same):
            raise ValueError(f"{name}: a row of the smaller layer is none of the dense one's")
        start += int(same[0]) + 1
        stays[start - 1] = True
    return stays
