"""What helps a cut model to recover: variants of the options, judged on held-out calibration data.

    python -m bench.studies.recovery distilbert-sst2 --fixed "steps: 90" "lr: 8.0e-5" "method: lora" --out FILE

Every variant trains the same refitted model. Tuning looks at calibration data only; `--validate` judges each result on
the evaluation data too, once a choice is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from deploy_prune.pipeline.setup import Setup


@click.command(help=__doc__)
@click.argument("recipe")
@click.argument("variants", nargs=-1)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")
@click.option("--method", default="spp", show_default=True)
@click.option("--kinds", default="neuron", show_default=True, help="Unit kinds to cut, separated by commas.")
@click.option("--sparsity", type=float, default=0.5, show_default=True)
@click.option("--fixed", default="", metavar="YAML", help="Options of all variants, as `name: value, ...`.")
@click.option("--validate", is_flag=True, help="Judge every result on the evaluation data as well.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Write the figures here as JSON.")
def main(
    recipe: str,
    variants: tuple[str, ...],
    overrides: tuple[str, ...],
    method: str,
    kinds: str,
    sparsity: float,
    fixed: str,
    validate: bool,
    out: Path,
) -> None:
    import yaml

    from bench.environment import environment
    from bench.studies.quality import judge
    from deploy_prune.files import write_json
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.recipe import load_recipe
    from deploy_prune.recovery import recover

    setup = prepare(load_recipe(recipe, list(overrides)))
    small = _cut(setup, method, kinds.split(","), sparsity)
    rows: list[dict[str, Any]] = []
    for variant in variants or ("",):
        options = {**yaml.safe_load("{" + fixed + "}"), **yaml.safe_load("{" + variant + "}")}
        found = recover(small, setup.task, teacher=setup.model, seed=setup.recipe.seed, **options)
        row = {"variant": variant, "options": options, **found.to_json()}
        if validate:
            row["evaluation"] = {"before": judge(setup, small), "after": judge(setup, found.model)}
        rows.append(row)
        marks = "  ".join(f"{mark.value:.4f} ({mark.loss:.3f})" for mark in found.marks)
        click.echo(f"{variant or 'defaults':50} {marks}  {found.seconds:.0f} s")
        write_json(
            out,
            {
                "recipe": setup.recipe.portable(),
                "method": method,
                "kinds": kinds,
                "sparsity": sparsity,
                "rows": rows,
                "environment": environment(),
            },
        )


def _cut(setup: Setup, method: str, kinds: list[str], sparsity: float) -> Any:
    """The refitted compact model that all variants start from."""
    from converters.surgery import compact
    from deploy_prune.methods import search
    from deploy_prune.pipeline.making import planned_weights
    from deploy_prune.pipeline.searching import moments_of

    how = setup.recipe.search
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
    plan = path.plan(sparsity, kinds=kinds)
    return compact(planned_weights(setup, plan, moments_of(setup), path.basis), plan, check_weights=False)


if __name__ == "__main__":
    main()
