"""From raw samples to figures: percentiles, the ratio of two medians with its interval, and the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000  # the ends of a 95 % interval then rest on 50 resamples each
LEVEL = 0.95
_CHUNK = 4_000_000  # samples drawn at once: 32 MB of float64
AGREES = 0.02  # how far the estimate of dense against itself may miss 1: the verdicts are widened by it
WIDEST = 1.5  # the widest interval of it, high over low, that says anything
Verdict = Literal["faster", "no measurable change", "slower"]


@dataclass(frozen=True)
class Ratio:
    """A ratio of latencies with its interval: `Ratio(0.71, 0.69, 0.73)` takes 29 % less time than the baseline."""

    value: float
    low: float
    high: float

    @property
    def holds_one(self) -> bool:
        return self.low <= 1.0 <= self.high

    def widened(self, deviation: float) -> Ratio:
        """The same estimate when the measurement itself may be off by a factor of `deviation` (1.02: by 2 %)."""
        factor = max(deviation, 1.0 / deviation)
        return Ratio(self.value, self.low / factor, self.high * factor)


def percentiles(samples: np.ndarray, which: tuple[float, ...] = (50, 90, 99)) -> tuple[float, ...]:
    """Percentiles over all calls, linearly interpolated."""
    import numpy as np

    return tuple(float(p) for p in np.percentile(samples, which))


def ratio_of_medians(
    candidate: np.ndarray,
    baseline: np.ndarray,
    *,
    sessions: int = 1,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Ratio:
    """median(candidate) / median(baseline) with its percentile-bootstrap interval, paired by round.

    Both arrays are (rounds, calls); the rounds are `sessions` equal runs, each with freshly loaded models. Drawn with
    replacement are first whole sessions, then whole rounds within each, the same ones for both models: what slows a
    round (a busy neighbour, a clock change) slows both models in it, the calls of a round are not independent, and
    where a session's weights happen to lie in memory moves all its rounds.
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13; Davison and Hinkley, Bootstrap
    Methods and their Application, 1997, section 3.8.)
    """
    import numpy as np

    if candidate.shape != baseline.shape or candidate.ndim != 2 or not candidate.size:
        raise ValueError(f"expected two equal (rounds, calls) arrays, got {candidate.shape} and {baseline.shape}")
    rounds, calls = candidate.shape
    if sessions < 1 or rounds % sessions:
        raise ValueError(f"{rounds} rounds are not {sessions} equal sessions")
    generator = np.random.default_rng(seed)
    each = rounds // sessions
    step = max(1, _CHUNK // (rounds * calls))
    ratios = np.empty(resamples)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        session = generator.integers(0, sessions, (stop - start, sessions, 1))
        drawn = (session * each + generator.integers(0, each, (stop - start, sessions, each))).reshape(stop - start, -1)
        above = np.median(candidate[drawn].reshape(stop - start, -1), axis=1)
        ratios[start:stop] = above / np.median(baseline[drawn].reshape(stop - start, -1), axis=1)
    tail = 50 * (1 - level)
    low, high = np.percentile(ratios, (tail, 100 - tail))
    return Ratio(float(np.median(candidate) / np.median(baseline)), float(low), float(high))


def verdict(ratio: Ratio, self_check: Ratio) -> Verdict:
    """Whether a model is faster than the baseline, beyond what the baseline differs from itself.

    `self_check` is the ratio of a second session of the baseline to the first. The interval is widened by the factor
    by which that estimate misses 1 before it is asked whether it holds 1.
    """
    widened = ratio.widened(self_check.value)
    if widened.holds_one:
        return "no measurable change"
    return "faster" if widened.high < 1.0 else "slower"


def sound(self_check: Ratio) -> bool:
    """Whether dense against itself speaks for a measurement: no wider an interval than `WIDEST`, which holds 1 or whose
    estimate misses it by no more than `AGREES`."""
    near = self_check.holds_one or abs(self_check.value - 1) <= AGREES
    return near and self_check.high <= WIDEST * self_check.low


def written(ratio: Ratio) -> str:
    """`0.71 [0.69, 0.73]`, with as many digits as the width of the interval deserves."""
    width = ratio.high - ratio.low
    digits = 2 if width <= 0 or not math.isfinite(width) else min(4, max(2, 1 - math.floor(math.log10(width))))
    return f"{ratio.value:.{digits}f} [{ratio.low:.{digits}f}, {ratio.high:.{digits}f}]"
