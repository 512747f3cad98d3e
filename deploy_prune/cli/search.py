"""`deploy-prune search`: a model becomes a solution path, from which any member can be cut later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy_prune import distributed
from deploy_prune.cli import console
from deploy_prune.cli.run import resume_options
from deploy_prune.errors import UsageError

if TYPE_CHECKING:
    from deploy_prune.pipeline.workspace import Mode

# Every search of the registry (deploy_prune.methods), by name: importing it here would make `--help` slow.
SEARCHES = (
    *("spp", "layer-adaptive", "fine-grained", "structural-diff"),
    *("obs", "kwon", "flap", "wanda", "corp", "fisher", "taylor", "magnitude", "random"),
)


@click.command(short_help="Score every unit of a model and write the solution path.")
@click.argument("model")
@click.option("--task", required=True, help="What the model does: image-classification, text-classification, ...")
@click.option("--data", required=True, help="Calibration data: digits:train, imagefolder:DIR, tsv:FILE, hf:ID, ...")
@click.option("--eval", "evaluation", help="Evaluation data, kept in the path for `export`.")
@click.option("--task-option", "task_options", multiple=True, metavar="KEY=VALUE", help="An option of the task.")
@click.option("--method", default="spp", show_default=True, help=f"{', '.join(SEARCHES)}.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the method: steps=120")
@click.option(
    "--until-resolved",
    is_flag=True,
    help="spp: go on until enough units have entered, not rank the rest by rate.",
)
@click.option("--examples", type=click.IntRange(1), help="Calibration examples.  [default: all]")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True)
@click.option("--allocation", type=click.Choice(["global", "separate", "uniform"]), help="How sites share the cut.")
@click.option("--stages", metavar="X,...", help="Sparsities at which what is left is judged again; '' for none.")
@click.option(
    "--basis", type=click.Choice(["own", "principal"]), help="What a head's dimensions are.  [default: the method's]"
)
@click.option(
    "--calibrate/--no-calibrate",
    default=None,
    help="Order the units of all kinds by losses measured for each kind after the search.  [default: the method's]",
)
@click.option("--loss-examples", type=click.IntRange(1), help="Calibration examples of these.  [default: the task's]")
@click.option("--micro-batch", type=click.IntRange(1), help="Examples at once.  [default: a whole batch]")
@click.option("--activation-checkpointing", is_flag=True, help="Compute activations again on the way back.")
@click.option("--shard", is_flag=True, help="Spread the weights over the processes (FSDP).")
@click.option("--memory-gb", type=click.FloatRange(0), default=2.0, show_default=True, help="GiB of kept data.")
@click.option("--checkpoint-minutes", type=click.FloatRange(0), default=5.0, show_default=True, help="Between saves.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="PATH.safetensors")
@resume_options
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(
    model: str,
    task: str,
    data: str,
    evaluation: str | None,
    task_options: tuple[str, ...],
    method: str,
    settings: tuple[str, ...],
    output: Path,
    until_resolved: bool,
    stages: str | None,
    mode: Mode | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Search MODEL (timm:, hf:, gguf: or python: reference) and write the solution path.

    One path serves every budget: `deploy-prune export PATH --sparsity .3,.5 -o BUNDLE`. A stopped search keeps what it
    has reached in PATH.work; `--resume` goes on from there. Several processes: `accelerate launch --num_processes N -m
    deploy_prune search ...`.
    """
    from deploy_prune.cli.inspect import describe_path
    from deploy_prune.methods import get_method
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.losses import calibrated, calibrates, why_not
    from deploy_prune.pipeline.searching import find_path, kept_path, moments_to, search_fingerprint
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.pipeline.workspace import file_workspace, refuse_foreign_file
    from deploy_prune.recipe import recipe_from
    from deploy_prune.recipe_parts import ComputePart
    from deploy_prune.recipe_text import settings_of, shares
    from deploy_prune.refitting import load_moments

    distributed.from_main(lambda: refuse_foreign_file(output, SolutionPath.load, "solution path"))
    options = settings_of(settings, "--set") | ({"until_resolved": True} if until_resolved else {})
    device, seed = how.pop("device"), how.pop("seed")
    compute = {name: how.pop(name) for name in ComputePart.model_fields}
    if how["calibrate"] and (compute["shard"] or distributed.sharded_by_launcher()):
        raise UsageError(
            "a path is calibrated on one process, which holds the whole model",
            expected="--calibrate without --shard",
            remedy="Search with --shard, and calibrate the path where the model fits: dp.calibrate_path.",
        )
    recipe = recipe_from(
        {
            "name": "search",
            "model": model,
            "task": {
                "name": task,
                "calibration": data,
                "evaluation": evaluation,
                "options": settings_of(task_options, "--task-option"),
            },
            "search": {"method": method, "options": options, "stages": shares(stages, "--stages"), **how},
            "family": {"sparsities": [0.5]},  # a recipe names its members; a search cuts none
            "compute": compute,
            "device": device,
            "seed": seed,
        },
        where="the command line",
    )
    setup = prepare(recipe, console.progress())
    calibrate = calibrates(recipe)
    if not calibrate and how["calibrate"] is None and get_method(method).calibrated:
        console.note(f"the path is not calibrated: {why_not(recipe)}")
    with file_workspace(output, mode or "new") as saved:
        path = kept_path(setup, saved) if calibrate else find_path(setup, saved)
        moments = saved / f"moments-{search_fingerprint(setup)[:16]}"
        if calibrate:
            moments_to(setup, moments)
        distributed.from_main(
            lambda: (calibrated(setup, path, load_moments(moments)) if calibrate else path).save(output)
        )
    if not distributed.is_main():
        return
    report = describe_path(str(output))
    if as_json:
        console.emit_json(report)
    else:
        console.note(
            f"wrote {output}: {sum(row['units'] for row in report['groups'])} units in "
            f"{len(report['groups'])} groups, {report['prunable parameters']} of {report['parameters']} "
            "parameters prunable"
        )
