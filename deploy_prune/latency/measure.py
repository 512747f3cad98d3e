"""Measuring the latency table of a model: probes are cut, exported and timed, a few rungs of each ladder at a time."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.latency_table import LatencyTable, SiteTimes, Widths, first_rungs, next_rungs
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError
from deploy_prune.files import scratch_directory
from deploy_prune.latency.place import Place
from deploy_prune.latency.shapes import Shape, at_widths, probe, shapes_of
from deploy_prune.progress import SILENT, Progress
from deploy_prune.units import Site, UnitKind, site_to_json

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.budget import CostModel

# Writes a model as the graph that ships.
Export = Callable[["nn.Module", Path], Any]
AT_ONCE = 12  # probes loaded together, beside the dense model twice
_DENSE, _REST = "dense", "rest"


def latency_table(
    model: nn.Module,
    sites: Sequence[Site],
    costs: CostModel,
    place: Place,
    export: Export,
    *,
    kinds: Sequence[UnitKind] | None = None,
    align: int = 8,
    cache: Path | None = None,
    fresh: bool = False,
    progress: Progress = SILENT,
) -> LatencyTable:
    """The table of `model` at `place`; from the directory `cache` when it was measured there before, unless `fresh`.

    Ladders are measured for units of the given `kinds`, at multiples of `align` features. A table is that of a device,
    runtime, version, threads, sizes and shapes: weights do not matter. Raises what export and runtime raise,
    UsageError when the model without its sites is not measurably faster.
    """
    with scratch_directory() as scratch:
        dense = scratch / "dense.onnx"
        export(model, dense)
        place = place.settled(dense)
        facts = place.facts(dense)
        asked = None if kinds is None else [kind.value for kind in kinds]
        name = _key(facts, sites, costs, dense, asked, align)
        stored = _stored(cache, name) if not fresh else None
        if stored is not None:
            return stored
        work = _Work(model, sites, place, export, scratch, {_DENSE: dense}, progress)
        table = _measured(work, shapes_of(sites, costs, align), kinds, {**facts, "align": align, "kinds": asked})
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        table.save(cache / name)
    return table


@dataclass
class _Work:
    """Probes as files, and their times as shares of the dense model's."""

    model: nn.Module
    sites: Sequence[Site]
    place: Place
    export: Export
    directory: Path
    files: dict[str, Path]
    progress: Progress
    dense_ms: list[float] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    batches: int = 0

    def take(self, wanted: Iterable[tuple[str, Mapping[str, Mapping[UnitKind, int]]]]) -> None:
        """Export and time the named probes, `AT_ONCE` at a time."""
        names = []
        probes = list(wanted)
        self.progress.start(len(probes), "probes")
        try:
            for name, held in probes:
                self.files[name] = self.directory / f"{name}.onnx"
                self.export(probe(self.model, self.sites, held), self.files[name])
                names.append(name)
                self.progress.advance(1, name)
        finally:
            self.progress.finish()
        for start in range(0, len(names), AT_ONCE):
            batch = names[start : start + AT_ONCE]
            report = self.place.time(
                {name: self.files[name] for name in (_DENSE, *batch)}, seed=self.batches, progress=self.progress
            )
            self.batches += 1
            self.dense_ms.append(report[_DENSE].p50_ms)
            self.shares |= {name: report[name].ratio.value for name in batch}
            for name in batch:
                self.files.pop(name).unlink()


