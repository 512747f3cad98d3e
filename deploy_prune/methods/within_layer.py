"""Scores by which the units of one layer are ordered, by name: searches of the registry that need no options."""

from __future__ import annotations

from typing import Literal, get_args

from deploy_prune.methods.activation_scores import corp, flap, wanda
from deploy_prune.methods.base import Context, Importance, NoOptions
from deploy_prune.methods.baselines import fisher, magnitude, taylor
from deploy_prune.methods.obs import obs

WithinScore = Literal["fisher", "taylor", "magnitude", "obs", "flap", "wanda", "corp"]
WITHIN: tuple[str, ...] = get_args(WithinScore)
# Scores that measure a rise of one loss, so that a head, a dimension and a neuron may be compared per parameter.
COMPARABLE: frozenset[WithinScore] = frozenset({"fisher", "taylor"})

_SCORES = {
    "fisher": fisher, "taylor": taylor, "magnitude": magnitude, "obs": obs, "flap": flap, "wanda": wanda, "corp": corp
}  # fmt: skip


def within_score(context: Context, name: WithinScore) -> Importance:
    """The score of every unit, (units,) by key, larger stays longer. Raises what the search of that name raises."""
    return _SCORES[name](context, NoOptions())
