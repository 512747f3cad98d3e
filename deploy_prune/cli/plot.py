"""`deploy-prune plot`: a chart of what was measured, as a picture or an interactive page."""

from __future__ import annotations

from pathlib import Path

import click

KINDS = ("pareto", "predicted", "widths", "roofline")


@click.command(short_help="Draw a chart: pareto, predicted, widths or roofline; PNG, SVG, PDF or interactive HTML.")
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="FILE.png or FILE.html"
)
def command(kind: str, source: Path, out: Path) -> None:
    """Draw SOURCE: of a bundle, quality against latency (pareto), measured against predicted latency (predicted; also
    of the JSON of bench.studies.latency_budget) or the width every layer keeps (widths); of what `bench --why --json`
    printed, a roofline under the ceilings measured beside.
    """
    from bench.plots import draw
    from deploy_prune.charts import CHARTS
    from deploy_prune.cli import console

    console.note(f"wrote {draw(CHARTS[kind](source), out)}")
