"""`deploy-prune export`: members at any budget, cut from a solution path that was searched before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote

import click

from deploy_prune.budget import MEASURED
from deploy_prune.cli import console
from deploy_prune.cli.run import report_bundle, resume_options
from deploy_prune.errors import UnavailableError, UsageError
from deploy_prune.precision_options import Precision

if TYPE_CHECKING:
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.workspace import Mode

# Option -> budget of the recipe.
BUDGETS = {
    "sparsity": "sparsity",
    "params": "params",
    "macs": "macs",
    "bytes": "bytes",
    "latency-ms": "latency",
    "speedup": "speedup",
}


def _targets(command: Any) -> Any:
    meaning = {
        "sparsity": "Shares of the prunable parameters to remove: .3,.5",
        "params": "Parameters that may remain; below 1 a share of the dense model's.",
        "macs": "Multiply-accumulates that may remain; below 1 a share of the dense model's.",
        "bytes": "Bytes of weights that may remain; below 1 a share of the dense model's.",
        "latency-ms": "Milliseconds per call, measured here on --runtime at --batch and --seq.",
        "speedup": "Times as fast as the dense model, measured in the same way: 1.5,2",
    }
    for option in reversed(BUDGETS):
        command = click.option(f"--{option}", BUDGETS[option], metavar="X,...", help=meaning[option])(command)
    return command


@click.command(short_help="Cut models at given budgets from a solution path into a bundle.")
@click.argument("path", type=click.Path(path_type=Path))
@_targets
@click.option("--kinds", metavar="KIND,...", help="Only units of these kinds: head, qk, vo, neuron.  [default: all]")
@click.option("--align", type=click.IntRange(1), help="Widths at a multiple of this.  [default: 8 by latency, else 1]")
@click.option("--runtime", metavar="NAME", help="Where latency is measured and, by default, timed.  [default: ort-cpu]")
@click.option("--batch", type=click.IntRange(1), help="Examples per call there.  [default: 1]")
@click.option(
    "--seq", type=click.IntRange(1), help="Tokens per example there, where a model takes them. [default: 128]"
)
@click.option(
    "--past",
    type=click.IntRange(0),
    help="Time decoders there, one new token on a cache of so many; 0: a prompt of --seq tokens to them.",
)
@click.option(
    "--latency-precision",
    type=click.Choice(get_args(Precision)),
    help="Precision that is timed there; every model is left in it too.  [default: fp32]",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads there.  [default: every physical core]")
@click.option("--model", help="Model reference, where it is not the path's own; its weights must be the same.")
@click.option("--data", help="Calibration data for the refit, where it is not the path's own.")
@click.option("--eval", "evaluation", help="Evaluation data, where it is not the path's own.")
@click.option("--no-refit", is_flag=True, help="Cut only; do not correct the weights that stay.")
@click.option("--recover", is_flag=True, help="Train every member after the cut; how: --set recover.KEY=VALUE.")
@click.option(
    "--variant",
    type=click.Choice(["auto", "standard", "ort", "plain"]),
    help="Form of the graphs: standard operators, ONNX Runtime's own too, whichever is faster, or as traced.  "
    "[default: standard]",
)
@click.option(
    "--precision",
    metavar="NAME,...",
    help=f"Leave every model in these too: {', '.join(get_args(Precision))}.",
)
@click.option("--no-bench", is_flag=True, help="Do not time the models.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A key of the recipe: refit.ridge=1e-2")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the bundle.")
@resume_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    path: Path,
    kinds: str | None,
    align: int | None,
    runtime: str | None,
    batch: int | None,
    seq: int | None,
    past: int | None,
    latency_precision: str | None,
    threads: int | None,
    model: str | None,
    data: str | None,
    evaluation: str | None,
    no_refit: bool,
    recover: bool,
    variant: str | None,
    precision: str | None,
    no_bench: bool,
    settings: tuple[str, ...],
    output: Path,
    mode: Mode | None,
    as_json: bool,
    **targets: str | None,
) -> None:
    """Cut members from PATH, the file that `search` wrote, or a bundle's path.safetensors.

    Nothing is searched again: each member takes seconds. By latency, what a site costs at each width is measured on
    the runtime first, once for a model's shape and a machine; that takes minutes.
    """
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline import run_recipe
    from deploy_prune.recipe import recipe_from

    loaded = SolutionPath.load(path)
    family = {**_family(targets), "kinds": kinds.split(",") if kinds else None, "align": align}
    place = {"runtime": runtime, "batch": batch, "seq": seq, "past": past, "threads": threads}
    place |= {"precision": latency_precision}
    described = recipe_of(loaded, family) | _place(family, {k: v for k, v in place.items() if v is not None})
    described["model"] = model or learned_model(loaded, path)
    changes = [
        f"{key}={value}" for key, value in (("task.calibration", data), ("task.evaluation", evaluation)) if value
    ]
    changes += [f"export.variant={variant}"] if variant else []
    if precision is not None and not precision.strip(" ,"):
        raise click.UsageError("--precision names no precision.")
    also = [name.strip() for name in (precision or "").split(",") if name.strip()]
    also += [latency_precision] if latency_precision and latency_precision not in also else []
    changes += [f"precision.also=[{','.join(also)}]"] if also else []
    changes += ["recover.enabled=true"] * recover
    changes += ["refit.enabled=false"] * no_refit + ["bench.enabled=false"] * no_bench
    recipe = recipe_from(described, [*changes, *settings], where=f"the export of {path}")
    outcome = run_recipe(
        recipe,
        output,
        mode=mode or "new",
        path=loaded,
        progress=console.progress(),
        note=console.note,
    )
    report_bundle(outcome, as_json)


def learned_model(path: SolutionPath, file: Path) -> str:
    """The model of a path; with the task delta that lies beside the path's file, where one made it.

    Raises UnavailableError when that is not there.
    """
    delta = path.options.get("delta")
    if delta is None:
        return path.model
    beside = file.parent / str(delta)
    if not beside.is_file():
        raise UnavailableError(
            "the path is of a model that a task delta makes, and the delta is not beside it",
            where=str(beside),
            remedy="Take both from the bundle, or name the model: --model 'REF?delta=FILE'.",
        )
    reference, mark, digest = path.model.partition("#")
    return f"{reference}{'&' if '?' in reference else '?'}delta={quote(str(beside), safe='/')}{mark}{digest}"


def recipe_of(path: SolutionPath, family: dict[str, Any]) -> dict[str, Any]:
    """The recipe that a path remembers, with another family. Raises UsageError when it remembers no task."""
    from deploy_prune.kind_losses import CALIBRATED

    options = dict(path.options)
    calibrated = CALIBRATED in options
    task = options.pop("task", None)
    for noted in ("found", "delta", CALIBRATED):
        options.pop(noted, None)
    if task is None:
        raise UsageError(
            "the path does not say what task it was searched for",
            where=path.model,
            remedy="Write it with `deploy-prune search` or `run`; from Python use path.plan and dp.export_onnx.",
        )
    search = {
        name: options.pop(name, None)
        for name in ("examples", "batch_size", "precision", "allocation", "basis", "stages")
    }
    return {
        "name": "export",
        "model": path.model,
        "task": task,
        "seed": options.pop("seed", 0),
        "family": family,
        "search": {
            "method": path.method,
            "calibrate": calibrated,
            **{k: v for k, v in search.items() if v is not None},
            "options": options,
        },
    }


def _place(family: dict[str, Any], place: dict[str, Any]) -> dict[str, Any]:
    """Where latency is measured, and the members are timed. Raises UsageError when that is said of another budget."""
    if family["budget"] in MEASURED:
        lists = {"runtime": "runtimes", "batch": "batch", "seq": "seq", "past": "past"}
        bench = {name: [place[key]] for key, name in lists.items() if key in place}
        threads = {key: place[key] for key in ("threads",) if key in place}
        timed = {"family": {**family, "latency": place}, "bench": {**bench, **threads}}
        return timed | ({"export": {"cache": True}} if "past" in place else {})
    if place:
        options = {"precision": "latency-precision"}
        raise UsageError(
            "--runtime, --batch, --seq, --past, --latency-precision and --threads belong to --latency-ms and --speedup",
            got=", ".join(f"--{options.get(name, name)}" for name in place),
            remedy="What is timed afterwards: --set bench.runtimes=ort-cpu --set bench.batch=1,8",
        )
    return {}


def _family(targets: dict[str, str | None]) -> dict[str, Any]:
    given = {budget: text for budget, text in targets.items() if text is not None}
    if len(given) != 1:
        raise click.UsageError(f"Give one of {', '.join('--' + option for option in BUDGETS)}.")
    ((budget, text),) = given.items()
    parts = [part.strip().removesuffix("x") if budget == "speedup" else part for part in text.split(",")]
    try:
        values = [float(part) for part in parts]
    except ValueError:
        option = next(option for option, name in BUDGETS.items() if name == budget)
        raise UsageError(f"--{option} takes numbers separated by commas", expected=".3,.5", got=text) from None
    return {"budget": budget, "targets": values}