def _measured(
    work: _Work, shapes: Sequence[Shape], kinds: Sequence[UnitKind] | None, facts: Mapping[str, Any]
) -> LatencyTable:
    began = time.monotonic()
    ladders = [_first(shape, kinds) for shape in shapes]
    middles = [_middle(shape, kinds) for shape in shapes]
    checks = [[(shape.full[0], *w[1:]) for w in middle] for shape, middle in zip(shapes, middles, strict=True)]
    wanted: list[tuple[str, Any]] = [(_REST, {})]
    for number, shape in enumerate(shapes):
        wanted += [
            (_name(number, w), at_widths(shape, w)) for w in [*ladders[number], *middles[number], *checks[number]]
        ]
    work.take(wanted)
    further = []
    for number, (shape, times) in enumerate(zip(shapes, _times(work, shapes, ladders), strict=True)):
        more = _bends(shape, times)
        ladders[number] += more
        further += [(_name(number, w), at_widths(shape, w)) for w in more]
    if further:
        work.take(further)
    dense, rest = statistics.median(work.dense_ms), work.shares[_REST] * statistics.median(work.dense_ms)
    if rest >= dense:
        raise UsageError(
            "the model without its sites is not measurably faster than the whole",
            where=f"{work.place.runtime}, {work.place.sizes()}",
            expected=f"less than {dense:.3f} ms",
            got=f"{rest:.3f} ms",
            remedy="Measure a larger batch, or longer, or on a quieter machine.",
        )
    count = len(work.shares)
    return LatencyTable(
        dense,
        rest,
        tuple(_times(work, shapes, ladders, middles, checks)),
        {**facts, "probes": count, "seconds": round(time.monotonic() - began, 1)},
    )


def _times(
    work: _Work,
    shapes: Sequence[Shape],
    ladders: list[list[Widths]],
    middles: list[list[Widths]] | None = None,
    checks: list[list[Widths]] | None = None,
) -> list[SiteTimes]:
    """What one site of each shape takes at the measured widths; differences below nothing are noise, and count 0."""
    dense_ms, rest = statistics.median(work.dense_ms), work.shares[_REST]

    def ms(number: int, shape: Shape, widths: Widths) -> float:
        return max(0.0, (work.shares[_name(number, widths)] - rest) * dense_ms / len(shape.probed))

    return [
        SiteTimes(
            tuple(kind.value for kind in shape.kinds),
            shape.full,
            tuple(site.name for site in shape.sites),
            *({w: ms(number, shape, w) for w in part[number]} if part else {} for part in (ladders, middles, checks)),
        )
        for number, shape in enumerate(shapes)
    ]


def _first(shape: Shape, kinds: Sequence[UnitKind] | None) -> list[Widths]:
    """The whole site, and the first rungs of every ladder, the other kinds whole."""
    found = {shape.full: None}
    for axis, kind in enumerate(shape.kinds):
        if kinds is None or kind in kinds:
            found |= {_at(shape.full, axis, w): None for w in first_rungs(shape.full[axis], shape.steps[axis])}
    return list(found)


def _middle(shape: Shape, kinds: Sequence[UnitKind] | None) -> list[Widths]:
    """One point off the ladders, half of everything, where a site has two kinds to cut inside its heads."""
    half = tuple(
        max(step, round(full / 2 / step) * step) if kinds is None or kind in kinds else full
        for kind, full, step in zip(shape.kinds, shape.full, shape.steps, strict=True)
    )
    inside = len(half) > 2 and all(a != b for a, b in zip(half, shape.full, strict=True))
    return [half] if inside else []


def _bends(shape: Shape, times: SiteTimes) -> list[Widths]:
    return [
        _at(shape.full, axis, width)
        for axis in range(len(shape.kinds))
        for width in next_rungs(times.ladder(axis), shape.steps[axis], times.points[times.full])
    ]


def _at(full: Widths, axis: int, width: int) -> Widths:
    return (*full[:axis], width, *full[axis + 1 :])


def _name(number: int, widths: Widths) -> str:
    return f"shape{number}_" + "x".join(map(str, widths))


def _key(
    facts: Mapping[str, Any], sites: Sequence[Site], costs: CostModel, dense: Path, kinds: list[str] | None, align: int
) -> str:
    """File name of a table. The operators of the dense graph stand for how models are exported."""
    import onnx

    graph = onnx.load(str(dense), load_external_data=False).graph
    parts = {
        "facts": facts,
        "sites": [site_to_json(site) for site in sites],
        "costs": costs.to_json(),
        "operators": [f"{node.domain}.{node.op_type}" for node in graph.node],
        "kinds": kinds,
        "align": align,
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32] + ".json"


def _stored(cache: Path | None, name: str) -> LatencyTable | None:
    """The cached table; None when there is none, or a damaged one, which is measured again."""
    if cache is None:
        return None
    try:
        return LatencyTable.load(cache / name)
    except (UnavailableError, ArtifactError):
        return None
