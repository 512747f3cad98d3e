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
    from collections.abc import Iterable

Array = NDArray[np.float64]
Standing = Literal["ahead", "within noise", "behind"]
RESAMPLES = 2000
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
    """Ours against the best other contestant at one size. `lost` is against the dense model, `unit` says in what."""

    asked: float
    ours: dict[str, Any]
    other: dict[str, Any]
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
    statistic = SCORES[result.head["metric"]][0]
    a, b = result.per_example(ours), result.per_example(other)
    generator = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        chosen = generator.integers(0, len(a), len(a))
        draws[i] = statistic(b[chosen]) - statistic(a[chosen])
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return Difference(statistic(b) - statistic(a), float(low), float(high))


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
    all but the contestants `without`, on the very examples that are reported, which flatters it."""
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
