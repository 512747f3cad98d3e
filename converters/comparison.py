"""How far two arrays that should be equal are apart, and where; knows nothing of models, and nothing of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Difference:
    """`error` is max|a − b| / max|a| over the whole batch, infinite where a value is not a number or the shapes differ.

    `agreement` is the share of positions with the same argmax over the last axis. `fault` says in words why `error`
    is infinite. `index` is the first place, in reading order, that is further apart than `tolerance`.
    """

    error: float
    agreement: float
    fault: str | None = None
    index: tuple[int, ...] | None = None
    values: tuple[float, float] | None = None


def compare(
    reference: np.ndarray, candidate: np.ndarray, *, tolerance: float, valid: np.ndarray | None = None
) -> Difference:
    """Compare two outputs; `valid` (batch, sequence) marks the positions of (batch, sequence, ...) that count."""
    import numpy as np

    if reference.shape != candidate.shape:
        return Difference(math.inf, 0.0, f"shape {candidate.shape} instead of {reference.shape}")
    counts = np.ones(reference.shape, bool)
    if valid is not None:
        counts &= valid.astype(bool).reshape(valid.shape + (1,) * (reference.ndim - valid.ndim))
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    for name, values in (("reference", a), ("candidate", b)):
        bad = ~np.isfinite(values) & counts
        if bad.any():
            first = _first(bad)
            return Difference(
                math.inf,
                0.0,
                f"{int(bad.sum())} values of the {name} are NaN or infinite",
                first,
                (float(a[first]), float(b[first])),
            )
    a, b = np.where(counts, a, 0.0), np.where(counts, b, 0.0)
    distance, scale = np.abs(a - b), float(np.abs(a).max(initial=0.0))
    worst = float(distance.max(initial=0.0))
    error = worst / scale if scale else (0.0 if worst == 0.0 else math.inf)
    same = (a.argmax(-1) == b.argmax(-1))[counts[..., 0]]
    agreement = float(same.mean()) if same.size else 1.0
    if not error > tolerance:
        return Difference(error, agreement)
    first = _first(distance > tolerance * scale)
    return Difference(
        error,
        agreement,
        None if scale else "the reference is zero everywhere",
        first,
        (float(a[first]), float(b[first])),
    )


def _first(where: np.ndarray) -> tuple[int, ...]:
    import numpy as np

    return tuple(int(i) for i in np.argwhere(where)[0])
