"""What the uniform layout costs in quality: one path cut to the same parameters in three ways, refitted, no training.

    python -m bench.studies.uniform_cost distilbert-sst2 PATH.safetensors --out FILE.json

uniform     equal layers, of the kinds that the model's stock class can say
free        the same kinds, every layer as many units as the path leaves it
free, all   all unit kinds
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(help=__doc__)
@click.argument("recipe")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")
@click.option("--params", "shares", multiple=True, type=float, default=(0.9, 0.8), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Write the figures here as JSON.")
def main(recipe: str, file: Path, overrides: tuple[str, ...], shares: tuple[float, ...], out: Path) -> None:
    from bench.environment import environment
    from bench.studies.quality import cut, judge
    from converters.stock import stock_kinds
    from deploy_prune.errors import BudgetError
    from deploy_prune.files import write_json
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.searching import moments_of
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.recipe import load_recipe
    from deploy_prune.uniform import uniform_plan

    setup = prepare(load_recipe(recipe, list(overrides)))
    path = SolutionPath.load(file)
    moments = moments_of(setup)
    kinds = [kind.value for kind in stock_kinds(setup.model)]
    rows: list[dict[str, Any]] = [{"layout": "dense", **judge(setup, setup.model), "params": path.costs.params}]
    click.echo(f"dense {rows[0]['value']:.4f}")
    ways: dict[str, Any] = {
        "uniform": lambda share: uniform_plan(path, budget="params", value=share, kinds=kinds),
        "free": lambda share: path.plan(budget="params", value=share, kinds=kinds),
        "free, all": lambda share: path.plan(budget="params", value=share),
    }
    for share in shares:
        for layout, plan_at in ways.items():
            try:
                plan = plan_at(share)
            except BudgetError as error:
                click.echo(f"{layout} {share}: {error.what}")
                continue
            row = {"layout": layout, "asked": share, **judge(setup, cut(setup, path, plan, moments))}
            row |= {"params": plan.achieved.params, "macs": plan.achieved.macs}
            rows.append(row)
            click.echo(f"{layout:10} {share:.0%}  {row['metric']} {row['value']:.4f}  {row['params']:,} parameters")
            told = {"recipe": setup.recipe.portable(), "method": path.method, "kinds": kinds, "rows": rows}
            write_json(out, {**told, "environment": environment()})


if __name__ == "__main__":
    main()
