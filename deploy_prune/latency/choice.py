"""The plan that loses least within a time: dynamic programming over sites and their widths.

    min Σ_s loss_s(w_s)   subject to   T_rest + Σ_s t_s(w_s) ≤ limit,    w_s among the aligned widths of site s.

A knapsack with one choice per site (ZipLM, arXiv 2302.04089, section 3.2; MDP, arXiv 2504.02168, poses the same with
attention's widths as separate choices). The time is cut into `BUCKETS` and rounded up, so that a choice never exceeds
its limit; exact but for that rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from bench.latency_table import LatencyTable
from deploy_prune.kind_losses import Losses, site_losses
from deploy_prune.latency.shapes import aligned_step
from deploy_prune.units import Site, UnitKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploy_prune.path import SolutionPath

BUCKETS = 8000  # rounding up wastes at most one of them per site: 0.3 % of the limit for 24 sites


@dataclass(frozen=True)
class Options:
    """What one site may become, none beaten by another in both: rising `ms` (n,), falling `losses` (n,), and the
    units it then keeps, `widths` (n, kinds)."""

    site: str
    kinds: tuple[UnitKind, ...]
    widths: NDArray[np.int64]
    ms: NDArray[np.float64]
    losses: NDArray[np.float64]

    def counts(self, index: int) -> dict[UnitKind, int]:
        return dict(zip(self.kinds, self.widths[index].tolist(), strict=True))


def options_of(
    path: SolutionPath, table: LatencyTable, losses: Losses, *, kinds: Sequence[str] | None, align: int
) -> list[Options]:
    """The options of every site: all aligned widths of the given kinds, whole or gone included."""
    return [_site_options(path, site, table, losses, kinds, align) for site in path.sites]


def choose(options: Sequence[Options], limit_ms: float) -> list[int] | None:
    """The index into every site's options that loses least within `limit_ms` for all sites together; None when even
    the fastest options take longer. Rounding up may refuse a limit within a thousandth of the fastest."""
    fastest = sum(float(o.ms[0]) for o in options)
    if limit_ms < fastest:
        return None
    if limit_ms >= sum(float(o.ms[-1]) for o in options):
        return [len(o.ms) - 1 for o in options]
    unit = (limit_ms - fastest) / BUCKETS  # of the time above the fastest, which every choice takes
    if unit <= 0:
        return [0] * len(options)
    best = np.zeros(BUCKETS + 1)
    picks = np.zeros((len(options), BUCKETS + 1), np.int32)
    for row, own in enumerate(options):
        steps = np.ceil((own.ms - own.ms[0]) / unit - 1e-9).astype(np.int64)
        new = np.full(BUCKETS + 1, np.inf)
        for index in np.flatnonzero(steps <= BUCKETS).tolist():
            step = int(steps[index])
            with_it = best[: BUCKETS + 1 - step] + own.losses[index]
            better = with_it < new[step:]
            new[step:][better] = with_it[better]
            picks[row, step:][better] = index
        best = new
    chosen = [0] * len(options)
    left = BUCKETS
    for row in range(len(options) - 1, -1, -1):
        chosen[row] = int(picks[row, left])
        left -= int(np.ceil((options[row].ms[chosen[row]] - options[row].ms[0]) / unit - 1e-9))
    return chosen


def counts_of(options: Sequence[Options], chosen: Sequence[int]) -> dict[str, dict[UnitKind, int]]:
    return {own.site: own.counts(index) for own, index in zip(options, chosen, strict=True)}


def fastest_ms(options: Sequence[Options]) -> float:
    """What all sites together take at the least."""
    return sum(float(own.ms[0]) for own in options)


def _site_options(
    path: SolutionPath,
    site: Site,
    table: LatencyTable,
    losses: Losses,
    asked: Sequence[str] | None,
    align: int,
) -> Options:
    kinds = tuple(UnitKind(kind) for kind in table.shape_of(site.name).kinds)
    ranges = [_widths(site, kind, align) if asked is None or kind in asked else [site.counts[kind]] for kind in kinds]
    rows = [list(row) for row in product(*ranges)]
    if asked is None or kinds[0] in asked:
        rows.append([0] * len(kinds))
    widths = np.array(rows, np.int64)
    ms = np.array([table.site_ms(site.name, dict(zip(kinds, row, strict=True))) for row in rows])
    lost = site_losses(path, site, widths, kinds, losses)
    keep = _unbeaten(ms, lost)
    return Options(site.name, kinds, widths[keep], ms[keep], lost[keep])


def _widths(site: Site, kind: UnitKind, align: int) -> list[int]:
    step, full = aligned_step(site, kind, align), site.counts[kind]
    return sorted({*range(step, full, step), full})


def _unbeaten(ms: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the options on the lower left front, fastest first."""
    order = np.lexsort((losses, ms))
    kept = []
    lowest = np.inf
    for index in order.tolist():
        if losses[index] < lowest:
            kept.append(index)
            lowest = losses[index]
    return np.array(kept, np.int64)
