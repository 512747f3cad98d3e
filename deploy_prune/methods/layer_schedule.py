"""From scores within layers and an importance of every layer to one order of leaving: the layer ratios as a path.

A path needs one order for all amounts. The ratios of `removal_ratios` never fall as the amount rises, so that there is
one: a layer's units leave by their rank in it, each at the amount at which the layer's ratio reaches the share of its
parameters that is gone with the unit. Cut at any sparsity, the path then has the ratios of that amount, to a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from deploy_prune.errors import UsageError
from deploy_prune.methods.base import Context, Importance, Options
from deploy_prune.methods.layer_ratios import leaving_order, normalised
from deploy_prune.methods.site_importance import SiteMeasure, site_importance
from deploy_prune.slots import by_slot, rank_in_lane
from deploy_prune.units import Site, UnitKind, unit_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploy_prune.budget import CostModel


class LayerOptions(Options):
    """How the layers share the cut; a layer is a site, an attention or a feed-forward."""

    importance: SiteMeasure = Field(
        "gradient", description="of a layer: its output's gradient, its activation, or both multiplied token by token"
    )
    importance_power: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="above 1 spares the most important layers more than the others"
    )


def layered(context: Context, scores: Importance, options: LayerOptions, *, comparable: bool) -> Importance:
    """The importance under which units leave by `scores` within their layer, and layers by their measured importance.

    Leaves both importances of every layer in the context's facts. `comparable` as in `scheduled`.
    """
    raw = site_importance(context, options.importance)
    shares = normalised(list(raw.values()), options.importance_power)
    context.facts["layers"] = {
        name: {options.importance: value, "importance": float(share)}
        for (name, value), share in zip(raw.items(), shares, strict=True)
    }
    own = {name: float(share) for name, share in zip(raw, shares, strict=True)}
    return scheduled(context.sites, context.costs, scores, own, comparable=comparable)


def scheduled(
    sites: Sequence[Site],
    costs: CostModel,
    scores: Importance,
    importance: Mapping[str, float],
    *,
    comparable: bool,
) -> dict[str, Tensor]:
    """The importance per unit, float64, that makes a path's global allocation follow the layer ratios.

    `scores` order the units of every kind within their site, (units,) by key; `importance` is I_l in [0, 1] by site.
    Kinds of one site leave together: where scores of different kinds are `comparable`, by score per parameter, else so
    that every kind has lost the same share of its units. What has left is counted by the cost model, so that parameters
    of two kinds (a head and its dimensions) count once. Raises UsageError when a score is not finite.
    """
    bad = [key for key, values in scores.items() if not bool(torch.isfinite(values).all())]
    if bad:
        raise UsageError("scores are not finite", problems=bad, remedy="The model or its data produces NaN.")
    ranks: dict[str, NDArray[np.int64]] = {}
    places: dict[str, list[int]] = {}  # of each kind's slots, among those of all sites as their sites give them up
    layer: list[int] = []
    share: list[float] = []
    for number, site in enumerate(sites):
        values = {kind: scores[unit_key(site.name, kind)].detach().cpu().double().numpy() for kind in site.counts}
        ranks |= {unit_key(site.name, kind): rank_in_lane(v, site.lanes(kind)) for kind, v in values.items()}
        slots = {kind: by_slot(v, ranks[unit_key(site.name, kind)]) for kind, v in values.items()}
        order = _within(site, costs, slots, comparable=comparable)
        for place, kind in enumerate(order, len(layer)):
            places.setdefault(unit_key(site.name, kind), []).append(place)
        layer += [number] * len(order)
        share += _gone(site, costs, order)
    leaving = leaving_order([importance[s.name] for s in sites], np.array(layer), np.array(share))
    time = np.empty(len(layer))
    time[leaving] = np.arange(1, len(layer) + 1) / len(layer)
    found = {}
    for site in sites:
        for kind in site.counts:
            key = unit_key(site.name, kind)
            per_unit = costs.unit_params(site, kind) / site.lanes(kind)
            found[key] = torch.from_numpy(time[places[key]][ranks[key]] * per_unit)
    return found


def _within(
    site: Site, costs: CostModel, slots: Mapping[UnitKind, NDArray[np.float64]], *, comparable: bool
) -> list[UnitKind]:
    """The kind of every slot in the order in which a site gives them up; slots of one kind leave by rank."""
    value, kinds = [], []
    for kind, own in slots.items():
        position = (np.arange(len(own)) + 0.5) / len(own)
        value.append(own / costs.unit_params(site, kind) if comparable else position)
        kinds += [kind] * len(own)
    return [kinds[i] for i in np.argsort(np.concatenate(value), kind="stable")]


def _gone(site: Site, costs: CostModel, order: Sequence[UnitKind]) -> list[float]:
    """The share of the site's prunable parameters that is gone after each slot of `order` has left."""
    kept = dict(site.counts)
    dense = costs.params_of([site], {site.name: kept})
    prunable = costs.prunable([site])
    shares = []
    for kind in order:
        kept[kind] -= 1
        least = {k: n if k is site.vanishing_kind else max(n, 1) for k, n in kept.items()}
        shares.append((dense - costs.params_of([site], {site.name: least})) / prunable)
    return shares
