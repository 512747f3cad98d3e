"""The report's charts as PNG, for model cards and READMEs: the same figures, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy_prune.errors import UnavailableError
from deploy_prune.files import atomic_file, existing
from deploy_prune.release.report.figures import figures

_DENSE, _ACCENT = "#6b7684", "#0b7a75"


def write_pictures(bundle: Path | str, directory: Path | str) -> list[Path]:
    """Write tradeoff.png (quality against size and latency), path.png and widths.png; those a bundle has data for.

    Raises UnavailableError without matplotlib, ArtifactError for what is no bundle.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UnavailableError("matplotlib is not installed", remedy="pip install 'deploy-prune[report]'") from error
    from deploy_prune.release.manifest import MANIFEST, Manifest

    matplotlib.use("Agg")
    bundle, directory = existing(bundle, "bundle"), Path(directory)
    data = figures(bundle, Manifest.load(bundle / MANIFEST))
    written = []
    for name, draw in (("tradeoff", _tradeoff), ("path", _path), ("widths", _widths)):
        figure = draw(data)
        if figure is None:
            continue
        file = directory / f"{name}.png"
        with atomic_file(file) as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
        written.append(file)
    return written


def _subplots(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _tradeoff(data: dict[str, Any]) -> Any:
    members = [m for m in data["members"] if m["quality"]]
    if not members:
        return None
    costs: list[tuple[str, dict[str, float]]] = [("file size, MB", {m["name"]: m["bytes"] / 1e6 for m in members})]
    for cell in data["cells"]:
        times = {m["name"]: entry["p50"] for m in members for entry in m["latency"] if entry["cell"] == cell}
        costs.append((f"latency, {cell}, ms", times))
    figure, axes = _subplots(1, len(costs), 4.6 * len(costs), 3.6)
    for axis, (label, cost) in zip(axes[0], costs, strict=True):
        for member in members:
            if member["name"] not in cost:
                continue
            quality, x = member["quality"], cost[member["name"]]
            color = _DENSE if member is data["members"][0] else _ACCENT
            axis.vlines(x, quality["low"], quality["high"], color=color, alpha=0.4)
            axis.plot(x, quality["value"], "o", color=color)
            axis.annotate(member["name"], (x, quality["value"]), xytext=(4, 5), textcoords="offset points", fontsize=8)
        axis.set_xlabel(label)
        axis.set_ylabel(f"{data['metric']} (95 %)")
        axis.grid(alpha=0.2)
    return figure


def _path(data: dict[str, Any]) -> Any:
    import numpy as np

    kinds = data["path"]
    if not kinds:
        return None
    figure, axes = _subplots(1, len(kinds), 3.6 * len(kinds) + 1, max(2.6, 0.22 * max(map(len, kinds.values())) + 1))
    for axis, (kind, rows) in zip(axes[0], kinds.items(), strict=True):
        picture = np.full((len(rows), max(len(row["values"]) for row in rows)), np.nan)
        for i, row in enumerate(rows):
            picture[i, : len(row["values"])] = row["values"]
        shown = axis.imshow(picture, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axis.set_title(kind, fontsize=10)
        axis.set_ylabel("layer")
        axis.set_xlabel("units, longest staying first")
    figure.colorbar(shown, ax=axes, label="leaves at")
    return figure


def _widths(data: dict[str, Any]) -> Any:
    kinds = {kind: entry for kind, entry in data["widths"].items() if entry["kept"]}
    if not kinds:
        return None
    figure, axes = _subplots(1, len(kinds), 3.6 * len(kinds), 3.2)
    for axis, (kind, entry) in zip(axes[0], kinds.items(), strict=True):
        for name, kept in entry["kept"].items():
            shares = [None if k is None else 100 * k / total for k, total in zip(kept, entry["total"], strict=True)]
            axis.plot(range(len(shares)), shares, "o-", markersize=3, linewidth=1.4, label=name)
        axis.set_title(kind, fontsize=10)
        axis.set_xlabel("layer")
        axis.set_ylabel("kept, %")
        axis.set_ylim(0, 105)
        axis.grid(alpha=0.2)
    axes[0][-1].legend(fontsize=8)
    return figure
