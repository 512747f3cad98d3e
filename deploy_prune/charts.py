"""What the charts show: latency against quality, predicted against measured, widths per layer, a roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.plots import Chart, Series
from deploy_prune.errors import ArtifactError, UsageError
from deploy_prune.files import existing, read_json
from deploy_prune.units import PER_HEAD, UnitKind

if TYPE_CHECKING:
    from deploy_prune.release.manifest import Manifest


def pareto(source: Path) -> Chart:
    """Quality over the median latency of every member, one line per runtime and size along the members that no other
    beats in both. Raises UsageError for a bundle that was not timed or judged."""
    from deploy_prune.release.gate import cell_name

    manifest = _bundle(source)
    cells: dict[str, list[tuple[float, float, float, float, str]]] = {}
    for member in manifest.members:
        for entry in member.latency:
            if member.quality is not None:
                point = (entry.p50_ms, member.quality.value, *member.quality.interval, member.name)
                cells.setdefault(cell_name(entry), []).append(point)
    judged = next((m.quality for m in manifest.members if m.quality is not None), None)
    if judged is None or not cells:
        raise UsageError(
            "the bundle has no quality with latency", where=str(source), remedy="Run it with bench.enabled."
        )
    series = []
    for name, points in cells.items():
        x, y, low, high, text = zip(*points, strict=True)
        series.append(Series(name, x, y, "points", text, low, high))
        front = _front([(ms, value) for ms, value, *_ in points], judged.higher_is_better)
        fast, best = zip(*front, strict=True)
        series.append(Series(f"{name}: front", fast, best, "line", dashed=True))
    return Chart(f"{manifest.name}: quality against latency", "p50 ms per call", judged.metric, tuple(series))


def predicted(source: Path) -> Chart:
    """Measured over predicted latency of members that were chosen by latency, of a bundle or of a study's JSON."""
    if source.is_dir():
        fits = {m.name: m.latency_fit.model_dump() for m in _bundle(source).members if m.latency_fit is not None}
    else:
        data = read_json(source)
        fits = data.get("fits", {}) if isinstance(data, dict) else {}
    if not fits:
        raise UsageError(
            "nothing here was chosen by latency",
            where=str(source),
            expected="a bundle of `export --speedup` or --latency-ms, or the JSON of bench.studies.latency_budget",
        )
    try:
        dense = [fit["dense_ms"] for fit in fits.values()]
        x = [fit["predicted_ms"] for fit in fits.values()]
        ends = [[fit["ratio"][end] * fit["dense_ms"] for fit in fits.values()] for end in ("low", "high")]
        y = [fit["measured_ms"] for fit in fits.values()]
    except (KeyError, TypeError) as error:
        raise ArtifactError("not fits of a latency budget", where=str(source), got=repr(error)) from error
    top = max(*dense, *x, *y)
    return Chart(
        "latency: measured against predicted",
        "predicted ms",
        "measured ms",
        (
            Series("as predicted", (0.0, top), (0.0, top), "line", dashed=True),
            Series("members", tuple(x), tuple(y), "points", tuple(fits), tuple(ends[0]), tuple(ends[1])),
        ),
    )


def widths(source: Path) -> Chart:
    """Share of every site's width that the members of a bundle keep: heads times what each keeps, or neurons."""
    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan

    manifest = _bundle(source)
    sites = SolutionPath.load(source / "path.safetensors").sites
    series = []
    for member in manifest.members:
        if member.plan is None:
            continue
        counts = PrunePlan.load(source / member.plan).counts(sites)
        shares = []
        for site in sites:
            own = counts[site.name]
            inner = [own[kind] / site.counts[kind] for kind in PER_HEAD if kind in site.counts]
            share = own[site.vanishing_kind] / site.counts[site.vanishing_kind]
            heads = site.vanishing_kind is UnitKind.HEAD and inner
            shares.append(share * sum(inner) / len(inner) if heads else share)
        series.append(Series(member.name, tuple(map(float, range(len(sites)))), tuple(shares), "both"))
    if not series:
        raise UsageError("the bundle has no plans", where=str(source))
    names = tuple(site.name for site in sites)
    return Chart(
        f"{manifest.name}: width kept by every site", "site", "share of the dense width", tuple(series), ticks=names
    )


def roofline(source: Path) -> Chart:
    """Operations per second over operations per byte, under the measured ceilings; of a saved `bench --why --json`."""
    data = read_json(existing(source, "JSON of `deploy-prune bench --why --json`"))
    try:
        found: Sequence[Mapping[str, Any]] = data["rooflines"]
        top = found[0]["ceilings"]
        peak, bandwidth = top["flops"] / 1e9, top["bytes"] / 1e9
        series = []
        for cell in found:
            models = cell["models"]
            name = ", ".join(f"{what} {size}" for what, size in cell["sizes"].items())
            x = tuple(model["flops"] / model["bytes"] for model in models.values())
            y = tuple(model["flops"] / model["seconds"] / 1e9 for model in models.values())
            series.append(Series(name, x, y, "points", tuple(models)))
    except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ArtifactError(
            "no rooflines in this file",
            where=str(source),
            got=repr(error),
            remedy="Make it with `deploy-prune bench BUNDLE --why --json > FILE`.",
        ) from error
    ridge = peak / bandwidth
    reach = [ridge, *(x for s in series for x in s.x)]
    ends = (min(reach) / 4, ridge, max(reach) * 4)
    roof = Series("ceilings", ends, tuple(min(peak, bandwidth * x) for x in ends), "line", dashed=True)
    title = f"roofline of {top['runtime']} on {top['device']}"
    return Chart(title, "operations per byte", "GFLOP/s", (roof, *series), log=True)


CHARTS: Mapping[str, Callable[[Path], Chart]] = {
    "pareto": pareto,
    "predicted": predicted,
    "widths": widths,
    "roofline": roofline,
}


def _bundle(source: Path) -> Manifest:
    from deploy_prune.release.manifest import MANIFEST, Manifest

    return Manifest.load(existing(source, "bundle") / MANIFEST)


def _front(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The points no other beats in both, fastest first."""
    kept: list[tuple[float, float]] = []
    for ms, value in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not kept or (value > kept[-1][1] if higher else value < kept[-1][1]):
            kept.append((ms, value))
    return kept
