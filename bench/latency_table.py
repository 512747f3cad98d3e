"""What a site costs at each width, on one runtime at one batch and sequence size.

A latency is taken to be additive: with t_s(w) the time that site s at widths w adds to the model in which it has
vanished (so t_s = 0 when it does),

    T(plan) = T_rest + f · Σ_s t_s(w_s),        f = (T_dense − T_rest) / Σ_s t_s(dense widths),

where T_rest is the model without any site and f, near 1, makes the dense model come out as it was measured. Sites of
equal shape share one `SiteTimes`. (The table of ZipLM, arXiv 2302.04089, section 3.2, and of "A Fast Post-Training
Pruning Framework for Transformers", arXiv 2204.09656; here every time is a difference between whole graphs of the
runtime, so that its fusions and its cold weights are in it.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy_prune.errors import ArtifactError
from deploy_prune.files import read_json, write_json

TYPE, VERSION = "latency-table", 2  # 2: a point in the middle says how kinds act on each other
# How many units of each kind a site keeps, in the order of the site's kinds: (2, 32, 64).
Widths = tuple[int, ...]
_FLOOR = 0.02  # of the whole site's time: below this an extrapolation is noise


@dataclass(frozen=True)
class SiteTimes:
    """Milliseconds that one site of a shape takes at the widths that were measured.

    `SiteTimes(("head", "qk", "vo"), (12, 64, 64), ("layers.0.attn", ...), {(12, 64, 64): 3.1, (6, 64, 64): 1.6, ...})`.
    `points` holds the whole site and, for each kind, a ladder of widths at which the others are whole. `middle`, one
    point off all ladders where a site has two kinds inside its heads, says how much of what each saves alone both save
    together. `checks` are further points; they say how good the table is and take no part in it.
    """

    kinds: tuple[str, ...]
    full: Widths
    sites: tuple[str, ...]
    points: Mapping[Widths, float]
    middle: Mapping[Widths, float] = field(default_factory=dict)
    checks: Mapping[Widths, float] = field(default_factory=dict)

    def ladder(self, axis: int) -> list[tuple[int, float]]:
        """(width, ms) of one kind, rising, the others whole. A wider site is no faster: where it was measured so,
        neighbours are averaged, as a choice would pick just the widths that noise flatters."""
        others = [i for i in range(len(self.full)) if i != axis]
        own = sorted((w[axis], ms) for w, ms in self.points.items() if all(w[i] == self.full[i] for i in others))
        return list(zip((width for width, _ in own), _rising([ms for _, ms in own]), strict=True))

    def ms(self, widths: Sequence[int]) -> float:
        """Time at any widths; 0 when the first kind, without which there is no sublayer, has none.

        With c of C units of the first kind and s_k what kind k saves on its ladder,
            t = t_1(c) − c/C · (Σ_k s_k − β Π_k s_k),
        as dimensions lie in every head; β is such that the middle comes out as it was measured (0 without one).
        """
        if not widths[0]:
            return 0.0
        share = widths[0] / self.full[0]
        total = self._apart(widths)
        for widths_of_middle, ms in self.middle.items():
            there = widths_of_middle[0] / self.full[0] * self._product(widths_of_middle)
            if there > 0:
                total += (ms - self._apart(widths_of_middle)) * share * self._product(widths) / there
        return max(total, _FLOOR * share * self.points[self.full])

    def _apart(self, widths: Sequence[int]) -> float:
        """The time if what the kinds save added up."""
        saved = sum(self._saved(axis, widths[axis]) for axis in range(1, len(self.full)))
        return _between(self.ladder(0), widths[0]) - widths[0] / self.full[0] * saved

    def _saved(self, axis: int, width: int) -> float:
        ladder = self.ladder(axis)
        return 0.0 if width == self.full[axis] else ladder[-1][1] - _between(ladder, width)

    def _product(self, widths: Sequence[int]) -> float:
        return math.prod(self._saved(axis, widths[axis]) for axis in range(1, len(self.full)))

    def misses(self) -> dict[Widths, float]:
        """By how much of the whole site's time each check point was mispredicted (signed)."""
        whole = self.points[self.full]
        return {widths: (self.ms(widths) - ms) / whole for widths, ms in self.checks.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "kinds": list(self.kinds),
            "full": list(self.full),
            "sites": list(self.sites),
            "points": [[list(widths), ms] for widths, ms in sorted(self.points.items())],
            "middle": [[list(widths), ms] for widths, ms in sorted(self.middle.items())],
            "checks": [[list(widths), ms] for widths, ms in sorted(self.checks.items())],
            "misses": [[list(widths), miss] for widths, miss in sorted(self.misses().items())],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SiteTimes:
        parts = ({tuple(w): float(ms) for w, ms in data[part]} for part in ("points", "middle", "checks"))
        return SiteTimes(tuple(data["kinds"]), tuple(data["full"]), tuple(data["sites"]), *parts)


@dataclass(frozen=True)
class LatencyTable:
    """The table of one model. `facts` says on what it was measured: runtime, device, version, options, sizes."""

    dense_ms: float
    rest_ms: float
    shapes: tuple[SiteTimes, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def factor(self) -> float:
        """f above: how far the sites of the dense model are from adding up."""
        whole = sum(len(shape.sites) * shape.points[shape.full] for shape in self.shapes)
        return (self.dense_ms - self.rest_ms) / whole

    def shape_of(self, site: str) -> SiteTimes:
        return next(shape for shape in self.shapes if site in shape.sites)

    def site_ms(self, site: str, counts: Mapping[Any, int]) -> float:
        """f · t_s: what one site adds when it keeps `counts` units of each kind (of all that its shape names)."""
        shape = self.shape_of(site)
        return self.factor * shape.ms([counts[kind] for kind in shape.kinds])

    def plan_ms(self, counts: Mapping[str, Mapping[Any, int]]) -> float:
        """T(plan), from the units that every site keeps."""
        return self.rest_ms + sum(self.site_ms(site, counts[site]) for shape in self.shapes for site in shape.sites)

    def to_json(self) -> dict[str, Any]:
        return {
            "_type": TYPE,
            "_version": VERSION,
            "dense_ms": self.dense_ms,
            "rest_ms": self.rest_ms,
            "factor": self.factor,
            "shapes": [shape.to_json() for shape in self.shapes],
            "facts": dict(self.facts),
        }

    @staticmethod
    def from_json(data: Any, where: str = "latency table") -> LatencyTable:
        """Raises ArtifactError for anything but a table of this version."""
        found = data if isinstance(data, dict) else {}
        if (found.get("_type"), found.get("_version")) != (TYPE, VERSION):
            got = f"{found.get('_type')!r} version {found.get('_version')!r}"[:80]
            raise ArtifactError("not a latency table", where=where, expected=f"{TYPE} version {VERSION}", got=got)
        try:
            shapes = tuple(SiteTimes.from_json(shape) for shape in found["shapes"])
            table = LatencyTable(float(found["dense_ms"]), float(found["rest_ms"]), shapes, found["facts"])
            if not (0 < table.rest_ms < table.dense_ms and 0 < table.factor < float("inf")):
                raise ValueError("times that do not fit together")
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ArtifactError(
                "a damaged latency table", where=where, got=repr(error)[:200], remedy="Delete it; it is measured again."
            ) from error
        return table

    def save(self, path: Path | str) -> None:
        write_json(path, self.to_json())

    @staticmethod
    def load(path: Path | str) -> LatencyTable:
        """Raises UnavailableError or ArtifactError."""
        return LatencyTable.from_json(read_json(path), str(path))


# Deviation of a middle point from the line through its neighbours, as a share of the whole site's time, above which the
# ladder gets further rungs: below it timing noise on a shared machine cannot be told from a bend.
BEND = 0.04


def first_rungs(full: int, step: int) -> list[int]:
    """Widths to begin with: the narrowest, about half and all; `step` is the alignment in units."""
    half = max(step, round(full / 2 / step) * step)
    return sorted({min(step, full), min(half, full), full})


def next_rungs(ladder: Iterable[tuple[int, float]], step: int, whole_ms: float) -> list[int]:
    """Middles of the two intervals around every inner rung at which the ladder bends, where there is room."""
    rungs = sorted(ladder)
    new: set[int] = set()
    for (a, at_a), (b, at_b), (c, at_c) in zip(rungs, rungs[1:], rungs[2:], strict=False):
        line = at_a + (at_c - at_a) * (b - a) / (c - a)
        if abs(at_b - line) > BEND * whole_ms:
            new |= {round((low + high) / 2 / step) * step for low, high in ((a, b), (b, c))}
    return sorted(new - {width for width, _ in rungs} - {0})


def _rising(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in least squares."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, na), (b, nb) = pools[-2:]
            pools[-2:] = [((a * na + b * nb) / (na + nb), na + nb)]
    return [value for value, count in pools for _ in range(count)]


def _between(ladder: Sequence[tuple[int, float]], width: int) -> float:
    """Linear between rungs, and on along the last two beyond them."""
    if len(ladder) == 1:
        return ladder[0][1]
    upper = next((i for i, (rung, _) in enumerate(ladder) if rung >= width), len(ladder) - 1)
    (a, at_a), (b, at_b) = ladder[max(0, upper - 1)], ladder[max(1, upper)]
    return at_a + (at_b - at_a) * (width - a) / (b - a)
