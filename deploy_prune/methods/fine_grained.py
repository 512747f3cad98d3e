"""Fine-grained pruning: heads by their attention distributions, neurons by their activations, layers by their share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from deploy_prune.methods.activation_scores import column_energy, column_fluctuation
from deploy_prune.methods.attention_statistics import attention_scores
from deploy_prune.methods.base import Context, Importance, NoOptions
from deploy_prune.methods.baselines import taylor
from deploy_prune.methods.layer_schedule import LayerOptions, layered
from deploy_prune.units import UnitKind, groups, unit_key

HeadScore = Literal["variance", "variance-over-queries", "entropy", "taylor"]
DimensionScore = Literal["fluctuation", "energy", "taylor"]


class FineGrainedOptions(LayerOptions):
    """Options of fine-grained."""

    heads: HeadScore = Field("variance", description="of attention distributions, low leaves first; or taylor")
    dimensions: DimensionScore = Field(
        "fluctuation", description="of neurons, value and query/key dimensions: their variance or energy, or taylor"
    )


def fine_grained(context: Context, options: FineGrainedOptions) -> Importance:
    """Scores within every layer, and between layers the ratios of layer-adaptive (layer_schedule.py).

    Heads have the score of their attention distributions (attention_statistics.py): one that looks at everything alike
    leaves first. Neurons and value/output dimensions j have what they move the output by, Var(x_j) · Σ_i W_ij²
    (`fluctuation`) or E[x_j²] · Σ_i W_ij² (`energy`), query/key dimensions the same of their part of the logit, q_d ·
    k_d. `taylor` is |Σ ∂ℓ/∂m|. No two of these compare, so that the kinds of a layer leave at the same pace.
    """
    wanted = {options.heads, options.dimensions}
    by_gradient = taylor(context, NoOptions()) if "taylor" in wanted else {}
    by_column: Importance = {}
    if options.dimensions == "fluctuation":
        by_column = column_fluctuation(context)
    elif options.dimensions == "energy":
        by_column = column_energy(context)
    by_attention = {} if options.heads == "taylor" else attention_scores(context, options.heads)

    def score(site: str, kind: UnitKind) -> Tensor:
        key = unit_key(site, kind)
        if kind is UnitKind.HEAD:
            return by_gradient[key] if options.heads == "taylor" else by_attention[site]
        return by_gradient[key] if options.dimensions == "taylor" else by_column[key]

    scores = {unit_key(site.name, kind): score(site.name, kind) for site, kind in groups(context.sites)}
    return layered(context, scores, options, comparable=False)
