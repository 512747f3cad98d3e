"""Torch-Pruning's history: [[layer, whether outputs, indices], ...], replayed on the sites of a model.

An entry names the layer that a group of coupled layers hangs on, and positions in it as it was at that moment: earlier
entries have shortened it. Coupled with a feed-forward's inner layer is its other one; with any of query, key, value or
output projection all four, for Torch-Pruning removes the same features from them. So a channel of a feed-forward is a
neuron, and a channel of an attention one query/key and one value dimension of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploy_prune.errors import ArtifactError, PlanError
from deploy_prune.foreign.removed import Removed
from deploy_prune.plan import PrunePlan
from deploy_prune.units import PER_HEAD, Site, SiteKind, UnitKind

Entry = tuple[str, bool, list[int]]


def removed_by_history(data: Sequence[Any], sites: Sequence[Site], where: str) -> Removed:
    """Raises ArtifactError when `data` is no history, PlanError with every entry that no plan of this model can say."""
    alive = {site.name: list(range(_channels(site))) for site in sites}
    owners = {(layer, axis): site for site in sites for layer, axis in site.axes()}
    problems = []
    for number, entry in enumerate(data):
        layer, outputs, indices = _entry(entry, number, where)
        site = owners.get((layer, "out" if outputs else "in"))
        if site is None:
            problems.append(
                f"entry {number}: the {'out' if outputs else 'in'}puts of {layer} are no units of the model"
            )
            continue
        if problem := _unsayable(site):
            problems.append(f"entry {number}: {site.name}: {problem}")
            continue
        left = alive[site.name]
        if outside := [i for i in indices if not 0 <= i < len(left) * _stacked(site, layer)]:
            problems.append(f"entry {number}: {layer} had {len(left)} channels left, got {outside[:6]}")
            continue
        gone = {left[i % len(left)] for i in indices}
        alive[site.name] = [channel for channel in left if channel not in gone]
    removed = Removed()
    for site in sites:
        problems += _units(site, set(range(_channels(site))) - set(alive[site.name]), removed)
    if problems:
        raise PlanError("the history is not one that a plan of this model can say", where=where, problems=problems[:20])
    return removed


def history_of(plan: PrunePlan, sites: Sequence[Site]) -> list[Entry]:
    """One entry per site that lost something. Raises PlanError where query/key and value dimensions that left differ,
    or query heads share keys and values: Torch-Pruning removes the same from all."""
    history: list[Entry] = []
    problems = []
    for site in sites:
        first = site.slices[site.vanishing_kind][0].layer
        if all(len(plan.kept(site, kind)) == site.units(kind) for kind in site.counts):
            continue
        if problem := _unsayable(site):
            problems.append(f"{site.name}: {problem}")
            continue
        if site.kind is SiteKind.FEED_FORWARD:
            gone = set(range(site.counts[UnitKind.NEURON])) - set(plan.kept(site, UnitKind.NEURON))
        else:
            heads = plan.kept(site, UnitKind.HEAD)
            whole = [head * site.qk_width + d for head in heads for d in range(site.qk_width)]
            kept = [set(plan.kept(site, kind)) if kind in site.counts else set(whole) for kind in PER_HEAD]
            if kept[0] != kept[1]:
                problems.append(
                    f"{site.name}: the query/key dimensions that left are not the value dimensions that left"
                )
                continue
            gone = set(range(_channels(site))) - kept[0]
        parts = _stacked(site, first)
        history.append((first, True, sorted(c + part * _channels(site) for c in gone for part in range(parts))))
        if len(gone) == _channels(site):
            problems.append(f"{site.name}: vanishes whole, and Torch-Pruning keeps a channel of every layer")
    if problems:
        raise PlanError("Torch-Pruning cannot say this plan", problems=problems[:20], remedy="Write masks.")
    return history


def _channels(site: Site) -> int:
    return site.counts[UnitKind.NEURON] if site.kind is SiteKind.FEED_FORWARD else site.heads * site.qk_width


def _stacked(site: Site, layer: str) -> int:
    """How many parts of so many channels the outputs of `layer` are: 3 of a fused query, key and value."""
    if layer == site.out:
        return 1
    if site.kind is SiteKind.FEED_FORWARD:
        return site.slices[UnitKind.NEURON][0].per_unit
    return sum(s.layer == layer and s.axis == "out" and s.per_unit > 0 for s in site.slices[UnitKind.HEAD])


def _unsayable(site: Site) -> str | None:
    if site.kind is SiteKind.FEED_FORWARD:
        return None
    if site.query_heads_per_unit > 1:
        return "query heads share keys and values, which Torch-Pruning's channels do not tell apart"
    if site.qk_width != site.vo_width:
        return "keys and values are of unlike width"
    return None


def _units(site: Site, gone: set[int], removed: Removed) -> list[str]:
    """Channels as units; what no unit is comes back in words."""
    if site.kind is SiteKind.FEED_FORWARD:
        removed.add(site, UnitKind.NEURON, gone)
        return []
    if not gone:
        return []
    width = site.qk_width
    partly = []
    for head in range(site.heads):
        own = {d for d in range(width) if head * width + d in gone}
        if len(own) == width:
            removed.add(site, UnitKind.HEAD, [head])
        else:
            partly.append((head, own))
    if len({len(own) for _, own in partly}) > 1:
        return [f"{site.name}: heads lose unequally many dimensions: {[len(own) for _, own in partly][:8]}"]
    problems = []
    for head, own in partly:
        for kind in PER_HEAD if own else ():
            slots = site.counts.get(kind)
            if slots is None:
                problems.append(
                    f"{site.name}: has no {kind.value} units: {(site.limits or {}).get(kind, 'not offered')}"
                )
            elif slots == width:
                removed.add(site, kind, [head * slots + d for d in own])
            elif {d % slots for d in own} & {d % slots for d in range(width) if d not in own}:
                problems.append(f"{site.name}: head {head} loses one dimension of a rotary pair")
            else:
                removed.add(site, kind, {head * slots + d % slots for d in own})
    return list(dict.fromkeys(problems))


def _entry(entry: Any, number: int, where: str) -> Entry:
    right = (
        isinstance(entry, list | tuple)
        and len(entry) == 3
        and isinstance(entry[0], str)
        and isinstance(entry[1], bool)
        and isinstance(entry[2], list | tuple)
        and all(isinstance(i, int) and not isinstance(i, bool) for i in entry[2])
    )
    if not right:
        raise ArtifactError(
            "not a pruning history",
            where=f"{where}, entry {number}",
            expected='["layer", true, [indices]]',
            got=str(entry)[:80],
        )
    return entry[0], entry[1], list(entry[2])
