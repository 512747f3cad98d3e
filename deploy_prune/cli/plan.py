"""`deploy-prune plan`: pruning decisions of other tools, in and out, and a bundle from a plan alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy_prune.cli import console
from deploy_prune.cli.run import report_bundle, resume_options

if TYPE_CHECKING:
    from deploy_prune.pipeline.workspace import Mode

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(short_help="Import, export and cut plans, also those of other tools.")
def command() -> None:
    """Which units every layer keeps, in a file of its own."""


@command.command("import")
@click.argument("file", type=_FILE)
@click.option("--model", required=True, help="Reference of the model that the decisions are about.")
@click.option("-o", "--output", required=True, type=_FILE, help="The plan: FILE.json")
def import_(file: Path, model: str, output: Path) -> None:
    """Make a plan of FILE: heads to remove by layer (JSON), masks (.npz, JSON, .pt), or the history of a Torch-Pruning
    pruner (JSON).
    """
    from deploy_prune.adapters import find_sites
    from deploy_prune.architecture import weights_sha256
    from deploy_prune.foreign import import_plan
    from deploy_prune.sources import load_model
    from deploy_prune.units import groups

    loaded = load_model(model)
    sites = find_sites(loaded)
    plan = import_plan(file, sites, model=model, weights_sha256=weights_sha256(loaded))
    plan.save(output)
    rows = [[s.name, k.value, s.units(k), len(plan.kept(s, k))] for s, k in groups(sites)]
    console.table(["site", "units", "of", "kept"], [row for row in rows if row[2] != row[3]])
    console.note(f"wrote {output} (deploy-prune plan build {output} --task ... --data ... -o BUNDLE)")


@command.command("export")
@click.argument("plan", type=_FILE)
@click.option(
    "--form",
    required=True,
    type=click.Choice(["heads", "masks", "layer-masks", "history"]),
    help="Heads to remove by layer (JSON); a mask by site and kind, or head_mask and neuron_mask (.npz); "
    "Torch-Pruning's history (JSON).",
)
@click.option("--model", help="Model reference, where it is not the plan's own; its weights must be the same.")
@click.option("-o", "--output", required=True, type=_FILE)
def export(plan: Path, form: str, model: str | None, output: Path) -> None:
    """Write PLAN in a form that other tools read. What the form cannot say is refused."""
    from deploy_prune.adapters import find_sites
    from deploy_prune.architecture import weights_sha256
    from deploy_prune.foreign import export_plan
    from deploy_prune.plan import PrunePlan
    from deploy_prune.sources import load_model

    loaded = PrunePlan.load(plan)
    base = load_model(model or loaded.model)
    sites = find_sites(base)
    loaded.validate_for(sites, weights_sha256(base), where=str(plan))
    export_plan(loaded, sites, output, form)
    console.note(f"wrote {output}")


@command.command("build")
@click.argument("plan", type=_FILE)
@click.option("--task", required=True, help="Task: image-classification, text-classification, ...")
@click.option("--data", required=True, help="Calibration data for the refit.")
@click.option("--eval", "evaluation", help="Data the reported quality is measured on.")
@click.option("--model", help="Model reference, where it is not the plan's own; its weights must be the same.")
@click.option("--no-refit", is_flag=True, help="Cut only; do not correct the weights that stay.")
@click.option("--no-bench", is_flag=True, help="Do not time the models.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A key of the recipe: refit.ridge=1e-2")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the bundle.")
@resume_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(
    plan: Path,
    task: str,
    data: str,
    evaluation: str | None,
    model: str | None,
    no_refit: bool,
    no_bench: bool,
    settings: tuple[str, ...],
    output: Path,
    mode: Mode | None,
    as_json: bool,
) -> None:
    """Cut the one model that PLAN says, refit, prove and judge it, and leave a bundle. Nothing is searched."""
    from deploy_prune.budget import CostModel
    from deploy_prune.pipeline import run_recipe
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.plan import PrunePlan
    from deploy_prune.plan_path import GIVEN, given_plan, path_of_plan
    from deploy_prune.recipe import recipe_from

    loaded = PrunePlan.load(plan)
    described: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", plan.stem).lstrip("._-") or "plan",
        "model": model or loaded.model,
        "task": {"name": task, "calibration": data, "evaluation": evaluation},
        "search": {"method": GIVEN},
    }
    changes = ["refit.enabled=false"] * no_refit + ["bench.enabled=false"] * no_bench + list(settings)
    where = f"the plan {plan}"
    recipe = recipe_from({**described, "family": {"sparsities": [0.5]}}, changes, where=where)  # of a size to be found
    setup = prepare(recipe)
    loaded.validate_for(setup.sites, setup.weights_sha256, where=str(plan))
    example = next(iter(setup.task.calibration(1, limit=1, seed=recipe.seed)))
    costs = CostModel.measure(setup.model, setup.sites, setup.task.signature, example.inputs)
    path = path_of_plan(loaded, setup.sites, costs, task=recipe.portable()["task"])
    achieved = given_plan(path).achieved
    assert achieved is not None
    sized = {**described, "family": {"sparsities": [round(achieved.sparsity, 4) or 1e-4]}}
    outcome = run_recipe(
        recipe_from(sized, changes, where=where),
        output,
        mode=mode or "new",
        path=path,
        progress=console.progress(),
        note=console.note,
    )
    report_bundle(outcome, as_json)
