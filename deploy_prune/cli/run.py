"""`deploy-prune run`: a recipe becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy_prune import distributed
from deploy_prune.cli import console

if TYPE_CHECKING:
    from deploy_prune.pipeline import Outcome
    from deploy_prune.pipeline.workspace import Mode


def resume_options(command: Any) -> Any:
    """`--resume` and `--fresh`, shared by the commands that write a bundle."""
    command = click.option("--fresh", "mode", flag_value="fresh", help="Start again; replace an old bundle.")(command)
    return click.option(
        "--resume", "mode", flag_value="resume", default=None, help="Go on from the last whole stage of a stopped run."
    )(command)


@click.command(short_help="Run a recipe: search once, cut and prove a family, leave a bundle.")
@click.argument("recipe", required=False)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key: search.method=fisher")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the bundle.  [default: runs/NAME]")
@resume_options
@click.option("--mlflow", metavar="URI", help="Log the bundle to this MLflow tracking server: http://HOST:5000")
@click.option("--mlflow-experiment", metavar="NAME", help="Experiment there.  [default: deploy-prune]")
@click.option("--dry-run", is_flag=True, help="Check everything that needs no download; say what would be done.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    recipe: str | None,
    settings: tuple[str, ...],
    out: Path | None,
    mode: Mode | None,
    mlflow: str | None,
    mlflow_experiment: str | None,
    dry_run: bool,
    schema: bool,
    as_json: bool,
) -> None:
    """Run RECIPE: a YAML file, or the name of a built-in recipe.

    Long work shows progress on stderr. A stopped run keeps its whole stages in OUT.work; `--resume` goes on from them.
    """
    from deploy_prune import recipe as recipes

    if schema:
        console.emit_json(recipes.schema())
        return
    if recipe is None:
        raise click.UsageError(f"Missing RECIPE: a YAML file or one of {', '.join(recipes.builtin_recipes())}.")
    run_and_report(recipe, settings, out, mode, dry_run, as_json, mlflow, mlflow_experiment)


def run_and_report(
    source: str,
    settings: tuple[str, ...],
    out: Path | None,
    mode: Mode | None,
    dry_run: bool,
    as_json: bool,
    mlflow: str | None = None,
    experiment: str | None = None,
) -> None:
    """Load the recipe, run it (or say what it would do) and print what came out; log it to MLflow where asked."""
    from deploy_prune.recipe import load_recipe

    if experiment is not None and mlflow is None:
        raise click.UsageError("--mlflow-experiment goes with --mlflow URI.")

    recipe = load_recipe(source, settings)
    out = out or Path("runs") / recipe.name
    if dry_run:
        from deploy_prune.pipeline.dry import dry_run as describe

        outlook = describe(recipe, out)
        console.emit_json(outlook.to_json()) if as_json else print(outlook.text())
        outlook.raise_for_missing()
        return
    from deploy_prune.pipeline import run_recipe
    from deploy_prune.release import tracking

    experiment = experiment or tracking.EXPERIMENT
    if mlflow is not None and distributed.is_main():
        tracking.connect(mlflow, experiment)  # what is missing shows now, not after hours
    outcome = run_recipe(recipe, out, mode=mode or "new", progress=console.progress(), note=console.note)
    report_bundle(outcome, as_json)
    if mlflow is not None and distributed.is_main():
        console.note(f"logged to MLflow: run {tracking.log_bundle(outcome.out, mlflow, experiment)}")


def report_bundle(outcome: Outcome, as_json: bool) -> None:
    """Print the family of a finished bundle."""
    from deploy_prune.pipeline.summary import rows, summary

    if not distributed.is_main():
        return
    found = summary(outcome.out)
    if as_json:
        console.emit_json(found)
        return
    console.table(*rows(found))
    console.note(
        f"{'already whole' if outcome.already else 'wrote'}: {outcome.out} (deploy-prune verify {outcome.out})"
    )
