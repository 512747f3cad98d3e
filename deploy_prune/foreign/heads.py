"""Heads to remove by layer: {"0": [2, 5], "3": [1]}. Layers are numbers of attention sites in model order, or names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploy_prune.errors import PlanError
from deploy_prune.foreign.removed import Removed
from deploy_prune.plan import PrunePlan
from deploy_prune.units import PER_HEAD, Site, SiteKind, UnitKind, groups


def removed_by_heads(data: Mapping[str, Any], sites: Sequence[Site], where: str) -> Removed:
    """Query heads by layer become units. Raises PlanError for layers and heads that are not there, and for a part of
    a group that shares a key/value head."""
    attentions = [site for site in sites if site.kind is SiteKind.ATTENTION]
    named = {site.name: site for site in attentions} | {str(i): site for i, site in enumerate(attentions)}
    removed, problems = Removed(), []
    for layer, heads in data.items():
        site = named.get(layer)
        if site is None:
            problems.append(f"layer {layer}: the model has {len(attentions)} attention layers")
            continue
        if not isinstance(heads, list) or not all(isinstance(h, int) and not isinstance(h, bool) for h in heads):
            problems.append(f"layer {layer}: expected a list of heads, got {str(heads)[:60]}")
            continue
        if outside := [h for h in heads if not 0 <= h < site.heads]:
            problems.append(f"layer {layer}: heads {outside[:6]}, the layer has 0-{site.heads - 1}")
            continue
        per = site.query_heads_per_unit
        for group in sorted({head // per for head in heads}):
            own = set(range(group * per, (group + 1) * per))
            if own <= set(heads):
                removed.add(site, UnitKind.HEAD, [group])
            else:
                problems.append(
                    f"layer {layer}: removes query heads {sorted(own & set(heads))} of key/value head {group}, "
                    f"which owns {min(own)}-{max(own)}; a plan removes all of them or none"
                )
    if problems:
        raise PlanError("the heads are not those of this model", where=where, problems=problems)
    return removed


def heads_of(plan: PrunePlan, sites: Sequence[Site]) -> dict[str, list[int]]:
    """Removed query heads by layer, layers that keep all left out. Raises PlanError where units of other kinds left."""
    problems = []
    for site, kind in groups(sites):
        have = len(plan.kept(site, UnitKind.HEAD)) * site.counts[kind] if kind in PER_HEAD else site.units(kind)
        if kind is not UnitKind.HEAD and len(plan.kept(site, kind)) < have:
            problems.append(f"{site.name}: {have - len(plan.kept(site, kind))} {kind.value} units left")
    if problems:
        raise PlanError(
            "a list of heads cannot say what else left",
            problems=problems[:20],
            remedy="Write masks, or cut kinds head only.",
        )
    attentions = [site for site in sites if site.kind is SiteKind.ATTENTION]
    gone = {
        str(i): [head for head in range(site.heads) if head not in set(plan.keep[site.name][UnitKind.HEAD])]
        for i, site in enumerate(attentions)
    }
    return {layer: heads for layer, heads in gone.items() if heads}
