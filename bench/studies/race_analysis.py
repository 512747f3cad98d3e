"""From a race's rows to its verdicts: what each model loses, and whether that differs beyond chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.studies.race_result import DENSE, RaceResult, key_of
from deploy_prune.tasks.quality import f1, matthews, ratio_of_sums, spearman

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Array = NDArray[np.float64]
Standing = Literal["ahead", "within noise", "behind"]
RESAMPLES = 2000
FOLDS, ROUNDS = 5, 20
FORMS = ("own", "refit")

# How a metric is counted: higher is better, in points; perplexity as its logarithm, in nats, lower is better.
SCORES: dict[str, tuple[Callable[[Array], float], str]] = {
    "top1": (lambda v: 100 * float(v.mean()), "points"),
    "accuracy": (lambda v: 100 * float(v.mean()), "points"),
    "matthews": (lambda rows: 100 * matthews(rows), "points"),
    "f1": (lambda rows: 100 * f1(rows), "points"),
    "spearman": (lambda rows: 100 * spearman(rows), "points"),
    "perplexity": (lambda rows: -ratio_of_sums(rows), "nats"),
}


@dataclass(frozen=True)
class Difference:
    """What ours loses less what the other loses, with its 95 % interval: below 0 ours is better."""

    value: float
    low: float
    high: float

    @property
    def standing(self) -> Standing:
        if self.high < 0:
            return "ahead"
        return "behind" if self.low > 0 else "within noise"


@dataclass(frozen=True)
class Point:
    """Ours against the best other contestant at one size, which is one of `others` (keys of rows). `lost` is against
    the dense model, `unit` says in what."""

    asked: float
    ours: dict[str, Any]
    other: dict[str, Any]
    others: tuple[str, ...]
    lost: float
    other_lost: float
    difference: Difference
    unit: str


def unit_of(result: RaceResult) -> str:
    return SCORES[result.head["metric"]][1]


def score(result: RaceResult, key: str) -> float:
    """The row's score on its scale, higher is better."""
    return SCORES[result.head["metric"]][0](result.per_example(key))


def lost(result: RaceResult, row: dict[str, Any]) -> float:
    """How much of the dense model's score a row lost."""
    return score(result, f"{DENSE}/{DENSE}/0") - score(result, key_of(row))


