"""Slots: the units of qk and vo leave one of every head at a time, each head's least important first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy_prune.units import Site, UnitKind, groups, unit_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploy_prune.budget import CostModel


def rank_in_lane(values: NDArray[np.float64], lanes: int) -> NDArray[np.int64]:
    """Rank of every unit among those of its head, 0 for the smallest; ties by index."""
    rows = values.reshape(lanes, -1)
    return np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1, kind="stable").reshape(-1)


def by_slot(values: NDArray[np.float64], rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """Importance of every slot: the sum over heads of their units of equal rank."""
    return np.asarray(np.bincount(rank, weights=values), dtype=np.float64)


@dataclass(frozen=True)
class Slots:
    """All slots flattened in model order: their group's number, kind's number and parameters. A head and a neuron is a
    slot of its own; a qk or vo slot is one unit of every head.

    By group: `least` is how many slots a site that stays keeps, `features` how many features of a layer one slot is (0
    where alignment does not apply).
    """

    groups: list[tuple[Site, UnitKind]]
    keys: list[str]
    group: NDArray[np.int64]
    kind: NDArray[np.int64]
    params: NDArray[np.float64]
    least: NDArray[np.int64]
    features: NDArray[np.int64]

    def steps(self, align: int) -> NDArray[np.int64]:
        """Slots per group that make a multiple of `align` features."""
        return np.where(self.features == 0, 1, np.maximum(1, -(-align // np.maximum(self.features, 1))))

    @staticmethod
    def of(sites: Sequence[Site], costs: CostModel, kinds: Sequence[UnitKind] | None) -> Slots:
        found = groups(sites, kinds)
        counts = [s.counts[k] for s, k in found]
        order = list(UnitKind)
        width = {UnitKind.QK: lambda s: s.qk_width, UnitKind.VO: lambda s: s.vo_width}
        repeat: Callable[[list[Any]], NDArray[Any]] = lambda values: np.repeat(np.asarray(values), counts)  # noqa: E731
        return Slots(
            found,
            [unit_key(s.name, k) for s, k in found],
            repeat(list(range(len(found)))),
            repeat([order.index(k) for _, k in found]),
            repeat([float(costs.unit_params(s, k)) for s, k in found]),
            np.array([0 if k is s.vanishing_kind else 1 for s, k in found]),
            np.array([0 if k is UnitKind.HEAD else width[k](s) // s.counts[k] if k in width else 1 for s, k in found]),
        )
