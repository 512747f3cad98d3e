"""Charts: the same points as picture and page, fronts that nothing beats, and sources without data refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.plots import Chart, Series, draw
from deploy_prune.charts import CHARTS, _front, predicted, roofline
from deploy_prune.cli.main import run_command
from deploy_prune.cli.plot import KINDS
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError

CHART = Chart("t", "x", "y", (Series("s", (1.0, 2.0), (3.0, 4.0), "both", ("a", "b"), (2.5, 3.5), (3.5, 4.5)),))
FIT = {
    "predicted_ms": 5.0,
    "measured_ms": 5.2,
    "dense_ms": 10.0,
    "ratio": {"value": 0.52, "low": 0.5, "high": 0.54},
}
WHY = {
    "rooflines": [
        {
            "ceilings": {"runtime": "ort-cpu", "device": "a CPU", "flops": 1e11, "bytes": 1e10},
            "sizes": {"batch": 8},
            "models": {"dense": {"flops": 1e9, "bytes": 1e8, "seconds": 0.02}},
        }
    ]
}


def saved(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_commands_and_charts_have_the_same_names() -> None:
    assert tuple(CHARTS) == KINDS


def test_a_picture_is_a_picture_and_a_page_opens_offline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw(CHART, tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    pytest.importorskip("plotly")
    page = draw(CHART, tmp_path / "c.html").read_text()
    assert "Plotly.newPlot" in page and 'src="http' not in page


def test_other_suffixes_and_empty_charts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format"):
        draw(CHART, tmp_path / "c.gif")
    with pytest.raises(UsageError, match="nothing to draw"):
        draw(Chart("t", "x", "y", ()), tmp_path / "c.png")


@pytest.mark.parametrize(("package", "file"), [("matplotlib.figure", "c.png"), ("plotly.graph_objects", "c.html")])
def test_an_absent_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, file: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnavailableError, match=r"deploy-prune\[report\]"):
        draw(CHART, tmp_path / file)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.5, 0.9)]
    assert _front(points, True) == [(1.0, 0.5), (2.5, 0.9)]
    assert _front(points, False) == [(1.0, 0.5), (2.0, 0.4)]


def test_measured_stands_over_predicted_with_its_interval(tmp_path: Path) -> None:
    chart = predicted(saved(tmp_path / "study.json", {"fits": {"2x": FIT}}))
    members = chart.series[1]
    assert (members.x, members.y, members.text) == ((5.0,), (5.2,), ("2x",))
    assert (members.low, members.high) == ((5.0,), (5.4,))
    with pytest.raises(UsageError, match="chosen by latency"):
        predicted(saved(tmp_path / "other.json", {}))
    with pytest.raises(ArtifactError):
        predicted(saved(tmp_path / "half.json", {"fits": {"2x": {"dense_ms": 1.0}}}))


def test_no_model_stands_above_a_roof_that_was_measured_right(tmp_path: Path) -> None:
    chart = roofline(saved(tmp_path / "why.json", WHY))
    roof, models = chart.series
    assert models.x == (10.0,) and models.y == (50.0,)
    assert max(roof.y) == 100.0 and chart.log
    with pytest.raises(ArtifactError, match="--why"):
        roofline(saved(tmp_path / "plain.json", {"cells": []}))


def test_plot_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = saved(tmp_path / "why.json", WHY)
    assert run_command(["-q", "plot", "roofline", str(source), "-o", str(tmp_path / "r.svg")]) == 0
    assert (tmp_path / "r.svg").stat().st_size > 1000
    assert run_command(["-q", "plot", "widths", str(tmp_path), "-o", str(tmp_path / "w.png")]) == 3
