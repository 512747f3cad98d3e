"""Low-rank adapters that take about as many numbers as a sparse delta would, to compare it with."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploy_prune.adapters import find_sites
from deploy_prune.errors import UnavailableError, UnsupportedModelError
from deploy_prune.layers import width
from deploy_prune.recovery.hidden import layers_of
from deploy_prune.recovery.lora import add_adapters, places

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Adapters:
    """`rank` of the adapters beside every linear layer inside `layers`, and how many `numbers` they are in all."""

    layers: tuple[str, ...]
    rank: int
    numbers: int

    def beside(self, model: nn.Module) -> nn.Module:
        """A frozen copy with the adapters in it. Raises UnavailableError without peft."""
        if importlib.util.find_spec("peft") is None:
            raise UnavailableError(
                "adapters need the package peft", where="fit lora", remedy="pip install 'deploy-prune[lora]'"
            )
        adapted = copy.deepcopy(model)
        add_adapters(adapted, self.layers, self.rank, 2.0 * self.rank)
        return adapted


def adapters_of(model: nn.Module, count: int) -> Adapters:
    """Adapters of about `count` numbers, of rank 1 at least: rank r takes r (in + out) at every layer.

    Raises UnsupportedModelError for a model whose layers are not known.
    """
    layers = tuple(layers_of(model, find_sites(model)))
    per_rank = sum(width(m, "in") + width(m, "out") for m in places(model, layers).values())
    if not per_rank:
        raise UnsupportedModelError("no linear layer that an adapter could stand beside", where=type(model).__name__)
    rank = max(1, round(count / per_rank))
    return Adapters(layers, rank, rank * per_rank)
