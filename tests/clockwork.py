"""A machine for tests of latency: a graph takes as long as its file is large, always."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import LatencyReport, summarise
from bench.samples import Samples


def time_of(files: Mapping[str, Path], nanoseconds: Callable[[str, Path], float]) -> LatencyReport:
    """A report in which every call of a graph takes `nanoseconds(name, file)`."""
    taken = {name: nanoseconds(name, file) for name, file in files.items()}
    first, *others = taken
    ns = np.tile(np.array([taken[first], *taken.values()]).round().astype(np.int64)[None, :, None], (6, 1, 1))
    order = np.tile(np.arange(len(taken) + 1), (6, 1))
    return summarise(Samples((first, f"{first} (again)", *others), ns, order, {"batch": 1}, 0))


def bytes_of(name: str, file: Path) -> float:
    del name
    return float(file.stat().st_size)


def by_size(place: Any, files: Mapping[str, Path], **options: Any) -> LatencyReport:
    """In place of `Place.time`."""
    del place, options
    return time_of(files, bytes_of)
