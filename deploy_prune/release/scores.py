"""Scores per example: what a quality figure was made of, stored so that two models can be compared example by example.

A member's figure and interval say how good it is on new data. Whether it is worse than another model is a question
about the difference, and what makes an example hard for both cancels there: the interval of a difference, made of
scores, is narrower than the two intervals suggest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import ArtifactError
from deploy_prune.files import atomic_file, existing

if TYPE_CHECKING:
    import numpy as np

    from deploy_prune.release.manifest import Manifest, Member, QualityEntry

RESAMPLES = 2000  # the ends of a 95 % interval then rest on 50 resamples each
_Z95 = 1.959963984540054
_KEY = "per_example"


@dataclass(frozen=True)
class Change:
    """How much worse `value` a model is than another, in the metric's own unit, with the 95 % interval; negative is
    better. `paired` when it was made example by example."""

    value: float
    low: float
    high: float
    paired: bool


def save_scores(path: Path | str, rows: np.ndarray) -> None:
    """Store one value or row per judged thing, in the smallest type that holds it exactly."""
    import numpy as np
    from safetensors.numpy import save_file

    small = next((t for t in (np.uint8, np.float32) if np.array_equal(rows.astype(t).astype(rows.dtype), rows)), None)
    with atomic_file(path) as temporary:
        save_file({_KEY: np.ascontiguousarray(rows.astype(small) if small else rows)}, temporary)


def load_scores(path: Path | str) -> np.ndarray:
    """What `save_scores` stored, as float64. Raises UnavailableError or ArtifactError."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = existing(path, "scores file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError("scores are not valid safetensors", where=str(path), got=str(error)[:200]) from error
    rows = tensors.get(_KEY)
    if set(tensors) != {_KEY} or rows is None or rows.ndim not in (1, 2) or not rows.size:
        raise ArtifactError(
            "not a file of scores", where=str(path), expected=_KEY, got=", ".join(sorted(tensors))[:200] or "nothing"
        )
    values: np.ndarray = rows.astype(np.float64)
    if not np.isfinite(values).all():
        raise ArtifactError("scores are not finite", where=str(path))
    return values


def drop(
    old: QualityEntry, new: QualityEntry, old_rows: np.ndarray | None = None, new_rows: np.ndarray | None = None
) -> Change:
    """How much worse `new` is than `old` on the same metric.

    With the rows of both: for hits and misses Tango's score interval (see `_tango`), else a percentile bootstrap that
    draws the same examples for both (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    Without, the two intervals combined as if the models had been judged on different examples, which is wider: the
    lower end is d - √((p₁ - l₁)² + (u₂ - p₂)²) (Zou and Donner, Statistics in Medicine 27, 2008).
    """
    import math

    sign = 1.0 if old.higher_is_better else -1.0
    value = sign * (old.value - new.value)
    statistic = _statistic(old.metric)
    if statistic and old_rows is not None and new_rows is not None and old_rows.shape == new_rows.shape:
        hits = old_rows.ndim == 1 and all(set(rows.tolist()) <= {0.0, 1.0} for rows in (old_rows, new_rows))
        ends = _tango(old_rows, new_rows) if hits else _paired(statistic, old_rows, new_rows, sign)
        return Change(value, *ends, paired=True)
    (l1, u1), (l2, u2) = old.interval, new.interval
    if sign > 0:
        low = value - math.hypot(old.value - l1, u2 - new.value)
        high = value + math.hypot(u1 - old.value, new.value - l2)
    else:
        low = value - math.hypot(new.value - l2, u1 - old.value)
        high = value + math.hypot(u2 - new.value, old.value - l1)
    return Change(value, low, high, paired=False)


def contradiction(quality: QualityEntry, rows: np.ndarray) -> str | None:
    """Why stored scores are not those of a stated figure; None when they are."""
    if len(rows) != quality.n:
        return f"holds {len(rows)} scores, {quality.n} were judged"
    statistic = _statistic(quality.metric)
    try:
        found = quality.value if statistic is None else statistic(rows)
    except (IndexError, ValueError, FloatingPointError):
        return f"holds scores of another kind than {quality.metric}'s"
    if abs(found - quality.value) > 1e-6 * max(1.0, abs(quality.value)):
        return f"gives {quality.metric} {found:.6g}, the manifest says {quality.value:.6g}"
    return None


def drop_from_dense(bundle: Path, manifest: Manifest, member: Member) -> Change | None:
    """How much worse than the bundle's dense model a member is; None where either was not judged."""
    dense = manifest.dense
    if member.quality is None or dense.quality is None or member.quality.metric != dense.quality.metric:
        return None
    rows = [load_scores(bundle / m.scores) if m.scores else None for m in (dense, member)]
    return drop(dense.quality, member.quality, *rows)


def _tango(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """The 95 % score interval of the difference Δ of two shares judged on the same n examples.

    b examples were hit by `old` alone, c by `new` alone; the ends are where T(Δ) = ± 1.96,
        T(Δ) = (b - c - nΔ) / √(n (2q + Δ(1 - Δ))),   q = (√(B² - 4AC) - B) / 2A,
        A = 2n,   B = -b - c + (2n - b + c)Δ,   C = -cΔ(1 - Δ).
    Where the two agree on every example it is ± z²/(n + z²), not 0 as a bootstrap's would be. (Tango, Statistics in
    Medicine 17, 1998.)
    """
    import math

    n, b, c = len(old), float((old > new).sum()), float((new > old).sum())

    def statistic(delta: float) -> float:
        a2, b2, c2 = 2 * n, -b - c + (2 * n - b + c) * delta, -c * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b2 * b2 - 4 * a2 * c2)) - b2) / (2 * a2)
        variance = n * (2 * q + delta * (1 - delta))
        distance = b - c - n * delta
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def end(target: float, inner: float, outer: float) -> float:
        for _ in range(60):  # T falls as Δ grows
            middle = (inner + outer) / 2
            if abs(statistic(middle)) < target:
                inner = middle
            else:
                outer = middle
        return inner

    difference = (b - c) / n
    return end(_Z95, difference, -1.0), end(_Z95, difference, 1.0)


def _paired(
    statistic: Callable[[np.ndarray], float], old: np.ndarray, new: np.ndarray, sign: float
) -> tuple[float, float]:
    import numpy as np

    generator = np.random.default_rng(0)
    draws = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        chosen = generator.integers(0, len(old), len(old))
        draws[i] = sign * (statistic(old[chosen]) - statistic(new[chosen]))
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return float(low), float(high)


def _statistic(metric: str) -> Callable[[Any], float] | None:
    """The figure a metric makes of its rows; None for a metric whose rows do not say it."""
    from deploy_prune.tasks import quality

    def mean(rows: Any) -> float:
        return float(rows.mean())

    def share(rows: Any) -> float:
        return mean(rows) if rows.ndim == 1 else quality.ratio_of_sums(rows)

    found: dict[str, Callable[[Any], float]] = {
        "top1": mean,
        "accuracy": mean,
        "recall@1": mean,
        "spearman": quality.spearman,
        "matthews": quality.matthews,
        "f1": quality.f1,
        "perplexity": quality.perplexity,
        "agreement": share,
    }
    return found.get(metric)