def paired(result: RaceResult, ours: str, other: str, *, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Score of `other` less score of `ours`, with its percentile-bootstrap interval over examples.

    The same examples are drawn with replacement for both, so that what makes an example hard for both cancels (Efron
    and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    """
    rows = result.per_example(ours), result.per_example(other)
    return paired_rows(result.head["metric"], *rows, seed=seed, resamples=resamples)


def paired_rows(metric: str, ours: Array, other: Array, *, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """As `paired`, of values of the same examples: (n,), or (n, columns) where the metric takes several."""
    a, b = counted(metric, ours), counted(metric, other)
    n = len(ours)
    generator = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        often = np.bincount(generator.integers(0, n, n), minlength=n).astype(float)
        draws[i] = b(often) - a(often)
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    once = np.ones(n)
    return Difference(b(once) - a(once), float(low), float(high))


def counted(metric: str, rows: Array) -> Callable[[Array], float]:
    """The metric's score as a function of how often each example counts: that of `rows` repeated so often."""
    if metric == "spearman":
        x, y = (np.unique(column, return_inverse=True)[1] for column in rows.T)
        return lambda often: 100 * _rank_correlation(x, y, often)
    if metric == "perplexity":
        return lambda often: -float(rows[:, 0] @ often / (rows[:, 1] @ often))
    if rows.ndim == 1:
        return lambda often: 100 * float(rows @ often / often.sum())
    statistic = SCORES[metric][0]
    return lambda often: statistic(np.repeat(rows, often.astype(np.int64), axis=0))


def _rank_correlation(x: NDArray[np.int64], y: NDArray[np.int64], often: Array) -> float:
    """Spearman's rank correlation, ties at their mean rank, of two columns given as the places of their values."""

    def ranks(places: NDArray[np.int64]) -> Array:
        here = np.bincount(places, often)
        found: Array = (np.cumsum(here) - here / 2)[places]
        return found - found @ often / often.sum()

    a, b = ranks(x), ranks(y)
    scale = float(np.sqrt((a * a) @ often * ((b * b) @ often)))
    return float((a * b) @ often) / scale if scale else float("nan")


@dataclass(frozen=True)
class Apart:
    """The best other contestant where the examples that choose it are not those that judge it: what it loses, and
    what ours loses more."""

    other_lost: float
    difference: Difference


def apart(result: RaceResult, ours: str, others: Sequence[str], *, seed: int = 0, resamples: int = 200) -> Apart:
    """Ours against the best of `others` (keys of rows), chosen on four fifths of the examples and judged on the fifth
    that is left, five times over (cross-fitting: Chernozhukov et al., Double/debiased machine learning, 2018).

    A best that is chosen and judged on the same examples looks better than it is, the more so the more there are to
    choose from; this estimate does not. Means over `ROUNDS` partitions; the interval is the percentile bootstrap over
    examples with all of it done anew in each draw, copies of an example always in the same fifth.
    """
    metric = result.head["metric"]
    dense, mine, *rivals = (counted(metric, result.per_example(k)) for k in (f"{DENSE}/{DENSE}/0", ours, *others))
    n = len(result.per_example(ours))
    generator = np.random.default_rng(seed)

    def once(often: Array) -> tuple[float, float]:
        part = generator.permutation(n) % FOLDS
        lost, difference, judged = 0.0, 0.0, 0.0
        for fold in range(FOLDS):
            inside, outside = often * (part == fold), often * (part != fold)
            size = inside.sum()
            if not size or not outside.any():
                continue
            best = max(rivals, key=lambda score_of: score_of(outside))
            theirs = best(inside)
            lost += size * (dense(inside) - theirs)
            difference += size * (theirs - mine(inside))
            judged += size
        return (lost / judged, difference / judged) if judged else (np.nan, np.nan)

    whole = np.array([once(np.ones(n)) for _ in range(ROUNDS)]).mean(axis=0)
    draws = [once(np.bincount(generator.integers(0, n, n), minlength=n).astype(float))[1] for _ in range(resamples)]
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return Apart(float(whole[0]), Difference(float(whole[1]), float(low), float(high)))


def sound(result: RaceResult, forms: Iterable[str] = FORMS) -> list[dict[str, Any]]:
    """The rows of the given forms that have a score."""
    return [row for key, row in result.rows.items() if row["form"] in forms and key in result.values]


def points(
    result: RaceResult,
    forms: Iterable[str] = FORMS,
    ours: str = "spp",
    form: str = "own",
    without: Iterable[str] = (),
) -> list[Point]:
    """One per size at which ours and another contestant have a row; the best other is taken among all given forms of
    all but the contestants `without`, on the very examples that are reported, which flatters it (`apart` does not)."""
    left_out = {ours, *without}
    found = []
    rows = sound(result, {*forms, form})
    for asked in sorted({row["asked"] for row in rows if row["asked"] > 0}):
        here = [row for row in rows if row["asked"] == asked]
        mine = [row for row in here if row["contestant"] == ours and row["form"] == form]
        others = [row for row in here if row["contestant"] not in left_out and row["form"] in forms]
        if not mine or not others:
            continue
        best = min(others, key=lambda row: lost(result, row))
        found.append(
            Point(
                asked,
                mine[0],
                best,
                tuple(key_of(row) for row in others),
                lost(result, mine[0]),
                lost(result, best),
                paired(result, key_of(mine[0]), key_of(best)),
                unit_of(result),
            )
        )
    return found


def best_throughout(result: RaceResult, ours: str = "spp") -> tuple[str, str, float] | None:
    """Contestant, form and mean loss of the one other that loses least on average over all sizes that ours has."""
    rows = sound(result)
    sizes = {row["asked"] for row in rows if row["contestant"] == ours}
    found = []
    for name, form in dict.fromkeys((row["contestant"], row["form"]) for row in rows if row["contestant"] != ours):
        own = [row for row in rows if (row["contestant"], row["form"]) == (name, form) and row["asked"] in sizes]
        if len(own) == len(sizes):
            found.append((name, form, float(np.mean([lost(result, row) for row in own]))))
    return min(found, key=lambda each: each[2]) if found else None


@dataclass(frozen=True)
class Summary:
    """Over all points: `share` is what ours loses as a share of what the best other contestant loses, summed before
    dividing; `mean_share` is the mean of the points' own shares, over those where the other loses at least `LEAST`."""

    points: int
    ahead: int
    behind: int
    lost: float
    other_lost: float
    mean_share: float

    @property
    def share(self) -> float:
        return self.lost / self.other_lost if self.other_lost > 0 else float("nan")


LEAST = {"points": 0.5, "nats": 0.02}  # a share of next to nothing says nothing


def summary(found: list[Point]) -> Summary:
    shares = [p.lost / p.other_lost for p in found if p.other_lost >= LEAST[p.unit]]
    return Summary(
        len(found),
        sum(p.difference.standing == "ahead" for p in found),
        sum(p.difference.standing == "behind" for p in found),
        float(np.mean([p.lost for p in found])) if found else float("nan"),
        float(np.mean([p.other_lost for p in found])) if found else float("nan"),
        float(np.mean(shares)) if shares else float("nan"),
    )


def sizes_of(result: RaceResult) -> list[float]:
    """The shares that were asked to be removed, rising."""
    return sorted({row["asked"] for row in result.rows.values() if row["contestant"] != DENSE})
