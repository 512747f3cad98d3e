"""Quality kept at each size, without training: every search method on one recipe's model, data and budgets.

    python -m bench.studies.quality vit-tiny-imagenet --out bench/results/quality_vit_tiny.json

All methods see the same calibration examples and the same refit moments; each compact model is judged in torch, fp32,
on the recipe's evaluation data. Nothing is tuned here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.setup import Setup
    from deploy_prune.plan import PrunePlan
    from deploy_prune.refitting import Moments

METHODS = ("spp", "fisher", "taylor", "magnitude", "random")
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@click.command(help=__doc__)
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")
@click.option("--method", "methods", multiple=True, default=METHODS, show_default=True)
@click.option("--sparsity", "sparsities", type=float, multiple=True, default=SPARSITIES, show_default=True)
@click.option("--kinds", multiple=True, default=("neuron", "head,neuron"), show_default=True, help="Unit kinds to cut.")
@click.option("--refit/--no-refit", default=True, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Write the figures here as JSON.")
def main(
    recipe: str,
    overrides: tuple[str, ...],
    methods: tuple[str, ...],
    sparsities: tuple[float, ...],
    kinds: tuple[str, ...],
    refit: bool,
    out: Path,
) -> None:
    from bench.environment import environment
    from deploy_prune.files import write_json
    from deploy_prune.methods import search
    from deploy_prune.pipeline.searching import moments_of
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.recipe import load_recipe

    setup = prepare(load_recipe(recipe, list(overrides)))
    start = time.monotonic()
    moments = moments_of(setup) if refit else None
    seconds = {"moments": time.monotonic() - start}
    dense = judge(setup, setup.model)
    click.echo(f"dense {dense['metric']} {dense['value']:.4f}")
    rows: list[dict[str, Any]] = []
    how = setup.recipe.search
    for method in methods:
        start = time.monotonic()
        options = how.options if method == how.method else {}
        path = search(
            setup.model,
            setup.task,
            method,
            examples=how.examples,
            batch_size=how.batch_size,
            precision=how.precision,
            seed=setup.recipe.seed,
            **options,
        )
        seconds[method] = time.monotonic() - start
        for group in kinds:
            for sparsity in sparsities:
                plan = path.plan(sparsity, kinds=group.split(","), align=setup.recipe.family.alignment)
                row = judge(setup, cut(setup, path, plan, moments))
                assert plan.achieved is not None
                row |= {"method": method, "kinds": group, "asked": sparsity, **plan.achieved.model_dump()}
                rows.append(row)
                click.echo(
                    f"{method:10} {group:12} {sparsity:.0%}  params {row['params'] / path.costs.params:.1%}  "
                    f"{row['metric']} {row['value']:.4f}"
                )
                write_json(
                    out,
                    {
                        "recipe": setup.recipe.portable(),
                        "refit": refit,
                        "dense": dense,
                        "rows": rows,
                        "seconds": seconds,
                        "environment": environment(),
                        "options": dict(path.options),
                    },
                )


def cut(setup: Setup, path: SolutionPath, plan: PrunePlan, moments: Moments | None) -> nn.Module:
    """The compact model of a path's plan, refitted when there are moments."""
    from converters.surgery import compact
    from deploy_prune.pipeline.making import planned_weights

    return compact(planned_weights(setup, plan, moments, path.basis), plan, check_weights=False)


def judge(setup: Setup, model: nn.Module) -> dict[str, Any]:
    """Metric, value and interval of a torch model on the evaluation data."""

    def predict(inputs: dict[str, Tensor]) -> Tensor:
        return setup.task.signature.call(model, inputs)

    quality = setup.task.evaluate(predict, limit=setup.recipe.quality.limit)
    return {"metric": quality.metric, "value": quality.value, "interval": list(quality.interval), "n": quality.n}


if __name__ == "__main__":
    main()
