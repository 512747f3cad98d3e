"""`deploy-prune report`: a bundle on one page."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write a bundle's page (one HTML file, opens offline) and its charts as PNG.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="HTML file.  [default: NAME.html]")
@click.option("--png", type=click.Path(path_type=Path, file_okay=False), help="Write the charts into this directory.")
def command(bundle: Path, out: Path | None, png: Path | None) -> None:
    """Write the report of BUNDLE: the family, quality against cost, the path, widths per layer, parity, how to load a
    member. A bundle made by `run` has it inside, as report.html."""
    from deploy_prune.cli import console
    from deploy_prune.errors import UsageError
    from deploy_prune.release.report import write_report

    out = out or Path(f"{bundle.resolve().name}.html")
    for target in (out, *([png] if png else [])):
        if bundle.resolve() in target.resolve().parents:
            raise UsageError(
                "a finished bundle takes no more files", where=str(target), remedy="Choose a place outside the bundle."
            )
    console.note(f"wrote {write_report(bundle, out)}")
    if png is not None:
        from deploy_prune.release.report.pictures import write_pictures

        for file in write_pictures(bundle, png):
            console.note(f"wrote {file}")
