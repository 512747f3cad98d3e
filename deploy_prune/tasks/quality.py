"""How good a model was on an evaluation set: one number, its 95 % interval, and the values it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000  # enough for two digits of a 95 % interval
_Z95 = 1.959963984540054

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """`Quality("top1", 0.84, n=650, interval=(0.81, 0.87), higher_is_better=True)`.

    `n` counts what was judged (images, sentences, windows, sentence pairs). `per_example` has one value or row per
    judged thing in evaluation order, so that two models can be compared example by example. `detail` holds what the
    figure cannot be repeated without (for perplexity: window length, stride, tokens).
    """

    metric: str
    value: float
    n: int
    interval: tuple[float, float]
    higher_is_better: bool
    per_example: Array = field(repr=False, compare=False, default_factory=lambda: np.zeros(0))
    detail: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, without the values per example."""
        return {
            "metric": self.metric,
            "value": self.value,
            "n": self.n,
            "interval": list(self.interval),
            "higher_is_better": self.higher_is_better,
            **({"detail": self.detail} if self.detail else {}),
        }

    def drop_from(self, dense: Quality) -> float:
        """How much worse than `dense` this is, in the metric's own unit; negative when better."""
        change = dense.value - self.value
        return change if self.higher_is_better else -change


def share(hits: Array) -> tuple[float, tuple[float, float]]:
    """Mean of 0/1 `hits` with its Wilson score interval."""
    n, p = len(hits), float(hits.mean())
    centre = (p + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * float(np.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n**2)))
    return p, (max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(rows: Array, statistic: Callable[[Array], float]) -> tuple[float, tuple[float, float]]:
    """`statistic(rows)` with its percentile bootstrap interval over rows; the resampling is seeded and repeatable."""
    generator = np.random.default_rng(0)
    draws = [statistic(rows[generator.integers(0, len(rows), len(rows))]) for _ in range(RESAMPLES)]
    finite = [draw for draw in draws if np.isfinite(draw)]
    low, high = np.quantile(finite, [0.025, 0.975]) if finite else (float("nan"), float("nan"))
    return float(statistic(rows)), (float(low), float(high))


def ratio_of_sums(rows: Array) -> float:
    """Sum of column 0 over sum of column 1: a mean over tokens that come in rows of unequal length."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def perplexity(rows: Array) -> float:
    """exp(total negative log-likelihood / total tokens), natural logarithm; rows are (sum of NLL, tokens)."""
    return float(np.exp(ratio_of_sums(rows)))


def spearman(rows: Array) -> float:
    """Spearman's rank correlation of the two columns, ties at their mean rank; NaN when a column is constant."""
    x, y = (_ranks(rows[:, column]) for column in (0, 1))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else float("nan")


def matthews(rows: Array) -> float:
    """Matthews' correlation of answers and labels, columns 0 and 1, of any number of classes (Gorodkin, Comput. Biol.
    Chem. 28, 2004); 0 where answers or labels are all one class."""
    classes, index = np.unique(rows, return_inverse=True)
    pairs = index.reshape(rows.shape)
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    n, answered, labeled = table.sum(), table.sum(1), table.sum(0)
    scale = float(np.sqrt((n**2 - answered @ answered) * (n**2 - labeled @ labeled)))
    return float(n * np.trace(table) - answered @ labeled) / scale if scale else 0.0


def f1(rows: Array) -> float:
    """F1 of class 1, the harmonic mean of precision and recall; answers and labels are columns 0 and 1. 0 where class 1
    is never answered rightly."""
    answered, labeled = rows[:, 0] == 1, rows[:, 1] == 1
    right = float((answered & labeled).sum())
    return 2 * right / float(answered.sum() + labeled.sum()) if right else 0.0


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)
