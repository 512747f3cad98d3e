"""Layer-adaptive pruning: every layer gives up as much as its importance allows."""

from __future__ import annotations

from pydantic import Field

from deploy_prune.methods.base import Context, Importance
from deploy_prune.methods.layer_schedule import LayerOptions, layered
from deploy_prune.methods.within_layer import COMPARABLE, WithinScore, within_score


class LayerAdaptiveOptions(LayerOptions):
    """Options of layer-adaptive."""

    within: WithinScore = Field("fisher", description="the score that orders the units of one layer")


def layer_adaptive(context: Context, options: LayerAdaptiveOptions) -> Importance:
    """Layers share the cut by ratio_l = amount · (1 − I_l) / Σ(1 − I) · n, clamped and made exact (layer_ratios.py).

    I_l is the layer's measured importance (site_importance.py), normalised to [0, 1] and raised to importance_power;
    amounts are parameters of prunable units. Within a layer units leave by the score `within`. The ratios of all
    amounts are one schedule (layer_schedule.py): plans are nested, each meets its amount to one unit. Another
    `allocation` than the default discards the ratios.
    """
    scores = within_score(context, options.within)
    return layered(context, scores, options, comparable=options.within in COMPARABLE)
