"""`deploy-prune diff`: a task learned as a sparse difference from a frozen base model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy_prune.cli import console
from deploy_prune.cli.run import resume_options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploy_prune.pipeline.workspace import Mode
    from deploy_prune.tasks import Task


@click.command(short_help="Learn what a task changes of a frozen base model: a sparse task delta.")
@click.argument("model")
@click.option("--task", "task_name", required=True, help="image-classification, text-classification, ...")
@click.option("--data", required=True, help="Labeled data to learn from; a part is held out: tsv:FILE, csv:FILE, ...")
@click.option("--eval", "evaluation", help="Evaluation data: base and task model are judged on it.")
@click.option("--task-option", "task_options", multiple=True, metavar="KEY=VALUE", help="An option of the task.")
@click.option("--head", metavar="NAME,...", help="Modules that are the task's own, trained whole.  [default: found]")
@click.option(
    "--fit",
    type=click.Choice(["l0", "l1", "random", "bitfit", "last-layer", "full", "lora"]),
    default="l0",
    show_default=True,
    help="How what changes is chosen; all but l0 and l1 are there to compare with.",
)
@click.option("--share", type=float, default=0.005, show_default=True, help="Of the base's values that may change.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="epochs=3 lr=1e-5 groups=tensor penalty=..."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="DELTA.safetensors"
)
@click.option("--checkpoint-minutes", type=click.FloatRange(0), default=5.0, show_default=True, help="Between saves.")
@resume_options
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(
    model: str,
    task_name: str,
    data: str,
    evaluation: str | None,
    task_options: tuple[str, ...],
    head: str | None,
    fit: str,
    share: float,
    settings: tuple[str, ...],
    device: str,
    seed: int,
    output: Path,
    checkpoint_minutes: float,
    mode: Mode | None,
    as_json: bool,
) -> None:
    """Learn the task on MODEL (timm:, hf:, gguf: or python: reference) and write its delta: which values of the base
    change, and to what, with the task's head. `hf:ENCODER?new_head=2` puts a fresh head of 2 classes on an encoder.

    A stopped training keeps what it has reached in DELTA.work; `--resume` goes on from there, to the same delta.
    `deploy-prune delta export DELTA -o TASK.onnx` makes the task's model of it.
    """
    from deploy_prune.delta import TaskDelta, diff
    from deploy_prune.pipeline.setup import choose_device
    from deploy_prune.pipeline.workspace import file_workspace, refuse_foreign_file
    from deploy_prune.recipe_text import settings_of
    from deploy_prune.saved_state import SavedState
    from deploy_prune.sources import load_model
    from deploy_prune.tasks import load_task

    refuse_foreign_file(output, TaskDelta.load, "task delta")
    own = settings_of(task_options, "--task-option")
    base = load_model(model).to(choose_device(device))
    task = load_task(task_name, model=base, model_ref=model, calibration=data, evaluation=evaluation, **own)
    options = {"fit": fit, "share": share, **settings_of(settings, "--set")}
    heads = None if head is None else tuple(name for name in head.split(",") if name)
    with file_workspace(output, mode or "new") as place:
        saved = SavedState(place, "diff", checkpoint_minutes)
        found = diff(base, task, head=heads, seed=seed, progress=console.progress(), saved=saved, **options)
        how = {"name": task_name, "data": data, "options": own}
        delta = replace(found.delta, facts={**found.delta.facts, "model": model, "task": how})
        delta.save(output)
    report = {"delta": str(output), **found.to_json(), "sizes": delta.sizes(base), "file_bytes": output.stat().st_size}
    if evaluation is not None:
        report["evaluation"] = {"task": judged(found.model, task), "base": judged(base, task)}
    if as_json:
        console.emit_json(report)
        return
    console.facts(summary(report))


def judged(model: nn.Module, task: Task, limit: int | None = None) -> dict[str, Any]:
    """The metric of a model, where it is, on the evaluation data or `limit` rows of it."""
    place = next(model.parameters()).device

    def predict(inputs: dict[str, Tensor]) -> Tensor:
        return task.signature.call(model, {n: t.to(place) for n, t in inputs.items()})

    quality: dict[str, Any] = task.evaluate(predict, limit=limit).to_json()
    return quality


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What a person wants to know first."""
    sizes, phases = report["sizes"], report["trainable"]
    facts = {
        "delta": report["delta"],
        "values changed": f"{report['share']:.3%} of the base",
        f"{report['metric']}, held out": f"{report['before']:.4f} -> {report['after']:.4f}",
    }
    if "evaluation" in report:
        own = report["evaluation"]
        facts[f"{report['metric']}, evaluation"] = f"{own['base']['value']:.4f} -> {own['task']['value']:.4f}"
    last = list(phases)[-1]

    def mib(size: int) -> str:
        return f"{size / 2**20:.1f} MiB"

    adapters = report["lora_state_bytes"]
    lora = "" if adapters is None else f", {mib(adapters)} for adapters of as many numbers"
    return facts | {
        "file": f"{report['file_bytes']} bytes, {report['file_bytes'] / sizes['base']:.2%} of the base",
        "positions": f"{sizes['positions']} bytes; their entropy is {sizes['positions_entropy']:.0f}",
        "values and head": f"{sizes['values'] + sizes['head']} bytes",
        "trained": ", ".join(f"{n} numbers ({phase})" for phase, n in phases.items()),
        "training state": f"{mib(report['state_bytes'][last])} ({last}), {mib(max(report['state_bytes'].values()))} at "
        f"the most; {mib(report['full_state_bytes'])} for all weights{lora}",
    }
