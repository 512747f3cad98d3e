"""A race as a picture: quality against parameters, MACs and, where measured, latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.studies.contestants import contestants
from bench.studies.race_analysis import lost, sizes_of, sound
from bench.studies.race_result import DENSE, RaceResult


def plot(result: RaceResult, file: Path, most: int = 8) -> None:
    """Quality against parameters, MACs and, where measured, latency: ours and the `most` others that lose least,
    each in its better form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = result.rows[f"{DENSE}/{DENSE}/0"]
    curves = chosen(result, most)
    panels = [("params", "parameters / dense"), ("macs", "MACs / dense"), ("latency", "latency / dense")]
    panels = [p for p in panels if p[0] != "latency" or any("latency" in r for rows in curves.values() for r in rows)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.2), sharey=True, squeeze=False)
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for name, rows in curves.items():
            ours = name in contestants() and contestants()[name].ours
            xs = [1.0, *(_share(row, key, dense) for row in rows)]
            ys = [dense["value"], *(row["value"] for row in rows)]
            spots = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None]
            axis.plot(
                *zip(*spots, strict=True), marker="o", lw=2.6 if ours else 1.1, label=name, zorder=3 if ours else 2
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(result.head["metric"])
    if not dense["higher_is_better"]:
        axes[0][0].set_yscale("log")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{result.head['recipe']}, without training")
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def chosen(result: RaceResult, most: int) -> dict[str, list[dict[str, Any]]]:
    """Contestant -> its rows by size, in the form that loses least on average; ours, then the best others."""
    sizes = sizes_of(result)
    curves: dict[str, tuple[float, list[dict[str, Any]]]] = {}
    for form in ("own", "refit"):
        rows = [row for row in sound(result, (form,)) if row["contestant"] != DENSE]
        for name in dict.fromkeys(row["contestant"] for row in rows):
            own = sorted((row for row in rows if row["contestant"] == name), key=lambda row: row["asked"])
            if len(own) < len(sizes):
                continue
            mean = sum(lost(result, row) for row in own) / len(own)
            if name not in curves or mean < curves[name][0]:
                curves[name] = mean, own
    ours = [n for n in curves if n in contestants() and contestants()[n].ours]
    others = sorted((n for n in curves if n not in ours), key=lambda n: curves[n][0])[:most]
    return {name: curves[name][1] for name in [*ours, *others]}


def _share(row: dict[str, Any], key: str, dense: dict[str, Any]) -> float | None:
    if key == "latency":
        return row["latency"]["ratio"]["value"] if "latency" in row else None
    return float(row[key] / dense[key])
