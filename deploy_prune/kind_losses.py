"""What it costs in quality that a site gets narrower: the path's order, and losses measured along the path.

A path says in which order units leave, not what their leaving costs. Units of one kind and equal score are equally
dispensable per parameter (that is how scores are made), so one function of the score is enough for a kind: the loss
density ρ_k(s). With ℓ_j the measured loss of the path's plan j that cuts units of kind k alone, and m_j the parameters
of the slots that plan j cuts and plan j−1 keeps,

    ρ_j = (ℓ_j − ℓ_{j−1}) / m_j,    made non-decreasing (least squares, weights m_j),

set at the middle of the scores between the two plans (the first: from the kind's lowest score) and interpolated
geometrically. A site that keeps h of H heads and cuts slots R then costs

    Σ_{heads in R} ρ p + (h/H) Σ_{qk, vo in R} ρ p,    p the parameters of a slot; neurons as heads.

One density for all kinds was measured first: it said of narrow values that they lose 0.4 times what they do, of few
neurons 1.4 times (bench/notes.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy_prune.budget import Counts
from deploy_prune.errors import BudgetError
from deploy_prune.path import SolutionPath
from deploy_prune.progress import SILENT, Progress
from deploy_prune.units import PER_HEAD, Site, UnitKind, groups, unit_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploy_prune.plan import PrunePlan

SPARSITIES = (0.1, 0.3, 0.5, 0.75)  # of the units of a kind: where its loss is measured
CALIBRATED = "calibrated"  # option of a path: the losses that made its order
_TIE = 1e-3  # of a density: units of equal density leave in the order of their scores
_FAR = math.log(1e3)  # how much less or more than at the outer knots a density may be beyond them
_LEAST = 1e-6  # of the largest density: nothing leaves for free


@dataclass(frozen=True)
class LossCurve:
    """ρ of one kind: `density` (per parameter) at rising `scores`. `measured` holds (sparsity, loss) of its plans."""

    scores: tuple[float, ...]
    density: tuple[float, ...]
    measured: tuple[tuple[float, float], ...] = ()

    def at(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """ρ, beyond the knots on either side with the slope from the first to the last: where a model is past use its
        loss rises no more, but what it then loses is dear to any model that is not."""
        log = np.log(self.density)
        span = self.scores[-1] - self.scores[0]
        slope = (log[-1] - log[0]) / span if span > 0 else 0.0
        beyond = np.maximum(0.0, scores - self.scores[-1]) + np.minimum(0.0, scores - self.scores[0])
        beyond = np.clip(slope * beyond, -_FAR, _FAR)
        return np.asarray(np.exp(np.interp(scores, self.scores, log) + beyond))

    def to_json(self) -> dict[str, Any]:
        return {
            "scores": list(self.scores),
            "density": list(self.density),
            "measured": [list(m) for m in self.measured],
        }


@dataclass(frozen=True)
class Losses:
    """ρ of every kind, by its name."""

    curves: Mapping[str, LossCurve]

    def to_json(self) -> dict[str, Any]:
        return {kind: curve.to_json() for kind, curve in self.curves.items()}


def measured_losses(
    path: SolutionPath,
    loss_of: Callable[[PrunePlan], float],
    *,
    kinds: Sequence[str] | None = None,
    progress: Progress = SILENT,
) -> Losses:
    """The losses of every kind alone, by `loss_of` (0 for the dense model). Raises BudgetError when no plan of any kind
    reaches a sparsity; a single such kind counts as dear as the dearest."""
    asked = path.kinds(kinds)
    found: dict[str, LossCurve] = {}
    failed: BudgetError | None = None
    for kind in asked:
        try:
            found[kind.value] = loss_curve(path, loss_of, kind.value, progress=progress)
        except BudgetError as error:
            failed = error
    if not found:
        assert failed is not None
        raise failed
    dearest = max(curve.density[-1] for curve in found.values())
    return Losses({kind.value: found.get(kind.value, LossCurve((0.0,), (dearest,))) for kind in asked})


def loss_curve(
    path: SolutionPath,
    loss_of: Callable[[PrunePlan], float],
    kind: str,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    progress: Progress = SILENT,
) -> LossCurve:
    """Measure `loss_of` at plans along the path that cut units of one kind alone. Raises BudgetError when the path
    reaches none."""
    lowest = min(float(np.min(path.scores[unit_key(s.name, k)])) for s, k in groups(path.sites) if k.value == kind)
    measured: list[tuple[float, float, float, float]] = [(0.0, lowest, 0.0, 0.0)]  # sparsity, threshold, mass, loss
    progress.start(len(sparsities), f"losses along the path, {kind}")
    try:
        for sparsity in sparsities:
            try:
                plan = path.plan(sparsity, kinds=[kind])
            except BudgetError:
                break
            counts = plan.counts(path.sites)
            measured.append((sparsity, _threshold(path, counts), _mass(path, counts), loss_of(plan)))
            progress.advance(1, f"{sparsity:g}: {measured[-1][-1]:.4g}")
    finally:
        progress.finish()
    if len(measured) == 1:
        raise BudgetError(
            f"no plan of this path reaches any sparsity of {kind} units",
            expected=f"{sparsities[0]:g}",
            got="none",
            remedy="Do without losses along the path: search.calibrate=false, and no budget of latency.",
        )
    steps = [
        ((a[1] + b[1]) / 2, (b[3] - a[3]) / (b[2] - a[2]), b[2] - a[2]) for a, b in pairwise(measured) if b[2] > a[2]
    ]
    scores, density, mass = (np.array(part) for part in zip(*steps, strict=True))
    rising = non_decreasing(density, mass)
    top = max(float(rising.max()), np.finfo(float).tiny / _LEAST)
    return LossCurve(
        tuple(scores.tolist()),
        tuple(np.maximum(rising, _LEAST * top).tolist()),
        tuple((m[0], m[3]) for m in measured[1:]),
    )


def slot_losses(path: SolutionPath, site: Site, kind: UnitKind, losses: Losses) -> NDArray[np.float64]:
    """ρ p of the slots of one kind, first to leave first: (counts,). A kind without a curve stays whole."""
    scores = np.sort(path.scores[unit_key(site.name, kind)])[:: site.lanes(kind)]
    curve = losses.curves.get(kind.value)
    return np.zeros(len(scores)) if curve is None else curve.at(scores) * path.costs.unit_params(site, kind)


def site_losses(
    path: SolutionPath, site: Site, widths: NDArray[np.int64], kinds: Sequence[UnitKind], losses: Losses
) -> NDArray[np.float64]:
    """Loss of every row of `widths` (options, kinds), units kept per kind; the first kind is the vanishing one."""
    total = np.zeros(len(widths))
    share = widths[:, 0] / site.counts[kinds[0]]
    for column, kind in enumerate(kinds):
        gone = np.concatenate([[0.0], np.cumsum(slot_losses(path, site, kind, losses))])
        total += (share if kind in PER_HEAD else 1.0) * gone[site.counts[kind] - widths[:, column]]
    return total


def non_decreasing(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The non-decreasing sequence nearest to `values` in weighted least squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools[-2:]
            pools[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    return np.concatenate([np.full(count, value) for value, _, count in pools])


def _threshold(path: SolutionPath, counts: Counts) -> float:
    """The largest score that has left."""
    highest = 0.0
    for site in path.sites:
        for kind, kept in counts[site.name].items():
            slots = np.sort(path.scores[unit_key(site.name, kind)])[:: site.lanes(kind)]
            if kept < len(slots) and (kept or kind is site.vanishing_kind):
                highest = max(highest, float(slots[len(slots) - kept - 1]))
    return highest


def _mass(path: SolutionPath, counts: Mapping[str, Mapping[UnitKind, int]]) -> float:
    """Parameters of the slots that are cut: the loss under a density of 1."""
    even = Losses({kind.value: LossCurve((0.0,), (1.0,)) for kind in UnitKind})
    total = 0.0
    for site in path.sites:
        kinds = [site.vanishing_kind, *(kind for kind in site.counts if kind is not site.vanishing_kind)]
        own = counts[site.name]
        row = np.array([[own[kind] for kind in kinds]])
        total += float(site_losses(path, site, row, kinds, even)[0])
    return total


def calibrated_path(path: SolutionPath, losses: Losses) -> SolutionPath:
    """The path on which units leave in order of what they lose per parameter, ρ_k(s), over all kinds. Inside a kind the
    order stays. Raises KeyError for losses that lack a kind of the path.
    """
    importance = {}
    for site, kind in groups(path.sites):
        key = unit_key(site.name, kind)
        scores = np.asarray(path.scores[key], np.float64)
        density = losses.curves[kind.value].at(scores) * (1 + _TIE * scores)
        importance[key] = density * path.costs.unit_params(site, kind) / site.lanes(kind)
    return SolutionPath.from_importance(
        importance,
        model=path.model,
        weights_sha256=path.weights_sha256,
        sites=path.sites,
        costs=path.costs,
        method=path.method,
        options={**path.options, "allocation": "global", CALIBRATED: losses.to_json()},
        basis=path.basis,
    )
