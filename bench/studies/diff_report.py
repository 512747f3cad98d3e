"""The table of a diff study: the dev-set metric by task and fit, the mean over seeds and each of them.

python -m bench.studies.diff_report bench/results/diff_glue.json
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import click

from bench.studies.diff import FITS, TASKS
from deploy_prune.files import read_json


@click.command(help=__doc__)
@click.argument("file", type=click.Path(exists=True, path_type=Path))
def main(file: Path) -> None:
    click.echo(table(read_json(file)["rows"]))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, in points; seeds that were not run are left out of a cell, fits that no task has of the table."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for key, row in rows.items():
        task, fit, seed = key.split("/")
        found.setdefault((task, fit), {})[int(seed)] = 100 * row["value"]
    fits = [fit for fit in FITS if any((task, fit) in found for task in TASKS)]
    tasks = [task for task in TASKS if any((task, fit) in found for fit in fits)]
    lines = ["| task | " + " | ".join(fits) + " |", "|---|" + "---|" * len(fits)]
    for task in tasks:
        cells = [_cell(found.get((task, fit), {})) for fit in fits]
        lines.append(f"| {task}, {TASKS[task].metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(seeds: dict[int, float]) -> str:
    if not seeds:
        return ""
    each = ", ".join(f"{seeds[seed]:.1f}" for seed in sorted(seeds))
    return f"{mean(seeds.values()):.1f} ({each})"


if __name__ == "__main__":
    main()
