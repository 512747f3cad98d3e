"""`deploy-prune demo`: the whole pipeline on embedded data, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy_prune.cli.run import resume_options, run_and_report

if TYPE_CHECKING:
    from deploy_prune.pipeline.workspace import Mode


@click.command(short_help="Prune a small model on embedded data, offline: the whole pipeline in minutes.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the bundle.  [default: runs/digits]")
@resume_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(out: Path | None, mode: Mode | None, as_json: bool) -> None:
    """Run the built-in recipe `digits`: train a small vision transformer on scikit-learn's digits, search once, cut a
    family, prove and time it, leave a bundle.
    """
    run_and_report("digits", (), out, mode, dry_run=False, as_json=as_json)
