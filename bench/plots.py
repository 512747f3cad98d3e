"""Charts as data, drawn twice from the same points: PNG by matplotlib, interactive HTML by plotly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy_prune.errors import UnavailableError, UsageError
from deploy_prune.files import atomic_file

SUFFIXES = (".png", ".svg", ".pdf", ".html")


@dataclass(frozen=True)
class Series:
    """Named points; `low` and `high` are ends of intervals in y, `text` what a point is called."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    mode: Literal["points", "line", "both"] = "points"
    text: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """`ticks` names the places 0, 1, 2, ... of the x axis."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log: bool = False
    ticks: tuple[str, ...] = ()


def draw(chart: Chart, file: Path | str) -> Path:
    """Write `chart` in the format that the suffix names, atomically; HTML holds plotly and opens offline.

    Raises UsageError for another suffix or a chart without points, UnavailableError without matplotlib or plotly.
    """
    path = Path(file)
    if path.suffix not in SUFFIXES:
        raise UsageError("not a format for charts", got=str(file), expected=f"FILE{', FILE'.join(SUFFIXES)}")
    if not any(series.x for series in chart.series):
        raise UsageError("nothing to draw", where=chart.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _html(chart, path) if path.suffix == ".html" else _picture(chart, path)


def _picture(chart: Chart, file: Path) -> Path:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise _absent("matplotlib", str(file)) from None
    figure = Figure(figsize=(max(6.4, 0.3 * len(chart.ticks)), 4.4))
    axis = figure.subplots()
    for series in chart.series:
        style = {"points": "o", "line": "-", "both": "o-"}[series.mode]
        if series.dashed:
            style = style.replace("-", "--")
        (line,) = axis.plot(series.x, series.y, style, label=series.name, markersize=5)
        for text, x, y in zip(series.text, series.x, series.y, strict=False):
            axis.annotate(text, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        if series.low:
            axis.vlines(series.x, series.low, series.high, color=line.get_color(), linewidth=1, alpha=0.6)
    if chart.log:
        axis.set_xscale("log")
        axis.set_yscale("log")
    if chart.ticks:
        axis.set_xticks(range(len(chart.ticks)), chart.ticks, rotation=90, fontsize=7)
    axis.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    with atomic_file(file) as temporary:
        metadata = {"Software": None} if file.suffix == ".png" else None
        figure.savefig(temporary, dpi=110, format=file.suffix[1:], metadata=metadata)
    return file


def _html(chart: Chart, file: Path) -> Path:
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise _absent("plotly", str(file)) from None
    figure = go.Figure()
    for series in chart.series:
        error: dict[str, Any] | None = None
        if series.low:
            ends = zip(series.y, series.low, series.high, strict=True)
            above, below = zip(*((high - y, y - low) for y, low, high in ends), strict=True)
            error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}
        figure.add_scatter(
            x=list(series.x),
            y=list(series.y),
            name=series.name,
            mode={"points": "markers", "line": "lines", "both": "lines+markers"}[series.mode],
            text=list(series.text) or None,
            line={"dash": "dash"} if series.dashed else None,
            error_y=error,
        )
    kind = "log" if chart.log else None
    ticks = {"tickvals": list(range(len(chart.ticks))), "ticktext": list(chart.ticks)} if chart.ticks else {}
    figure.update_layout(
        title=chart.title,
        template="plotly_white",
        xaxis={"title": chart.x, "type": kind, **ticks},
        yaxis={"title": chart.y, "type": kind},
    )
    with atomic_file(file) as temporary:
        page = figure.to_html(include_plotlyjs=True, div_id="chart")
        temporary.write_text(page, encoding="utf-8")
    return file


def _absent(package: str, where: str) -> UnavailableError:
    return UnavailableError(
        f"this chart needs the package {package}", where=where, remedy="pip install 'deploy-prune[report]'"
    )
