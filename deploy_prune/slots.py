"""Slots: the units of qk and vo leave one of every head at a time, each head's least important first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rank_in_lane(values: NDArray[np.float64], lanes: int) -> NDArray[np.int64]:
    """Rank of every unit among those of its head, 0 for the smallest; ties by index."""
    rows = values.reshape(lanes, -1)
    return np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1, kind="stable").reshape(-1)


def by_slot(values: NDArray[np.float64], rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """Importance of every slot: the sum over heads of their units of equal rank."""
    return np.asarray(np.bincount(rank, weights=values), dtype=np.float64)
