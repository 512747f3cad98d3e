"""Does a path whose kinds are made comparable keep more quality at equal size? (`search.calibrate`)

    python -m bench.studies.calibration vit-tiny-imagenet --path PATH --out bench/results/calibration_vit_tiny.json

The plans of a path searched before and of the same path calibrated remove equal shares of the prunable parameters;
both are refitted, nothing is trained, and both are judged on the recipe's evaluation data, row by row.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click


@click.command(help=__doc__)
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")
@click.option("--path", "file", type=click.Path(path_type=Path), required=True, help="Of the same weights.")
@click.option("--sparsity", "sparsities", type=float, multiple=True, default=(0.1, 0.3, 0.5, 0.7), show_default=True)
@click.option("--limit", type=int, help="Rows of evaluation data.  [default: all]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Write the figures here as JSON.")
def main(
    recipe: str, overrides: tuple[str, ...], file: Path, sparsities: tuple[float, ...], limit: int | None, out: Path
) -> None:
    from bench.environment import environment
    from bench.studies.judging import difference, judge_all, metric_difference
    from deploy_prune.cli import console
    from deploy_prune.errors import UsageError
    from deploy_prune.files import write_json
    from deploy_prune.kind_losses import CALIBRATED
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.losses import calibrated
    from deploy_prune.pipeline.searching import moments_of
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.plan import dense_plan
    from deploy_prune.recipe import load_recipe

    plain = SolutionPath.load(file)
    if CALIBRATED in plain.options:
        raise UsageError(
            "this path is calibrated already",
            where=str(file),
            expected="a path as it was searched",
            got=CALIBRATED,
            remedy="Search with --no-calibrate.",
        )
    setup = prepare(load_recipe(recipe, list(overrides)), progress=console.progress())
    dense_plan(plain.model, plain.weights_sha256, plain.sites).validate_for(setup.sites, setup.weights_sha256)
    moments = moments_of(setup)
    began = time.monotonic()
    ours = calibrated(setup, plain, moments)
    seconds = time.monotonic() - began
    paths = {"plain": plain, "calibrated": ours}
    plans = {f"{s:g} {which}": path.plan(s) for s in sparsities for which, path in paths.items()}
    judged = judge_all(setup, plain, moments, plans, limit)
    rows = judged["rows"]
    names = ("calibrated", "plain")
    pairs: list[dict[str, Any]] = []
    for s in sparsities:
        a, b = (rows[f"{s:g} {which}"] for which in names)
        metric = metric_difference(judged["metric"], a["metric"], b["metric"], names)
        pairs.append(
            {"sparsity": s, "metric": metric, **{w: difference(a[w], b[w], names) for w in ("loss", "distance")}}
        )
    write_json(
        out,
        {
            "recipe": setup.recipe.name,
            "model": setup.recipe.portable()["model"],
            "path": {"method": plain.method, "options": dict(plain.options)},
            "losses": ours.options[CALIBRATED],
            "seconds": seconds,
            "units": {name: plan.achieved.units for name, plan in plans.items() if plan.achieved},
            "quality": judged["figures"],
            "pairs": pairs,
            "environment": environment(),
        },
    )
    for row in pairs:
        a, b = (judged["figures"][f"{row['sparsity']:g} {which}"]["value"] for which in ("calibrated", "plain"))
        loss = row["loss"]
        click.echo(
            f"{row['sparsity']:.0%} removed: metric {a:.4f} calibrated, {b:.4f} plain; loss {loss['difference']:+.4f} "
            f"[{loss['low']:+.4f}, {loss['high']:+.4f}] of {loss['plain']:.4f}"
        )


if __name__ == "__main__":
    main()
